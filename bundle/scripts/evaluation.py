# SPDX-License-Identifier: Apache-2.0
"""Evaluation inside MONAI's evaluators: an Ignite metric over instances, and a handler that writes the scores down.

The scores themselves are in `metrics.py`. MONAI's own metrics average over images and classes; CTC's SEG and DET are
ratios over all objects of all frames, so each process keeps one small `FrameScore` per image, and these are gathered.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced

from scripts.files import write_whole
from scripts.images import CTC_FRAME, CTC_SEQUENCE, image_stem
from scripts.labels import as_label_array
from scripts.metrics import IOU_THRESHOLDS, FrameScore, score_frame, summarize

SHOWN = ("SEG", "DET", "OP_CSB", "AP50", "mAP")  # in the log; everything is in the files

logger = logging.getLogger(__name__)


class InstanceMetrics(Metric):
    """SEG, DET, OP_CSB, AP and error counts of an evaluator's instances, as its key metric or beside it.

    Reads decollated outputs: a list of dicts with `pred` (instance ids, (X, Y[, Z]) or (1, X, Y[, Z])), `image`
    (MetaTensor (1, X, Y[, Z]) which knows its file), and `label`, `markers` or both (ids (1, X, Y[, Z]), `IGNORE` where
    not annotated). MONAI's evaluator leaves `markers` in the batch, from where they are taken. An image that several
    processes, or one of them twice, were given (samplers pad) is scored once.

    After a run `rows` holds (name, FrameScore) of all images of all processes, and `summary` what `summarize` makes of
    them. `engine.state.metrics` gets every number of the summary as `<prefix><KEY>`, and the key metric under the name
    it is attached by, there 0 if it is nan (a data set without a true object), because checkpoints are chosen by it.
    """

    def __init__(
        self,
        key: str = "SEG",
        prefix: str = "val_",
        iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
        edge: int = 0,
        output_transform: Callable = lambda output: output,
    ) -> None:
        """Check the arguments.

        Args:
            key: the number of the summary (SEG, OP_CSB, AP50, mAP, ...) that is the key metric.
            prefix: of the names in `engine.state.metrics`.
            iou_thresholds: in [0.5, 1].
            edge: leave out predictions that lie wholly within so many pixels of the image's edge, where the Cell
                Tracking Challenge annotates no cell (see `labels.ignore_edge`).
            output_transform: gives the list of dicts, where `engine.state.output` is not one.
        """
        nothing = np.zeros((1, 1), dtype=np.int32)
        known = list(summarize([score_frame(nothing, nothing, iou_thresholds=iou_thresholds)]))
        if key not in known:
            raise ValueError(f"key is {key!r}, but must be one of {', '.join(known)}")
        self.key = key
        self.prefix = prefix
        self.iou_thresholds = tuple(iou_thresholds)
        self.edge = edge
        super().__init__(output_transform=output_transform)

    @reinit__is_reduced
    def reset(self) -> None:
        """Forget all images."""
        self._scored: list[tuple[str, FrameScore]] = []
        self.rows: list[tuple[str, FrameScore]] = []
        self.summary: dict[str, float] = {}

    @torch.no_grad()
    def iteration_completed(self, engine: Engine) -> None:
        """Score the output of one iteration, with the markers of its batch."""
        output, batch = self._output_transform(engine.state.output), engine.state.batch
        if isinstance(output, list) and isinstance(batch, list) and len(batch) == len(output):
            output = [_with_markers(item, source) for item, source in zip(output, batch, strict=True)]
        self.update(output)

    @reinit__is_reduced
    def update(self, output: Sequence[Mapping[str, Any]]) -> None:
        """Score a list of items."""
        if isinstance(output, Mapping) or not all(isinstance(item, Mapping) for item in output):
            raise ValueError(f"got {type(output).__name__}, expected a list of dicts: leave decollate on")
        for item in output:
            path = source_path(item) or f"image{len(self._scored)}_of_process{idist.get_rank()}"
            try:
                prediction, truth, markers = _label_images(item)
                prediction = inside_field(prediction, self.edge)
                score = score_frame(prediction, truth, markers, iou_thresholds=self.iou_thresholds)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            self._scored.append((path, score))

    def compute(self) -> dict[str, float]:
        """Gather the images of all processes and summarize them; every process has to call it."""
        gathered = [self._scored]
        if dist.is_available() and dist.is_initialized():
            gathered = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, self._scored)
        by_path = dict(sorted((row for part in gathered for row in part), key=lambda row: row[0]))
        self.rows = list(zip(short_names(list(by_path)), by_path.values(), strict=True))
        self.summary = summarize(by_path.values())
        return self.summary

    def completed(self, engine: Engine, name: str) -> None:
        """Put the numbers into `engine.state.metrics`."""
        summary = self.compute()
        engine.state.metrics.update({f"{self.prefix}{key}": float(value) for key, value in summary.items()})
        value = float(summary[self.key])
        if math.isnan(value):
            logger.warning(f"{self.key} of {len(self.rows)} images is undefined without true objects; counts as 0")
            value = 0.0
        engine.state.metrics[name] = value


class ScoreWriter:
    """Handler that writes `scores.csv`, one row per image, and `scores.json`, the summary, when an evaluator is done.

    The summary has a part for each sequence of the Cell Tracking Challenge, for its scores are per sequence. Files are
    written by the first process, and whole or not at all; a score without anything to divide by is empty (null).
    """

    def __init__(self, metric: InstanceMetrics, output_dir: str) -> None:
        """Keep the arguments.

        Args:
            metric: attached to the same evaluator.
            output_dir: made where it is missing.
        """
        self.metric = metric
        self.output_dir = Path(output_dir)

    def attach(self, engine: Engine) -> None:
        """Write at the end of each run."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the files and log the summary."""
        if idist.get_rank() > 0:
            return
        rows, summary = self.metric.rows, self.metric.summary
        if not summary:
            raise ValueError("there are no scores to write: use the metric also as a metric of this evaluator")
        write_whole(self.output_dir / "scores.csv", _as_csv(rows).encode())
        sequences = {name: _without_nan(summarize(frames)) for name, frames in by_sequence(rows).items()}
        scores = {"summary": _without_nan(summary), "sequences": sequences}
        write_whole(self.output_dir / "scores.json", (json.dumps(scores, indent=2, allow_nan=False) + "\n").encode())
        shown = ", ".join(f"{key} {summary[key]:.4f}" for key in SHOWN if key in summary)
        logger.info(f"{shown} on {len(rows)} images with {summary['n_true']} objects: {self.output_dir / 'scores.csv'}")


