# SPDX-License-Identifier: Apache-2.0
"""Scores of instances: the Cell Tracking Challenge's SEG, DET and OP_CSB, and DSB2018's average precision.

SEG, DET: Maska et al. 2023, doi 10.1038/s41592-023-01879-y, and Matula et al. 2015, doi 10.1371/journal.pone.0144959;
the figures agree with the challenge's own package `py-ctcmetrics`. AP: Caicedo et al. 2019, 10.1038/s41592-019-0612-7,
in the convention of StarDist (`IoU >= t`; the counts are summed over the data set, then divided).

A label image is an integer array of any dimension: 0 background, positive ids objects (they may be sparse), and in the
truth `IGNORE` where nobody annotated. How ignored pixels count is our decision, by what a score is for:

* SEG: as background, as in the challenge, whose gold truth shows only some cells of a frame. What spills out of an
  annotated cell is wrong wherever it spills; predictions elsewhere have no part in SEG.
* The rest, also DET from the truth: predictions of which more than half is ignored are left out; of the others the
  ignored pixels are not counted, neither in intersections nor in unions.
* DET from markers: the markers say by themselves what is annotated; ignored pixels of the truth play no part.
* Planes (last axis) of a 3D truth which are ignored throughout are cut from truth and prediction first: they lie
  between the single annotated slices of the challenge's 3D gold truth, and only annotated slices are scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from scripts.labels import IGNORE

IOU_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
SPLIT_PART = 0.1  # a prediction that covers less of a true object than this is a speck, not a part of a split


@dataclass(frozen=True)
class OverlapTable:
    """Areas (pixels) of all objects and of all their non-empty intersections: a sparse contingency table."""

    truth_areas: np.ndarray  # (T,) of the true objects, by ascending id
    pred_areas: np.ndarray  # (P,) of the predicted objects, by ascending id
    pred_ignored: np.ndarray  # (P,) how much of each prediction lies in the ignored region
    truth_index: np.ndarray  # (K,) index of the true object of each overlapping pair
    pred_index: np.ndarray  # (K,) index of the predicted object of each pair
    intersections: np.ndarray  # (K,) their common area

    def iou(self) -> np.ndarray:
        """(K,) intersection over union of each pair, correctly rounded: half is exactly 0.5."""
        areas = self.truth_areas[self.truth_index] + self.pred_areas[self.pred_index]
        return self.intersections / (areas - self.intersections)

    def covering(self) -> np.ndarray:
        """(K,) whether the prediction covers MORE than half of the true object; at most one per true object does."""
        return 2 * self.intersections > self.truth_areas[self.truth_index]

    def without_ignored(self) -> OverlapTable:
        """The same table without predictions of which more than half is ignored, and without ignored pixels."""
        kept = 2 * self.pred_ignored <= self.pred_areas
        pairs = kept[self.pred_index]
        return replace(
            self,
            pred_areas=(self.pred_areas - self.pred_ignored)[kept],
            pred_ignored=np.zeros(int(kept.sum()), dtype=np.int64),
            truth_index=self.truth_index[pairs],
            pred_index=(np.cumsum(kept) - 1)[self.pred_index[pairs]],
            intersections=self.intersections[pairs],
        )


NOTHING = OverlapTable(*(np.zeros(0, dtype=np.int64) for _ in range(6)))  # the overlaps of a frame without truth


@dataclass(frozen=True)
class FrameScore:
    """What one image adds to the scores: plain numbers, to gather across processes and to write to a file.

    Where there is no truth, but markers, `n_true` counts the markers, and all below `det` is 0.
    """

    n_true: int  # true objects
    n_pred: int  # predicted objects, without those left out as ignored
    det: tuple[int, int, int, int]  # markers (or true objects) that DET asks for, and NS, FN, FP of `det_counts`
    seg_sum: float  # sum of the SEG values of the true objects
    seg_count: int  # number of true objects
    iou_thresholds: tuple[float, ...]
    tp: tuple[int, ...]  # matched pairs per threshold, see `match_counts`
    fp: tuple[int, ...]  # unmatched predictions per threshold
    fn: tuple[int, ...]  # unmatched true objects per threshold
    splits: int  # true objects that were predicted in parts, see `split_count`
    merges: int  # predictions that join true objects, see `merge_count`
    misses: int  # true objects without a prediction of IoU >= 0.5; those split or merged are often among them
    false_positives: int  # predictions without a true object of IoU >= 0.5


def overlap_table(truth: np.ndarray, prediction: np.ndarray) -> OverlapTable:
    """Count all overlaps of two label images of one shape.

    The pixels are first reduced to runs of equal (truth, prediction), and only the runs are sorted: the work is linear
    in the pixels and the table linear in the objects, however large their ids.

    Raises:
        ValueError: the shapes differ, the arrays are not integer, or an id is negative (but `IGNORE` in the truth).
    """
    _check("truth", truth, lowest=IGNORE)
    _check("prediction", prediction, lowest=0)
    if truth.shape != prediction.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in shape; score on one grid")
    truth_run, pred_run, length = _runs(truth, prediction)
    truth_areas, truth_index = _areas(truth_run, length)
    pred_areas, pred_index = _areas(pred_run, length)
    ignored = (truth_run == IGNORE) & (pred_run > 0)
    both = (truth_run > 0) & (pred_run > 0)
    n_pred = max(len(pred_areas), 1)
    pairs, inverse = np.unique(truth_index[both] * n_pred + pred_index[both], return_inverse=True)
    return OverlapTable(
        truth_areas,
        pred_areas,
        pred_ignored=_sum_by(pred_index[ignored], length[ignored], len(pred_areas)),
        truth_index=pairs // n_pred,
        pred_index=pairs % n_pred,
        intersections=_sum_by(inverse, length[both], len(pairs)),
    )


def seg_scores(table: OverlapTable) -> np.ndarray:
    """(T,) SEG per true object: the Jaccard index with the prediction that covers more than half of it, or 0."""
    scores, covering = np.zeros(len(table.truth_areas)), table.covering()
    scores[table.truth_index[covering]] = table.iou()[covering]
    return scores


def det_counts(table: OverlapTable) -> tuple[int, int, int]:
    """Operations (NS, FN, FP) that turn the predicted set of vertices into the true one.

    A prediction takes every marker of which it covers more than half. FN: markers that nobody takes; FP: predictions
    that take none; NS: a prediction that takes k > 1 markers has to be split k - 1 times.
    """
    covering = table.covering()
    found = int(covering.sum())
    takers = len(np.unique(table.pred_index[covering]))
    return found - takers, len(table.truth_areas) - found, len(table.pred_areas) - takers


def det_score(vertices: int, ns: int, fn: int, fp: int) -> float:
    """DET = 1 - min(AOGM-D, AOGM-D0) / AOGM-D0 with the challenge's weights NS 5, FN 10, FP 1; nan without vertices."""
    from_scratch = 10 * vertices
    return 1.0 - min(5 * ns + 10 * fn + fp, from_scratch) / from_scratch if vertices else math.nan


