# SPDX-License-Identifier: Apache-2.0
"""Look at what the network is trained on: a sheet of augmented patches with the outlines of their objects.

    python -m scripts.contact_sheet --dataset_dir DIR --output sheet.png

Each row is another image. The first column is a patch as it is, the others are random changes of the same patch.
Objects have a yellow outline, ignored pixels are tinted blue. Of a volume the middle slice is shown.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import fire
import monai.transforms as mt
import numpy as np
from PIL import Image
from skimage.segmentation import find_boundaries

from scripts.augment import Strength, intensity_transforms, sampling_transforms, spatial_transforms
from scripts.datalists import make_datalist
from scripts.labels import RepairObjectsd
from scripts.presets import load_transforms

logger = logging.getLogger(__name__)

ROI_SIZES = {2: (192, 192), 3: (64, 64, 16)}
CELL = 192  # pixels of one patch on the sheet, at least
GAP = 4  # pixels between patches
OUTLINE = (255, 200, 0)
TINT = (40, 90, 255)  # of ignored pixels


def draw_patch(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Picture (Y, X, 3), u8, of an image (X, Y[, Z]), about 0 to 1, with its instances; middle slice of a volume."""
    if image.ndim == 3:
        image, labels = (array[..., array.shape[-1] // 2] for array in (image, labels))
    repeat = -(-CELL // max(image.shape))
    image, labels = (array.T.repeat(repeat, 0).repeat(repeat, 1) for array in (image, labels))
    picture = np.repeat(np.clip(image, 0, 1)[..., None] * 255, 3, axis=2)
    ignored = labels < 0
    picture[ignored] = 0.6 * picture[ignored] + 0.4 * np.array(TINT)
    objects = np.maximum(labels, 0)
    picture[find_boundaries(objects, mode="inner", connectivity=1) & (objects > 0)] = OUTLINE
    return picture.astype(np.uint8)


def draw_row(
    item: Mapping[str, str], roi_size: Sequence[int], cols: int, strength: Strength, seed: int
) -> list[np.ndarray]:
    """Pictures of one patch of an image: as it is, then `cols` - 1 times augmented."""
    load = load_transforms(with_truth=True, partial_truth={})
    sample = mt.Compose([*load, *sampling_transforms(roi_size, 1, strength)]).set_random_state(seed)
    augment = mt.Compose(
        [*spatial_transforms(roi_size, strength), RepairObjectsd("label"), *intensity_transforms(roi_size, strength)]
    ).set_random_state(seed)
    patch = sample(dict(item))[0]
    untouched = mt.CenterSpatialCropd(["image", "label"], roi_size)(patch)
    items = [untouched, *(augment(patch) for _ in range(cols - 1))]
    return [draw_patch(np.asarray(i["image"])[0], np.asarray(i["label"])[0]) for i in items]


def contact_sheet(
    dataset_dir: str,
    output: str,
    spatial_dims: int = 2,
    rows: int = 4,
    cols: int = 6,
    roi_size: Sequence[int] | None = None,
    strength: Strength = "heavy",
    seed: int = 0,
) -> str:
    """Write a sheet of augmented patches as a picture.

    Args:
        dataset_dir: a data set as `make_datalist` reads it; its training images are shown.
        output: file of the picture, such as sheet.png.
        spatial_dims: 2 or 3.
        rows: images, spread evenly over the data set.
        cols: patches per image.
        roi_size: shape of a patch (X, Y[, Z]) in pixels; None for `ROI_SIZES`.
        strength: "none", "flips", "light" or "heavy".
        seed: another one gives other patches.

    Returns:
        `output`.
    """
    roi_size = tuple(roi_size or ROI_SIZES[spatial_dims])
    if len(roi_size) != spatial_dims:
        raise ValueError(f"Got roi_size {roi_size} for spatial_dims {spatial_dims}, expected {spatial_dims} sizes.")
    items = make_datalist(dataset_dir, "training", spatial_dims, check=False)
    chosen = [items[i] for i in np.linspace(0, len(items) - 1, min(rows, len(items))).round().astype(int)]
    border = ((0, GAP), (0, GAP), (0, 0))
    lines = [
        np.hstack([np.pad(p, border) for p in draw_row(item, roi_size, cols, strength, seed + row)])
        for row, item in enumerate(chosen)
    ]
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.vstack(lines)).save(output)
    logger.info("%d x %d patches of %s in %s", len(lines), cols, dataset_dir, output)
    return output


if __name__ == "__main__":
    fire.Fire(contact_sheet)
