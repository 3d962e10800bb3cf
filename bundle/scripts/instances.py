# SPDX-License-Identifier: Apache-2.0
"""The network's probabilities back to instances: watershed from interior seeds inside the foreground.

Our decision, the inverse of `targets.py`. Foreground is what is more likely not background; each face-connected region
of sure interior is the seed of one cell; between the seeds of one foreground region the watershed draws the line where
border is most likely. Foreground regions with one seed need no watershed and are one cell as they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from skimage.measure import label as connected_regions
from skimage.segmentation import watershed

from scripts.labels import like
from scripts.targets import BACKGROUND, BORDER, INTERIOR


def find_seeds(probabilities: np.ndarray, threshold: float, min_size: int) -> np.ndarray:
    """Number the face-connected regions where interior is likely and likelier than border, 1..N, int32.

    Args:
        probabilities: `(3, X, Y[, Z])`.
        threshold: of the interior's probability.
        min_size: in pixels; smaller regions are noise.
    """
    interior = probabilities[INTERIOR]
    seeds = connected_regions((interior > threshold) & (interior > probabilities[BORDER]), connectivity=1)
    return keep_large(seeds.astype(np.int32, copy=False), min_size)


def keep_large(labels: np.ndarray, min_size: int) -> np.ndarray:
    """Remove objects below `min_size` pixels and number the others 1..N in scan order (last axis fastest), int32."""
    flat = labels.ravel()
    places = np.flatnonzero(flat)
    values = flat[places]
    sizes = np.bincount(values, minlength=1)
    first = np.full(len(sizes), labels.size, dtype=np.int64)
    first[values[::-1]] = places[::-1]  # the last one written is the first in scan order
    order = np.argsort(first, kind="stable")
    order = order[sizes[order] >= max(min_size, 1)]
    number = np.zeros(len(sizes), dtype=np.int32)
    number[order] = np.arange(1, len(order) + 1)
    return number[labels]


def grow_seeds(seeds: np.ndarray, foreground: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Give each foreground pixel to a seed; regions without a seed become one object each.

    Args:
        seeds: int32 array `(X, Y[, Z])`, 0 outside.
        foreground: boolean array of the same shape.
        probabilities: `(3, X, Y[, Z])`.

    Returns:
        int32 array of the same shape.
    """
    regions = connected_regions(foreground).astype(np.int32, copy=False)
    on_seed = seeds > 0
    highest = np.zeros(regions.max(initial=0) + 1, dtype=np.int32)
    np.maximum.at(highest, regions[on_seed], seeds[on_seed])
    lowest = np.full_like(highest, np.iinfo(np.int32).max)
    np.minimum.at(lowest, regions[on_seed], seeds[on_seed])
    no_seed = highest == 0
    single = np.where(no_seed, seeds.max(initial=0) + np.cumsum(no_seed, dtype=np.int32), highest)
    single[(lowest < highest) | (np.arange(len(single)) == 0)] = 0
    labels = single[regions]
    shared = foreground & (labels == 0)
    if shared.any():
        landscape = probabilities[BORDER] - probabilities[INTERIOR]
        markers = np.where(shared, seeds, 0)
        # seeds lie below all else, large ones deepest: a pixel between two seeds goes to the larger one, because small
        # cells are interior up to their rim (`targets.py`)
        sizes = np.bincount(markers.ravel()).astype(landscape.dtype)
        landscape[markers > 0] = -2 - (sizes / sizes[1:].max(initial=1))[markers[markers > 0]]
        labels += watershed(landscape, markers, mask=shared, connectivity=foreground.ndim)
    return labels


def fill_enclosed(labels: np.ndarray) -> np.ndarray:
    """Fill the holes of single objects: background that touches exactly one object and not the image's edge.

    Args:
        labels: integer label array of any dimension, without negative values.
    """
    holes = connected_regions(labels == 0, connectivity=1).astype(np.int32, copy=False)
    count = int(holes.max(initial=0)) + 1
    at_edge = np.zeros(count, dtype=bool)
    highest = np.zeros(count, dtype=labels.dtype)
    lowest = np.full(count, np.iinfo(labels.dtype).max, dtype=labels.dtype)
    for axis in range(labels.ndim):
        for end in (0, -1):
            at_edge[np.take(holes, end, axis=axis)] = True
        before = tuple(slice(None, -1) if i == axis else slice(None) for i in range(labels.ndim))
        behind = tuple(slice(1, None) if i == axis else slice(None) for i in range(labels.ndim))
        for here, there in ((before, behind), (behind, before)):
            contact = (holes[here] > 0) & (labels[there] > 0)
            np.maximum.at(highest, holes[here][contact], labels[there][contact])
            np.minimum.at(lowest, holes[here][contact], labels[there][contact])
    filling = np.where(~at_edge & (lowest == highest), highest, 0)
    filling[0] = 0
    return labels + filling[holes]


