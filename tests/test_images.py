# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose, LoadImage, LoadImaged, SaveImaged
from PIL import Image

from imagefiles import pixels, same
from scripts.images import (
    LabelWriter,
    MicroscopyReader,
    ResultLayout,
    image_info,
    read_image,
    result_path,
    write_labels,
)

LABELS_2D = np.array([[0, 1, 1], [2, 0, 300]])
LABELS_3D = np.stack([LABELS_2D, LABELS_2D * 2, LABELS_2D * 0, LABELS_2D])  # 4 x 2 x 3
SAVE = {"keys": "pred", "writer": "scripts.images.LabelWriter", "output_dtype": None, "print_log": False}


@pytest.mark.parametrize("name", ["cut.png", "cut.nii", "cut.nii.gz", "text.tif", "text.png", "text.nii.gz"])
def test_broken_files_name_the_file(tmp_path, name):
    path = tmp_path / name
    if name.startswith("cut"):
        array = np.random.default_rng(0).integers(0, 255, (40, 40), dtype=np.uint8)
        Image.fromarray(array).save(path) if name.endswith("png") else nibabel.save(
            nibabel.Nifti1Image(array, None), path
        )
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_text("no image")
    with pytest.raises(ValueError, match=name):
        read_image(path)


def test_missing_file_and_unknown_type(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.tif"):
        read_image(tmp_path / "none.tif")
    (tmp_path / "a.czi").touch()
    with pytest.raises(ValueError, match=r"a\.czi.*\.tif"):
        read_image(tmp_path / "a.czi")


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_gray_png_is_read_exactly(tmp_path, dtype):
    array = pixels(dtype, (5, 7))
    Image.fromarray(array).save(tmp_path / "a.png")
    assert same(read_image(tmp_path / "a.png")[0], array)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("channels", [3, 4])
def test_color_gives_luminance(tmp_path, name, channels):
    color = np.zeros((2, 2, channels), np.uint8)
    color[0, 0, :3], color[0, 1, :3], color[1, 0, :3], color[1, 1, :3] = (255, 0, 0), (0, 255, 0), (0, 0, 255), 200
    Image.fromarray(color).save(tmp_path / name)
    read, _ = read_image(tmp_path / name)
    assert same(read, np.array([[76, 150], [29, 200]], np.uint8))  # 255 x 0.299, 0.587, 0.114
    assert image_info(tmp_path / name).color


@pytest.mark.parametrize(
    ("shape", "file_shape"), [((4, 3), (3, 4)), ((4, 3, 1), (3, 4)), ((4, 3, 2), (2, 3, 4)), ((4, 3, 2, 1), (2, 3, 4))]
)
def test_nifti_axes_and_spacing(tmp_path, shape, file_shape):
    array = pixels("int16", shape)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([0.5, 0.25, 2, 1])), tmp_path / "a.nii.gz")
    read, spacing = read_image(tmp_path / "a.nii.gz")
    assert same(read, array.reshape(file_shape[::-1], order="F").T)
    assert spacing == (2, 0.25, 0.5)[-len(file_shape) :]
    assert image_info(tmp_path / "a.nii.gz").shape == file_shape


def test_nifti_with_channels_is_refused(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 3, 2, 2), np.uint8), None), tmp_path / "a.nii")
    with pytest.raises(ValueError, match=r"a\.nii.*\(4, 3, 2, 2\)"):
        read_image(tmp_path / "a.nii")


def test_reader_gives_monai_axes_and_affine(tmp_path):
    array = pixels("uint16", (3, 5, 7))
    metadata = {"axes": "ZYX", "spacing": 3, "unit": "um"}
    tifffile.imwrite(tmp_path / "a.tif", array, imagej=True, resolution=(2, 4), metadata=metadata)
    reader = MicroscopyReader()
    alone, meta = reader.get_data(reader.read(tmp_path / "a.tif"))
    assert same(alone, array.T) and meta["filename_or_obj"] == str(tmp_path / "a.tif")
    loaded = LoadImage(reader="scripts.images.MicroscopyReader", ensure_channel_first=True, dtype=None)(
        tmp_path / "a.tif"
    )
    assert loaded.shape == (1, 7, 5, 3) and np.array_equal(loaded[0], array.T)
    assert not loaded.is_floating_point()  # MONAI holds u16 as int32: torch computes little with u16
    np.testing.assert_allclose(loaded.affine, np.diag([0.5, 0.25, 3, 1]))


