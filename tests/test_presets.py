# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from imagefiles import save
from scripts.labels import IGNORE
from scripts.presets import load_transforms

RAMP = np.linspace(0, 1, 12 * 20).reshape(12, 20)  # ([Z,] Y, X), as on disk
PARTIAL = {"margin": 2, "edge": 0, "strict": False}


def load(folder: Path, image: np.ndarray, ext: str = ".tif", **labels: np.ndarray) -> dict:
    item = {key: str(save(folder / f"{key}.tif", array)) for key, array in labels.items()}
    item["image"] = str(save(folder / f"image{ext}", image))
    return item


def plain(tensor: torch.Tensor) -> np.ndarray:
    return np.asarray(torch.as_tensor(tensor))


@pytest.mark.parametrize(
    "dtype, high, ext",
    [
        (np.uint8, 255, ".tif"),
        (np.uint8, 255, ".png"),
        (np.uint16, 65535, ".tif"),  # half of the values are negative when they are read as int16
        (np.uint16, 65535, ".png"),
        (np.float32, 1e-3, ".tif"),
        (np.float32, 1e6, ".nii.gz"),
    ],
)
def test_image_of_any_type_is_scaled_to_0_and_1(tmp_path: Path, dtype: type, high: float, ext: str) -> None:
    raw = (RAMP * high).astype(dtype)
    image = Compose(load_transforms())(load(tmp_path, raw, ext))["image"]
    assert isinstance(image, MetaTensor) and image.dtype == torch.float32
    assert image.shape == (1, 20, 12)  # files are (Y, X), items (1, X, Y)
    low, top = np.percentile(raw, (1, 99.8))
    expected = np.clip((raw.astype(np.float64) - low) / (top - low), 0, 1)
    np.testing.assert_allclose(plain(image)[0].T, expected, atol=2e-3)
    assert image.meta["filename_or_obj"].endswith(f"image{ext}")


def test_volume_keeps_its_axes(tmp_path: Path) -> None:
    raw = np.zeros((3, 8, 10), np.uint16)
    raw[2, 5, 7] = 1000
    raw[1, 0, 9] = 500
    image = plain(Compose(load_transforms())(load(tmp_path, raw))["image"])
    assert image.shape == (1, 10, 8, 3)
    assert np.argwhere(image == image.max()).tolist() == [[0, 7, 5, 2]]


def test_hot_pixel_does_not_darken_the_image(tmp_path: Path) -> None:
    raw = np.tile(np.arange(100, dtype=np.uint16), (100, 1))
    raw[50, 50] = 65535
    image = plain(Compose(load_transforms())(load(tmp_path, raw))["image"])
    assert image.max() == 1 and 0.45 < np.median(image) < 0.55


@pytest.mark.parametrize("value", [0, 7, 65535])
def test_constant_image_is_finite(tmp_path: Path, value: int) -> None:
    image = plain(Compose(load_transforms())(load(tmp_path, np.full((8, 9), value, np.uint16)))["image"])
    assert image.shape == (1, 9, 8)
    assert not image.any()


def test_almost_constant_image_is_finite_and_in_range(tmp_path: Path) -> None:
    """Both percentiles of a black image with a few bright pixels are 0."""
    raw = np.zeros((100, 100), np.uint8)
    raw[3, 4] = 200
    image = plain(Compose(load_transforms())(load(tmp_path, raw))["image"])
    assert np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1


def test_labels_keep_their_numbers(tmp_path: Path) -> None:
    label = np.zeros((12, 20), np.uint16)
    label[1:4, 2:5], label[6:9, 10:14] = 40000, 65535
    item = Compose(load_transforms(with_truth=True))(load(tmp_path, RAMP.astype(np.float32), label=label))
    assert item["label"].dtype == torch.int32 and item["label"].shape == (1, 20, 12)
    np.testing.assert_array_equal(plain(item["label"])[0].T, label)


def test_plain_mask_gives_objects(tmp_path: Path) -> None:
    mask = np.zeros((12, 20), np.uint8)
    mask[1:4, 2:5] = mask[6:9, 10:14] = 255
    item = Compose(load_transforms(with_truth=True))(load(tmp_path, RAMP.astype(np.float32), label=mask))
    label = plain(item["label"])[0].T
    assert sorted(np.unique(label)) == [0, 1, 2]
    assert label[2, 3] != label[7, 11]


def test_label_is_not_touched_without_being_asked_for(tmp_path: Path) -> None:
    item = Compose(load_transforms())({**load(tmp_path, RAMP.astype(np.float32)), "label": "/not/there.tif"})
    assert item["label"] == "/not/there.tif"


@pytest.mark.parametrize("partial_truth, ignored", [(None, False), (PARTIAL, True)])
def test_partial_truth(tmp_path: Path, partial_truth: dict | None, ignored: bool) -> None:
    """Two cells have a marker, one of them a mask; the other's surroundings are unknown where that is asked for."""
    raw, label, markers = (np.zeros((40, 60), np.uint16) for _ in range(3))
    raw[:] = np.arange(60)
    label[8:13, 8:13] = 3
    markers[9:12, 9:12], markers[29:32, 44:47] = 1, 2
    item = Compose(load_transforms(True, partial_truth))(load(tmp_path, raw, label=label, markers=markers))
    found = plain(item["label"])[0].T
    assert (found[label > 0] == 3).all()
    assert (found[30, 45] == IGNORE) is np.bool_(ignored)
    assert found[0, 0] == 0 and found[39, 0] == 0  # far from the unknown cell
    assert ("markers" in item) is not ignored
    if not ignored:
        np.testing.assert_array_equal(found, label)
        np.testing.assert_array_equal(plain(item["markers"])[0].T, markers)


def test_item_without_markers_is_complete(tmp_path: Path) -> None:
    label = np.zeros((12, 20), np.uint16)
    label[1:4, 2:5] = 5
    item = Compose(load_transforms(True, PARTIAL))(load(tmp_path, RAMP.astype(np.float32), label=label))
    np.testing.assert_array_equal(plain(item["label"])[0].T, label)


def test_markers_alone_are_enough_for_evaluation(tmp_path: Path) -> None:
    """Of some frames of the challenge only the markers are known."""
    markers = np.zeros((12, 20), np.uint16)
    markers[1:4, 2:5] = 5
    item = Compose(load_transforms(with_truth=True))(load(tmp_path, RAMP.astype(np.float32), markers=markers))
    assert item["markers"].dtype == torch.int32 and "label" not in item


def test_transforms_are_a_list_of_their_own() -> None:
    first, second = load_transforms(True), load_transforms(True)
    assert isinstance(first, list) and first is not second and len(first) == len(second)
