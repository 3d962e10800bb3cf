# SPDX-License-Identifier: Apache-2.0
"""Synthetic fluorescence microscopy of touching nuclei, so that the bundle trains on a machine without any data.

`make_frame` draws one image with its exact instances; `ensure_dataset` writes a small set in the official layout of
the Cell Tracking Challenge (CTC) on first use. Sequence 01 is for training, 02 for validation. Frames are independent
of each other (variety is worth more than motion here), so each nucleus is a track of one frame in `man_track.txt`.

Model of the image: deformed ellipsoids that share contact borders but no pixel; chromatin texture with dark nucleoli;
own brightness per nucleus; uneven illumination; defocus blur and haze; photon (Poisson) noise, read (Gaussian) noise,
camera offset. All numbers are our own choice; nothing is fitted to a data set.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from scipy import ndimage

logger = logging.getLogger(__name__)

MANIFEST = "synthetic.json"
VERSION = 1  # raise it when the same parameters give other images
SHAPES = {2: (256, 256), 3: (20, 96, 96)}  # ([Z,] Y, X)
RADII = {2: ((7.0, 14.0), (7.0, 14.0)), 3: ((3.2, 4.8), (6.5, 10.5), (6.5, 10.5))}  # (low, high) in pixels per axis
MAX_OVERLAP = 0.18  # share of a nucleus that a neighbor may press away
MAX_TRIES = 12  # attempts to place a nucleus, per nucleus wanted


@dataclass
class _Scene:
    """Nuclei placed so far: instances, and the normalized radius within the owner of each pixel (1 at its edge)."""

    labels: np.ndarray  # int32, ([Z,] Y, X)
    radius: np.ndarray  # float32, ([Z,] Y, X)
    centers: list[np.ndarray]
    sizes: list[np.ndarray]


def _volume(half_axes: Sequence[float] | np.ndarray) -> float:
    """Pixels in an ellipse or ellipsoid."""
    return float(np.prod(half_axes)) * (np.pi if len(half_axes) == 2 else 4 / 3 * np.pi)


def _nucleus(
    rng: np.random.Generator, center: np.ndarray, size: np.ndarray, shape: Sequence[int]
) -> tuple[tuple[slice, ...], np.ndarray]:
    """Bounding box of a deformed, rotated ellipsoid, and the normalized radius in the box (float32, 1 at its edge)."""
    reach = np.ceil(np.r_[size[:-2], np.repeat(size[-2:].max(), 2)] * 1.25).astype(int)
    low = np.maximum(np.floor(center).astype(int) - reach, 0)
    high = np.minimum(np.floor(center).astype(int) + reach + 1, shape)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    *depth, y, x = (g - c for g, c in zip(np.ogrid[box], center, strict=True))
    turn = rng.uniform(0, np.pi)
    u, v = (np.cos(turn) * y + np.sin(turn) * x) / size[-2], (np.cos(turn) * x - np.sin(turn) * y) / size[-1]
    flat = np.hypot(u, v)
    angle = np.arctan2(u, v)
    edge = 1 + sum(rng.normal(0, 0.06 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5))
    squared = (flat / edge) ** 2
    for z, half_depth in zip(depth, size[:-2], strict=True):
        squared = squared + (z / half_depth) ** 2
    return box, np.sqrt(squared).astype(np.float32)


def _propose(rng: np.random.Generator, scene: _Scene, radii: Sequence[Sequence[float]], clustering: float) -> tuple:
    """Center and half axes of a further nucleus: beside a present one with probability `clustering`, else anywhere."""
    shape = scene.labels.shape
    size = np.array([rng.uniform(low, high) for low, high in radii])
    if not scene.centers or rng.random() > clustering:
        return rng.uniform(0, shape), size
    host = rng.integers(len(scene.centers))
    direction = rng.normal(size=len(shape))
    direction /= np.linalg.norm(direction)
    return scene.centers[host] + direction * (scene.sizes[host] + size) * rng.uniform(0.85, 0.98), size


def _place(rng: np.random.Generator, scene: _Scene, center: np.ndarray, size: np.ndarray) -> bool:
    """Add a nucleus unless it and its neighbors would overlap much, or one of them would fall into pieces."""
    if np.any(center < 0) or np.any(center >= scene.labels.shape):
        return False
    box, radius = _nucleus(rng, center, size, scene.labels.shape)
    labels, owner_radius = scene.labels[box], scene.radius[box]
    inside = radius < 1
    shared = inside & (labels > 0)
    smallest = min([inside.sum(), *(_volume(scene.sizes[i - 1]) for i in np.unique(labels[shared]))])
    if shared.sum() > MAX_OVERLAP * smallest:
        return False
    won = inside & (radius < owner_radius)
    trial = np.where(won, len(scene.centers) + 1, labels)
    if any(ndimage.label(trial == i)[1] != 1 for i in np.unique(trial[inside]) if i > 0):
        return False
    labels[won] = len(scene.centers) + 1
    owner_radius[won] = radius[won]
    scene.centers.append(center)
    scene.sizes.append(size)
    return True


def _smooth_noise(rng: np.random.Generator, shape: Sequence[int], sigma: float | Sequence[float]) -> np.ndarray:
    """Gaussian random field with zero mean, unit variance and the given correlation length in pixels, float32."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="reflect")
    return (field - field.mean()) / max(float(field.std()), 1e-6)


