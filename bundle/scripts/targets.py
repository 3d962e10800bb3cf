# SPDX-License-Identifier: Apache-2.0
"""Instance labels to the network's three classes: background, interior, and border between cells.

Our decision; the paper only asks for a loss that separates touching objects. The border lies inside of the cells, on
both sides of a contact: a band of `2 * border_width` pixels is wide enough to be learned, and foreground (interior +
border) stays exactly the cells, so nothing is lost on the way back (`instances.py`). Cells that stand free have no
border.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from scipy import ndimage
from skimage.measure import label as connected_regions

from scripts.labels import IGNORE, as_label_array, like

BACKGROUND, INTERIOR, BORDER = 0, 1, 2
MIN_RECOVERED = 0.95  # share of a fragment that must grow back from its interior, else its border is made thinner


def near_other(labels: np.ndarray, width: Sequence[int], gap: int) -> np.ndarray:
    """Return the pixels at most `width` from their object's outline and at most `width + gap` from another object.

    Distances are counted in squares (boxes): the maximum over the axes.

    Args:
        labels: integer array of any dimension; 0 is background, a value below 0 counts as one more object.
        width: in pixels, along each axis.
        gap: in pixels.
    """
    no_object = np.iinfo(labels.dtype).max
    objects_only = np.where(labels == 0, no_object, labels)
    reach = [2 * (pixels + gap) + 1 for pixels in width]
    near = ndimage.maximum_filter(labels, reach, mode="nearest") > labels
    near |= ndimage.minimum_filter(objects_only, reach, mode="nearest") < labels
    core = ndimage.minimum_filter(labels, [2 * pixels + 1 for pixels in width], mode="nearest") == labels
    core &= ndimage.maximum_filter(labels, [2 * pixels + 1 for pixels in width], mode="nearest") == labels
    return near & ~core


def beside_smaller(fragments: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Return the pixels that touch a smaller one of some fragments (of equal ones, that of the lower number).

    Args:
        fragments: connected regions, numbered 1..N, of any dimension.
        which: for each number, whether it is one of the fragments that count.
    """
    sizes = np.bincount(fragments.ravel(), minlength=len(which))
    rank = np.full(len(which), len(which), dtype=np.int32)
    order = np.argsort(np.where(which, sizes, fragments.size), kind="stable")
    rank[order] = np.arange(len(which))
    rank[~which] = len(which)
    ranks = rank[fragments]
    return ndimage.minimum_filter(ranks, 3, mode="nearest") < ranks


def innermost(fragment: np.ndarray, others: np.ndarray, share: float) -> np.ndarray:
    """Return the `share` of a fragment's pixels that lies furthest from its neighbors, as one connected region.

    Args:
        fragment: boolean array of any dimension.
        others: pixels of other objects, of the same shape.
        share: 0 to 1.
    """
    distance = ndimage.distance_transform_edt(~others) if others.any() else ndimage.distance_transform_edt(fragment)
    inside = np.sort(distance[fragment])[::-1]
    level = inside[max(0, round(share * len(inside)) - 1)]
    if inside[0] > 1:
        level = max(level, np.nextafter(1.0, 2.0))  # a pixel that touches a neighbor is never interior
    regions = connected_regions(fragment & (distance >= level), connectivity=1)
    return regions == np.bincount(regions.ravel())[1:].argmax() + 1


