# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from imagefiles import IMAGE, LABEL, save
from scripts.checks import check_items

RGB = np.stack([IMAGE, IMAGE * 2, IMAGE], -1)
FLOAT = LABEL.astype(np.float32)
BAD = [
    ("stack in 2D", {"image": np.stack([IMAGE] * 2), "label": np.stack([LABEL] * 2)}, r"x\.tif.*3D configuration"),
    ("shapes", {"label": LABEL[:2]}, r"x_label\.tif: shape \(2, 4\).*x\.tif has \(3, 4\)"),
    ("float TIFF", {"label": FLOAT}, r"x_label\.tif: labels of type float32"),
    ("fractions", {"label": FLOAT + 0.5, "ext": ".nii.gz"}, r"x_label\.nii\.gz: labels with fractions"),
    ("not a number", {"label": FLOAT * np.nan, "ext": ".nii.gz"}, r"x_label\.nii\.gz: labels with fractions"),
    ("negative", {"label": LABEL.astype(np.int16) - 1}, r"x_label\.tif: labels down to -1"),
    ("color", {"label": RGB}, r"x_label\.tif: a color picture"),
    ("color PNG", {"label": RGB, "ext": ".png"}, r"x_label\.png: a color picture"),
    ("black", {"image": IMAGE * 0}, r"x\.tif: every pixel is 0"),
    ("constant", {"image": IMAGE * 0 + 9}, r"x\.tif: every pixel is 9"),
    ("NaN", {"image": np.where(IMAGE == 3, np.nan, IMAGE)}, r"x\.tif: .*finite"),
    ("markers", {"markers": LABEL[:2]}, r"x_markers\.tif: shape \(2, 4\)"),
]
GOOD = [
    ("plain", {}),
    ("empty label", {"label": LABEL * 0}),
    ("float NIfTI", {"label": FLOAT, "ext": ".nii.gz"}),
    ("plain mask", {"label": (LABEL > 0).astype(np.uint8)}),
    ("color image", {"image": RGB}),
    ("markers", {"markers": LABEL}),
]


def make_item(folder: Path, image=IMAGE, label=LABEL, markers=None, ext: str = ".tif") -> dict[str, str]:
    item = {"image": save(folder / "x.tif", image), "label": save(folder / f"x_label{ext}", label)}
    if markers is not None:
        item["markers"] = save(folder / "x_markers.tif", markers)
    return {key: str(path) for key, path in item.items()}


@pytest.mark.parametrize(("files", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_files_are_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        check_items([make_item(tmp_path, **files)], spatial_dims=2)


@pytest.mark.parametrize("files", [case[1] for case in GOOD], ids=[case[0] for case in GOOD])
def test_good_files(tmp_path, files):
    check_items([make_item(tmp_path, **files)], spatial_dims=2)


def test_image_in_3d(tmp_path):
    with pytest.raises(ValueError, match=r"x\.tif.*expected a 3D stack"):
        check_items([make_item(tmp_path)], spatial_dims=3)


def test_truncated_missing_and_incomplete_items(tmp_path):
    item = make_item(tmp_path)
    path = Path(item["image"])
    path.write_bytes(path.read_bytes()[:-5])
    items = [item, {**item, "label": "/none/y.tif"}, {"image": "z.tif"}]
    with pytest.raises(ValueError, match=r"(?s)4 problem.*x\.tif: cut off.*/none/y\.tif: no such file.*z\.tif.*label"):
        check_items(items, spatial_dims=2)


def test_ten_problems_are_listed_and_all_are_counted(tmp_path):
    items = [{"image": f"/none/{n}.tif", "label": "/none/l.tif"} for n in range(20)]
    with pytest.raises(ValueError, match="40 problem") as caught:
        check_items(items, spatial_dims=2)
    assert str(caught.value).count("\n  - ") == 10 and "and 30 more" in str(caught.value)


def test_no_items():
    with pytest.raises(ValueError, match="no items"):
        check_items([], spatial_dims=2)