def _render(rng: np.random.Generator, scene: _Scene) -> np.ndarray:
    """Camera image (u16) of a scene."""
    shape = scene.labels.shape
    flatten = (0.4,) * (len(shape) - 2) + (1.0, 1.0)  # a slice is thicker than a pixel: shorter lengths along z
    brightness = np.r_[0, rng.lognormal(0, 0.35, len(scene.centers))].astype(np.float32)
    profile = 0.55 + 0.45 * np.sqrt(np.clip(1 - scene.radius**2, 0, 1))  # a nucleus is thinner at its edge
    texture = 1 + 0.16 * _smooth_noise(rng, shape, [1.3 * f for f in flatten])
    nucleoli = 1 - 0.35 * (_smooth_noise(rng, shape, [2.2 * f for f in flatten]) > 1.4)
    signal = brightness[scene.labels] * profile * np.clip(texture, 0.3, None) * nucleoli
    signal = ndimage.gaussian_filter(signal, [rng.uniform(0.7, 1.6) * f for f in flatten])
    haze = ndimage.gaussian_filter(signal, [12 * f for f in flatten])
    light = 1 + 0.2 * np.clip(_smooth_noise(rng, shape, [n / 3 for n in shape]), -2, 2)
    photons = rng.uniform(60, 250) * light * (signal + 0.35 * haze + rng.uniform(0.03, 0.12))
    gain, offset, read_noise = rng.uniform(4, 12), rng.uniform(100, 400), rng.uniform(2, 6)
    counts = gain * (rng.poisson(photons) + rng.normal(0, read_noise, shape)) + offset
    return np.clip(np.rint(counts), 0, np.iinfo(np.uint16).max).astype(np.uint16)