def largest_pieces(fragments: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return each fragment's number where its largest face-connected piece inside lies, 0 elsewhere.

    Args:
        fragments: connected regions, numbered 1..N, of any dimension.
        inside: pixels that may be interior.
    """
    candidates = np.where(inside, fragments, 0)
    pieces = connected_regions(candidates, connectivity=1)
    sizes = np.bincount(pieces.ravel())
    fragment_of = np.zeros(len(sizes), dtype=fragments.dtype)
    fragment_of[pieces] = candidates
    best = np.zeros(fragments.max(initial=0) + 1, dtype=np.int64)
    order = np.argsort(sizes, kind="stable")
    best[fragment_of[order]] = order  # the last one written is the largest
    chosen = np.zeros_like(fragment_of)
    chosen[best] = fragment_of[best]
    chosen[0] = 0
    return chosen[pieces]


def recovered(fragments: np.ndarray, interior: np.ndarray, width: Sequence[int]) -> np.ndarray:
    """Return the share of each fragment that its interior covers when it grows by `width`: what decoding gets back.

    Args:
        fragments: connected regions, numbered 1..N, of any dimension.
        interior: numbers of the fragments where their interior lies, of the same shape.
        width: in pixels, along each axis.
    """
    grown = ndimage.maximum_filter(interior, [2 * pixels + 1 for pixels in width])
    total = np.bincount(fragments.ravel())
    return np.bincount(fragments[grown == fragments], minlength=len(total)) / np.maximum(total, 1)


def one_interior_each(labels: np.ndarray, width: Sequence[int], gap: int, min_share: float) -> np.ndarray:
    """Return the interiors: one face-connected region for each connected fragment of an object.

    The border is as wide as asked where the fragment can be grown back from its interior. Where it can't (tiny or
    thin cells), the border is made thinner, at last to the pixels that touch a neighbor, on both sides of the
    contact: so the line between two cells stays in the middle of their border, where the watershed finds it.
    Fragments too small even for that are interior as a whole: their neighbor's border separates the two, or, of two
    such fragments, that of the larger one. If that leaves too little of it, it keeps its `innermost` pixels.

    Args:
        labels: integer label array of any dimension, with `IGNORE` taken as one more object.
        width: of the border, in pixels along each axis.
        gap: see `instances_to_target`.
        min_share: see `instances_to_target`.
    """
    fragments = connected_regions(np.maximum(labels, 0))
    levels = [([min(pixels, thickness) for pixels in width], gap) for thickness in range(max(width), 0, -1)]
    levels.append(([1] * labels.ndim, 0))
    inside = np.zeros(labels.shape, dtype=bool)
    zone = np.ones(labels.shape, dtype=bool)
    for thickness, near in levels:
        inside |= zone & ~near_other(labels, thickness, near)
        interior = largest_pieces(fragments, inside)
        open_fragments = recovered(fragments, interior, thickness) < MIN_RECOVERED
        open_fragments[0] = False
        if not open_fragments.any():
            return interior > 0
        zone = ndimage.maximum_filter(open_fragments[fragments], [2 * (pixels + gap) + 1 for pixels in width])
    inside |= open_fragments[fragments] & ~beside_smaller(fragments, open_fragments)
    interior = largest_pieces(fragments, inside)
    enough = np.bincount(interior.ravel(), minlength=len(open_fragments)) >= min_share * np.bincount(fragments.ravel())
    open_fragments &= ~enough
    interior[open_fragments[fragments]] = 0
    left = np.where(open_fragments[fragments], fragments, 0)
    for number, box in enumerate(ndimage.find_objects(left), start=1):
        if box is not None:
            wider = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)
            fragment = left[wider] == number
            others = (labels[wider] != 0) & (labels[wider] != labels[wider][fragment][0])
            interior[wider][innermost(fragment, others, min_share)] = number
    return interior > 0


def instances_to_target(
    labels: np.ndarray, border_width: int | Sequence[int] = 2, gap: int = 2, min_share: float = 0.25
) -> np.ndarray:
    """Turn instance labels into the classes background, interior and border.

    Border are an object's pixels at most `border_width` from its outline and at most `border_width + gap` from
    another object, counted in squares (boxes). Each connected fragment of an object keeps exactly one connected
    interior: smaller pieces that the border cuts off are border, and where too little would remain the border is
    thinner (`one_interior_each`). Pixels that would be border if the ignored area beside them were a cell become
    `IGNORE`.

    Args:
        labels: integer label array of any dimension, `IGNORE` where not annotated.
        border_width: in pixels, at least 1; one number, or one for each axis (anisotropic volumes).
        gap: objects with so many background pixels between them still get a border; the gap itself stays background.
        min_share: a fragment too small for any border keeps this share of it as interior, 0 to 1.

    Returns:
        int64 array of the same shape with `BACKGROUND`, `INTERIOR`, `BORDER` and `IGNORE`.

    Raises:
        ValueError: if the border width is below 1 or has the wrong length.
    """
    width = [border_width] * labels.ndim if isinstance(border_width, int) else list(border_width)
    if len(width) != labels.ndim or min(width) < 1:
        raise ValueError(
            f"border_width is {border_width} for labels of the shape {labels.shape}: expected one whole number >= 1, "
            "or one for each axis"
        )
    labels = labels.astype(np.int32, copy=False)
    target = np.where(labels > 0, BORDER, labels).astype(np.int64)
    interior = one_interior_each(labels, width, gap, min_share)
    if labels.min(initial=0) < 0:
        sure = near_other(np.maximum(labels, 0), width, gap)
        target[(labels > 0) & near_other(labels, width, gap) & ~sure] = IGNORE
    target[interior] = INTERIOR
    return target


class InstancesToTargetd(MapTransform):
    """Turn instance labels `(1, X, Y[, Z])` into classes of the same shape, int64: `instances_to_target`."""

    def __init__(
        self,
        keys: KeysCollection,
        border_width: int | Sequence[int] = 2,
        gap: int = 2,
        min_share: float = 0.25,
        allow_missing_keys: bool = False,
    ) -> None:
        """Store the options.

        Args:
            keys: of the labels.
            border_width: see `instances_to_target`.
            gap: see `instances_to_target`.
            min_share: see `instances_to_target`.
            allow_missing_keys: do nothing where an item has no label.
        """
        super().__init__(keys, allow_missing_keys)
        self.border_width = border_width
        self.gap = gap
        self.min_share = min_share

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with its target."""
        item = dict(data)
        for key in self.key_iterator(item):
            channels = as_label_array(item[key])
            target = [instances_to_target(labels, self.border_width, self.gap, self.min_share) for labels in channels]
            item[key] = like(np.stack(target), item[key]).to(torch.int64)
        return item
