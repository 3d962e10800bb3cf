# SPDX-License-Identifier: Apache-2.0
"""Instance labels: valid objects from masks, from torn labels and from partial truth.

A label image is an integer array: 0 background, 1..N objects, `IGNORE` not annotated (no one learns from it or is
scored on it). An object is one region in the full neighborhood (8 in 2D, 26 in 3D). All of this is our decision: the
paper of GRUU-Net only says that deformation "can lead to degenerated objects"; that gold truth of the Cell Tracking
Challenge (CTC) is partial is how its files are. The functions take arrays of any dimension; the transforms take `(1,
X, Y[, Z])` and keep the meta data.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage
from skimage.measure import label as connected_regions

IGNORE = -1
MASK_VALUES = (1, 255)  # what annotation tools write for "inside" in a plain mask
REACH_FACTOR = 1.5  # unannotated cells may reach this much further than the annotated ones beside them


def as_label_array(image: np.ndarray | torch.Tensor) -> np.ndarray:
    """Return an image of whole numbers as an int32 label array.

    Args:
        image: label image of any shape and any dtype; floats must hold whole numbers.

    Raises:
        ValueError: for fractions, not-a-number, and values below `IGNORE` or beyond int32.
    """
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.size and not (array.min() >= IGNORE and array.max() <= np.iinfo(np.int32).max):
        raise ValueError(
            f"label image holds values from {array.min()} to {array.max()}, expected {IGNORE} (not annotated), "
            "0 (background) and object numbers up to 2**31 - 1: is this an image instead of a label?"
        )
    labels = array.astype(np.int32)
    if array.dtype.kind == "f" and not np.array_equal(labels, array):
        raise ValueError("label image holds fractions, expected whole object numbers: resample by nearest neighbor")
    return labels


def unique_objects(labels: np.ndarray) -> np.ndarray:
    """Turn a plain mask into objects; leave instance labels as they are.

    A plain mask is what an annotator draws without numbers: its only positive value is 1 (or 255). Each connected
    region of it becomes an object. An instance label with the single object 1 looks the same; the result is the same,
    too, where that object is one region.

    Args:
        labels: integer label array of any dimension; `IGNORE` is kept.

    Returns:
        Label array of the same shape, int32.
    """
    labels = labels.astype(np.int32, copy=False)
    objects = labels > 0
    inside = labels[objects]
    if inside.size == 0 or inside[0] not in MASK_VALUES or not (inside == inside[0]).all():
        return labels
    return np.where(objects, connected_regions(objects), labels).astype(np.int32)


def repair_objects(labels: np.ndarray, min_size: int = 5, min_fraction: float = 0.25) -> np.ndarray:
    """Make each connected fragment of a torn object an object of its own, and ignore crumbs.

    Deformations and crops tear objects. A fragment is kept if it has at least `min_fraction` of the size of the
    object's largest fragment and at least `min_size` pixels. Smaller crumbs become `IGNORE`: they are neither
    background nor cells of a usual shape.

    Args:
        labels: integer label array of any dimension; `IGNORE` is kept.
        min_size: in pixels.
        min_fraction: of the largest fragment of the same object.

    Returns:
        Label array of the same shape, int32, objects numbered 1..N in scan order.
    """
    fragments = connected_regions(np.maximum(labels, 0)).astype(np.int32, copy=False)
    sizes = np.bincount(fragments.ravel())
    owner = np.zeros(len(sizes), dtype=np.int64)
    owner[fragments] = labels  # all pixels of a fragment have the same owner
    _, owner = np.unique(owner, return_inverse=True)
    largest = np.zeros(owner.max() + 1, dtype=sizes.dtype)
    np.maximum.at(largest, owner[1:], sizes[1:])
    keep = sizes >= np.maximum(min_size, min_fraction * largest[owner])
    keep[0] = False
    number = np.where(keep, np.cumsum(keep), IGNORE).astype(np.int32)
    number[0] = 0
    return np.where(labels < 0, np.int32(IGNORE), number[fragments])


def marker_owners(labels: np.ndarray, markers: np.ndarray) -> dict[int, int]:
    """Return for each marker the object that holds more than half of it, 0 where there is none.

    Args:
        labels: integer label array of any dimension.
        markers: integer array of the same shape, 0 where there is no marker.
    """
    on_marker = markers > 0
    ids, sizes = np.unique(markers[on_marker], return_counts=True)
    owners = {int(marker): 0 for marker in ids}
    pairs, overlaps = np.unique(
        np.stack([markers[on_marker], np.maximum(labels[on_marker], 0)]), axis=1, return_counts=True
    )
    for marker, owner, overlap in zip(*pairs, overlaps, strict=True):
        if overlap > 0.5 * sizes[np.searchsorted(ids, marker)]:
            owners[int(marker)] = int(owner)
    return owners


def reach_beyond_marker(
    labels: np.ndarray, markers: np.ndarray, owners: Mapping[int, int], spacing: Sequence[float] | None = None
) -> float:
    """Return how far annotated cells reach beyond their markers: the largest distance of a cell's pixel to its marker.

    Args:
        labels: integer label array of any dimension.
        markers: integer array of the same shape.
        owners: object of each marker (0: none), as `marker_owners` gives.
        spacing: size of a pixel along each axis; the result has its unit (pixels without it).
    """
    boxes = ndimage.find_objects(np.maximum(labels, 0))
    reach = 0.0
    for marker, owner in owners.items():
        if owner:
            box = boxes[owner - 1]
            distance = ndimage.distance_transform_edt(markers[box] != marker, sampling=spacing)
            reach = max(reach, float(distance[labels[box] == owner].max()))
    return reach


def mark_unannotated(
    labels: np.ndarray,
    markers: np.ndarray,
    margin: float = 10,
    spacing: Sequence[float] | None = None,
    strict: bool = False,
) -> np.ndarray:
    """Set the surroundings of cells that have a marker but no annotation to `IGNORE`: they are not background.

    The gold truth of the CTC holds a few cells of a frame (`SEG`) and markers of almost all (`TRA`). Background within
    `REACH_FACTOR` x reach + `margin` of an uncovered marker is ignored; the reach is learned from the frame's annotated
    cells (`reach_beyond_marker`). A marker is covered if more than half of it lies in one object. With all markers
    covered nothing changes; with none covered nothing is known about the cells, and all background is ignored.

    Args:
        labels: integer label array of any dimension; objects stay as they are.
        markers: integer array of the same shape, 0 where there is no marker.
        margin: in pixels (in the unit of `spacing` where that is given).
        spacing: size of a pixel along each axis, for anisotropic images.
        strict: trust background only where an annotated cell is nearer than any uncovered marker. For cells with long
            protrusions (Fluo-C2DL-MSC), whose reach two annotated cells can't tell; costs most of the background.

    Raises:
        ValueError: if the shapes differ.
    """
    if labels.shape != markers.shape:
        raise ValueError(f"labels have the shape {labels.shape}, markers {markers.shape}: expected those of one frame")
    owners = marker_owners(labels, markers)
    uncovered = [marker for marker, owner in owners.items() if owner == 0]
    if not uncovered:
        return labels
    if len(uncovered) == len(owners):
        return np.where(labels == 0, IGNORE, labels)
    distance = ndimage.distance_transform_edt(~np.isin(markers, uncovered), sampling=spacing)
    reach = reach_beyond_marker(labels, markers, owners, spacing)
    unknown = distance <= REACH_FACTOR * reach + margin
    if strict:
        unknown |= ndimage.distance_transform_edt(labels <= 0, sampling=spacing) >= distance
    return np.where(unknown & (labels == 0), IGNORE, labels)


def ignore_edge(labels: np.ndarray, width: int) -> np.ndarray:
    """Set the background within `width` pixels of the image's edge, along the first two axes, to `IGNORE`.

    The CTC leaves cells near the edge out (its "field of interest"): markers and masks are missing there.

    Args:
        labels: integer label array `(X, Y[, Z])`.
        width: in pixels; in the CTC 25 for Fluo-N2DL-HeLa and PhC-C2DL-PSC, 50 for DIC-C2DH-HeLa, Fluo-N2DH-GOWT1 and
            Fluo-C2DL-MSC, 0 for simulated sets.
    """
    edge = np.ones(labels.shape, dtype=bool)
    edge[width : max(width, labels.shape[0] - width), width : max(width, labels.shape[1] - width)] = False
    return np.where(edge & (labels == 0), IGNORE, labels)


def like(array: np.ndarray, image: np.ndarray | torch.Tensor) -> MetaTensor:
    """Return an int32 label array `(1, X, Y[, Z])` as MetaTensor with the meta data of `image`."""
    tensor = MetaTensor(torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)))
    return tensor.copy_meta_from(image) if isinstance(image, MetaTensor) else tensor


class AsInstancesd(MapTransform):
    """Read labels `(1, X, Y[, Z])` as instances, int32: `as_label_array`, then `unique_objects`."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with int32 instance labels."""
        item = dict(data)
        for key in self.key_iterator(item):
            labels = as_label_array(item[key])
            item[key] = like(np.stack([unique_objects(channel) for channel in labels]), item[key])
        return item


