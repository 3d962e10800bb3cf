# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from imagefiles import LABEL, make_sequence, names, numbers, save
from scripts.ctc import is_partial
from scripts.datalists import make_datalist


def test_ctc_prefers_silver_then_gold_and_leaves_out_the_rest(tmp_path):
    make_sequence(tmp_path, frames=4, gold=[0, 1], silver=[1, 2], tracked=range(4))
    items = make_datalist(tmp_path, "all")
    assert [Path(item["label"]).parts[-3:] for item in items] == [
        ("01_GT", "SEG", "man_seg000.tif"),
        ("01_ST", "SEG", "man_seg001.tif"),
        ("01_ST", "SEG", "man_seg002.tif"),
    ]
    assert numbers(items) == [0, 1, 2] and not any("markers" in item for item in items)


def test_ctc_markers_only_with_partial_gold(tmp_path):
    make_sequence(tmp_path, frames=3, gold=[0, 1], silver=[2], tracked=range(3))
    for t in (1, 2):  # object 2 is not annotated
        save(tmp_path / "01_GT" / "SEG" / f"man_seg{t:03d}.tif", np.where(LABEL == 2, 0, LABEL))
    items = make_datalist(tmp_path, "all")
    assert [names([item], "markers") if "markers" in item else [] for item in items] == [[], ["man_track001.tif"], []]


@pytest.mark.parametrize(
    ("label", "marker", "partial"),
    [
        ([0, 1, 1, 1, 0], [0, 7, 7, 0, 0], False),
        ([0, 0, 1, 1, 0], [0, 7, 7, 7, 0], False),  # 2 of 3 pixels
        ([0, 0, 1, 1, 0], [0, 7, 7, 0, 0], True),  # exactly half is not enough
        ([0, 1, 2, 3, 0], [0, 7, 7, 7, 0], True),  # in objects, but in none with most of it
        ([0, 1, 1, 0, 0], [0, 7, 0, 8, 0], True),  # the second cell is left out
        ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0], False),
    ],
)
def test_partial_gold_truth(tmp_path, label, marker, partial):
    seg, tra = (save(tmp_path / n, np.array([v], np.uint16)) for n, v in (("s.tif", label), ("m.tif", marker)))
    assert is_partial(seg, tra) is partial


def test_ctc_evaluation_takes_gold_and_markers(tmp_path):
    make_sequence(tmp_path, frames=5, gold=[0, 1], silver=range(5), tracked=[1, 2])
    items = make_datalist(tmp_path, "all", truth="evaluation")
    assert [(number, sorted(item)) for number, item in zip(numbers(items), items, strict=True)] == [
        (0, ["image", "label"]),
        (1, ["image", "label", "markers"]),
        (2, ["image", "markers"]),
    ]
    assert all("_GT" in item["label"] for item in items[:2])


@pytest.mark.parametrize(("frames", "training"), [(10, 7), (3, 2), (2, 1)])
def test_single_sequence_validates_on_its_end(tmp_path, frames, training):
    make_sequence(tmp_path, frames=frames, silver=range(frames))
    assert numbers(make_datalist(tmp_path / "01", "training")) == list(range(training))
    assert numbers(make_datalist(tmp_path, "validation")) == list(range(training, frames))
    assert numbers(make_datalist(tmp_path, "all")) == list(range(frames))


def test_no_frame_trains_and_validates_under_another_truth(tmp_path):
    make_sequence(tmp_path, frames=20, gold=[1, 2, 18, 19], tracked=range(20))
    training = numbers(make_datalist(tmp_path, "training")) + numbers(make_datalist(tmp_path, truth="evaluation"))
    validation = [
        n for truth in ("training", "evaluation") for n in numbers(make_datalist(tmp_path, "validation", truth=truth))
    ]
    assert not set(training) & set(validation) and {1, 2} < set(training) and {18, 19} <= set(validation)


def test_last_of_several_sequences_validates(tmp_path):
    for name in ("01", "02", "03"):
        make_sequence(tmp_path, name, 2, gold=[0, 1] if name != "03" else [])
    folders = [{Path(i["image"]).parent.name for i in make_datalist(tmp_path, s)} for s in ("training", "validation")]
    assert folders == [{"01"}, {"02"}]  # 03 has no truth


def test_ctc_volumes_and_slices(tmp_path, caplog):
    make_sequence(tmp_path, frames=2, gold=[0], tracked=[0, 1], depth=3)
    save(tmp_path / "01_GT" / "SEG" / "man_seg_001_002.tif", LABEL)
    with caplog.at_level(logging.WARNING):
        items = make_datalist(tmp_path, "all", spatial_dims=3)
    assert numbers(items) == [0] and "man_seg_001_002.tif" in caplog.text


@pytest.mark.parametrize("truths", [{}, {"gold": [0]}])
def test_ctc_without_enough_truth(tmp_path, truths):
    make_sequence(tmp_path, frames=3, **truths)
    with pytest.raises(ValueError, match="no truth found" if not truths else "section='all'"):
        make_datalist(tmp_path)


@pytest.mark.parametrize(
    ("name", "training", "validation", "partial"),
    [
        ("DIC-C2DH-HeLa", 58, 26, 0),
        ("Fluo-N2DL-HeLa", 37, 17, 0),
        ("Fluo-C2DL-MSC", 7, 4, 4),
        ("PhC-C2DL-PSC", 29, 13, 0),
    ],
)
def test_real_ctc_sets(real_data, name, training, validation, partial):
    lists = [make_datalist(real_data / "ctc" / name, section) for section in ("training", "validation")]
    assert [len(items) for items in lists] == [training, validation]
    assert sum("markers" in item for items in lists for item in items) == partial


def test_real_evaluation_frames(real_data):
    items = make_datalist(real_data / "ctc" / "DIC-C2DH-HeLa", "all", truth="evaluation", check=False)
    assert len(items) == 84 and sum("label" in item for item in items) == 9 and all("markers" in item for item in items)
