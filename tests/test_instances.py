# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.images import read_image
from scripts.instances import (
    ProbabilitiesToInstancesd,
    ToLabelArrayd,
    fill_enclosed,
    keep_large,
    probabilities_to_instances,
)
from scripts.metrics import overlap_table, seg_scores
from scripts.targets import instances_to_target


def one_hot(target: np.ndarray | list) -> np.ndarray:
    return np.stack([np.asarray(target) == value for value in range(3)]).astype(np.float32)


def decode(target: list, **options: object) -> np.ndarray:
    return probabilities_to_instances(one_hot(target), **({"min_size": 1} | options))


# target as classes: 0 background, 1 interior, 2 border
CASES = {
    "free cells": ([[1, 1, 0, 1, 1]], {}, [[1, 1, 0, 2, 2]]),
    "touching cells are split in the middle of the border": ([[1, 1, 2, 2, 1, 1]], {}, [[1, 1, 1, 2, 2, 2]]),
    "a region without seed is one object": ([[2, 2, 2, 0, 1]], {}, [[1, 1, 1, 0, 2]]),
    "too small without seed": ([[2, 2, 0, 1, 1, 1]], {"min_size": 3}, [[0, 0, 0, 1, 1, 1]]),
    "too small with seed": ([[1, 1, 0, 1, 1, 1]], {"min_size": 3}, [[0, 0, 0, 1, 1, 1]]),
    "noise is no seed": ([[1, 2, 2, 1, 1, 1]], {"min_seed_size": 2}, [[1, 1, 1, 1, 1, 1]]),
    "hole": ([[1, 1, 1], [1, 0, 1], [1, 1, 1]], {}, [[1, 1, 1], [1, 1, 1], [1, 1, 1]]),
    "hole kept": ([[1, 1, 1], [1, 0, 1], [1, 1, 1]], {"fill_holes": False}, [[1, 1, 1], [1, 0, 1], [1, 1, 1]]),
    "hole at the image's edge stays": ([[1, 0, 1], [1, 1, 1]], {}, [[1, 0, 1], [1, 1, 1]]),
    "nothing": ([[0, 0, 0]], {}, [[0, 0, 0]]),
}


@pytest.mark.parametrize(("target", "options", "expected"), CASES.values(), ids=CASES)
def test_classes_to_instances(target, options, expected):
    result = decode(target, **options)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, expected)


def test_a_diagonal_leak_joins_no_seeds():
    result = decode([[1, 1, 2, 2], [1, 1, 2, 2], [2, 2, 1, 1], [2, 2, 1, 1]])
    assert result.max() == 2 and (result[:2, :2] == 1).all() and (result[2:, 2:] == 2).all()


def test_thresholds():
    probabilities = np.array([[[0.3, 0.45, 0.6]], [[0.6, 0.3, 0.2]], [[0.1, 0.25, 0.2]]], dtype=np.float32)
    assert probabilities_to_instances(probabilities, min_size=1).tolist() == [[1, 1, 0]]
    assert probabilities_to_instances(probabilities, min_size=1, foreground_threshold=0.6).tolist() == [[1, 0, 0]]
    assert probabilities_to_instances(probabilities, min_size=1, foreground_threshold=0.3).tolist() == [[1, 1, 1]]


def test_border_dominated_pixels_are_no_seed():
    probabilities = np.array([[[0.0] * 5], [[0.8, 0.4, 0.4, 0.4, 0.8]], [[0.2, 0.6, 0.6, 0.6, 0.2]]], dtype=np.float32)
    assert probabilities_to_instances(probabilities, seed_threshold=0.3, min_size=1).max() == 2


def test_the_line_follows_the_most_likely_border():
    border = np.array([0.0, 0.1, 0.2, 0.3, 0.9, 0.1, 0.0])
    interior = np.array([0.9, 0.4, 0.4, 0.4, 0.1, 0.4, 0.9])
    probabilities = np.stack([1 - border - interior, interior, border])[:, None].repeat(3, axis=1)
    result = probabilities_to_instances(probabilities.clip(0, 1), foreground_threshold=0.0, min_size=1)
    assert result[1].tolist()[:4] == [1, 1, 1, 1] and result[1].tolist()[5:] == [2, 2]


def test_hole_between_two_objects_and_island_stay():
    labels = np.array([[1, 1, 2, 2], [1, 0, 0, 2], [1, 1, 2, 2]])
    np.testing.assert_array_equal(fill_enclosed(labels), labels)
    island = np.pad(np.array([[2]]), 1)
    island = np.pad(island, 1, constant_values=1)
    np.testing.assert_array_equal(fill_enclosed(island), island)


def test_hole_in_3d_needs_to_be_closed_on_all_sides():
    closed = np.ones((3, 3, 3), dtype=np.int32)
    closed[1, 1, 1] = 0
    assert fill_enclosed(closed).all()
    tunnel = closed.copy()
    tunnel[1, 1, 0] = 0
    np.testing.assert_array_equal(fill_enclosed(tunnel), tunnel)