class RepairObjectsd(MapTransform):
    """Number fragments of torn objects and ignore crumbs: `repair_objects` on labels `(1, X, Y[, Z])`."""

    def __init__(
        self, keys: KeysCollection, min_size: int = 5, min_fraction: float = 0.25, allow_missing_keys: bool = False
    ) -> None:
        """Store the options.

        Args:
            keys: of the labels.
            min_size: see `repair_objects`.
            min_fraction: see `repair_objects`.
            allow_missing_keys: do nothing where an item has no label.
        """
        super().__init__(keys, allow_missing_keys)
        self.min_size = min_size
        self.min_fraction = min_fraction

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with repaired labels."""
        item = dict(data)
        for key in self.key_iterator(item):
            labels = as_label_array(item[key])
            repaired = np.stack([repair_objects(channel, self.min_size, self.min_fraction) for channel in labels])
            item[key] = like(repaired, item[key])
        return item


class MarkUnannotatedd(MapTransform):
    """Ignore what the truth leaves open: `mark_unannotated` where an item has markers, and always `ignore_edge`."""

    def __init__(
        self,
        keys: KeysCollection,
        markers_key: str = "markers",
        margin: float = 10,
        edge: int = 0,
        strict: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        """Store the options.

        Args:
            keys: of the labels `(1, X, Y[, Z])`.
            markers_key: of the markers, of the same shape; removed afterwards. Items without it stay as they are.
            margin: see `mark_unannotated`.
            edge: see `ignore_edge`, in pixels; 0 where all cells have markers up to the edge.
            strict: see `mark_unannotated`.
            allow_missing_keys: do nothing where an item has no label.
        """
        super().__init__(keys, allow_missing_keys)
        self.markers_key = markers_key
        self.margin = margin
        self.edge = edge
        self.strict = strict

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with `IGNORE` where nobody annotated, without its markers."""
        item = dict(data)
        markers = as_label_array(item.pop(self.markers_key)) if self.markers_key in item else None
        if markers is None and not self.edge:
            return item
        for key in self.key_iterator(item):
            marked = as_label_array(item[key])
            if markers is not None:
                pairs = zip(marked, markers, strict=True)
                marked = np.stack([mark_unannotated(*pair, margin=self.margin, strict=self.strict) for pair in pairs])
            item[key] = like(np.stack([ignore_edge(channel, self.edge) for channel in marked]), item[key])
        return item
