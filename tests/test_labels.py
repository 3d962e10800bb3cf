# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from scripts.labels import (
    IGNORE,
    AsInstancesd,
    MarkUnannotatedd,
    RepairObjectsd,
    as_label_array,
    ignore_edge,
    mark_unannotated,
    marker_owners,
    reach_beyond_marker,
    repair_objects,
    unique_objects,
)

AFFINE = torch.diag(torch.tensor([0.5, 0.5, 2.0, 1.0], dtype=torch.float64))

UNIQUE_CASES = {
    "two regions of a mask": ([[1, 1, 0, 1], [0, 0, 0, 1]], [[1, 1, 0, 2], [0, 0, 0, 2]]),
    "diagonal pixels are one region": ([[1, 0], [0, 1]], [[1, 0], [0, 1]]),
    "mask of 255": ([[255, 0, 255]], [[1, 0, 2]]),
    "ignored pixels stay": ([[1, IGNORE, 1]], [[1, IGNORE, 2]]),
    "instances stay, also disconnected ones": ([[2, 0, 2, 1]], [[2, 0, 2, 1]]),
    "a single object with another number stays": ([[7, 0, 7]], [[7, 0, 7]]),
    "empty": ([[0, 0]], [[0, 0]]),
}


@pytest.mark.parametrize(("labels", "expected"), UNIQUE_CASES.values(), ids=UNIQUE_CASES)
def test_unique_objects(labels, expected):
    result = unique_objects(np.array(labels))
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, expected)


REPAIR_CASES = {
    "whole objects are renumbered": ([[5, 5, 0, 9, 9]], [[1, 1, 0, 2, 2]]),
    "touching objects stay apart": ([[5, 5, 9, 9]], [[1, 1, 2, 2]]),
    "torn in halves": ([[5, 5, 0, 5, 5]], [[1, 1, 0, 2, 2]]),
    "a quarter is an object": ([[5, 5, 5, 5, 5, 5, 5, 5, 0, 5, 5]], [[1] * 8 + [0, 2, 2]]),
    "less than a quarter is a crumb": ([[5, 5, 5, 5, 5, 5, 5, 5, 5, 0, 5, 5]], [[1] * 9 + [0, IGNORE, IGNORE]]),
    "below min_size": ([[5, 0, 9, 9]], [[IGNORE, 0, 1, 1]]),
    "diagonal is connected": ([[5, 0], [0, 5]], [[1, 0], [0, 1]]),
    "ignored pixels stay": ([[IGNORE, 5, 5, IGNORE]], [[IGNORE, 1, 1, IGNORE]]),
    "empty": ([[0, 0]], [[0, 0]]),
}


@pytest.mark.parametrize(("labels", "expected"), REPAIR_CASES.values(), ids=REPAIR_CASES)
def test_repair_objects(labels, expected):
    for array in (np.array(labels), np.array(labels)[None]):  # 2D and 3D
        np.testing.assert_array_equal(repair_objects(array, min_size=2).reshape(np.shape(expected)), expected)


def test_repair_is_idempotent_and_keeps_the_foreground_of_torn_labels():
    rng = np.random.default_rng(0)
    labels = np.kron(np.arange(1, 37).reshape(6, 6), np.ones((10, 10), dtype=int))
    labels[rng.random(labels.shape) < 0.3] = 0
    once = repair_objects(labels)
    np.testing.assert_array_equal(repair_objects(once), once)
    np.testing.assert_array_equal(once == 0, labels == 0)


def test_repair_is_fast():
    labels = np.kron(np.arange(1, 65).reshape(8, 8), np.ones((32, 32), dtype=np.int32))
    labels[::5] = 0
    start = time.process_time()
    for _ in range(5):
        repair_objects(labels)
    assert time.process_time() - start < 5 * 0.05


# Object 3 covers marker 1 and 60 % of marker 2; marker 4 has half of its pixels in object 5, which is not enough.
LABELS = np.array([[3, 3, 3, 3, 3, 0, 0, 0, 5, 5, 0, 0]])
MARKERS = np.array([[0, 1, 2, 2, 2, 2, 2, 4, 4, 0, 0, 0]])


def test_marker_owners():
    assert marker_owners(LABELS, MARKERS) == {1: 3, 2: 3, 4: 0}


@pytest.mark.parametrize(("spacing", "expected"), [(None, 4.0), ((1, 1), 4.0), ((1, 0.5), 2.0)])
def test_reach_is_the_furthest_pixel_of_a_cell_from_its_marker(spacing, expected):
    labels = np.array([[7, 7, 7, 7, 7, 7, 0, 8, 8]])
    markers = np.array([[0, 1, 0, 0, 0, 0, 0, 2, 2]])
    assert reach_beyond_marker(labels, markers, {1: 7, 2: 8}, spacing) == expected


def test_background_near_an_uncovered_marker_is_ignored():
    labels, markers = np.zeros((1, 40), dtype=int), np.zeros((1, 40), dtype=int)
    labels[0, :5] = 1
    markers[0, 2] = 1  # covered, reach 2: ignored up to 1.5 * 2 + 4 = 7 pixels from the other marker
    markers[0, 25] = 2
    expected = labels.copy()
    expected[0, 18:33] = IGNORE
    np.testing.assert_array_equal(mark_unannotated(labels, markers, margin=4), expected)


def test_annotated_pixels_are_never_ignored():
    labels, markers = np.array([[1, 1, 1, 0, 0, 0]]), np.array([[0, 1, 0, 0, 2, 0]])
    expected = [[1, 1, 1, IGNORE, IGNORE, IGNORE]]
    np.testing.assert_array_equal(mark_unannotated(labels, markers), expected)


