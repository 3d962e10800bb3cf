# SPDX-License-Identifier: Apache-2.0
"""Pictures to check a segmentation by eye: the image in gray, instances as colored outlines, the truth dashed white.

Everything here is our decision. Outlines lie on the inside of the objects, so touching objects show two lines of two
colors. Small images are enlarged by a whole factor, so that a line is thinner than a pixel of the image. A volume is
shown as its maximum projections along z, y and x, each to scale.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter
from skimage.segmentation import expand_labels
from skimage.transform import resize

from scripts.evaluation import short_names, source_path
from scripts.files import write_whole
from scripts.labels import as_label_array

PALETTE = np.array(
    [
        (255, 70, 70),
        (60, 220, 60),
        (80, 160, 255),
        (255, 220, 0),
        (255, 80, 255),
        (0, 230, 230),
        (255, 150, 30),
        (170, 130, 255),
        (190, 255, 120),
        (255, 160, 190),
    ],
    dtype=np.uint8,
)
TRUTH_COLOR = (255, 255, 255)
PERCENTILES = (0.5, 99.5)  # of the pixels, shown as black and white
MEAN_GRAY = 0.25  # darker pictures are lifted to this mean
SMALL, LARGE = 800, 1000  # pixels: longer sides below SMALL are enlarged to LARGE at least
DASH = 5  # pixels
NEIGHBORHOOD = 4  # pixels of the image: objects with a gap of up to twice this get different colors
GAP = 4  # pixels between the projections


class View(NamedTuple):
    """A plane to draw: gray values (H, W), labels of the same shape, and how often to repeat rows and columns."""

    image: np.ndarray
    labels: Sequence[np.ndarray]
    rows: int
    columns: int


def draw_overlay(
    image: np.ndarray,
    instances: np.ndarray,
    truth: np.ndarray | None = None,
    spacing: Sequence[float] | None = None,
) -> np.ndarray:
    """Draw outlines of instances, and of the truth, onto an image.

    Args:
        image: gray values `([Z,] Y, X)`.
        instances: object ids of the same shape, 0 background.
        truth: true ids of the same shape, values below 1 are not drawn.
        spacing: size of a voxel along the axes, in any unit; equal by default. A 2D picture has square pixels anyway.

    Returns:
        (H, W, 3) RGB picture, uint8.

    Raises:
        ValueError: the shapes differ, or are not 2D or 3D, or the spacing does not fit them.
    """
    labels = [instances] if truth is None else [instances, truth]
    if image.ndim not in (2, 3) or any(label.shape != image.shape for label in labels):
        shapes = ", ".join(str(label.shape) for label in labels)
        raise ValueError(f"image is {image.shape}, labels are {shapes}; expected one shape, (Y, X) or (Z, Y, X)")
    if spacing is not None and (len(spacing) != image.ndim or min(spacing) <= 0):
        raise ValueError(f"spacing is {tuple(spacing)}, expected {image.ndim} positive sizes, one per axis")
    labels = [_ranked(label) for label in labels]
    if image.ndim == 2:
        views = [_plane(image, labels)]
    else:
        views = _projections(image, labels, np.array(spacing or (1.0, 1.0, 1.0)))
    pairs = np.concatenate([neighbors(view.labels[0]) for view in views])
    colors = pick_colors(pairs, int(labels[0].max(initial=0)))
    pictures = [_draw(view, colors) for view in views]
    return _arrange(*pictures) if image.ndim == 3 else pictures[0]


def stretch_contrast(image: np.ndarray) -> np.ndarray:
    """Map gray values to [0, 1], from the 0.5th to the 99.5th percentile, and brighten what would be dark.

    Brightening is by a power (gamma) that brings the mean to `MEAN_GRAY`, if it is below. An image of one value is
    black.
    """
    low, high = np.percentile(image, PERCENTILES)
    if high <= low:
        low, high = image.min(), max(image.max(), image.min() + 1e-6)
    gray = np.clip((image.astype(np.float32) - low) / (high - low), 0, 1)
    mean = float(gray.mean())
    return gray if mean in (0, 1) else gray ** np.clip(np.log(MEAN_GRAY) / np.log(mean), 0.4, 1)


def neighbors(labels: np.ndarray) -> np.ndarray:
    """(K, 2) pairs of ids, ascending, of the objects of a label image (H, W) that touch or almost do."""
    grown = expand_labels(labels, NEIGHBORHOOD)
    one = np.concatenate([grown[1:].ravel(), grown[:, 1:].ravel()])
    other = np.concatenate([grown[:-1].ravel(), grown[:, :-1].ravel()])
    pairs = np.sort(np.stack([one, other], axis=1)[(one != other) & (one > 0) & (other > 0)], axis=1)
    return np.unique(pairs, axis=0)


def pick_colors(pairs: np.ndarray, count: int) -> np.ndarray:
    """Index into `PALETTE` for each id 0..count: different for the ids of a pair, as long as ten colors suffice."""
    earlier: dict[int, list[int]] = {}
    for low, high in pairs.tolist():
        earlier.setdefault(high, []).append(low)
    colors = np.zeros(count + 1, dtype=np.int64)
    for label in range(1, count + 1):
        taken = {int(colors[other]) for other in earlier.get(label, [])}
        order = [(label + i) % len(PALETTE) for i in range(len(PALETTE))]
        colors[label] = next((color for color in order if color not in taken), order[0])
    return colors


class OverlaySaver:
    """Handler that saves `<stem>_overlay.png` for each image of an evaluator, `01_t000_overlay.png` for a CTC frame.

    Reads decollated outputs: dicts with `image` (1, X, Y[, Z]) and `pred` (ids, with or without the channel), and
    draws `label` as truth, where there is one. The voxel size is that of the image.
    """

    def __init__(self, output_dir: str, max_images: int | None = None) -> None:
        """Keep the arguments.

        Args:
            output_dir: made where it is missing.
            max_images: number of images per run and process; all by default.
        """
        self.output_dir = Path(output_dir)
        self.max_images = max_images
        self._sources: list[str] = []

    def attach(self, engine: Engine) -> None:
        """Save after each iteration."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def _start(self, engine: Engine) -> None:
        self._sources = []

    def __call__(self, engine: Engine) -> None:
        """Draw the images of an iteration."""
        output: Any = engine.state.output
        for item in output:
            if self.max_images is not None and len(self._sources) >= self.max_images:
                return
            source = source_path(item) or f"image{len(self._sources)}"
            self._sources.append(source)
            try:
                picture = draw_overlay(*_as_files_have_it(item))
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from error
            png = io.BytesIO()
            Image.fromarray(picture).save(png, format="PNG")
            stem = short_names(self._sources)[-1].replace("/", "_")
            write_whole(self.output_dir / f"{stem}_overlay.png", png.getvalue())