def match_counts(table: OverlapTable, iou_thresholds: Sequence[float] = IOU_THRESHOLDS) -> tuple[int, ...]:
    """Size of the largest one-to-one matching of pairs with IoU >= t, per threshold t.

    Above 0.5 an object has at most one partner. At exactly 0.5 it can have two, if these share it in equal halves and
    have no other part: the pairs are a forest of single edges and stars, each of which gives one match, and a forest
    has as many trees as it has more vertices than edges.

    Raises:
        ValueError: a threshold is below 0.5, where this does not hold, or above 1.
    """
    if not all(0.5 <= t <= 1 for t in iou_thresholds):
        raise ValueError(f"iou_thresholds are {tuple(iou_thresholds)}, but must lie between 0.5 and 1")
    iou = table.iou()
    counts = []
    for threshold in iou_thresholds:
        truth_index, pred_index = table.truth_index[iou >= threshold], table.pred_index[iou >= threshold]
        counts.append(len(np.unique(truth_index)) + len(np.unique(pred_index)) - len(truth_index))
    return tuple(counts)


def split_count(table: OverlapTable) -> int:
    """Number of true objects with two parts or more.

    A part is a prediction which lies by more than half in the object and covers at least `SPLIT_PART` of it.
    """
    inside = 2 * table.intersections > table.pred_areas[table.pred_index]
    substantial = table.intersections >= SPLIT_PART * table.truth_areas[table.truth_index]
    return int((np.bincount(table.truth_index[inside & substantial]) >= 2).sum())


def merge_count(table: OverlapTable) -> int:
    """Number of predictions that cover more than half of each of two true objects or more."""
    return int((np.bincount(table.pred_index[table.covering()]) >= 2).sum())


