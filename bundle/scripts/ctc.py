# SPDX-License-Identifier: Apache-2.0
"""The folders of the Cell Tracking Challenge (CTC): which image has which truth.

    01/t000.tif                     image, or volume
    01_GT/SEG/man_seg000.tif        gold truth, by hand; in many frames only a few of the cells
    01_GT/TRA/man_track000.tif      one marker for (almost) every cell
    01_ST/SEG/man_seg000.tif        silver truth, computed from many submissions; every cell

Source: naming conventions at celltrackingchallenge.net. Decision: gold truth of single slices (`man_seg_T_Z.tif`, 3D
sets) is left out, because a volume needs the truth of all its slices.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.images import CTC_FRAME, CTC_SEQUENCE, read_image
from scripts.labels import marker_owners

logger = logging.getLogger(__name__)

GOLD = re.compile(r"man_seg(\d{3,})\.tiff?", re.IGNORECASE)
MARKERS = re.compile(r"man_track(\d{3,})\.tiff?", re.IGNORECASE)
IMAGE = re.compile(CTC_FRAME.pattern + r"\.tiff?", re.IGNORECASE)
SLICE = re.compile(r"man_seg_\d+_\d+\.tiff?", re.IGNORECASE)


class Frame(NamedTuple):
    """One time point of a sequence and the truth files that it has."""

    number: int
    image: Path
    gold: Path | None
    silver: Path | None
    markers: Path | None


def find_sequences(folder: Path) -> list[Path]:
    """Sequence folders (`01`, `02`, ...) with frames: the folder itself, or those in it, by name."""
    candidates = [folder] if CTC_SEQUENCE.fullmatch(folder.name) else []
    candidates += sorted(p for p in folder.iterdir() if p.is_dir() and CTC_SEQUENCE.fullmatch(p.name))
    return [path for path in candidates if _numbered(path, IMAGE)]


def frame_images(sequence: Path) -> list[Path]:
    """The images of a sequence in the order of time."""
    return list(_numbered(sequence, IMAGE).values())


def read_frames(sequence: Path) -> list[Frame]:
    """All frames of a sequence in the order of time, with the truth found beside it."""
    truth, silver_truth = (sequence.with_name(f"{sequence.name}_{kind}") for kind in ("GT", "ST"))
    images = _numbered(sequence, IMAGE)
    gold, silver = _numbered(truth / "SEG", GOLD), _numbered(silver_truth / "SEG", GOLD)
    markers = _numbered(truth / "TRA", MARKERS)
    _warn_of_slices(truth / "SEG")
    orphans = sorted((gold.keys() | silver.keys() | markers.keys()) - images.keys())
    if orphans:
        logger.warning("%s: truth of %d frames has no image (first: frame %d)", truth, len(orphans), orphans[0])
    return [Frame(n, image, gold.get(n), silver.get(n), markers.get(n)) for n, image in images.items()]


def annotated(frames: Sequence[Frame]) -> list[Frame]:
    """Frames with object masks (silver or gold), or, where no frame has any, those with markers."""
    return [f for f in frames if f.silver or f.gold] or [f for f in frames if f.markers]


def first_validation_frame(frames: Sequence[Frame], val_fraction: float) -> int:
    """Number of the frame from which a sequence validates; the frames before it train.

    The last `val_fraction` of the annotated frames validate, at least one. It is the same frame for every kind of
    truth, so that no frame is trained on under one truth and validated under another.

    Raises:
        ValueError: where fewer than two frames are annotated.
    """
    usable = annotated(frames)
    if len(usable) < 2:
        raise ValueError(
            f"{frames[0].image.parent}: {len(usable)} annotated frame, expected at least 2 to split into training and "
            "validation: annotate more, or take section='all'"
        )
    n_training = math.floor(len(usable) * (1 - val_fraction) + 1e-9)
    return usable[min(max(n_training, 1), len(usable) - 1)].number


def training_item(frame: Frame) -> dict[str, str] | None:
    """Image and label, silver before gold; markers with gold, to tell what it leaves out; None without a label."""
    if frame.silver:
        return {"image": str(frame.image), "label": str(frame.silver)}
    if frame.gold is None:
        return None
    return {"image": str(frame.image), "label": str(frame.gold)} | _markers(frame)


def evaluation_item(frame: Frame) -> dict[str, str] | None:
    """Image, gold label and markers, each where it is there: what SEG and DET use; None without either."""
    label = {"label": str(frame.gold)} if frame.gold else {}
    truth = label | _markers(frame)
    return {"image": str(frame.image)} | truth if truth else None


def is_partial(label: str | Path, markers: str | Path) -> bool:
    """Whether some marker has no more than half of its pixels in one object: the label leaves out cells."""
    (labels, _), (points, _) = read_image(label), read_image(markers)
    if labels.shape != points.shape:
        raise ValueError(f"{label}: shape {labels.shape}, but {markers}: shape {points.shape}; expected the same frame")
    return 0 in marker_owners(labels, points).values()


def _markers(frame: Frame) -> dict[str, str]:
    return {"markers": str(frame.markers)} if frame.markers else {}


def _numbered(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Files of a folder by the number in their name, ascending; empty where there is no folder."""
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    matches = [match for match in map(pattern.fullmatch, names) if match]
    return {int(match[1]): folder / match[0] for match in sorted(matches, key=lambda match: int(match[1]))}


def _warn_of_slices(folder: Path) -> None:
    slices = [p for p in folder.iterdir() if SLICE.fullmatch(p.name)] if folder.is_dir() else []
    if slices:
        logger.warning("%s: %d files hold single slices (%s): left out", folder, len(slices), slices[0].name)
