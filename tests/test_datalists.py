# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from imagefiles import LABEL, make_folder, make_sequence, names, save
from scripts.checks import check_items
from scripts.datalists import list_images, make_datalist, split_by_hash
from scripts.images import (
    read_image,
)


def test_images_of_a_folder_in_natural_order(tmp_path):
    for name in ("c10.tif", "c2.png", "c1.nii.gz", "C3.TIFF"):
        save(tmp_path / name)
    for name in (".c4.tif", "._c2.tif", "Thumbs.db", "notes.txt"):
        (tmp_path / name).write_text("x")
    assert names(list_images(tmp_path)) == ["C3.TIFF", "c1.nii.gz", "c2.png", "c10.tif"]


def test_images_of_one_file_a_subfolder_and_ctc(tmp_path):
    file = save(tmp_path / "one" / "a.tif")
    assert list_images(file) == [{"image": str(file)}]
    save(tmp_path / "two" / "images" / "a.tif")
    assert names(list_images(tmp_path / "two")) == ["a.tif"]
    make_sequence(tmp_path / "ctc", "01", 2, gold=[0])
    make_sequence(tmp_path / "ctc", "02", 1)
    relative = [str(Path(i["image"]).relative_to(tmp_path)) for i in list_images(tmp_path / "ctc")]
    assert relative == ["ctc/01/t000.tif", "ctc/01/t001.tif", "ctc/02/t000.tif"]
    assert len(list_images(tmp_path / "ctc" / "01")) == 2


def test_relative_folder_keeps_the_name_of_the_sequence(tmp_path, monkeypatch):
    monkeypatch.chdir(make_sequence(tmp_path, "01", 1) / "01")
    assert list_images(".") == [{"image": str(tmp_path / "01" / "t000.tif")}]


def test_results_beside_their_images_are_left_out(tmp_path):
    for name in ("a.tif", "a_mask.tif", "a_overlay.png", "b_mask.tif"):
        save(tmp_path / name)
    assert names(list_images(tmp_path)) == ["a.tif", "b_mask.tif"]


def test_two_images_of_one_result_name(tmp_path):
    save(tmp_path / "a.tif")
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png and .*a\.tif would both give a_\S*\.tif"):
        list_images(tmp_path)


def test_no_images_says_what_was_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such"):
        list_images(tmp_path / "none")
    (tmp_path / "a.czi").touch()
    (tmp_path / "sub").mkdir()
    with pytest.raises(FileNotFoundError, match=r"1 x \.czi; folders: sub"):
        list_images(tmp_path)


@pytest.mark.parametrize(("shape", "spatial_dims", "hint"), [((2, 3, 4), 2, "3D config"), ((3, 4), 3, "2D config")])
def test_images_of_the_wrong_dimension(tmp_path, shape, spatial_dims, hint):
    save(tmp_path / "a.tif", np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match=rf"a\.tif.*{hint}"):
        list_images(tmp_path, spatial_dims)
    assert len(list_images(tmp_path, 5 - spatial_dims)) == 1


# ---- images and masks


@pytest.mark.parametrize(("truth", "suffix"), [("masks", ""), ("labels", ""), ("masks", "_mask"), ("labels", "_label")])
def test_folder_pairs_by_name(tmp_path, truth, suffix):
    make_folder(tmp_path, ["b10", "b2"], truth, suffix)
    items = make_datalist(tmp_path, "all")
    assert names(items) == ["b2.tif", "b10.tif"]
    assert names(items, "label") == [f"b2{suffix}.tif", f"b10{suffix}.tif"]
    assert make_datalist(tmp_path, "all", truth="evaluation") == items


