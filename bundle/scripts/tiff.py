# SPDX-License-Identifier: Apache-2.0
"""TIFF files of microscopes, ImageJ, OME and the Cell Tracking Challenge: exact pixels, or a clear refusal.

Decisions:
- `tifffile` reads. It needs `imagecodecs` for the LZW files of the Cell Tracking Challenge, which the bundle does not
  require: those pages are then decoded by Pillow and brought back to the data type that the file states.
- The voxel size is taken from OME or ImageJ metadata alone: the resolution tags of a plain TIFF are mostly a screen's.
- A file cut off between two pages would read as a shorter stack: the chain of pages is checked, and the file refused.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import tifffile
from PIL import Image

MICROMETERS = {
    "nm": 1e-3,
    "um": 1.0,
    "µm": 1.0,
    "μm": 1.0,
    "\\u00b5m": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "inch": 25400.0,
    "m": 1e6,
}  # an unknown unit ("pixel") counts as 1
LARGEST_IMAGEJ = 2**32 - 2**25  # bytes; above, TIFF needs 64-bit offsets, which ImageJ's own format does not have


class ImageError(ValueError):
    """An image file that cannot be used; the message names the file and says what to do."""


class ImageInfo(NamedTuple):
    """What a file says about its image; shape and voxel size in file order `([Z,] Y, X)`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    spacing: tuple[float, ...]
    color: bool  # RGB(A) in the file: the pixels are given as luminance


def tiff_info(path: Path) -> ImageInfo:
    """Shape, data type and voxel size of a TIFF file, from its headers alone.

    Raises:
        ImageError: where the file is cut off, or holds several channels, time points or images.
    """
    with tifffile.TiffFile(path) as tif:
        return _info(tif, path)


def read_tiff(path: Path) -> tuple[np.ndarray, ImageInfo]:
    """Pixels `([Z,] Y, X)` in the file's own data type, and what the file says about them.

    Raises:
        ImageError: as in `tiff_info`, and where the pixels cannot be decoded exactly.
    """
    with tifffile.TiffFile(path) as tif:
        info = _info(tif, path)
        axes, shape = _axes(tif, path)
        array = _pixels(tif, path).reshape(shape)
    if info.color:
        array = luminance(array, axes.index("S"))
    array = array.reshape(info.shape)
    if array.dtype == bool:
        return array.astype(np.uint8), info
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")), info


def write_tiff(path: Path, array: np.ndarray, spacing: tuple[float, ...]) -> None:
    """Write `([Z,] Y, X)` as zlib-compressed pages that ImageJ opens as an image or a stack.

    Args:
        path: file to write.
        array: u8, u16 or u32 pixels. ImageJ's metadata has no u32, so these (and huge files) carry OME metadata.
        spacing: voxel size per axis of `array`, in micrometers.
    """
    axes = "ZYX"[-array.ndim :]
    if array.dtype.itemsize <= 2 and array.nbytes < LARGEST_IMAGEJ:
        depth: dict[str, object] = {"spacing": spacing[0]} if array.ndim == 3 else {}
        resolution = (1 / spacing[-1], 1 / spacing[-2])
        metadata = depth | {"axes": axes, "unit": "um"}
        tifffile.imwrite(path, array, imagej=True, compression="zlib", resolution=resolution, metadata=metadata)
    else:
        metadata = {"axes": axes} | {f"PhysicalSize{axis}": size for axis, size in zip(axes, spacing, strict=True)}
        tifffile.imwrite(path, array, ome=True, compression="zlib", photometric="minisblack", metadata=metadata)


def luminance(array: np.ndarray, axis: int) -> np.ndarray:
    """Rec. 601 luminance of RGB(A) samples along `axis`; integers are rounded to their own type, alpha is left out."""
    red, green, blue = np.moveaxis(array, axis, 0)[:3].astype(np.float64)
    gray = 0.299 * red + 0.587 * green + 0.114 * blue
    return (np.rint(gray) if array.dtype.kind in "iu" else gray).astype(array.dtype)


def _info(tif: tifffile.TiffFile, path: Path) -> ImageInfo:
    _check_complete(tif, path)
    axes, shape = _axes(tif, path)
    color = _is_color(tif, axes, shape)
    kept = [(a, n) for a, n in zip(axes, shape, strict=True) if a in "YX" or (n > 1 and not (color and a == "S"))]
    names = "".join(a for a, _ in kept)
    if "T" in names:
        raise ImageError(
            f"{path}: a time series (axes {axes}, shape {shape}), expected one image or volume: save each frame as a "
            "file of its own; if it is a volume, save it with slices instead of frames (ImageJ: Image > Properties)"
        )
    if "C" in names or "S" in names:
        raise ImageError(
            f"{path}: several channels (axes {axes}, shape {shape}), expected one: save the channel to segment alone"
        )
    if names[-2:] != "YX" or len(names) > 3:
        raise ImageError(f"{path}: axes {axes}, shape {shape}, expected (Y, X) or (Z, Y, X): save one image per file")
    sizes = tuple(n for _, n in kept)
    return ImageInfo(sizes, tif.series[0].dtype, _spacing(tif)[-len(sizes) :], color)