def score_frame(
    prediction: np.ndarray,
    truth: np.ndarray | None = None,
    markers: np.ndarray | None = None,
    iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> FrameScore:
    """Score one image.

    Args:
        prediction: instances, ids from 1, 0 background.
        truth: true instances of the same shape, `IGNORE` where not annotated. Without it only DET is scored.
        markers: markers of the challenge's tracking truth (TRA), of the same shape, for DET. Without them, or where
            they are `IGNORE` throughout, DET uses the true objects themselves.
        iou_thresholds: in [0.5, 1].

    Raises:
        ValueError: neither truth nor markers are given, or the arrays do not fit, see `overlap_table`.
    """
    marked = None if markers is None else overlap_table(markers, prediction).without_ignored()
    if truth is None:
        if marked is None:
            raise ValueError("there is nothing to score a prediction by: give its truth, its markers, or both")
        return _frame_score(None, marked, iou_thresholds)
    table = overlap_table(*_annotated_planes(truth, prediction))
    if marked is None or np.all(markers == IGNORE):
        marked = table.without_ignored()
    return _frame_score(table, marked, iou_thresholds)


def summarize(frames: Iterable[FrameScore]) -> dict[str, float]:
    """Scores of a set of images, such as a sequence, or a single one.

    All are ratios of counts summed over the set: every object weighs the same, whichever image it is in, and an image
    with nothing true and nothing predicted changes nothing. A score without anything to divide by is nan.

    Returns:
        SEG, DET, OP_CSB, AP50 ... AP95, mAP (their mean), the error counts, n_true, n_pred and n_frames.

    Raises:
        ValueError: the frames were scored with different thresholds.
    """
    frames = list(frames)
    thresholds = {frame.iou_thresholds for frame in frames} or {IOU_THRESHOLDS}
    if len(thresholds) > 1:
        raise ValueError(f"frames were scored with different IoU thresholds, {sorted(thresholds)}; use one set for all")
    seg = _ratio(math.fsum(frame.seg_sum for frame in frames), sum(frame.seg_count for frame in frames))
    det = det_score(*(sum(frame.det[i] for frame in frames) for i in range(4)))
    summary = {"SEG": seg, "DET": det, "OP_CSB": (seg + det) / 2}
    for i, threshold in enumerate(thresholds.pop()):
        tp, wrong = sum(frame.tp[i] for frame in frames), sum(frame.fp[i] + frame.fn[i] for frame in frames)
        summary[f"AP{round(100 * threshold)}"] = _ratio(tp, tp + wrong)
    summary["mAP"] = float(np.mean([value for key, value in summary.items() if key.startswith("AP")]))
    for name in ("splits", "merges", "misses", "false_positives", "n_true", "n_pred"):
        summary[name] = sum(getattr(frame, name) for frame in frames)
    return {**summary, "n_frames": len(frames)}


def _frame_score(table: OverlapTable | None, marked: OverlapTable, iou_thresholds: Sequence[float]) -> FrameScore:
    """The numbers of a frame from the overlaps with its truth (None where it has none) and those DET looks at."""
    scored = table.without_ignored() if table else NOTHING
    shown = scored if table else marked
    n_true, n_pred = len(scored.truth_areas), len(scored.pred_areas)
    matched, *tp = match_counts(scored, (0.5, *iou_thresholds))
    return FrameScore(
        n_true=len(shown.truth_areas),
        n_pred=len(shown.pred_areas),
        det=(len(marked.truth_areas), *det_counts(marked)),
        seg_sum=float(seg_scores(table or NOTHING).sum()),
        seg_count=n_true,
        iou_thresholds=tuple(float(t) for t in iou_thresholds),
        tp=tuple(tp),
        fp=tuple(n_pred - n for n in tp),
        fn=tuple(n_true - n for n in tp),
        splits=split_count(scored),
        merges=merge_count(scored),
        misses=n_true - matched,
        false_positives=n_pred - matched,
    )


def _check(name: str, labels: np.ndarray, lowest: int) -> None:
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{name} is {labels.dtype}, but must be an integer label image; convert it before scoring")
    if labels.size and labels.min() < lowest:
        raise ValueError(f"{name} holds id {labels.min()}, but ids start at {lowest} (only a truth may hold {IGNORE})")


def _runs(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of a and of b, and length, of each run of pixels where neither changes."""
    a, b = a.ravel(), b.ravel()
    change = np.flatnonzero((a[1:] != a[:-1]) | (b[1:] != b[:-1])) + 1
    start = np.concatenate([np.zeros(min(a.size, 1), dtype=np.int64), change])
    return a[start].astype(np.int64), b[start].astype(np.int64), np.diff(np.append(start, a.size))


def _areas(ids: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas of the objects by ascending id, and each run's index into them (negative for runs of no object)."""
    found, index = np.unique(ids, return_inverse=True)
    first = int(np.searchsorted(found, 1))
    return _sum_by(index, length, len(found))[first:], index - first


def _sum_by(index: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """(count,) int64 sums of the values of each index; exact below 2^53."""
    return np.bincount(index, weights=values, minlength=count).astype(np.int64)


def _annotated_planes(truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both without the planes (last axis) of a 3D truth which are ignored throughout."""
    if truth.ndim != 3 or truth.shape != prediction.shape:
        return truth, prediction
    planes = (truth != IGNORE).any(axis=(0, 1))
    return truth[..., planes], prediction[..., planes]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