def test_complete_frames_stay_and_frames_without_any_annotation_are_ignored():
    markers = np.array([[0, 1, 0, 0, 2, 0] + [0] * 60])
    complete = np.array([[1, 1, 1, 2, 2, 2] + [0] * 60])
    np.testing.assert_array_equal(mark_unannotated(complete, markers), complete)
    assert (mark_unannotated(np.zeros_like(markers), markers) == IGNORE).all()
    no_markers = mark_unannotated(complete, np.zeros_like(markers))
    np.testing.assert_array_equal(no_markers, complete)


def test_strict_trusts_background_beside_annotated_cells_only():
    labels, markers = np.zeros((1, 60), dtype=int), np.zeros((1, 60), dtype=int)
    labels[0, :3], markers[0, 1], markers[0, 30] = 1, 1, 2
    loose, strict = (mark_unannotated(labels, markers, margin=2, strict=strict) for strict in (False, True))
    assert loose[0, 59] == 0 and strict[0, 59] == IGNORE and strict[0, 5] == 0


def test_other_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(3, 3\)"):
        mark_unannotated(np.zeros((2, 2), int), np.zeros((3, 3), int))


def test_ignore_edge_keeps_objects_and_the_depth_of_volumes():
    labels = np.zeros((6, 6, 2), dtype=int)
    labels[0, 0] = 4
    result = ignore_edge(labels, 2)
    assert (result[2:4, 2:4] == 0).all() and (result[0, 0] == 4).all() and (result == IGNORE).sum() == 2 * 31
    np.testing.assert_array_equal(ignore_edge(labels, 0), labels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.float32, bool])
def test_as_label_array_takes_whole_numbers_of_any_type(dtype):
    labels = as_label_array(np.array([[0, 1]], dtype=dtype))
    assert labels.dtype == np.int32 and labels.tolist() == [[0, 1]]


@pytest.mark.parametrize("bad", [[0.5], [np.nan], [-2], [2**31]])
def test_as_label_array_refuses_what_is_not_a_label(bad):
    with pytest.raises(ValueError, match="expected"):
        as_label_array(np.array(bad))


def test_transforms_keep_meta_data_and_skip_missing_keys():
    image = MetaTensor(torch.tensor([[[1.0, 0.0, 1.0]]]), affine=AFFINE, meta={"filename_or_obj": "a.tif"})
    item = AsInstancesd("label")({"label": image})
    item = RepairObjectsd("label", min_size=1)(item)
    item = MarkUnannotatedd("label")(item)
    assert item["label"].dtype == torch.int32 and item["label"].tolist() == [[[1, 0, 2]]]
    assert item["label"].meta["filename_or_obj"] == "a.tif" and torch.equal(item["label"].affine, AFFINE)
    assert image.tolist() == [[[1.0, 0.0, 1.0]]], "the input was changed"
    for transform in (AsInstancesd, RepairObjectsd, MarkUnannotatedd):
        assert transform("label", allow_missing_keys=True)({"image": 1}) == {"image": 1}
        with pytest.raises(KeyError):
            transform("label")({"image": 1, "markers": np.zeros((1, 2, 2))})


def test_mark_unannotated_transform_uses_and_removes_the_markers():
    item = {"label": torch.tensor([[[1, 1, 0, 0, 0]]]), "markers": torch.tensor([[[1, 0, 0, 0, 2]]])}
    result = MarkUnannotatedd("label")(item)
    assert set(result) == {"label"} and result["label"].tolist() == [[[1, 1, IGNORE, IGNORE, IGNORE]]]
    assert "markers" in item


# set, share of an unannotated cell's pixels that may stay background, share of true background that must stay usable
PARTIAL_SETS = [
    ("Fluo-N2DL-HeLa", "ST", 0.005, 0.5),
    ("DIC-C2DH-HeLa", "GT", 0.005, 0.05),
    ("Fluo-N2DH-GOWT1", "GT", 0.005, 0.6),
    ("Fluo-N2DH-SIM+", "GT", 0.0, 0.5),
]


@pytest.mark.parametrize(("name", "kind", "most_wrong", "least_usable"), PARTIAL_SETS)
def test_hidden_cells_are_never_background(real_data, name, kind, most_wrong, least_usable):
    rng, wrong, usable = np.random.default_rng(0), [], []
    folder = real_data / "ctc" / name
    for path in sorted((folder / f"01_{kind}" / "SEG").glob("*.tif")):
        labels = np.array(Image.open(path)).astype(np.int32)
        markers = np.array(Image.open(folder / "01_GT" / "TRA" / path.name.replace("seg", "track"))).astype(np.int32)
        owners = marker_owners(labels, markers)
        if not all(owners.values()):
            continue  # partial itself
        shown = [owners[marker] for marker in rng.choice(list(owners), 2, replace=False)]
        partial = mark_unannotated(np.where(np.isin(labels, shown), labels, 0), markers)
        hidden = (labels > 0) & ~np.isin(labels, shown)
        wrong.append((partial[hidden] == 0).mean())
        usable.append((partial[labels == 0] == 0).mean())
        if len(wrong) == 3:
            break
    assert len(wrong) == 3
    assert np.mean(wrong) <= most_wrong
    assert np.mean(usable) >= least_usable


def test_edge_is_ignored_with_and_without_markers():
    label = torch.zeros(1, 8, 8, dtype=torch.int32)
    label[0, 3:5, 3:5] = 1
    for item in ({"label": label}, {"label": label, "markers": label}):
        result = MarkUnannotatedd("label", edge=2)(item)["label"]
        assert (result == IGNORE).sum() == 64 - 16 and (result[0, 2:6, 2:6] >= 0).all()
