# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from scripts.labels import IGNORE
from scripts.metrics import (
    IOU_THRESHOLDS,
    det_counts,
    det_score,
    match_counts,
    merge_count,
    overlap_table,
    score_frame,
    seg_scores,
    split_count,
    summarize,
)


def row(text: str) -> np.ndarray:
    """'11.22-' -> [1 1 0 2 2 IGNORE]."""
    return np.array([0 if c == "." else IGNORE if c == "-" else int(c) for c in text], dtype=np.int32)


# name: truth, prediction, SEG per object, (NS, FN, FP), TP at .5, splits, merges
CASES = {
    "same": ("11.22", "22.11", [1, 1], (0, 0, 0), 2, 0, 0),
    "both empty": ("....", "....", [], (0, 0, 0), 0, 0, 0),
    "nothing found": ("11..", "....", [0], (0, 1, 0), 0, 0, 0),
    "nothing there": ("....", "11.2", [], (0, 0, 2), 0, 0, 0),
    "exactly half covered is not covered, but IoU .5": ("1111", "11..", [0], (0, 1, 1), 1, 0, 0),
    "more than half covered": ("1111", "111.", [0.75], (0, 0, 0), 1, 0, 0),
    "split in halves, one of them matches": ("1111", "1122", [0], (0, 1, 2), 1, 1, 0),
    "split unevenly": ("11111", "11122", [0.6], (0, 0, 1), 1, 1, 0),
    "a speck is no part": ("11111111111", "11111111112", [10 / 11], (0, 0, 1), 1, 0, 0),
    "merge": ("11.22", "11111", [0.4, 0.4], (1, 0, 0), 0, 0, 1),
    "merge of equal halves, one of them matches": ("1122", "1111", [0.5, 0.5], (1, 0, 0), 1, 0, 1),
    "merge of three": ("112233", "111111", [1 / 3] * 3, (2, 0, 0), 0, 0, 1),
    "neighbor half covered is no merge": ("112222", "1111..", [0.5, 0], (0, 1, 0), 1, 0, 0),
    "spill of less than half is ignored": ("11--", "111.", [2 / 3], (0, 0, 0), 1, 0, 0),
    "half in the ignored region stays": ("11--", ".11.", [0], (0, 1, 1), 1, 0, 0),
    "more than half in the ignored region is left out": ("111--------", "..1111.....", [0], (0, 1, 0), 0, 0, 0),
    "SEG sees what AP leaves out": ("11----", "111111", [1 / 3], (0, 1, 0), 0, 0, 0),
    "whole truth ignored": ("------", "1122.3", [], (0, 0, 0), 0, 0, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_hand_typed(name: str) -> None:
    truth, prediction, seg, det, tp, splits, merges = CASES[name]
    table = overlap_table(row(truth), row(prediction))
    scored = table.without_ignored()
    np.testing.assert_allclose(seg_scores(table), seg)
    assert det_counts(scored) == det
    assert match_counts(scored, (0.5,)) == (tp,)
    assert (split_count(scored), merge_count(scored)) == (splits, merges)
    frame = score_frame(row(prediction), row(truth))
    assert frame.seg_sum == pytest.approx(sum(seg)) and frame.seg_count == frame.n_true == len(seg)
    assert frame.det == (len(seg), *det)
    assert (frame.tp[0], frame.fn[0], frame.fp[0]) == (tp, frame.misses, frame.false_positives)
    assert frame.n_true == tp + frame.misses and frame.n_pred == tp + frame.false_positives
    assert (frame.splits, frame.merges) == (splits, merges)


def test_ignored_pixels_do_not_count_in_unions() -> None:
    frame = score_frame(row("1111..."), row("111---."), iou_thresholds=(0.5, 1.0))
    assert frame.tp == (1, 1)
    assert frame.seg_sum == pytest.approx(0.75)


def test_threshold_met_exactly_is_a_match() -> None:
    truth, prediction = row("." * 20), row("1" * 20)
    for wanted, threshold in ((11, 0.55), (13, 0.65), (17, 0.85), (19, 0.95)):
        truth[:wanted] = 1
        assert match_counts(overlap_table(truth, prediction), (threshold, threshold + 1e-9)) == (1, 0)


def test_ids_may_be_sparse_and_of_any_integer_type() -> None:
    truth, prediction = row("11.22.333"), row("22.113333")
    expected = score_frame(prediction, truth)
    large = np.array([0, 2**31 - 1, 7, 40_000_000])
    assert score_frame(large[prediction], large[truth]) == expected
    assert score_frame(prediction.astype(np.uint16), truth.astype(np.uint8)) == expected
    assert score_frame(prediction.astype(np.uint64), truth) == expected


def test_any_dimension() -> None:
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, 9, (2, 4, 5, 6))
    flat = score_frame(prediction.ravel(), truth.ravel())
    assert flat == score_frame(prediction, truth)
    assert flat == score_frame(prediction.reshape(20, 6).T, truth.reshape(20, 6).T)


def test_markers_decide_det_alone() -> None:
    truth, markers = row("111--------"), row(".1..2.3..4.")
    frame = score_frame(row("111.2222..5"), truth, markers)
    assert frame.det == (4, 1, 1, 1)  # 2 and 3 share a prediction, 4 is missed, 5 is no marker
    assert (frame.n_true, frame.n_pred, frame.tp[0], frame.false_positives) == (1, 1, 1, 0)
    only = score_frame(row("111.2222..5"), markers=markers)
    assert only.det == frame.det and (only.n_true, only.n_pred) == (4, 3)
    assert (only.seg_count, only.tp[0], only.misses, only.false_positives) == (0, 0, 0, 0)


def test_markers_ignored_throughout_are_no_markers() -> None:
    truth, prediction = row("11.22"), row("11..2")
    assert score_frame(prediction, truth, row("-----")) == score_frame(prediction, truth)


def test_only_annotated_planes_of_a_volume_are_scored() -> None:
    rng = np.random.default_rng(1)
    truth, prediction = rng.integers(0, 3, (2, 6, 6, 5))
    partial = np.full_like(truth, IGNORE)
    partial[..., 2] = truth[..., 2]
    assert score_frame(prediction, partial) == score_frame(prediction[..., 2], truth[..., 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((row("1."),), "nothing to score"),
        ((row("1."), row("1..")), "differ in shape"),
        ((row("1.").astype(np.float32), row("1.")), "integer"),
        ((row("1."), row("1.") > 0), "integer"),
        ((row("1-"), row("1.")), "prediction holds id -1"),
        ((row("1."), row("1.") - 2), "truth holds id -2"),
        ((row("1."), row("1."), None, (0.3,)), "between 0.5 and 1"),
    ],
)
def test_errors(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_frame(*arguments)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((10, 0, 0, 0), 1), ((10, 2, 1, 5), 0.75), ((1, 0, 1, 9), 0), ((1, 0, 0, 50), 0), ((0, 0, 0, 3), math.nan)],
)
def test_det_score(counts: tuple, expected: float) -> None:
    assert det_score(*counts) == pytest.approx(expected, nan_ok=True)


