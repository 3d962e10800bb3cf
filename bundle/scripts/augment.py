# SPDX-License-Identifier: Apache-2.0
"""Random part of the training pipeline: object-balanced patches, one warp, valid objects, intensity changes.

The paper of GRUU-Net asks for heavy augmentation, for sampling that "can bias the network to a certain class or
feature", and warns that elastic deformation "can lead to degenerated objects". How to do it is our decision:

- Each object is as likely to be looked at as any other, however small it is (touching ones twice as likely); a share of
  the patches looks at background. MONAI crops by a weight map; `ObjectWeightMapd` makes that map, once per image.
- All deformations are one resampling. MONAI's `Rand3DElasticd` takes 90 ms for a patch of 64 x 64 x 16 pixels, deforms
  z as much as x and y, and can't tell the label what lies outside of the image; hence `RandWarpd`, for 2D and 3D.
- What lies outside of the image is mirrored in the image and `IGNORE` in the label: no objects are invented.
- Torn objects are repaired (`RepairObjectsd`).

Items hold `image` (1, X, Y[, Z]), float, about 0 to 1, and `label`, instances of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import monai.transforms as mt
import numpy as np
import torch
from monai.config import KeysCollection
from monai.utils import convert_to_tensor
from scipy import ndimage
from torch.nn.functional import grid_sample, interpolate

from scripts.labels import IGNORE, RepairObjectsd

Strength = Literal["none", "flips", "light", "heavy"]
KEYS = ("image", "label")
MARGIN = (0.2, 0.2, 0.1)  # x, y, z: a patch to be warped is cropped larger by this share of its size at each side
CONTROL_POINTS = 6  # of the elastic deformation, per axis of a patch
WARPS: dict[str, dict[str, float]] = {
    "light": {"prob": 0.5, "rotate": 15, "scale": 0.1, "shear": 0.0, "elastic": 0.0},
    "heavy": {"prob": 0.9, "rotate": 45, "scale": 0.25, "shear": 0.1, "elastic": 0.12},
}


def object_weights(labels: np.ndarray, background: float = 0.1, touching: float = 2.0, reach: int = 2) -> np.ndarray:
    """Weight of each pixel to be looked at: the sum over an object is the same for small and large ones.

    Args:
        labels: instances (X, Y[, Z]); 0 is background, negative is ignored.
        background: share of the total that background pixels get together; the rest is the objects'.
        touching: weight of an object that touches another one, relative to one that does not.
        reach: objects touch where a pixel of another one is at most this far, in pixels along x and y; 1 along z.

    Returns:
        float32 weights of the same shape, sum 1; ignored pixels have 0. Where there are no objects background gets all,
        and the other way round; where all is ignored, all pixels have the same weight.
    """
    size = [2 * reach + 1] * 2 + [3] * (labels.ndim - 2)
    ids, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    index = index.reshape(labels.shape)
    highest = ndimage.maximum_filter(labels, size)
    lowest = ndimage.minimum_filter(np.where(labels > 0, labels, np.iinfo(labels.dtype).max), size)
    met = np.bincount(index[(labels > 0) & ((highest != labels) | (lowest != labels))], minlength=len(ids)) > 0
    share = np.where(ids > 0, np.where(met, touching, 1.0), 0.0)
    has_background, has_objects = bool((ids == 0).any()), bool(share.any())
    if has_objects:
        share *= (1 - background * has_background) / share.sum()
    share[ids == 0] = background if has_objects else 1.0
    if not share.any():
        return np.full(labels.shape, 1 / labels.size, np.float32)
    return (share / counts)[index].astype(np.float32)


def fold_to_centers(weights: np.ndarray, patch_size: Sequence[int]) -> np.ndarray:
    """Move the weight of pixels that are too near to the edge to the nearest pixel that can be the center of a patch.

    `RandWeightedCropd` only draws centers whose patch lies in the image, and drops the weight of all other pixels:
    objects near the edge would hardly ever be looked at. The total is kept.

    Args:
        weights: (X, Y[, Z]).
        patch_size: of the patches that will be cropped, in pixels.
    """
    folded = weights.copy()
    for axis, (size, patch) in enumerate(zip(weights.shape, patch_size, strict=True)):
        low = min(patch, size) // 2
        high = max(low + 1, size - patch + patch // 2)  # exclusive, as in monai.transforms.utils.weighted_patch_samples
        view = np.moveaxis(folded, axis, 0)
        view[low] += view[:low].sum(axis=0)
        view[high - 1] += view[high:].sum(axis=0)
        view[:low] = view[high:] = 0
    return folded


class ObjectWeightMapd(mt.MapTransform):
    """Add the sampling weights of an image: `object_weights`, folded for patches. Deterministic, so it is cached."""

    def __init__(
        self,
        keys: KeysCollection = "label",
        weight_key: str = "weight",
        background: float = 0.1,
        touching: float = 2.0,
        patch_size: Sequence[int] | None = None,
    ) -> None:
        """Store the options.

        Args:
            keys: of the instances (1, X, Y[, Z]).
            weight_key: of the map that is added, (1, X, Y[, Z]), float32.
            background: see `object_weights`.
            touching: see `object_weights`.
            patch_size: see `fold_to_centers`; None leaves the weights where they are.
        """
        super().__init__(keys)
        if not 0 <= background < 1 or touching <= 0:
            raise ValueError(f"Got background {background}, touching {touching}; expected 0 <= share < 1, factor > 0.")
        self.weight_key = weight_key
        self.options: dict[str, Any] = {"background": background, "touching": touching}
        self.patch_size = patch_size

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with its weight map."""
        item = dict(data)
        for key in self.key_iterator(item):
            labels = convert_to_tensor(item[key], track_meta=False)[0].numpy()
            weights = object_weights(labels, **self.options)
            if self.patch_size is not None:
                weights = fold_to_centers(weights, self.patch_size)
            item[self.weight_key] = torch.from_numpy(weights[None])
        return item