def probabilities_to_instances(
    probabilities: np.ndarray,
    seed_threshold: float = 0.5,
    foreground_threshold: float = 0.5,
    min_size: int = 10,
    min_seed_size: int = 1,
    fill_holes: bool = True,
) -> np.ndarray:
    """Turn class probabilities into numbered objects, the same ones each time.

    Objects are connected in the full neighborhood (8 in 2D, 26 in 3D), seeds by faces only (4 in 2D, 6 in 3D), so that
    a diagonal leak through a border doesn't merge cells. A foreground region without a seed is one object if it has at
    least `min_size` pixels: small cells may lack a seed, and a region that stands free needs none.

    Args:
        probabilities: softmax of background, interior, border: `(3, X, Y[, Z])`.
        seed_threshold: least probability of the interior for a seed.
        foreground_threshold: least probability of "not background" for an object's pixel.
        min_size: smallest object, in pixels.
        min_seed_size: smallest seed, in pixels; raise it where noise splits cells.
        fill_holes: fill background enclosed by a single object.

    Returns:
        int32 array `(X, Y[, Z])`, objects numbered 1..N in scan order.

    Raises:
        ValueError: if there are not three classes.
    """
    if probabilities.ndim < 3 or probabilities.shape[0] != 3:
        raise ValueError(
            f"probabilities have the shape {probabilities.shape}, expected (3, X, Y[, Z]) with background, interior, "
            "border: pass one image without batch dimension, after softmax"
        )
    foreground = 1 - probabilities[BACKGROUND] > foreground_threshold
    seeds = find_seeds(probabilities, seed_threshold, min_seed_size) * foreground
    labels = grow_seeds(seeds, foreground, probabilities)
    if fill_holes:
        labels = fill_enclosed(labels)
    return keep_large(labels, min_size)


class ProbabilitiesToInstancesd(MapTransform):
    """Turn probabilities `(3, X, Y[, Z])` into instances `(1, X, Y[, Z])`, int32: `probabilities_to_instances`."""

    def __init__(
        self,
        keys: KeysCollection,
        seed_threshold: float = 0.5,
        foreground_threshold: float = 0.5,
        min_size: int = 10,
        min_seed_size: int = 1,
        fill_holes: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        """Store the options.

        Args:
            keys: of the probabilities.
            seed_threshold: see `probabilities_to_instances`.
            foreground_threshold: see `probabilities_to_instances`.
            min_size: see `probabilities_to_instances`.
            min_seed_size: see `probabilities_to_instances`.
            fill_holes: see `probabilities_to_instances`.
            allow_missing_keys: do nothing where an item has no prediction.
        """
        super().__init__(keys, allow_missing_keys)
        self.options: dict[str, Any] = {
            "seed_threshold": seed_threshold,
            "foreground_threshold": foreground_threshold,
            "min_size": min_size,
            "min_seed_size": min_seed_size,
            "fill_holes": fill_holes,
        }

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with instances, on the CPU."""
        item = dict(data)
        for key in self.key_iterator(item):
            probabilities = torch.as_tensor(item[key]).detach().float().cpu().numpy()
            item[key] = like(probabilities_to_instances(probabilities, **self.options)[None], item[key])
        return item


class ToLabelArrayd(MapTransform):
    """Turn labels `(1, X, Y[, Z])` into a numpy array `(X, Y[, Z])`, uint16 or, beyond 65535 objects, uint32."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with plain label arrays, as the writer of MONAI Label expects them."""
        item = dict(data)
        for key in self.key_iterator(item):
            labels = np.asarray(torch.as_tensor(item[key]).cpu())
            if labels.shape[0] != 1 or labels.min(initial=0) < 0:
                raise ValueError(
                    f"labels under {key!r} have the shape {labels.shape} and values from {labels.min(initial=0)}: "
                    "expected one channel (1, X, Y[, Z]) and no ignored area, as ProbabilitiesToInstancesd gives"
                )
            largest = labels.max(initial=0)
            item[key] = labels[0].astype(np.uint16 if largest <= np.iinfo(np.uint16).max else np.uint32)
        return item