def test_summary_pools_objects_of_all_frames() -> None:
    frames = [
        score_frame(row("11.22.3"), row("11.22.3")),
        score_frame(row("....."), row("1...1")),
        score_frame(row("..1.."), row(".....")),
        score_frame(row("....."), row(".....")),
    ]
    summary = summarize(frames)
    assert list(summary) == (
        ["SEG", "DET", "OP_CSB", "AP50", "AP55", "AP60", "AP65", "AP70", "AP75", "AP80", "AP85", "AP90", "AP95", "mAP"]
        + ["splits", "merges", "misses", "false_positives", "n_true", "n_pred", "n_frames"]
    )
    assert summary["SEG"] == 3 / 4
    assert summary["DET"] == pytest.approx(1 - 11 / 40)
    assert summary["OP_CSB"] == pytest.approx((3 / 4 + 29 / 40) / 2)
    assert summary["AP50"] == summary["AP95"] == 3 / 5 and summary["mAP"] == pytest.approx(3 / 5)
    assert [summary[k] for k in ("misses", "false_positives", "n_true", "n_pred", "n_frames")] == [1, 1, 4, 4, 4]


@pytest.mark.parametrize("frames", [[], [score_frame(row("..."), row("..."))]])
def test_summary_of_nothing_is_nan(frames: list) -> None:
    summary = summarize(frames)
    assert all(math.isnan(summary[key]) for key in ("SEG", "DET", "OP_CSB", "AP50", "mAP"))
    assert summary["n_true"] == 0 and summary["n_frames"] == len(frames)


def test_summary_refuses_mixed_thresholds() -> None:
    frames = [score_frame(row("1"), row("1"), iou_thresholds=(t,)) for t in (0.5, 0.75)]
    with pytest.raises(ValueError, match="different IoU thresholds"):
        summarize(frames)
    assert summarize(frames[1:])["AP75"] == 1


def test_frame_score_is_plain_numbers() -> None:
    frame = score_frame(row("11.2"), row("1122"))
    for value in dataclasses.astuple(frame):
        assert {type(v) for v in (value if isinstance(value, tuple) else (value,))} <= {int, float}
    assert pickle.loads(pickle.dumps(frame)) == frame
    with pytest.raises(dataclasses.FrozenInstanceError):
        frame.n_true = 3


def brute_force_tp(truth: np.ndarray, prediction: np.ndarray, threshold: float) -> int:
    ids_t, ids_p = (sorted(set(a.ravel().tolist()) - {0}) for a in (truth, prediction))
    allowed = np.zeros((len(ids_t), len(ids_p)))
    for i, t in enumerate(ids_t):
        for j, p in enumerate(ids_p):
            both, either = ((truth == t) & (prediction == p)).sum(), ((truth == t) | (prediction == p)).sum()
            allowed[i, j] = both * 1000 >= round(threshold * 1000) * either
    return int(allowed[linear_sum_assignment(-allowed)].sum())