def test_reader_keeps_the_affine_of_nifti(tmp_path):
    affine = np.array([[0, -2, 0, 5], [1, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]], float)
    array = pixels("float32", (4, 3, 2, 1))
    nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / "a.nii.gz")
    loaded = LoadImage(reader="scripts.images.MicroscopyReader", ensure_channel_first=True)(tmp_path / "a.nii.gz")
    assert np.array_equal(loaded, array[None, ..., 0])
    np.testing.assert_array_equal(loaded.affine, affine)


def test_refused_file_is_not_read_by_another_reader(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", pixels("uint8", (3, 5, 7)), imagej=True, metadata={"axes": "TYX"})
    with pytest.raises(ValueError, match="time series"):
        LoadImage(reader="scripts.images.MicroscopyReader")(tmp_path / "a.tif")


def test_reader_refuses_several_files(tmp_path):
    with pytest.raises(ValueError, match="2 files"):
        MicroscopyReader().get_data((tmp_path / "a.tif", tmp_path / "b.tif"))


def test_reader_in_worker_processes(tmp_path):
    items = []
    for number, shape in enumerate([(5, 7)] * 4):
        tifffile.imwrite(tmp_path / f"{number}.tif", np.full(shape, number, np.uint8))
        items.append({"image": str(tmp_path / f"{number}.tif")})
    load = LoadImaged("image", reader="scripts.images.MicroscopyReader", ensure_channel_first=True)
    batches = list(DataLoader(Dataset(items, load), batch_size=2, num_workers=1))
    assert [tuple(batch["image"].shape) for batch in batches] == [(2, 1, 7, 5)] * 2
    assert [int(value) for batch in batches for value in batch["image"].amax((1, 2, 3))] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["a.tif", "a.tiff", "a.nii", "a.nii.gz"])
@pytest.mark.parametrize("labels", [LABELS_2D, LABELS_3D], ids=["2D", "3D"])
@pytest.mark.parametrize(("largest", "dtype"), [(65535, "uint16"), (65536, "uint32"), (2**32 - 1, "uint32")])
def test_labels_survive_writing(tmp_path, name, labels, largest, dtype):
    labels = np.where(labels == 300, largest, labels)
    spacing = (2.0, 0.25, 0.5)[-labels.ndim :]
    write_labels(tmp_path / "new" / name, labels, spacing)
    read, read_spacing = read_image(tmp_path / "new" / name)
    assert same(read, labels.astype(dtype)) and read_spacing == pytest.approx(spacing)
    assert [p.name for p in (tmp_path / "new").iterdir()] == [name]


def test_label_tiff_is_compressed_and_an_imagej_stack(tmp_path):
    write_labels(tmp_path / "a.tif", LABELS_3D)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        assert tif.imagej_metadata["slices"] == 4 and len(tif.pages) == 4
        assert tif.pages[0].compression == tifffile.COMPRESSION.ADOBE_DEFLATE


@pytest.mark.parametrize("bad", [-1, 0.5, np.nan, np.inf, 2**32])
def test_labels_that_would_change_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match=r"a\.tif.*whole numbers"):
        write_labels(tmp_path / "a.tif", np.array([[0, bad]]))
    assert not list(tmp_path.iterdir())


