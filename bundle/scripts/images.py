# SPDX-License-Identifier: Apache-2.0
"""Read microscopy images, write instance masks: TIFF, PNG and NIfTI, 2D and 3D, without changing a value.

MONAI without ITK has no TIFF reader, and its PIL reader keeps the first page of a stack only, so the bundle brings a
reader, a writer and a naming rule that stock `LoadImaged` and `SaveImaged` accept.

Axes: files are `([Z,] Y, X)`, MONAI's arrays are `(X, Y[, Z])`. `read_image` and `write_labels` speak the order of the
file, `MicroscopyReader` and `LabelWriter` that of MONAI. Voxel sizes are micrometers for TIFF, the header's unit for
NIfTI, and 1 where the file does not say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

import nibabel
import numpy as np
from monai.config import DtypeLike, NdarrayOrTensor, PathLike
from monai.data import FolderLayoutBase, ImageReader, ImageWriter
from monai.data.utils import affine_to_spacing, is_no_channel
from monai.utils import MetaKeys, SpaceKeys, convert_data_type, ensure_tuple
from PIL import Image

from scripts.files import whole_file
from scripts.tiff import ImageError, ImageInfo, luminance, read_tiff, tiff_info, write_tiff

NIFTI = (".nii", ".nii.gz")
SUFFIXES = (".ome.tiff", ".ome.tif", ".tiff", ".tif", ".png", ".nii.gz", ".nii")  # longest first
CTC_FRAME = re.compile(r"t(\d{3,})", re.IGNORECASE)  # t000.tif in a folder 01
CTC_SEQUENCE = re.compile(r"\d{2}")
T = TypeVar("T")


def image_suffix(path: PathLike) -> str:
    """The known suffix of a file name in lower case (`.tif`, `.ome.tif`, `.nii.gz`, ...), or an empty string."""
    name = Path(path).name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def image_stem(path: PathLike) -> str:
    """The file name without its known suffix."""
    name = Path(path).name
    return name[: len(name) - len(image_suffix(name))]


def read_image(path: PathLike) -> tuple[np.ndarray, tuple[float, ...]]:
    """Read a TIFF, PNG or NIfTI file exactly.

    Color pictures (RGB, RGBA, color palette) give their luminance in the file's own data type (PNG: u8).

    Returns:
        Pixels `([Z,] Y, X)` in the data type of the file, and the voxel size in the same order.

    Raises:
        FileNotFoundError: where there is no such file.
        ImageError: (a ValueError) where it cannot be read as one gray image or volume.
    """
    array, info = load_image(path)
    return array, info.spacing


def load_image(path: PathLike) -> tuple[np.ndarray, ImageInfo]:
    """As `read_image`, with all that the file says about the image."""
    return _open(path, read_tiff, _read_png, _read_nifti)


def image_info(path: PathLike) -> ImageInfo:
    """Shape, data type and voxel size as `read_image` gives them, from the file's header alone."""
    return _open(path, tiff_info, lambda p: _read_png(p)[1], _nifti_info)


def _open(path: PathLike, tiff: Callable[[Path], T], png: Callable[[Path], T], nifti: Callable[[Path], T]) -> T:
    """Call the function for the file's format; whatever a decoder raises becomes an error that names the file."""
    path, suffix = Path(path), image_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if not suffix:
        raise ImageError(f"{path}: unknown file type, expected one of {', '.join(sorted(SUFFIXES))}")
    decoder = nifti if suffix in NIFTI else png if suffix == ".png" else tiff
    try:
        return decoder(path)
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        kind = type(error).__name__
        raise ImageError(f"{path}: cut off, damaged or no {suffix} ({kind}: {error}): copy it again") from error


def _read_png(path: Path) -> tuple[np.ndarray, ImageInfo]:
    with Image.open(path) as image:
        mode = image.mode
        gray = mode in ("1", "L", "LA") or mode.startswith("I")
        pixels = np.asarray(image if gray else image.convert("RGB"))
    if mode == "LA":
        pixels = pixels[..., 0]
    color = not gray and bool(np.ptp(pixels, axis=-1).any())  # a gray palette is no color picture
    array = pixels if gray else luminance(pixels, -1)
    array = array.astype(np.uint16 if mode.startswith("I") else np.uint8)  # Pillow may give 16 bits as int32
    return array, ImageInfo(array.shape, array.dtype, (1.0, 1.0), color)


def _load_nifti(path: PathLike) -> nibabel.Nifti1Image:
    return cast(nibabel.Nifti1Image, nibabel.load(path))