def _as_files_have_it(
    item: Mapping[str, Any],
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, list[float] | None]:
    """Image, prediction, truth and spacing of an item, in the order of files and on the prediction's grid."""
    image = item["image"]
    gray = torch.as_tensor(image).detach().cpu().float().numpy().mean(axis=0)
    pred = as_label_array(item["pred"])
    pred = pred[0] if pred.ndim == gray.ndim + 1 and len(pred) == 1 else pred
    truth = None if item.get("label") is None else as_label_array(item["label"])[0]
    sizes = image.pixdim[: gray.ndim].numpy() if isinstance(image, MetaTensor) else np.ones(gray.ndim)
    if pred.ndim == gray.ndim and pred.shape != gray.shape:  # the prediction is back on the grid of the file
        sizes = sizes * gray.shape / pred.shape
        gray = resize(gray, pred.shape, order=1, anti_aliasing=False)
    spacing = [float(size) for size in sizes[::-1]] if gray.ndim == 3 else None
    return gray.T, pred.T, None if truth is None else truth.T, spacing


def _enlargement(side: float) -> int:
    """Whole factor for a picture whose longer side is this many pixels."""
    return 1 if side >= SMALL else int(min(np.ceil(LARGE / side), 16))


def _ranked(labels: np.ndarray) -> np.ndarray:
    """Ids replaced by their rank, 0..N, without values below 1."""
    ranks = np.unique(np.append(np.maximum(labels, 0), 0), return_inverse=True)[1]
    return ranks[:-1].reshape(labels.shape).astype(np.int32)


def _plane(image: np.ndarray, labels: Sequence[np.ndarray]) -> View:
    factor = _enlargement(max(image.shape))
    return View(image, labels, factor, factor)


def _projections(image: np.ndarray, labels: Sequence[np.ndarray], spacing: np.ndarray) -> list[View]:
    """Views of a volume `(Z, Y, X)` along z (Y, X), along x (Y, Z), and along y (Z, X), all to one scale."""
    units = spacing / spacing.min()
    depth, height, width = np.array(image.shape) * units
    factors = np.maximum(1, np.rint(_enlargement(depth + max(height, width)) * units)).astype(int).tolist()
    along_z, along_y, along_x = ([image.max(axis), *(_front(label, axis) for label in labels)] for axis in range(3))
    along_x = [part.T for part in along_x]
    scales = ((factors[1], factors[2]), (factors[1], factors[0]), (factors[0], factors[2]))
    return [View(v[0], v[1:], *scale) for v, scale in zip((along_z, along_x, along_y), scales, strict=True)]


def _front(labels: np.ndarray, axis: int) -> np.ndarray:
    """The first object along an axis at each place, as seen from its beginning."""
    first = np.expand_dims((labels > 0).argmax(axis=axis), axis)
    return np.take_along_axis(labels, first, axis=axis).squeeze(axis)


def _draw(view: View, colors: np.ndarray) -> np.ndarray:
    """The enlarged gray picture of a view with its outlines."""
    shape = (view.image.shape[0] * view.rows, view.image.shape[1] * view.columns)
    gray = resize(stretch_contrast(view.image), shape, order=1)
    picture = np.repeat(np.rint(255 * gray).astype(np.uint8)[..., None], 3, axis=2)
    instances, *truths = (np.kron(label, np.ones((view.rows, view.columns), dtype=np.int32)) for label in view.labels)
    line = _outline(instances, width=min(2, view.rows, view.columns))
    picture[line] = PALETTE[colors[instances[line]]]
    dash = np.add.outer(np.arange(shape[0]), np.arange(shape[1])) // DASH % 2 == 0
    for truth in truths:
        picture[_outline(truth, width=1) & dash] = TRUTH_COLOR
    return picture


def _outline(labels: np.ndarray, width: int) -> np.ndarray:
    """Pixels of objects that are within `width` pixels of something else; the edge of the picture is nothing."""
    size = 2 * width + 1
    return (labels > 0) & (maximum_filter(labels, size) != minimum_filter(labels, size))


def _arrange(top: np.ndarray, right: np.ndarray, below: np.ndarray) -> np.ndarray:
    """One picture of three: the second beside the first, the third below it."""
    height, width = top.shape[0] + GAP, top.shape[1] + GAP
    picture = np.zeros((height + below.shape[0], width + right.shape[1], 3), dtype=np.uint8)
    picture[: top.shape[0], : top.shape[1]] = top
    picture[: top.shape[0], width:] = right
    picture[height:, : top.shape[1]] = below
    return picture