def test_numbers_follow_the_scan_order():
    labels = np.array([[0, 9, 9, 4], [3, 0, 0, 4], [3, 3, 0, 0]])
    assert keep_large(labels, 1).tolist() == [[0, 1, 1, 2], [3, 0, 0, 2], [3, 3, 0, 0]]
    assert keep_large(labels, 3).tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]


def test_same_result_each_time_in_2d_and_3d():
    rng = np.random.default_rng(0)
    for shape in ((3, 37, 41), (3, 11, 17, 13)):
        probabilities = rng.dirichlet([1, 1, 1], shape[1:]).astype(np.float32)
        probabilities = np.moveaxis(probabilities, -1, 0)
        first, second = (probabilities_to_instances(probabilities.copy()) for _ in range(2))
        assert first.max() > 0
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(np.unique(first), np.arange(first.max() + 1))


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 3, 8, 8), (3, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(3, X, Y"):
        probabilities_to_instances(np.zeros(shape, dtype=np.float32))


def test_time_grows_with_pixels_not_with_objects():
    labels = np.kron(np.arange(1, 7226).reshape(85, 85), np.ones((12, 12), dtype=np.int32))
    probabilities = one_hot(instances_to_target(labels))
    start = time.process_time()
    result = probabilities_to_instances(probabilities)
    assert result.max() == 7225
    assert time.process_time() - start < 6


def test_transforms_keep_meta_data_and_give_the_writers_array():
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    target = np.zeros((16, 12), dtype=int)
    target[2:8, 2:8] = 1
    item = {"pred": MetaTensor(torch.from_numpy(one_hot(target)), affine=affine, meta={"filename_or_obj": "a.tif"})}
    item = ProbabilitiesToInstancesd("pred")(item)
    pred = item["pred"]
    assert isinstance(pred, MetaTensor) and pred.dtype == torch.int32 and pred.shape == (1, 16, 12)
    assert torch.equal(pred.affine, affine) and pred.meta["filename_or_obj"] == "a.tif"
    array = ToLabelArrayd("pred")(item)["pred"]
    assert type(array) is np.ndarray and array.dtype == np.uint16
    np.testing.assert_array_equal(array, target)


def test_transform_takes_half_precision():
    pred = torch.from_numpy(one_hot([[1] * 12])).half()
    assert ProbabilitiesToInstancesd("pred")({"pred": pred})["pred"].max() == 1


@pytest.mark.parametrize(("largest", "dtype"), [(65535, np.uint16), (65536, np.uint32)])
def test_label_array_never_wraps(largest, dtype):
    array = ToLabelArrayd("pred")({"pred": torch.tensor([[[0, largest]]], dtype=torch.int32)})["pred"]
    assert array.dtype == dtype and array.max() == largest


@pytest.mark.parametrize("bad", [torch.zeros(2, 4, 4), -torch.ones(1, 4, 4)])
def test_label_array_refuses_channels_and_ignored_areas(bad):
    with pytest.raises(ValueError, match="expected one channel"):
        ToLabelArrayd("pred")({"pred": bad})


# SEG of truth -> target -> instances with default parameters: what the three classes lose
ROUND_TRIPS = {
    "dsb2018": ("dsb2018/masks/*.tif", 20, 0.99),
    "bbbc039": ("bbbc039/masks/*.tif", 3, 0.99),
    "bbbc050": ("bbbc050/masks/*.tif", 4, 0.99),
    "DIC-C2DH-HeLa": ("ctc/DIC-C2DH-HeLa/01_GT/SEG/*.tif", 3, 0.99),
    "Fluo-C2DL-MSC": ("ctc/Fluo-C2DL-MSC/01_GT/SEG/*.tif", 3, 0.98),
    "Fluo-N2DH-GOWT1": ("ctc/Fluo-N2DH-GOWT1/01_GT/SEG/*.tif", 2, 0.99),
    "Fluo-N2DH-SIM+": ("ctc/Fluo-N2DH-SIM+/01_GT/SEG/*.tif", 3, 0.99),
    "Fluo-N2DL-HeLa GT": ("ctc/Fluo-N2DL-HeLa/01_GT/SEG/*.tif", 2, 0.99),
    "Fluo-N2DL-HeLa ST": ("ctc/Fluo-N2DL-HeLa/01_ST/SEG/*.tif", 2, 0.99),
    "PhC-C2DL-PSC GT": ("ctc/PhC-C2DL-PSC/01_GT/SEG/*.tif", 2, 0.99),
    "PhC-C2DL-PSC ST": ("ctc/PhC-C2DL-PSC/01_ST/SEG/*.tif", 2, 0.99),
}


@pytest.mark.parametrize(("pattern", "count", "least"), ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_round_trip_of_real_truth(real_data: Path, pattern, count, least):
    paths = sorted(real_data.glob(pattern))
    chosen = paths[:: max(1, len(paths) // count)][:count]
    assert len(chosen) == count
    scores = []
    for path in chosen:
        labels = read_image(path)[0].astype(np.int32)
        instances = probabilities_to_instances(one_hot(instances_to_target(labels)))
        scores.append(seg_scores(overlap_table(labels, instances)))
    assert np.concatenate(scores).mean() >= least