def _nifti_shape(path: Path, image: nibabel.Nifti1Image) -> tuple[int, ...]:
    """`(X, Y[, Z])` without the singleton axes that NIfTI writers append."""
    shape = image.shape
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (2, 3) or image.get_data_dtype().names:
        raise ImageError(f"{path}: shape {image.shape}, {image.get_data_dtype()}: expected one gray image or volume")
    return shape


def _nifti_info(path: Path) -> ImageInfo:
    image = _load_nifti(path)
    shape = _nifti_shape(path, image)
    spacing = tuple(float(size) for size in image.header.get_zooms()[: len(shape)])
    return ImageInfo(shape[::-1], image.get_data_dtype().newbyteorder("="), spacing[::-1], False)


def _read_nifti(path: Path) -> tuple[np.ndarray, ImageInfo]:
    image = _load_nifti(path)
    array = np.asanyarray(image.dataobj).reshape(_nifti_shape(path, image), order="F").T
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")), _nifti_info(path)


def write_labels(
    path: PathLike, labels: np.ndarray, spacing: Sequence[float] | None = None, affine: np.ndarray | None = None
) -> None:
    """Write instance labels as u16, or as u32 where a label is above 65535; whole or not at all.

    Args:
        path: `.tif` (zlib-compressed, opens in ImageJ), or `.nii` / `.nii.gz`. Missing folders are made.
        labels: `([Z,] Y, X)`, whole numbers from 0 (background) up.
        spacing: voxel size in the order of `labels`.
        affine: (4, 4), from (X, Y, Z) indices to the world; for NIfTI, where it takes the place of `spacing`.

    Raises:
        ValueError: where a label is negative, not a whole number or above 4294967295, or the file type is unknown.
    """
    path, suffix = Path(path), image_suffix(path)
    if suffix not in (".tif", ".tiff", *NIFTI):
        raise ValueError(f"{path}: cannot write labels as {path.suffix or 'this'}: use .tif, .nii or .nii.gz")
    labels = _as_unsigned(labels, path)
    spacing = tuple(float(size) for size in (spacing or (1.0,) * labels.ndim))
    with whole_file(path) as draft:
        if suffix in NIFTI:
            voxel = np.diag([*spacing[::-1], *(1.0,) * (4 - labels.ndim)])
            nibabel.save(nibabel.Nifti1Image(labels.T, voxel if affine is None else affine), draft)
        else:
            write_tiff(draft, labels, spacing)


def _as_unsigned(labels: np.ndarray, path: Path) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim not in (2, 3):
        raise ValueError(f"{path}: labels of shape {labels.shape}, expected (Y, X) or (Z, Y, X)")
    low, high = (labels.min(), labels.max()) if labels.size else (0, 0)
    if not (low >= 0 and high < 2**32) or not (labels.dtype.kind in "uib" or np.array_equal(labels, np.rint(labels))):
        raise ValueError(f"{path}: labels {low} to {high} ({labels.dtype}), expected whole numbers 0 to {2**32 - 1}")
    return labels.astype(np.uint16 if high < 2**16 else np.uint32)


def result_path(source: PathLike, output_dir: PathLike, postfix: str = "mask", ext: str | None = None) -> Path:
    """Where the result for an image belongs.

    A frame of the Cell Tracking Challenge, `.../01/t000.tif`, gives `<output_dir>/01_RES/mask000.tif`; any other image
    `<output_dir>/<stem>_mask.tif`, or `.nii.gz` where the image is NIfTI.
    """
    source = Path(os.path.abspath(source))
    stem, suffix = image_stem(source), image_suffix(source)
    ext = ext or (".nii.gz" if suffix in NIFTI else ".tif")
    frame = CTC_FRAME.fullmatch(stem)
    if frame and suffix in (".tif", ".tiff") and CTC_SEQUENCE.fullmatch(source.parent.name):
        return Path(output_dir) / f"{source.parent.name}_RES" / f"{postfix}{frame[1]}{ext}"
    return Path(output_dir) / f"{stem}_{postfix}{ext}"


class ResultLayout(FolderLayoutBase):
    """`result_path` in the form that `SaveImaged(folder_layout=...)` takes; it makes the folder."""

    def __init__(self, output_dir: PathLike, postfix: str = "mask", ext: str | None = None) -> None:
        self.output_dir = output_dir
        self.postfix = postfix
        self.ext = ext

    def filename(self, subject: PathLike = "subject", idx: int | None = None, **kwargs: object) -> str:
        """Path of the result for the image `subject`; `idx` numbers the patches of one image."""
        postfix = self.postfix if idx is None else f"{self.postfix}_{idx}"
        path = result_path(subject, self.output_dir, postfix, self.ext)
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)


