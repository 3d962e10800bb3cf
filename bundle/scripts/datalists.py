# SPDX-License-Identifier: Apache-2.0
"""Lists of images, and of images with their truth, from the folders that people have.

Decision: a split depends on names alone (the last CTC sequence, the last frames of a single one, or a hash of the
name), so it is the same on every machine; no file goes to both sections.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from scripts.checks import check_items, dimension_problem, refuse
from scripts.ctc import (
    Frame,
    annotated,
    evaluation_item,
    find_sequences,
    first_validation_frame,
    frame_images,
    is_partial,
    read_frames,
    training_item,
)
from scripts.images import ImageError, image_info, image_stem, image_suffix, result_path

logger = logging.getLogger(__name__)

Section = Literal["training", "validation", "all"]
Truth = Literal["training", "evaluation"]
SINGLE_SEQUENCE_VALIDATES = 0.3  # share of the frames of a data set with one sequence
FOLDER_VALIDATES = 0.1  # share of the images of a folder
BUCKETS = 1000
RESULT = re.compile(r"(.+)_(?:mask|label|overlay)s?")


def list_images(dataset_dir: str | Path, spatial_dims: int = 2) -> list[dict[str, str]]:
    """List the images to segment.

    Args:
        dataset_dir: an image; a folder of TIFF, PNG and NIfTI files, or with these in `images/`; a CTC data set or
            sequence.
        spatial_dims: 2 or 3, the dimension that every image must have.

    Returns:
        `{"image": path}` in natural order (2 before 10). Masks and overlays that lie beside their image are left out.

    Raises:
        FileNotFoundError: where there is no such file or folder, or no image in it.
        ValueError: where images are unreadable, have the wrong dimension, or would give results of the same name.
    """
    path = _absolute(dataset_dir)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    images = [path] if path.is_file() else _find_images(path)
    refuse([problem for image in images if (problem := _header_problem(image, spatial_dims))], f"in {path}")
    _refuse_same_results(images)
    return [{"image": str(image)} for image in images]


def make_datalist(
    dataset_dir: str | Path | Sequence[str | Path],
    section: Section = "training",
    spatial_dims: int = 2,
    val_fraction: float | None = None,
    group_pattern: str | None = None,
    truth: Truth = "training",
    check: bool = True,
) -> list[dict[str, str]]:
    r"""List images with their truth, for one section of a fixed split.

    Args:
        dataset_dir: a CTC data set or sequence, or a folder with `images/` and `masks/` (or `labels/`) of the same
            names (or with `_mask` or `_label` appended); or several of them.
        section: "training", "validation" or "all". Of several CTC sequences the last one validates, of a single one
            the last 30 % of the annotated frames; of a folder 10 % of the images, by the SHA-1 hash of the name.
        spatial_dims: 2 or 3.
        val_fraction: another share than 0.3 or 0.1; without effect where there are several CTC sequences.
        group_pattern: regular expression; images of a folder with the same match in their name (its first group, if it
            has one) stay together, such as `"Emb\\d+"`.
        truth: "training": each image has a label, of CTC the silver truth, else the gold one, with `markers` where that
            leaves out cells. "evaluation": what CTC measures: `label` where there is gold truth, and `markers`.
        check: whether to read all files and refuse bad ones, see `check_items`.

    Returns:
        `{"image", "label"[, "markers"]}` with absolute file names.

    Raises:
        FileNotFoundError: where there is no such folder.
        ValueError: where the folder has another layout, cannot be split, or holds bad files.
    """
    _check_arguments(section, truth, val_fraction)
    folders = [dataset_dir] if isinstance(dataset_dir, (str, os.PathLike)) else list(dataset_dir)
    items = []
    for folder in map(_absolute, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        sequences = find_sequences(folder)
        if sequences:
            items += _ctc_items(sequences, section, val_fraction or SINGLE_SEQUENCE_VALIDATES, truth)
        else:
            items += _folder_items(folder, section, val_fraction or FOLDER_VALIDATES, group_pattern)
    if check:
        check_items(items, spatial_dims)
    return items if truth == "evaluation" else [_without_needless_markers(item) for item in items]


def natural_key(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts 2 before 10, and is the same for every file system."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), part) if part.isdecimal() else (0, part) for part in parts]


def split_by_hash(groups: Sequence[str], val_fraction: float) -> set[str]:
    """Groups that validate: those whose SHA-1 hash falls into the share `val_fraction`; never none, never all.

    Raises:
        ValueError: where there are fewer than two groups.
    """
    buckets = {group: int(hashlib.sha1(group.encode()).hexdigest(), 16) % BUCKETS for group in groups}
    if len(buckets) < 2:
        raise ValueError(
            f"got {len(buckets)} image or group {sorted(buckets)}, expected at least 2 to split into training and "
            "validation: add images, or take section='all'"
        )
    ranked = sorted(buckets, key=lambda group: (buckets[group], group))
    n_validation = sum(bucket < BUCKETS * val_fraction for bucket in buckets.values())
    return set(ranked[: min(max(n_validation, 1), len(ranked) - 1)])


def _check_arguments(section: str, truth: str, val_fraction: float | None) -> None:
    if section not in ("training", "validation", "all"):
        raise ValueError(f"got section={section!r}, expected 'training', 'validation' or 'all'")
    if truth not in ("training", "evaluation"):
        raise ValueError(f"got truth={truth!r}, expected 'training' or 'evaluation'")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise ValueError(f"got val_fraction={val_fraction}, expected a share between 0 and 1, such as 0.1")


def _absolute(path: str | Path) -> Path:
    """Absolute, because CTC folders are known by their name; links are kept for the same reason."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def _image_files(folder: Path) -> list[Path]:
    files = [p for p in folder.iterdir() if image_suffix(p) and not p.name.startswith(".") and p.is_file()]
    return sorted(files, key=natural_key)


