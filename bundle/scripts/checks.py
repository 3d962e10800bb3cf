# SPDX-License-Identifier: Apache-2.0
"""Find bad images and labels before a training starts, all of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from tqdm import tqdm

from scripts.images import NIFTI, ImageError, ImageInfo, image_suffix, load_image

LISTED = 10  # problems named in one error
THREADS = 4
QUIET = 50  # so many items are checked without a progress bar


def check_items(items: Sequence[Mapping[str, str]], spatial_dims: int, progress: bool = True) -> None:
    """Read every file of a data list and refuse what cannot be trained on or scored.

    Bad are: missing, truncated and unreadable files; constant or not finite images; the wrong number of dimensions;
    labels (and markers) in color, with negative or fractional values, or of another shape than the image. Labels must
    be of an integer type; NIfTI may hold whole numbers as floats. A label without objects is valid.

    Args:
        items: `{"image", "label"[, "markers"]}` with file names; `label` may be missing where there are `markers`.
        spatial_dims: 2 or 3.
        progress: whether to show a bar for more than 50 items.

    Raises:
        ValueError: with the first 10 problems and their number.
    """
    if not items:
        raise ValueError("got no items to check, expected at least one image with its label")
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(partial(item_problems, spatial_dims=spatial_dims), items)
        bar = tqdm(found, total=len(items), desc="Checking images", disable=not progress or len(items) <= QUIET)
        problems = [problem for one in bar for problem in one]
    refuse(problems, f"in {len(items)} images and their labels")


def refuse(problems: Sequence[str], where: str) -> None:
    """Raise one ValueError that lists the problems, if there are any."""
    if not problems:
        return
    listed = "".join(f"\n  - {problem}" for problem in problems[:LISTED])
    more = f"\n  ... and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    raise ValueError(f"{len(problems)} problem(s) {where}:{listed}{more}\nCorrect or remove these files and try again.")


def item_problems(item: Mapping[str, str], spatial_dims: int) -> list[str]:
    """What is wrong with the files of one item; empty where nothing is."""
    if "image" not in item or not ("label" in item or "markers" in item):
        return [f"{item.get('image', 'an item')}: got the keys {sorted(item)}, expected image and label (or markers)"]
    problems, shapes = [], {}
    for key in ("image", "label", "markers"):
        if key not in item:
            continue
        try:
            array, info = load_image(item[key])
        except (FileNotFoundError, ImageError) as error:
            problems.append(str(error))
            continue
        shapes[key] = info.shape
        found = _image_problem(array, spatial_dims) if key == "image" else _label_problem(array, info, item[key])
        if found:
            problems.append(f"{item[key]}: {found}")
        if key != "image" and shapes.get("image", info.shape) != info.shape:
            problems.append(f"{item[key]}: shape {info.shape}, but its image {item['image']} has {shapes['image']}")
    return problems


def dimension_problem(shape: Sequence[int], spatial_dims: int) -> str | None:
    """What is wrong with the number of axes of an image in a 2D or 3D data set; None where nothing is."""
    if len(shape) == spatial_dims:
        return None
    if len(shape) > spatial_dims:
        return f"a stack of shape {tuple(shape)}, expected one 2D image: use the 3D configuration, or save slices"
    return f"an image of shape {tuple(shape)}, expected a 3D stack: use the 2D configuration, or save a stack"


def _image_problem(array: np.ndarray, spatial_dims: int) -> str | None:
    if array.dtype.kind not in "iuf":
        return f"pixels of type {array.dtype}, expected whole or real numbers"
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        return f"values from {low} to {high}, expected finite numbers"
    if low == high:
        return f"every pixel is {low}, expected an image: it may be a failed export"
    return dimension_problem(array.shape, spatial_dims)


def _label_problem(array: np.ndarray, info: ImageInfo, path: str) -> str | None:
    if info.color:
        return "a color picture, expected object numbers: save the labels as gray values (8 or 16 bit)"
    if array.dtype.kind not in "iu":
        if image_suffix(path) not in NIFTI or array.dtype.kind != "f":
            return f"labels of type {array.dtype}, expected integers: save them as 16 bit"
        if not np.array_equal(array, np.rint(array)):
            return "labels with fractions, expected whole numbers: was the label interpolated?"
    if array.min() < 0:
        return f"labels down to {array.min()}, expected 0 (background) and up"
    return None