class MicroscopyReader(ImageReader):
    """`read_image` for `LoadImaged`: arrays `(X, Y[, Z])` with the voxel size, or NIfTI's own affine, in the metadata.

    The file is opened in `get_data`, not in `read`: `LoadImage` answers an error in `read` by trying other readers, one
    of which would return the first page of a refused stack.
    """

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Whether all the files have a known suffix."""
        return all(image_suffix(name) for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: object) -> tuple[PathLike, ...]:
        """The file to read, as `get_data` takes it."""
        return ensure_tuple(data)

    def get_data(self, img: Sequence[PathLike] | PathLike) -> tuple[np.ndarray, dict]:
        """Pixels `(X, Y[, Z])` and MONAI's metadata of one file."""
        paths = ensure_tuple(img)
        if len(paths) != 1:
            raise ValueError(f"got {len(paths)} files for one image, expected one file with one channel: {paths}")
        array, info = load_image(paths[0])
        size = info.spacing[::-1]
        affine = np.diag([*size, *(1.0,) * (4 - len(size))])
        if image_suffix(paths[0]) in NIFTI:
            affine = np.array(_load_nifti(paths[0]).affine, dtype=np.float64)
        array = np.ascontiguousarray(array.T)
        return array, {
            MetaKeys.AFFINE: affine,
            MetaKeys.ORIGINAL_AFFINE: affine.copy(),
            MetaKeys.SPATIAL_SHAPE: np.asarray(array.shape),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan"),  # MONAI's sign for "no channel axis"
            "filename_or_obj": str(paths[0]),
        }


class LabelWriter(ImageWriter):
    """`write_labels` for `SaveImaged`: instance labels `(1, X, Y[, Z])` or `(X, Y[, Z])`.

    The labels choose the data type, so `output_dtype` is accepted and has no effect: u8 or float32 would change them.
    """

    def __init__(self, output_dtype: DtypeLike | None = None, scale: int | None = None, **kwargs: object) -> None:
        if scale is not None:
            raise ValueError(f"LabelWriter got scale={scale}: instance labels cannot be scaled, leave scale out")
        super().__init__(affine=None, channel_dim=0, spatial_ndim=None, squeeze_end_dims=True, **kwargs)

    def set_data_array(
        self, data_array: NdarrayOrTensor, channel_dim: int | None = 0, squeeze_end_dims: bool = True, **kwargs: object
    ) -> None:
        """Take the labels; `channel_dim` holds where the metadata do not tell the number of spatial axes."""
        self.data_obj = convert_data_type(data_array, np.ndarray)[0]
        self.channel_dim = None if is_no_channel(channel_dim) else channel_dim
        self.squeeze_end_dims = squeeze_end_dims

    def set_metadata(self, meta_dict: Mapping | None, resample: bool = False, **options: object) -> None:
        """Take the affine and the number of spatial axes of the source image."""
        if resample:
            raise ValueError("LabelWriter does not resample: set resample to false, and invert the transforms before")
        meta = meta_dict or {}
        shape, affine = meta.get(MetaKeys.SPATIAL_SHAPE), meta.get(MetaKeys.AFFINE)
        self.spatial_ndim = None if shape is None else len(shape)
        self.affine = None if affine is None else np.asarray(affine, dtype=np.float64)

    def write(self, filename: PathLike, verbose: bool = True, **kwargs: object) -> None:
        """Write `([Z,] Y, X)` to the file."""
        super().write(filename, verbose=verbose)
        labels = self._without_channel()
        while self.squeeze_end_dims and labels.ndim > 2 and labels.shape[-1] == 1:
            labels = labels[..., 0]
        spacing = None if self.affine is None else affine_to_spacing(self.affine, r=labels.ndim)[::-1]
        write_labels(filename, labels.T, None if spacing is None else tuple(spacing), self.affine)

    def _without_channel(self) -> np.ndarray:
        labels = np.asarray(self.data_obj)
        spatial_ndim = self.spatial_ndim or labels.ndim - (self.channel_dim is not None)
        if labels.ndim == spatial_ndim:
            return labels
        axis = self.channel_dim or 0  # SaveImage forgets the axis for good after one image without channel
        if labels.shape[axis] != 1:
            raise ValueError(f"got labels of shape {labels.shape}, expected one channel: (1, X, Y[, Z])")
        return np.take(labels, 0, axis=axis)