def inside_field(labels: np.ndarray, edge: int) -> np.ndarray:
    """Remove the objects that lie wholly within `edge` pixels of the image's edge, along the first two axes.

    Args:
        labels: object ids (X, Y[, Z]).
        edge: in pixels; 0 removes none.
    """
    if edge == 0:
        return labels
    field = labels[edge : max(edge, labels.shape[0] - edge), edge : max(edge, labels.shape[1] - edge)]
    return np.where(np.isin(labels, np.unique(field)), labels, 0)


def source_path(item: Mapping[str, Any]) -> str:
    """The file that an item's image (or else its label or prediction) came from; empty if none of them knows."""
    for key in ("image", "label", "pred"):
        name = getattr(item.get(key), "meta", {}).get("filename_or_obj", "")
        name = name[0] if isinstance(name, (list, tuple)) and name else name
        if name:
            return str(name)
    return ""


def short_names(paths: Sequence[str]) -> list[str]:
    """File names without suffix, with as many of their folders as it takes to tell them apart.

    A frame of a challenge's sequence keeps its folder: `01/t000`.
    """
    parts = [(*Path(path).parent.parts, image_stem(path)) for path in paths]
    least = [2 if len(part) > 1 and _is_frame(*part[-2:]) else 1 for part in parts]
    names: list[str] = []
    for more in range(max(map(len, parts), default=1)):
        names = ["/".join(part[-(count + more) :]) for part, count in zip(parts, least, strict=True)]
        if len(set(names)) == len(set(paths)):
            break
    return names


def by_sequence(rows: Sequence[tuple[str, FrameScore]]) -> dict[str, list[FrameScore]]:
    """Frames of each sequence of the challenge, by the sequence's name (`01`); other images are in none."""
    sequences: dict[str, list[FrameScore]] = {}
    for name, frame in rows:
        folder, _, stem = name.rpartition("/")
        if _is_frame(folder.rpartition("/")[2], stem):
            sequences.setdefault(folder, []).append(frame)
    return sequences


def _is_frame(folder: str, stem: str) -> bool:
    return bool(CTC_SEQUENCE.fullmatch(folder) and CTC_FRAME.fullmatch(stem))


def _with_markers(item: Mapping[str, Any], source: object) -> Mapping[str, Any]:
    """The item with the markers of its source, where only that has them."""
    markers = source.get("markers") if isinstance(source, Mapping) else None
    return item if markers is None or "markers" in item else {**item, "markers": markers}


def _label_images(item: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Prediction, truth and markers of an item as integer arrays (X, Y[, Z])."""
    if item.get("pred") is None:
        raise ValueError(f"there is no pred, only {', '.join(map(str, item))}; expected predicted instances")
    given = {key: as_label_array(item[key]) for key in ("label", "markers") if item.get(key) is not None}
    for key, array in given.items():
        if len(array) != 1:
            raise ValueError(f"{key} has the shape {array.shape}, expected one channel first: (1, X, Y[, Z])")
    prediction = as_label_array(item["pred"])
    if prediction.shape[:1] == (1,) and any(prediction.ndim == array.ndim for array in given.values()):
        prediction = prediction[0]
    truth, markers = (given[key][0] if key in given else None for key in ("label", "markers"))
    return prediction, truth, markers


def _as_csv(rows: Sequence[tuple[str, FrameScore]]) -> str:
    scores = [{"name": name, **_without_nan(summarize([frame]))} for name, frame in rows]
    first = ("name", "n_true", "n_pred")
    columns = [*first, *(key for key in (scores[0] if scores else {}) if key not in (*first, "n_frames"))]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(scores)
    return text.getvalue()


def _without_nan(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Scores to six digits, None where there is none."""
    return {key: None if math.isnan(value) else round(value, 6) for key, value in scores.items()}