@pytest.mark.parametrize("seed", range(12))
def test_matching_agrees_with_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = np.kron(rng.integers(0, 30, (5, 5)), np.ones((2, 2), dtype=int))
    prediction = np.where(rng.random(truth.shape) < 0.25, rng.integers(0, 40, truth.shape), truth)
    prediction[:, ::5] += (prediction[:, ::5] > 0) * 50
    counts = score_frame(prediction, truth).tp
    assert counts == tuple(brute_force_tp(truth, prediction, t) for t in IOU_THRESHOLDS)
    assert counts[0] > counts[-1]


def test_a_hundred_thousand_objects() -> None:
    ids = np.random.default_rng(0).permutation(320 * 320).reshape(320, 320) + 1
    truth = np.kron(ids, np.ones((4, 4), dtype=np.int64))
    truth[::4] = 0
    begin = time.process_time()
    frame = score_frame(np.roll(truth, 1, axis=1), truth)
    assert time.process_time() - begin < 10  # seconds of CPU, not of a busy machine; a dense table would not end
    assert frame.n_true == 320 * 320 and frame.misses == 0 and frame.tp[3] == 0  # IoU 3/5


def degrade(labels: np.ndarray, time: int) -> np.ndarray:
    """A wrong segmentation of a truth: objects kept, eroded, moved, split, joined and dropped, and two invented."""
    out = np.zeros(labels.shape, dtype=np.uint16)
    ids = np.unique(labels[labels > 0])
    boxes = ndimage.find_objects(labels)
    for i, label in enumerate(ids):
        inside = labels == label
        rows = boxes[label - 1][0]
        if i % 6 == 1:
            inside = ndimage.binary_erosion(inside, iterations=2 + i % 3)
        elif i % 6 == 2:
            inside = np.roll(inside, (i % 9, 3), (0, 1))
        elif i % 6 == 3:
            out[inside] = 1000 + label
            inside[: rows.start + int((rows.stop - rows.start) * (0.3 + 0.05 * (i % 5)))] = False
        elif i % 6 == 4:
            label = ids[i - 4]
        elif i % 6 == 5:
            continue
        out[inside & ((out == 0) | (i % 6 == 3))] = label
    out[2:8, 2:40] = 5000
    out[-9:-3, 50:70] = 5001
    return (
        out + (out > 0).astype(np.uint16) * 10000 * time
    )  # other tracks in each frame: valid for the official package


CTC = [
    ("Fluo-N2DH-SIM+", "GT", (0, 20, 40, 64)),
    ("Fluo-N2DL-HeLa", "ST", (12, 13, 14, 40)),
    ("DIC-C2DH-HeLa", "ST", (2, 21, 80)),
]


@pytest.mark.parametrize(("name", "source", "times"), CTC, ids=[case[0] for case in CTC])
def test_agrees_with_the_challenge(real_data: Path, tmp_path: Path, name: str, source: str, times: tuple) -> None:
    evaluate = pytest.importorskip("ctc_metrics").evaluate_sequence
    tifffile = pytest.importorskip("tifffile")
    folder = real_data / "ctc" / name
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    for sub in ("01_RES", "01_GT/SEG", "01_GT/TRA"):
        (tmp_path / sub).mkdir(parents=True)
    frames, tracks = [], {}
    for new, old in enumerate(times):
        markers = np.array(Image.open(folder / f"01_GT/TRA/man_track{old:03d}.tif")).astype(np.uint16)
        prediction = degrade(
            np.array(Image.open(folder / f"01_{source}/SEG/man_seg{old:03d}.tif")).astype(np.int32), new
        )
        tifffile.imwrite(tmp_path / f"01_GT/TRA/man_track{new:03d}.tif", markers)
        tifffile.imwrite(tmp_path / f"01_RES/mask{new:03d}.tif", prediction)
        gold = folder / f"01_GT/SEG/man_seg{old:03d}.tif"
        truth = np.array(Image.open(gold)).astype(np.int32) if gold.exists() and new != 1 else None
        if truth is not None:
            tifffile.imwrite(tmp_path / f"01_GT/SEG/man_seg{new:03d}.tif", truth.astype(np.uint16))
            as_partial = score_frame(prediction, np.where(truth > 0, truth, IGNORE), markers)
            assert as_partial.seg_sum == score_frame(prediction, truth, markers).seg_sum
        frames.append(score_frame(prediction, truth, markers))
        for kind, labels in (("01_GT/TRA/man_track.txt", markers), ("01_RES/res_track.txt", prediction)):
            for label in np.unique(labels[labels > 0]):
                tracks.setdefault(kind, {}).setdefault(int(label), []).append(new)
    for kind, found in tracks.items():
        lines = [f"{label} {seen[0]} {seen[-1]} 0\n" for label, seen in found.items()]
        (tmp_path / kind).write_text("".join(lines))
    official = evaluate(str(tmp_path / "01_RES"), str(tmp_path / "01_GT"), ["SEG", "DET"], threads=1)
    summary = summarize(frames)
    for key in ("SEG", "DET", "OP_CSB"):
        assert summary[key] == pytest.approx(official[key], abs=1e-6)
    assert 0.1 < summary["SEG"] < 0.95 and 0.1 < summary["DET"] < 0.95
    assert sum(frame.det[1] for frame in frames) > 0