def _find_images(folder: Path) -> list[Path]:
    sequences = find_sequences(folder)
    if sequences:
        return [image for sequence in sequences for image in frame_images(sequence)]
    for place in (folder, folder / "images"):
        files = _image_files(place) if place.is_dir() else []
        stems = {image_stem(p) for p in files}
        images = [p for p in files if not ((result := RESULT.fullmatch(image_stem(p))) and result[1] in stems)]
        if len(images) < len(files):
            logger.info("%s: %d masks or overlays beside their images are left out", place, len(files) - len(images))
        if images:
            return images
    raise FileNotFoundError(
        f"{folder}: no image found, expected .tif, .tiff, .png, .nii or .nii.gz files here, in images/, or CTC "
        f"sequences (01/t000.tif, ...); {_contents(folder)}"
    )


def _contents(folder: Path) -> str:
    """What a folder holds, in words for an error."""
    visible = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    folders = [p.name for p in visible if p.is_dir()]
    kinds = Counter(image_suffix(p) or p.suffix or "no suffix" for p in visible if p.is_file())
    files = ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common(5)) or "no files"
    return f"found {files}; folders: {', '.join(folders[:5]) or 'none'}{', ...' if len(folders) > 5 else ''}"


def _header_problem(path: Path, spatial_dims: int) -> str | None:
    try:
        problem = dimension_problem(image_info(path).shape, spatial_dims)
    except ImageError as error:
        return str(error)
    return problem and f"{path}: {problem}"


def _refuse_same_results(images: Sequence[Path]) -> None:
    sources: dict[Path, Path] = {}
    for image in images:
        first = sources.setdefault(result_path(image, ""), image)
        if first != image:
            raise ValueError(f"{first} and {image} would both give {result_path(image, '')}: rename one of them")


def _ctc_items(sequences: Sequence[Path], section: Section, val_fraction: float, truth: Truth) -> list[dict[str, str]]:
    """Items of one CTC data set."""
    runs = [frames for frames in map(read_frames, sequences) if annotated(frames)]
    if not runs:
        truths = f"{sequences[0].name}_GT/SEG, {sequences[0].name}_ST/SEG"
        raise ValueError(f"{sequences[0].parent}: no truth found, expected man_seg000.tif, ... in {truths}")
    if section != "all" and len(runs) > 1:
        runs = runs[:-1] if section == "training" else runs[-1:]
    elif section != "all":
        start = first_validation_frame(runs[0], val_fraction)
        runs = [[f for f in runs[0] if (f.number >= start) == (section == "validation")]]
    make: Callable[[Frame], dict[str, str] | None] = training_item if truth == "training" else evaluation_item
    items = [item for frames in runs for frame in frames if (item := make(frame))]
    if not items:
        raise ValueError(f"{sequences[0].parent}: no frame of section {section!r} has truth for {truth}")
    return items


def _folder_items(folder: Path, section: Section, val_fraction: float, pattern: str | None) -> list[dict[str, str]]:
    """Items of one folder with images/ and masks/."""
    items = _pairs(folder)
    if section == "all":
        return list(items.values())
    groups = {stem: _group(stem, pattern) for stem in items}
    validating = split_by_hash(list(groups.values()), val_fraction)
    return [item for stem, item in items.items() if (groups[stem] in validating) == (section == "validation")]


def _group(stem: str, pattern: str | None) -> str:
    if pattern is None:
        return stem
    match = re.search(pattern, stem)
    if match is None:
        raise ValueError(f"{stem}: group_pattern {pattern!r} does not match this image name: correct the pattern")
    return match[1] if match.re.groups else match[0]


def _pairs(folder: Path) -> dict[str, dict[str, str]]:
    """`{"image", "label"}` by stem; every image must have one label and the other way round."""
    truths = [folder / name for name in ("masks", "labels") if (folder / name).is_dir()]
    if not (folder / "images").is_dir() or len(truths) != 1:
        raise ValueError(
            f"{folder}: expected images/ and one of masks/ or labels/, or CTC sequences (01/t000.tif, 01_GT/SEG/, "
            f"...); {_contents(folder)}"
        )
    images = _image_files(folder / "images")
    _refuse_same_results(images)
    by_stem = {image_stem(p): p for p in images}
    labels: dict[str, Path] = {}
    problems = []
    for path in _image_files(truths[0]):
        stem = image_stem(path)
        result = RESULT.fullmatch(stem)
        stem = result[1] if stem not in by_stem and result else stem
        if stem not in by_stem:
            problems.append(f"{path}: a label without an image in {folder / 'images'}")
        elif stem in labels:
            problems.append(f"{path}: a second label for the image of {labels[stem]}")
        labels.setdefault(stem, path)
    problems += [f"{p}: an image without a label in {truths[0]}" for stem, p in by_stem.items() if stem not in labels]
    refuse(problems or ([] if images else [f"no images: {_contents(folder / 'images')}"]), f"in {folder}")
    return {stem: {"image": str(path), "label": str(labels[stem])} for stem, path in by_stem.items()}


def _without_needless_markers(item: dict[str, str]) -> dict[str, str]:
    if "markers" in item and not is_partial(item["label"], item["markers"]):
        return {key: value for key, value in item.items() if key != "markers"}
    return item