def test_folder_split_is_fixed_and_stays_when_images_are_added(tmp_path):
    stems = [f"img{n}" for n in range(30)]
    make_folder(tmp_path, stems)
    first = {section: names(make_datalist(tmp_path, section, check=False)) for section in ("training", "validation")}
    assert first["validation"] == ["img5.tif", "img14.tif", "img18.tif"]  # SHA-1 of the name, mod 1000, below 100
    assert len(first["training"]) == 27
    make_folder(tmp_path, ["more1", "more2"])
    later = names(make_datalist(tmp_path, "validation", check=False))
    assert set(first["validation"]) <= set(later) <= {*first["validation"], "more1.tif", "more2.tif"}


@pytest.mark.parametrize("val_fraction", [0.001, 0.3, 0.999])
@pytest.mark.parametrize("groups", [["a", "b"], [f"g{n}" for n in range(7)]])
def test_no_section_is_empty(groups, val_fraction):
    assert 1 <= len(split_by_hash(groups, val_fraction)) < len(groups)


@pytest.mark.parametrize("pattern", ["Emb\\d+", "Emb(\\d+)"])
def test_groups_stay_together(tmp_path, pattern):
    make_folder(tmp_path, [f"Emb{e:02d}_t{t}" for e in range(6) for t in range(3)])
    found = [
        {n[:5] for n in names(make_datalist(tmp_path, s, group_pattern=pattern))} for s in ("training", "validation")
    ]
    assert not found[0] & found[1] and len(found[0] | found[1]) == 6 and found[1]


def test_several_folders_are_joined(tmp_path):
    make_folder(tmp_path / "a", ["x", "y"])
    make_sequence(tmp_path / "b", frames=2, gold=[0, 1])
    assert names(make_datalist([tmp_path / "a", str(tmp_path / "b")], "all")) == [
        "x.tif",
        "y.tif",
        "t000.tif",
        "t001.tif",
    ]


def bad_folder(root: Path, problem: str) -> Path:
    if problem == "one image":
        return make_folder(root, ["a"])
    make_folder(root, ["a", "b"])
    if problem == "no label":
        (root / "masks" / "a.tif").unlink()
    elif problem == "no image":
        (root / "images" / "a.tif").unlink()
    elif problem == "two labels":
        save(root / "masks" / "a_mask.tif", LABEL)
    elif problem == "both folders":
        make_folder(root, ["a", "b"], "labels")
    elif problem == "other layout":
        (root / "images").rename(root / "pictures")
    return root


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("one image", r"'a'.*section='all'"),
        ("no label", r"images/a\.tif: an image without a label"),
        ("no image", r"masks/a\.tif: a label without an image"),
        ("two labels", r"a_mask\.tif: a second label"),
        ("both folders", "one of masks/ or labels/"),
        ("other layout", "folders: masks, pictures"),
    ],
)
def test_bad_folders(tmp_path, problem, message):
    with pytest.raises(ValueError, match=message):
        make_datalist(bad_folder(tmp_path, problem))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"section": "test"}, "'test'.*'training'"),
        ({"truth": "gold"}, "'gold'.*'evaluation'"),
        ({"val_fraction": 1.5}, "1.5"),
        ({"group_pattern": "Emb\\d+"}, "a: group_pattern"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_datalist(make_folder(tmp_path, ["a", "b"]), **arguments)
    with pytest.raises(FileNotFoundError, match="none"):
        make_datalist(tmp_path / "none")


# ---- real data


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [
        ("dsb2018", {}, (383, 45)),
        ("bbbc039", {}, (54, 6)),
        ("bbbc050", {"spatial_dims": 3, "group_pattern": "Emb\\d+"}, (18, 4)),
    ],
)
def test_real_folders(real_data, name, options, counts):
    start = time.perf_counter()
    lists = [make_datalist(real_data / name, section, **options) for section in ("training", "validation")]
    assert tuple(map(len, lists)) == counts
    assert time.perf_counter() - start < 15  # seconds; about 1 on an idle core


def test_real_images_without_objects_are_valid(real_data):
    items = make_datalist(real_data / "bbbc039", "all", check=False)
    empty = [item for item in items if not read_image(item["label"])[0].any()]
    check_items(items, spatial_dims=2, progress=False)
    assert len(items) == 60 and len(empty) <= 3
