# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import tifffile

from imagefiles import pixels, same
from scripts.images import (
    image_info,
    read_image,
)

DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"]


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7)])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiff_is_read_exactly(tmp_path, dtype, compression, shape):
    if compression == "lzw":
        pytest.importorskip("imagecodecs")
    array = pixels(dtype, shape)
    tifffile.imwrite(tmp_path / "a.tif", array, compression=compression, photometric="minisblack")
    read, spacing = read_image(tmp_path / "a.tif")
    assert same(read, array) and spacing == (1.0,) * len(shape)
    assert image_info(tmp_path / "a.tif").shape == shape


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_tiff_byte_order_becomes_native(tmp_path, byteorder):
    array = pixels("uint16", (5, 7))
    tifffile.imwrite(tmp_path / "a.tif", array, byteorder=byteorder)
    read, _ = read_image(tmp_path / "a.tif")
    assert same(read, array) and read.dtype.isnative


def test_tiff_pages_appended_one_by_one_are_a_volume(tmp_path):
    array = pixels("uint16", (3, 5, 7))
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for page in array:
            writer.write(page, compression="zlib")
    assert same(read_image(tmp_path / "a.tif")[0], array)


def hide_imagecodecs(monkeypatch) -> None:
    """Let tifffile find what it finds where imagecodecs is not installed."""
    from tifffile import _imagecodecs

    monkeypatch.setattr(tifffile.tifffile, "imagecodecs", _imagecodecs)
    for codecs in (tifffile.TIFF.DECOMPRESSORS, tifffile.TIFF.UNPREDICTORS):
        monkeypatch.setattr(
            codecs, "_codecs", {1: codecs._codecs[1]}
        )  # 1: not compressed; the others are looked up anew


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("01/t000.tif", "uint16"), ("01_GT/SEG/man_seg012.tif", "uint16"), ("01_GT/TRA/man_track000.tif", "uint16")],
)
def test_ctc_file_without_imagecodecs(real_data, monkeypatch, name, dtype):
    path = real_data / "ctc" / "Fluo-N2DL-HeLa" / name
    expected, _ = read_image(path)
    hide_imagecodecs(monkeypatch)
    with pytest.raises(ValueError, match="imagecodecs"):
        tifffile.imread(path)
    read, _ = read_image(path)
    assert same(read, expected) and read.dtype == dtype


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32"])
@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7)])
def test_lzw_without_imagecodecs(tmp_path, monkeypatch, dtype, shape):
    pytest.importorskip("imagecodecs")
    array = pixels(dtype, shape)
    tifffile.imwrite(tmp_path / "a.tif", array, compression="lzw", photometric="minisblack")
    hide_imagecodecs(monkeypatch)
    assert same(read_image(tmp_path / "a.tif")[0], array)


@pytest.mark.parametrize(("dtype", "photometric"), [("uint8", "miniswhite"), ("float64", "minisblack")])
def test_lzw_that_pillow_would_change_is_refused(tmp_path, monkeypatch, dtype, photometric):
    pytest.importorskip("imagecodecs")
    tifffile.imwrite(tmp_path / "a.tif", pixels(dtype, (5, 7)), compression="lzw", photometric=photometric)
    hide_imagecodecs(monkeypatch)
    with pytest.raises(ValueError, match="a.tif"):
        read_image(tmp_path / "a.tif")


def test_reading_and_writing_in_a_python_without_imagecodecs(tmp_path, bundle, real_data):
    source = real_data / "ctc" / "DIC-C2DH-HeLa" / "01_GT" / "SEG" / "man_seg002.tif"
    code = (
        "import sys; sys.modules['imagecodecs'] = None\n"
        "from scripts.tiff import read_tiff, write_tiff\n"
        f"labels, _ = read_tiff({str(source)!r}); write_tiff('out.tif', labels, (1.0, 1.0))\n"
        "assert (read_tiff('out.tif')[0] == labels).all() and labels.dtype == 'uint16' and labels.max() > 0\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(bundle)}, check=True)


SPACINGS = [
    (
        "imagej, um",
        {"imagej": True, "resolution": (2, 4), "metadata": {"axes": "ZYX", "spacing": 3, "unit": "um"}},
        (3, 0.25, 0.5),
    ),
    (
        "imagej, mm",
        {"imagej": True, "resolution": (2, 4), "metadata": {"axes": "ZYX", "spacing": 3, "unit": "mm"}},
        (3000, 250, 500),
    ),
    ("imagej, no unit", {"imagej": True, "resolution": (72, 72), "metadata": {"axes": "ZYX", "spacing": 2}}, (2, 1, 1)),
    ("imagej, nothing", {"imagej": True, "metadata": {"axes": "ZYX"}}, (1, 1, 1)),
    ("plain, 72 dpi", {"resolution": (72, 72), "resolutionunit": "INCH"}, (1, 1, 1)),
    (
        "ome",
        {"ome": True, "metadata": {"axes": "ZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25, "PhysicalSizeZ": 2}},
        (2, 0.25, 0.5),
    ),
    (
        "ome, nm",
        {"ome": True, "metadata": {"axes": "ZYX", "PhysicalSizeX": 500, "PhysicalSizeXUnit": "nm"}},
        (1, 1, 0.5),
    ),
]


@pytest.mark.parametrize(("options", "spacing"), [case[1:] for case in SPACINGS], ids=[case[0] for case in SPACINGS])
def test_spacing_only_from_ome_and_imagej(tmp_path, options, spacing):
    tifffile.imwrite(tmp_path / "a.tif", pixels("uint16", (3, 5, 7)), photometric="minisblack", **options)
    assert read_image(tmp_path / "a.tif")[1] == pytest.approx(spacing)


def test_singleton_time_and_channel_axes_are_dropped(tmp_path):
    array = pixels("uint16", (1, 3, 1, 5, 7))
    tifffile.imwrite(tmp_path / "a.tif", array, imagej=True, metadata={"axes": "TZCYX"})
    assert same(read_image(tmp_path / "a.tif")[0], array[0, :, 0])


@pytest.mark.parametrize(("axes", "word"), [("TYX", "time series"), ("CYX", "channels"), ("TZYX", "time series")])
def test_tiff_axes_that_are_refused(tmp_path, axes, word):
    shape = {"T": 2, "C": 3, "Z": 4, "Y": 5, "X": 7}
    array = pixels("uint16", tuple(shape[axis] for axis in axes))
    tifffile.imwrite(tmp_path / "a.tif", array, imagej=True, metadata={"axes": axes})
    for read in (read_image, image_info):
        with pytest.raises(ValueError, match=rf"a\.tif.*{word}"):
            read(tmp_path / "a.tif")


@pytest.mark.parametrize("keep", [0.99, 0.6, 0.3, 0.02])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_truncated_tiff_names_the_file(tmp_path, compression, keep):
    path = tmp_path / "cut.tif"
    noise = np.random.default_rng(0).integers(0, 65535, (5, 40, 40), dtype=np.uint16)
    with tifffile.TiffWriter(path) as writer:
        for page in noise:  # tables between the pixels: without a check, 0.6 reads as a stack of 3
            writer.write(page, compression=compression, metadata=None)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    for read in (read_image, image_info):
        with pytest.raises(ValueError, match="cut.tif"):
            read(path)