def warp_grid(
    roi_size: Sequence[int], size: Sequence[int], matrix: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Sampling grid for `torch.nn.functional.grid_sample` (`align_corners=True`) around the center of an image.

    Args:
        roi_size: shape of the output, (X, Y[, Z]).
        size: shape of the image that is sampled, in the same order.
        matrix: (dims, dims), from output to image coordinates, in pixels from the center.
        offsets: (2, n, n) displacements in x and y at control points over the output, in pixels; the same for all z.

    Returns:
        (1, X, Y[, Z], dims), float32.
    """
    axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in roi_size]
    points = torch.einsum("ij,j...->i...", matrix, torch.stack(torch.meshgrid(*axes, indexing="ij")))
    elastic = interpolate(offsets[None], size=tuple(roi_size[:2]), mode="bicubic", align_corners=True)[0]
    points[:2] += elastic.reshape(elastic.shape + (1,) * (len(roi_size) - 2))
    half = torch.tensor([max(n - 1, 1) / 2 for n in size]).reshape(-1, *[1] * len(roi_size))
    return (points / half).flip(0).movedim(0, -1)[None]


class RandWarpd(mt.RandomizableTransform, mt.MapTransform):
    """Rotate, scale, shear and elastically deform in one resampling, and cut the center of `roi_size`.

    Rotation, shear and elastic deformation act in the x-y plane only, because z of a microscope is coarser; scaling
    acts on z by a third of the strength. The image is sampled linearly and mirrored outside; the label is sampled by
    nearest neighbor, `IGNORE` outside. Without a deformation (1 - `prob`) the center is cut as it is.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        prob: float = 0.9,
        rotate: float = 45,
        scale: float = 0.25,
        shear: float = 0.1,
        elastic: float = 0.12,
    ) -> None:
        """Store the options.

        Args:
            roi_size: shape of the output, (X, Y[, Z]), pixels.
            prob: probability of a deformation.
            rotate: largest angle, degrees.
            scale: largest change of size: the factor lies between 1 / (1 + scale) and 1 + scale.
            shear: largest shear, pixels per pixel.
            elastic: largest standard deviation of control points, in distances between them; above 0.2 it tears cells.
        """
        mt.RandomizableTransform.__init__(self, prob)
        mt.MapTransform.__init__(self, KEYS)
        self.roi_size = tuple(roi_size)
        self.rotate, self.scale, self.shear, self.elastic = math.radians(rotate), scale, shear, elastic

    def randomize(self, data: object = None) -> None:
        """Draw the matrix (dims, dims) and the offsets (2, n, n) of the next deformation."""
        super().randomize(None)
        dims = len(self.roi_size)
        angle, skew = self.R.uniform(-self.rotate, self.rotate), self.R.uniform(-self.shear, self.shear)
        zoom, stretch, zoom_z = np.log1p(self.scale) * self.R.uniform(-1, 1, 3) * (1, 0.3, 0.3)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = np.diag(np.exp([zoom_z] * dims))
        matrix[:2, :2] = turn @ np.array([[1, skew], [0, 1]]) @ np.diag(np.exp([zoom + stretch, zoom - stretch]))
        self.matrix = torch.from_numpy(matrix.astype(np.float32))
        spacing = np.reshape(self.roi_size[:2], (2, 1, 1)) / (CONTROL_POINTS - 1)
        offsets = self.R.normal(size=(2, CONTROL_POINTS, CONTROL_POINTS)) * self.R.uniform(0, self.elastic) * spacing
        self.offsets = torch.from_numpy(offsets.astype(np.float32))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with its warped image (float32) and label (int32), (1, *roi_size)."""
        self.randomize()
        image, label = (convert_to_tensor(data[key], track_meta=False) for key in KEYS)
        if self._do_transform:
            grid = warp_grid(self.roi_size, image.shape[1:], self.matrix, self.offsets)
            image = grid_sample(image[None].float(), grid, "bilinear", "reflection", align_corners=True)[0]
            exact = torch.float32 if label.max() < 2**24 else torch.float64
            shifted = (label - IGNORE).to(exact)  # zero is what lies outside
            label = grid_sample(shifted[None], grid.to(exact), "nearest", "zeros", align_corners=True)[0] + IGNORE
        else:
            cut = mt.CenterSpatialCrop(self.roi_size)
            image, label = cut(image), cut(label)
        return {**data, "image": image.float(), "label": label.to(torch.int32)}


def sampling_transforms(
    roi_size: Sequence[int], num_samples: int = 1, strength: Strength = "heavy", **weights: float
) -> list[mt.Transform]:
    """Object-balanced patches of `roi_size` with the margin that `strength` needs. All before the crop is cached."""
    margins = [math.ceil(share * n) if strength in WARPS else 0 for share, n in zip(MARGIN, roi_size, strict=False)]
    patch_size = [n + 2 * m for n, m in zip(roi_size, margins, strict=True)]
    borders = [n for m in margins for n in (m, m + 1)]  # 1 more: MONAI never draws the last of the possible centers
    return [
        mt.SpatialPadd("image", roi_size, mode="symmetric"),
        mt.SpatialPadd("label", roi_size, mode="constant", value=IGNORE),
        mt.BorderPadd("image", borders, mode="symmetric"),
        mt.BorderPadd("label", borders, mode="constant", value=IGNORE),
        ObjectWeightMapd("label", "weight", patch_size=patch_size, **weights),
        mt.RandWeightedCropd(KEYS, "weight", patch_size, num_samples),
        mt.DeleteItemsd("weight"),
    ]


def spatial_transforms(roi_size: Sequence[int], strength: Strength = "heavy") -> list[mt.Transform]:
    """Flips, 90-degree rotations in the x-y plane (of square patches), and the warp of `strength`."""
    if strength == "none":
        return []
    flips: list[mt.Transform] = [mt.RandFlipd(KEYS, prob=0.5, spatial_axis=axis) for axis in range(len(roi_size))]
    if roi_size[0] == roi_size[1]:
        flips.append(mt.RandRotate90d(KEYS, prob=0.5, max_k=1, spatial_axes=(0, 1)))
    return flips + ([RandWarpd(roi_size, **WARPS[strength])] if strength in WARPS else [])


def intensity_transforms(roi_size: Sequence[int], strength: Strength = "heavy") -> list[mt.Transform]:
    """Uneven light, contrast, brightness, blur, noise; "light": half the strength, half as often.

    Gamma keeps mean and spread: it acts on the whole range of a patch, and a few outliers would turn the rest black.
    """
    if strength not in WARPS:
        return []
    s = 1.0 if strength == "heavy" else 0.5
    field: dict[str, Any] = {"rand_size": (4,) * len(roi_size), "gamma": (1 - 0.5 * s, 1 + 0.5 * s)}
    smooth = "bicubic" if len(roi_size) == 2 else "trilinear"
    blur: dict[str, Any] = {"sigma_x": (0.3, 1.5 * s), "sigma_y": (0.3, 1.5 * s), "sigma_z": (0.1, 0.5 * s)}
    return [
        mt.RandSmoothFieldAdjustIntensityd("image", roi_size, mode=smooth, prob=0.3 * s, **field),
        mt.RandAdjustContrastd("image", prob=0.5 * s, gamma=(1 - 0.4 * s, 1 + 0.8 * s), retain_stats=True),
        mt.RandScaleIntensityd("image", factors=0.4 * s, prob=0.5 * s),
        mt.RandShiftIntensityd("image", offsets=0.1 * s, prob=0.3 * s),
        mt.RandGaussianSmoothd("image", prob=0.25 * s, **blur),
        mt.RandGaussianNoised("image", prob=0.3 * s, std=0.1 * s),
    ]


def random_transforms(
    spatial_dims: int,
    roi_size: Sequence[int],
    num_samples: int = 1,
    strength: Strength = "heavy",
    background: float = 0.1,
    touching: float = 2.0,
    min_size: int = 5,
) -> list[mt.Transform]:
    """Everything random of the training pipeline, as a list: join it to the deterministic part in one Compose.

    Args:
        spatial_dims: 2 or 3.
        roi_size: shape of a patch (X, Y[, Z]) in pixels. Smaller images are padded: mirrored, label `IGNORE`.
        num_samples: patches per image and epoch.
        strength: "none" only samples, "flips" adds flips and 90-degree rotations, "light" and "heavy" add all the rest.
        background: see `object_weights`.
        touching: see `object_weights`.
        min_size: fragments of torn objects with fewer pixels are ignored.

    Returns:
        Transforms that give `num_samples` items of `image` (1, *roi_size), float32, and `label`, int32 instances; both
        are plain tensors, as the meta data could not say where a warped pixel comes from.
    """
    roi_size = tuple(int(n) for n in roi_size)
    if spatial_dims not in (2, 3) or len(roi_size) != spatial_dims:
        raise ValueError(f"Got spatial_dims {spatial_dims} and roi_size {roi_size}, expected 2 or 3 and as many sizes.")
    if strength not in ("none", "flips", *WARPS):
        raise ValueError(f"Got strength {strength!r}, expected one of 'none', 'flips', 'light', 'heavy'.")
    return [
        *sampling_transforms(roi_size, num_samples, strength, background=background, touching=touching),
        *spatial_transforms(roi_size, strength),
        RepairObjectsd("label", min_size=min_size),
        *intensity_transforms(roi_size, strength),
        mt.EnsureTyped(KEYS, dtype=(torch.float32, torch.int32), track_meta=False),
    ]
