# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["whole_file", "write_whole"]


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a draft to write to; it takes the place of `path` when the block ends without an error.

    Whenever this is interrupted, `path` is either the old file or the whole new one.

    Args:
        path: file to write; its folder is made where it is missing.

    Yields:
        a hidden file in the same folder, whose name ends as `path` does.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{uuid.uuid4().hex}{''.join(path.suffixes)}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """`Path.write_bytes` by way of `whole_file`."""
    with whole_file(path) as draft:
        draft.write_bytes(content)
