# SPDX-License-Identifier: Apache-2.0
"""Small image files and folders for tests."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import tifffile
from PIL import Image

IMAGE = np.arange(12, dtype=np.uint8).reshape(3, 4)
LABEL = np.array([[0, 1, 1, 0], [0, 1, 1, 0], [2, 2, 0, 0]], np.uint16)


def pixels(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """All of a type's range, both ends included."""
    kind = np.dtype(dtype)
    low, high = (np.iinfo(kind).min, np.iinfo(kind).max) if kind.kind in "iu" else (-1.5, 1e6)
    return np.linspace(low, high, int(np.prod(shape))).astype(kind).reshape(shape)


def same(read: np.ndarray, expected: np.ndarray) -> bool:
    return read.dtype == expected.dtype and np.array_equal(read, expected)


def save(path: Path, array: np.ndarray = IMAGE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.fromarray(array).save(path)
    elif path.suffix in (".nii", ".gz"):
        nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), path)
    else:
        tifffile.imwrite(path, array, photometric="rgb" if array.shape[-1] == 3 else "minisblack")
    return path


def names(items: list[dict[str, str]], key: str = "image") -> list[str]:
    return [Path(item[key]).name for item in items]


def numbers(items: list[dict[str, str]]) -> list[int]:
    return [int(name[1:4]) for name in names(items)]


def make_sequence(
    root: Path, name: str = "01", frames: int = 10, gold=(), silver=(), tracked=(), depth: int = 0
) -> Path:
    """A CTC sequence; `depth` > 0 makes volumes."""

    def stack(array: np.ndarray) -> np.ndarray:
        return np.stack([array] * depth) if depth else array

    for t in range(frames):
        save(root / name / f"t{t:03d}.tif", stack(IMAGE))
    for folder, times in (("GT/SEG/man_seg", gold), ("ST/SEG/man_seg", silver), ("GT/TRA/man_track", tracked)):
        for t in times:
            save(root / f"{name}_{folder}{t:03d}.tif", stack(LABEL))
    return root


def make_folder(root: Path, stems: list[str], truth: str = "masks", suffix: str = "") -> Path:
    for stem in stems:
        save(root / "images" / f"{stem}.tif")
        save(root / truth / f"{stem}{suffix}.tif", LABEL)
    return root
