# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image
from scipy import ndimage
from skimage.measure import label as connected_regions

from scripts.labels import IGNORE
from scripts.targets import BACKGROUND, BORDER, INTERIOR, InstancesToTargetd, instances_to_target


def values(text: str) -> np.ndarray:
    """A one-dimensional image: digits are values, `.` is 0, `x` is ignored."""
    return np.array([IGNORE if char == "x" else 0 if char == "." else int(char) for char in text])


CASES = {
    "touching": (2, 2, "..111111222222..", "..111122221111.."),
    "border of 1": (1, 2, "..111111222222..", "..111112211111.."),
    "border of 3": (3, 2, "1111111122222222", "1111122222211111"),
    "gap of 1": (2, 2, "..111111.222222..", "..111122.221111.."),
    "gap of 2": (2, 2, "111111..222222", "111122..221111"),
    "gap of 3: less border": (2, 2, "111111...222222", "111112...211111"),
    "gap of 5: free": (2, 2, "111111.....222222", "111111.....111111"),
    "gap not wanted": (2, 0, "111111..222222", "111111..111111"),
    "free cell, image edge is no outline": (2, 2, "1111....", "1111...."),
    "ignored area may be a cell": (2, 2, "11111xxxx.", "111xxxxxx."),
    "a known neighbor is border all the same": (2, 2, "111111222222xx", "1111222211xxxx"),
    "tiny cells get a thinner border": (2, 2, "111111222333333", "111112212211111"),
    "nothing": (2, 2, "....", "...."),
    "all ignored": (2, 2, "xxxx", "xxxx"),
}


@pytest.mark.parametrize(("width", "gap", "labels", "expected"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_classes(width, gap, labels, expected, ndim):
    repeats = (1,) if ndim == 1 else (7,) * (ndim - 1) + (1,)  # the same line many times
    target = instances_to_target(np.tile(values(labels), repeats), width, gap)
    assert target.dtype == np.int64
    np.testing.assert_array_equal(target, np.tile(values(expected), repeats))


def test_width_of_each_axis():
    labels = np.ones((12, 12), dtype=int)
    labels[6:] = 2
    along_first = instances_to_target(labels, (3, 1))
    assert ((along_first == BORDER).sum(axis=0) == 6).all()
    along_second = instances_to_target(labels.T, (3, 1))
    assert ((along_second == BORDER).sum(axis=1) == 2).all()


def test_each_connected_fragment_keeps_one_interior():
    labels = np.zeros((40, 40), dtype=int)
    labels[2:38, 2:20] = 1
    labels[18:22, 6:38] = 2  # a bar that nearly cuts object 1
    labels[30:32, 30:32] = 3
    labels[32:34, 30:32] = 4  # 4 pixels each
    target = instances_to_target(labels)
    assert set(np.unique(target)) == {BACKGROUND, INTERIOR, BORDER}
    for number in range(1, 5):
        fragments = connected_regions(labels == number)
        for fragment in range(1, fragments.max() + 1):
            inside = (target == INTERIOR) & (fragments == fragment)
            assert ndimage.label(inside)[1] == 1, f"fragment {fragment} of object {number}"


@pytest.mark.parametrize("width", [0, (2,), (2, 0), -1])
def test_wrong_width_is_refused(width):
    with pytest.raises(ValueError, match="expected one whole number >= 1"):
        instances_to_target(np.ones((4, 4), dtype=int), width)


def test_transform_keeps_meta_data():
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    label = MetaTensor(torch.tensor([[[1, 1, 1, 2, 2, 2]]]).repeat(1, 6, 1), affine=affine)
    target = InstancesToTargetd("label", border_width=1)({"label": label})["label"]
    assert isinstance(target, MetaTensor) and target.dtype == torch.int64 and target.shape == (1, 6, 6)
    assert torch.equal(target.affine, affine)
    assert target[0, 0].tolist() == [1, 1, 2, 2, 1, 1]
    assert InstancesToTargetd("label", allow_missing_keys=True)({}) == {}


REAL = {
    "dsb2018": "dsb2018/masks/*.tif",
    "bbbc039": "bbbc039/masks/*.tif",
    "PhC-C2DL-PSC": "ctc/PhC-C2DL-PSC/01_GT/SEG/*.tif",
    "DIC-C2DH-HeLa": "ctc/DIC-C2DH-HeLa/01_GT/SEG/*.tif",
}


@pytest.mark.parametrize("pattern", REAL.values(), ids=REAL)
def test_real_objects_keep_foreground_and_one_interior(real_data, pattern):
    paths = sorted(real_data.glob(pattern))[:3]
    assert len(paths) >= 2
    for path in paths:
        labels = np.array(Image.open(path)).astype(np.int32)
        target = instances_to_target(labels)
        np.testing.assert_array_equal(target > 0, labels > 0)
        fragments = connected_regions(labels)
        seeds = connected_regions(np.where(target == INTERIOR, fragments, 0), connectivity=1)
        assert seeds.max() == fragments.max() == len(np.unique(fragments[seeds > 0]))