def _axes(tif: tifffile.TiffFile, path: Path) -> tuple[str, tuple[int, ...]]:
    """Axis letters and lengths; pages that were appended one by one count as a stack."""
    first = tif.series[0]
    if len(tif.series) == 1:
        return first.axes, first.shape
    if any(s.shape != first.shape or s.dtype != first.dtype for s in tif.series):
        raise ImageError(f"{path}: {len(tif.series)} images of different kinds, expected one: save each as a file")
    return "I" + first.axes, (len(tif.series), *first.shape)


def _is_color(tif: tifffile.TiffFile, axes: str, shape: tuple[int, ...]) -> bool:
    photometric = tif.series[0].keyframe.photometric
    colored = photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)
    return colored and "S" in axes and shape[axes.index("S")] in (3, 4)


def _check_complete(tif: tifffile.TiffFile, path: Path) -> None:
    """Refuse a file that ends before its last page or its last pixel."""
    size = tif.filehandle.size
    end = tif.pages.next_page_offset if len(tif.pages) else None
    if end is not None:
        tif.filehandle.seek(end)
        tail = tif.filehandle.read(tif.tiff.offsetsize)
        chain_ends = len(tif.pages) and not any(tail)
        last = max((o + n for p in tif.pages for o, n in zip(p.dataoffsets, p.databytecounts, strict=True)), default=0)
        if chain_ends and last <= size:
            return
    raise ImageError(f"{path}: cut off or damaged ({size} bytes, pages are missing): copy or export the file again")


def _pixels(tif: tifffile.TiffFile, path: Path) -> np.ndarray:
    try:
        series = [one.asarray() for one in tif.series]
        return series[0] if len(series) == 1 else np.stack(series)
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
    pages = [page for one in tif.series for page in one.pages if page is not None]
    with Image.open(path) as image:
        return np.stack([_pillow_page(image, page, path) for page in pages])


def _pillow_page(image: Image.Image, page: tifffile.TiffPage | tifffile.TiffFrame, path: Path) -> np.ndarray:
    """One page by Pillow, in the data type of the file; refused where Pillow would change values."""
    image.seek(page.index)
    pixels, dtype = np.asarray(image), np.dtype(page.dtype)
    header = cast(tifffile.TiffPage, page.keyframe)
    inverts = header.photometric == tifffile.PHOTOMETRIC.MINISWHITE
    if inverts or pixels.shape != page.shape or pixels.dtype.itemsize < dtype.itemsize:
        raise ImageError(
            f"{path}: {header.compression!r} of {dtype} pixels needs the package imagecodecs: "
            "pip install imagecodecs, or save the file uncompressed"
        )
    return pixels.astype(dtype)


def _spacing(tif: tifffile.TiffFile) -> tuple[float, float, float]:
    """Voxel size (Z, Y, X) in micrometers where OME or ImageJ metadata give it, else 1."""
    if tif.is_ome and tif.ome_metadata:
        pixels = ElementTree.fromstring(tif.ome_metadata).find(".//{*}Pixels")
        return _ome_size(pixels, "Z"), _ome_size(pixels, "Y"), _ome_size(pixels, "X")
    if tif.imagej_metadata:
        return _imagej_sizes(tif.imagej_metadata, tif.pages.first.tags)
    return 1.0, 1.0, 1.0


def _ome_size(pixels: ElementTree.Element | None, axis: str) -> float:
    values = {} if pixels is None else pixels.attrib
    unit = values.get(f"PhysicalSize{axis}Unit", "µm")
    return _positive(values.get(f"PhysicalSize{axis}", 1)) * MICROMETERS.get(unit.lower(), 1.0)


def _imagej_sizes(metadata: dict, tags: tifffile.TiffTags) -> tuple[float, float, float]:
    unit = str(metadata.get("unit", "")).lower()
    sizes = [_positive(metadata.get("spacing", 1))]
    for name in ("YResolution", "XResolution"):
        pixels, length = tags[name].value if unit and name in tags else (1, 1)
        sizes.append(_positive(length / pixels if pixels else 1))
    z, y, x = (size * MICROMETERS.get(unit, 1.0) for size in sizes)
    return z, y, x


def _positive(value: str | float) -> float:
    """The number, or 1 where it is no voxel size (0, negative, infinite, text)."""
    try:
        number = abs(float(value))
    except ValueError:
        return 1.0
    return number if 0 < number < float("inf") else 1.0
