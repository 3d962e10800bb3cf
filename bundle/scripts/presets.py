# SPDX-License-Identifier: Apache-2.0
"""The steps that every workflow shares, written once: from files to normalized images and valid instance labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.transforms import (
    EnsureTyped,
    LoadImaged,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentilesd,
    Transform,
)

from scripts.images import MicroscopyReader
from scripts.labels import AsInstancesd, MarkUnannotatedd

__all__ = ["load_transforms"]


def load_transforms(with_truth: bool = False, partial_truth: Mapping[str, Any] | None = None) -> list[Transform]:
    """Transforms from files to a normalized image and, on demand, its truth; the argument of a `Compose`.

    The image is scaled from its own percentiles 1 and 99.8 to 0 and 1, because intensities differ by orders of
    magnitude between microscopes, and clipped there, because hot pixels do too.

    Args:
        with_truth: load the keys "label" (instances, or a plain mask) and "markers" of the items that have them.
        partial_truth: arguments of `MarkUnannotatedd`, which takes an item's markers as a sign that its label is
            partial, and ignores what the label misses. None leaves both as they are, for the official measures.

    Returns:
        transforms from an item of paths to `image` (1, X, Y[, Z]) float32, `label` and `markers` (1, X, Y[, Z]) int32.
    """
    keys = ["image", "label", "markers"] if with_truth else ["image"]
    transforms: list[Transform] = [
        LoadImaged(keys, reader=MicroscopyReader, dtype=None, ensure_channel_first=True, allow_missing_keys=True),
        EnsureTyped("image", dtype=torch.float32),
        ScaleIntensityRangePercentilesd("image", lower=1, upper=99.8, b_min=0.0, b_max=1.0, clip=True),
        # where both percentiles are equal (an almost black image), the step before neither scales nor clips
        ScaleIntensityRanged("image", a_min=0.0, a_max=1.0, b_min=0.0, b_max=1.0, clip=True),
    ]
    if with_truth:
        transforms.append(AsInstancesd(["label", "markers"], allow_missing_keys=True))
    if partial_truth is not None:
        transforms.append(MarkUnannotatedd("label", markers_key="markers", **partial_truth))
    return transforms
