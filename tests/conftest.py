# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: the bundle on the import path, and the real images where they are at hand."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundle"
sys.path.insert(0, str(BUNDLE))


@pytest.fixture(scope="session")
def bundle() -> Path:
    """The bundle's root folder."""
    return BUNDLE


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real annotated images; the test is skipped where there is none."""
    folder = Path(os.environ.get("MONAI_DATA_DIRECTORY", ROOT.parent / "shared" / "data"))
    if not (folder / "dsb2018" / "images").is_dir():
        pytest.skip(
            f"needs real images: set MONAI_DATA_DIRECTORY to a folder with dsb2018/, ctc/, ... (not found in {folder})"
        )
    return folder