def test_failed_writing_keeps_the_old_file(tmp_path, monkeypatch):
    write_labels(tmp_path / "a.tif", LABELS_2D)

    def fail(path: Path, *args: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("scripts.images.write_tiff", fail)
    with pytest.raises(OSError, match="disk full"):
        write_labels(tmp_path / "a.tif", LABELS_3D)
    assert np.array_equal(read_image(tmp_path / "a.tif")[0], LABELS_2D)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


@pytest.mark.parametrize(
    ("source", "postfix", "ext", "expected"),
    [
        ("/d/01/t000.tif", "mask", None, "out/01_RES/mask000.tif"),
        ("/d/02/t1234.TIF", "mask", None, "out/02_RES/mask1234.tif"),
        ("/d/01/t000.tif", "overlay", ".png", "out/01_RES/overlay000.png"),
        ("/d/images/t000.tif", "mask", None, "out/t000_mask.tif"),
        ("/d/01/cell.tif", "mask", None, "out/cell_mask.tif"),
        ("/d/x.png", "mask", None, "out/x_mask.tif"),
        ("/d/x.v2.ome.tiff", "mask", None, "out/x.v2_mask.tif"),
        ("/d/x.nii", "mask", None, "out/x_mask.nii.gz"),
        ("/d/x.nii.gz", "overlay", ".png", "out/x_overlay.png"),
    ],
)
def test_result_path(source, postfix, ext, expected):
    assert result_path(source, "out", postfix, ext) == Path(expected)


@pytest.mark.parametrize(
    ("source", "result", "labels"),
    [
        ("01/t007.tif", "01_RES/mask007.tif", LABELS_2D),
        ("01/t007.tif", "01_RES/mask007.tif", LABELS_3D),
        ("cells.png", "cells_mask.tif", LABELS_2D),
        ("cells.nii.gz", "cells_mask.nii.gz", LABELS_3D),
    ],
)
def test_stock_save_image_writes_what_was_loaded(tmp_path, source, result, labels):
    path = tmp_path / source
    path.parent.mkdir(exist_ok=True)
    affine = np.diag([0.5, 0.25, 2, 1])
    if source.endswith(".png"):
        Image.fromarray(labels.astype(np.uint16)).save(path)
    else:
        write_labels(path, labels, (2.0, 0.25, 0.5)[-labels.ndim :], affine)
    out = tmp_path / "out"
    load = LoadImaged("pred", reader="scripts.images.MicroscopyReader", ensure_channel_first=True)
    Compose([load, SaveImaged(**SAVE, folder_layout=ResultLayout(out))])({"pred": str(path)})
    assert [str(p.relative_to(out)) for p in out.rglob("*.*")] == [result]
    saved, spacing = read_image(out / result)
    assert same(saved, labels.astype(np.uint16)) and spacing == pytest.approx(read_image(path)[1])
    if result.endswith(".nii.gz"):
        np.testing.assert_array_equal(nibabel.load(out / result).affine, affine)


@pytest.mark.filterwarnings("ignore:data shape")
def test_save_image_with_and_without_channel_axis(tmp_path):
    # stock SaveImage keeps channel_dim None after the first array without a channel axis
    save = SaveImaged(**SAVE, folder_layout=ResultLayout(tmp_path / "out"))
    for name, shape in (("a", (3, 2)), ("b", (1, 3, 2)), ("c", (3, 2))):
        meta = {"filename_or_obj": f"/d/{name}.tif", "spatial_shape": np.array([3, 2])}
        save({"pred": MetaTensor(LABELS_2D.T.reshape(shape), meta=meta)})
        assert np.array_equal(read_image(tmp_path / "out" / f"{name}_mask.tif")[0], LABELS_2D)


def test_writer_alone(tmp_path):
    writer = LabelWriter()
    writer.set_data_array(LABELS_3D.T[None], channel_dim=0)
    writer.set_metadata({})
    writer.write(tmp_path / "a.tif", verbose=False)
    assert np.array_equal(read_image(tmp_path / "a.tif")[0], LABELS_3D)


def test_writer_refuses_what_would_change_labels(tmp_path):
    with pytest.raises(ValueError, match="scale"):
        LabelWriter(scale=255)
    writer = LabelWriter()
    with pytest.raises(ValueError, match="resample"):
        writer.set_metadata({}, resample=True)
    writer.set_data_array(np.zeros((2, 3, 3), int))
    writer.set_metadata({"spatial_shape": (3, 3)})
    with pytest.raises(ValueError, match="one channel"):
        writer.write(tmp_path / "a.tif", verbose=False)


@pytest.mark.parametrize("name", ["ctc/Fluo-N2DH-SIM+/01/t000.tif", "bbbc050/images/Emb01_t201.tif"])
def test_real_files_give_the_bytes_of_tifffile(real_data, name):
    pytest.importorskip("imagecodecs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read, spacing = read_image(real_data / name)
    assert same(read, tifffile.imread(real_data / name)) and set(spacing) == {1.0}
