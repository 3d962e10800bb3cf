# SPDX-License-Identifier: Apache-2.0
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy import ndimage

from scripts.synthetic import MANIFEST, RADII, SHAPES, ensure_dataset, make_frame, make_markers

SMALL = {"n_frames": 2, "n_val_frames": 1, "shape": (48, 64)}
SMALL_3D = {"spatial_dims": 3, "n_frames": 1, "n_val_frames": 1, "shape": (9, 40, 48)}


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()}


def n_touching(labels):
    highest = ndimage.maximum_filter(labels, 3)
    return len(np.unique(labels[(labels > 0) & (highest > labels)]))


@pytest.mark.parametrize("shape, fewest, most", [(SHAPES[2], 25, 60), (SHAPES[3], 20, 45), ((131, 97), 4, 14)])
@pytest.mark.parametrize("seed", [0, 1])
def test_frame_holds_touching_nuclei_in_one_piece_each(shape, fewest, most, seed):
    image, labels = make_frame(np.random.default_rng(seed), shape)
    assert image.dtype == labels.dtype == np.uint16
    assert image.shape == labels.shape == tuple(shape)
    ids = np.unique(labels)
    assert fewest <= ids[-1] <= most
    assert ids.tolist() == list(range(ids[-1] + 1))
    assert all(ndimage.label(labels == i)[1] == 1 for i in ids[1:])
    assert n_touching(labels) >= 0.2 * ids[-1]
    assert np.median(image[labels > 0]) > 1.5 * np.median(image[labels == 0])
    assert image.max() < 65535


def test_sizes_are_those_of_the_radii():
    _, labels = make_frame(np.random.default_rng(0), (256, 256), clustering=0.0)
    inner = labels[20:-20, 20:-20]
    whole = [i for i in np.unique(inner[inner > 0]) if (inner == i).sum() == (labels == i).sum()]
    radius = [np.sqrt((labels == i).sum() / np.pi) for i in whole]
    low, high = RADII[2][0]
    assert len(whole) > 10
    assert 0.85 * low < min(radius) and max(radius) < 1.15 * high


def test_frame_depends_on_the_random_state_only():
    first, again, other = (make_frame(np.random.default_rng(s), (64, 64)) for s in (3, 3, 4))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[1] != other[1]).any()


def test_frame_refuses_other_dimensions():
    with pytest.raises(ValueError, match=r"Got shape \(64,\)"):
        make_frame(np.random.default_rng(0), (64,))


def test_markers_are_the_core_of_each_instance():
    labels = np.zeros((9, 16), np.uint16)
    labels[1:8, 1:8] = 2
    labels[1:8, 8:15] = 5  # touches 2: the depth is measured to the neighbor, too
    labels[0, 0] = 7  # one pixel is its own core
    markers = make_markers(labels)
    expected = np.zeros_like(labels)
    expected[2:7, 2:7] = 2
    expected[2:7, 9:14] = 5
    expected[0, 0] = 7
    np.testing.assert_array_equal(markers, expected)
    assert not make_markers(np.zeros((4, 4), np.uint16)).any()


@pytest.mark.parametrize("options", [SMALL, SMALL_3D])
def test_dataset_has_the_official_layout(tmp_path, options):
    path = tmp_path / "new" / "set"
    assert ensure_dataset(str(path), **options) == str(path)
    for name, n_frames in (("01", options["n_frames"]), ("02", options["n_val_frames"])):
        tracks = np.loadtxt(path / f"{name}_GT" / "TRA" / "man_track.txt", dtype=int, ndmin=2)
        seen = []
        assert len(list((path / name).iterdir())) == n_frames
        for t in range(n_frames):
            image = tifffile.imread(path / name / f"t{t:03d}.tif")
            seg = tifffile.imread(path / f"{name}_GT" / "SEG" / f"man_seg{t:03d}.tif")
            tra = tifffile.imread(path / f"{name}_GT" / "TRA" / f"man_track{t:03d}.tif")
            assert image.shape == seg.shape == tra.shape == tuple(options["shape"])
            assert image.dtype == seg.dtype == tra.dtype == np.uint16
            pairs = {(int(a), int(b)) for a, b in zip(tra[tra > 0], seg[tra > 0], strict=True)}
            assert len(pairs) == len(np.unique(seg)) - 1 == len({b for _, b in pairs})  # one marker in each object
            seen += [(track, t, t, 0) for track, _ in sorted(pairs)]
        assert [tuple(row) for row in tracks.tolist()] == seen
    assert not list(path.parent.glob(".*"))  # nothing temporary stays


def test_same_seed_same_files_and_second_call_writes_nothing(tmp_path):
    first = ensure_dataset(tmp_path / "a", **SMALL)
    ensure_dataset(tmp_path / "b", **SMALL)
    ensure_dataset(tmp_path / "c", **SMALL, seed=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")["01/t000.tif"] != contents(tmp_path / "c")["01/t000.tif"]
    assert contents(tmp_path / "a")["01/t000.tif"] != contents(tmp_path / "a")["02/t000.tif"]
    before = {f: f.stat().st_mtime_ns for f in Path(first).rglob("*")}
    ensure_dataset(first, **SMALL)
    assert before == {f: f.stat().st_mtime_ns for f in Path(first).rglob("*")}


def test_incomplete_set_is_made_again(tmp_path):
    path = Path(ensure_dataset(tmp_path / "set", **SMALL))
    whole = contents(path)
    (path / "01_GT" / "SEG" / "man_seg001.tif").unlink()
    ensure_dataset(path, **SMALL)
    assert contents(path) == whole
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_foreign_folder_and_other_parameters_are_refused_untouched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "image.tif").write_bytes(b"precious")
    with pytest.raises(ValueError, match=f"no {MANIFEST}"):
        ensure_dataset(tmp_path / "mine", **SMALL)
    assert contents(tmp_path / "mine") == {"image.tif": b"precious"}
    ensure_dataset(tmp_path / "set", **SMALL)
    before = contents(tmp_path / "set")
    with pytest.raises(ValueError, match="other|made with"):
        ensure_dataset(tmp_path / "set", **SMALL, seed=1)
    assert contents(tmp_path / "set") == before


@pytest.mark.parametrize(
    "options, message",
    [
        ({"spatial_dims": 4}, "spatial_dims 4"),
        ({"spatial_dims": 3, "shape": (64, 64)}, "spatial_dims 3"),
        ({"n_frames": 0}, "expected 1 to 1000"),
        ({"n_val_frames": 1001}, "expected 1 to 1000"),
    ],
)
def test_arguments_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ensure_dataset(tmp_path / "set", **options)
    assert not any(tmp_path.iterdir())


def test_processes_may_start_at_once(tmp_path):
    path = str(tmp_path / "set")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.starmap(ensure_dataset, [(path, 2, 2, 1, (48, 64))] * 3) == [path] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    assert contents(path) == contents(ensure_dataset(tmp_path / "alone", **SMALL))


def test_needs_no_imagecodecs(tmp_path, bundle):
    code = (
        "import sys; sys.modules['imagecodecs'] = None; import tifffile\n"
        "from scripts.synthetic import ensure_dataset\n"
        f"p = ensure_dataset({str(tmp_path / 'set')!r}, 2, 1, 1, (32, 32))\n"
        "assert tifffile.imread(p + '/01/t000.tif').shape == (32, 32)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=bundle)