def make_frame(
    rng: np.random.Generator,
    shape: Sequence[int],
    coverage: tuple[float, float] = (0.15, 0.30),
    clustering: float = 0.7,
    radii: Sequence[Sequence[float]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image of touching nuclei with its exact instances.

    Args:
        rng: source of all randomness: the same state gives the same frame.
        shape: ([Z,] Y, X) in pixels; z is taken to be coarser than y and x.
        coverage: range of the share of pixels that lie in nuclei; crowded frames may stay below it.
        clustering: probability that a further nucleus is put beside a present one.
        radii: (low, high) of the half axes in pixels, one pair for each axis of `shape`; None for `RADII`.

    Returns:
        image (u16) and instance labels (u16, 0 is background, 1..N), both of `shape`. Instances never overlap, and each
        is one connected region.
    """
    if len(shape) not in RADII:
        raise ValueError(f"Got shape {tuple(shape)}, expected two (Y, X) or three (Z, Y, X) sizes in pixels.")
    radii = RADII[len(shape)] if radii is None else radii
    scene = _Scene(np.zeros(shape, np.int32), np.full(shape, np.inf, np.float32), [], [])
    typical = _volume([sum(r) / 2 for r in radii])
    wanted = max(1, round(rng.uniform(*coverage) * float(np.prod(shape)) / typical))
    for _ in range(MAX_TRIES * wanted):
        if len(scene.centers) == wanted:
            break
        _place(rng, scene, *_propose(rng, scene, radii, clustering))
    return _render(rng, scene), scene.labels.astype(np.uint16)


def make_markers(labels: np.ndarray) -> np.ndarray:
    """Inner half of each instance, by depth, as CTC's tracking markers: u16 of the same shape and ids as `labels`."""
    depth = np.zeros(labels.shape, np.float32)
    for i, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            inner = np.pad(labels[box] == i, 1)
            depth[box] += ndimage.distance_transform_edt(inner)[(slice(1, -1),) * labels.ndim] * (labels[box] == i)
    deepest = np.zeros(int(labels.max(initial=0)) + 1, np.float32)
    np.maximum.at(deepest, labels.ravel(), depth.ravel())
    return np.where(depth >= 0.5 * deepest[labels], labels, 0).astype(np.uint16)


def _write_tiff(path: Path, array: np.ndarray) -> None:
    tifffile.imwrite(path, array, compression="zlib", photometric="minisblack")


def _write_sequence(folder: Path, name: str, n_frames: int, shape: Sequence[int], seed: int) -> None:
    """Write images, SEG, TRA and man_track.txt of one sequence; a track's id is unique over all frames."""
    images, seg, tra = folder / name, folder / f"{name}_GT" / "SEG", folder / f"{name}_GT" / "TRA"
    for sub in (images, seg, tra):
        sub.mkdir(parents=True)
    tracks, used = [], 0
    for t in range(n_frames):
        image, labels = make_frame(np.random.default_rng([seed, int(name), t]), shape)
        if used + int(labels.max()) > np.iinfo(np.uint16).max:
            raise ValueError(f"More than 65535 nuclei in sequence {name}, too many for u16 tracks: lower `n_frames`.")
        markers = make_markers(labels)
        markers[markers > 0] += np.uint16(used)
        _write_tiff(images / f"t{t:03d}.tif", image)
        _write_tiff(seg / f"man_seg{t:03d}.tif", labels)
        _write_tiff(tra / f"man_track{t:03d}.tif", markers)
        tracks += [f"{used + i} {t} {t} 0" for i in range(1, int(labels.max()) + 1)]
        used += int(labels.max())
    (tra / "man_track.txt").write_text("\n".join(tracks) + "\n")


def _is_complete(path: Path, parameters: dict) -> bool:
    """Whether `path` holds this very set in full; a ValueError where it holds something else, which is not touched."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path} holds files but no {MANIFEST}: no synthetic set. Give another `path`, or empty it.")
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest["parameters"] != parameters:
        raise ValueError(
            f"{path} holds a synthetic set made with {manifest['parameters']}, expected {parameters}. "
            "Give another `path`, or delete that folder to have it made anew."
        )
    return all((path / file).is_file() for file in manifest["files"])


def _publish(temporary: Path, path: Path, parameters: dict) -> None:
    """Rename the finished set to its place; the first of several processes wins, all of them made the same files."""
    try:
        os.rename(temporary, path)
    except OSError:  # the folder is not empty
        if _is_complete(path, parameters):
            return
        logger.warning("%s is incomplete and is replaced.", path)
        os.rename(path, temporary.with_name("incomplete"))
        os.rename(temporary, path)


def ensure_dataset(
    path: str | os.PathLike,
    spatial_dims: int = 2,
    n_frames: int = 16,
    n_val_frames: int = 4,
    shape: Sequence[int] | None = None,
    seed: int = 0,
) -> str:
    """Make the synthetic set in CTC layout on first use, and do nothing where it is there already.

    Safe when many processes start at once: each writes to a temporary folder beside `path`, and a rename publishes it.

    Args:
        path: folder of the set; it must be absent, empty, or hold a synthetic set of the same parameters.
        spatial_dims: 2 or 3.
        n_frames: frames of sequence 01 (training).
        n_val_frames: frames of sequence 02 (validation).
        shape: size of a frame in pixels, ([Z,] Y, X); None for `SHAPES`.
        seed: the same seed gives the same set, pixel by pixel.

    Returns:
        `path` as a string.

    Raises:
        ValueError: `path` holds other files or a set of other parameters, or the arguments do not fit each other.
    """
    shape = tuple(shape or SHAPES.get(spatial_dims, ()))
    if spatial_dims not in SHAPES or len(shape) != spatial_dims:
        raise ValueError(f"Got spatial_dims {spatial_dims}, shape {shape}; expected 2 with (Y, X) or 3 with (Z, Y, X).")
    if min(n_frames, n_val_frames) < 1 or max(n_frames, n_val_frames) > 1000:
        raise ValueError(f"Got {n_frames} and {n_val_frames} frames, expected 1 to 1000 (names have three digits).")
    path = Path(path)
    parameters = {
        "version": VERSION,
        "shape": list(shape),
        "n_frames": n_frames,
        "n_val_frames": n_val_frames,
        "seed": seed,
    }
    if _is_complete(path, parameters):
        return str(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        made = work / "made"
        _write_sequence(made, "01", n_frames, shape, seed)
        _write_sequence(made, "02", n_val_frames, shape, seed)
        files = sorted(str(f.relative_to(made).as_posix()) for f in made.rglob("*") if f.is_file())
        (made / MANIFEST).write_text(json.dumps({"parameters": parameters, "files": files}, indent=1))
        _publish(made, path, parameters)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    logger.info("Synthetic data set of %d + %d frames in %s.", n_frames, n_val_frames, path)
    return str(path)
