# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.transforms import Lambdad
from PIL import Image

from scripts.images import read_image
from scripts.labels import IGNORE
from scripts.overlays import GAP, PALETTE, OverlaySaver, draw_overlay, neighbors, pick_colors, stretch_contrast

COLORS = {tuple(color) for color in PALETTE.tolist()}


def colored(picture: np.ndarray) -> np.ndarray:
    """Pixels that are not gray."""
    return (picture != picture[..., :1]).any(axis=-1)


def squares(shape: tuple = (300, 900)) -> np.ndarray:
    labels = np.zeros(shape, dtype=np.int32)
    labels[10:20, 10:20] = 7
    labels[10:20, 20:30] = 70_000
    labels[0:5, 880:900] = 3
    return labels


def test_outlines_lie_inside_and_neighbors_differ() -> None:
    labels = squares()
    picture = draw_overlay(np.zeros(labels.shape), labels)
    assert picture.shape == (300, 900, 3) and picture.dtype == np.uint8
    line = colored(picture)
    assert not line[labels == 0].any()
    inner = np.zeros_like(line)
    inner[11:19, 11:19] = inner[11:19, 21:29] = inner[0:4, 881:900] = True  # the edge of the picture is no outline
    np.testing.assert_array_equal(line, (labels > 0) & ~inner)
    assert tuple(picture[15, 19]) in COLORS and tuple(picture[15, 20]) in COLORS
    assert tuple(picture[15, 19]) != tuple(picture[15, 20])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((100, 60), (1000, 600)),
        ((256, 256), (1024, 1024)),
        ((520, 696), (1040, 1392)),
        ((850, 3), (850, 3)),
        ((1, 1), (16, 16)),
    ],
)
def test_small_images_are_enlarged(shape: tuple, expected: tuple) -> None:
    labels = np.zeros(shape, dtype=np.int32)
    labels[: max(1, shape[0] // 2)] = 1
    picture = draw_overlay(np.random.default_rng(0).random(shape), labels)
    assert picture.shape == (*expected, 3)
    assert colored(picture).any() == (shape[0] > 1)


def test_truth_is_dashed_white_and_leaves_the_prediction_visible() -> None:
    labels = squares((100, 100))
    plain = draw_overlay(np.zeros(labels.shape), labels)
    both = draw_overlay(np.zeros(labels.shape), labels, labels)
    white = (both == 255).all(axis=-1)
    assert white.sum() > 0 and colored(both).sum() > 0.5 * colored(plain).sum()
    assert (np.kron(labels, np.ones((10, 10), dtype=int))[white] > 0).all()
    ignored = np.full(labels.shape, IGNORE)
    np.testing.assert_array_equal(draw_overlay(np.zeros(labels.shape), labels, ignored), plain)


def test_no_objects_no_colors() -> None:
    image = np.random.default_rng(0).random((30, 40))
    assert not colored(draw_overlay(image, np.zeros((30, 40), dtype=np.int32))).any()


def test_volume_projections_are_to_scale() -> None:
    volume, labels = np.zeros((10, 40, 60)), np.zeros((10, 40, 60), dtype=np.uint16)
    labels[2:8, 10:20, 30:50] = 5
    picture = draw_overlay(volume, labels, spacing=(2.0, 0.5, 0.5))
    factor = 10  # 60 + 4 * 10 = 100 units wide
    assert picture.shape == (factor * (40 + 40) + GAP, factor * (60 + 40) + GAP, 3)
    line = colored(picture)
    top, right = line[: 40 * factor, : 60 * factor], line[: 40 * factor, 60 * factor + GAP :]
    below, corner = line[40 * factor + GAP :, : 60 * factor], line[40 * factor + GAP :, 60 * factor + GAP :]
    for panel, rows, columns in ((top, (10, 20), (30, 50)), (right, (10, 20), (8, 32)), (below, (8, 32), (30, 50))):
        for axis, (low, high) in ((1, rows), (0, columns)):
            hit = np.flatnonzero(panel.any(axis=axis))
            assert (hit[0], hit[-1]) == (low * factor, high * factor - 1)
    assert not corner.any()
    assert len({tuple(c) for c in picture[line].tolist()}) == 1  # an object has one color in all projections


def test_projection_shows_the_front_object() -> None:
    labels = np.zeros((4, 30, 30), dtype=np.int32)
    labels[3, 5:25, 5:25] = 9
    labels[1, 10:20, 10:20] = 2
    line = colored(draw_overlay(np.zeros(labels.shape), labels)[:400, :400])
    assert line.any()
    labels[1][labels[1] == 2] = 11
    np.testing.assert_array_equal(colored(draw_overlay(np.zeros(labels.shape), labels)[:400, :400]), line)


def test_contrast() -> None:
    dark = np.zeros((100, 100), dtype=np.uint16)
    dark[:10, :50] = np.linspace(100, 200, 50).astype(np.uint16)
    gray = stretch_contrast(dark + np.uint16(32768))
    assert gray.min() == 0 and gray.max() == 1
    assert gray[:10, :50].min() > 0.7  # half as bright as the brightest: 0.5 if nothing were lifted
    bright = np.linspace(0, 255, 10_000).reshape(100, 100)
    np.testing.assert_allclose(stretch_contrast(bright)[50], np.clip((bright[50] - 1.275) / 252.45, 0, 1), atol=1e-3)
    for constant in (0, 7, 65535):
        assert (stretch_contrast(np.full((5, 5), constant, dtype=np.uint16)) == 0).all()


def test_colors_of_neighbors_differ() -> None:
    labels = np.kron(np.arange(1, 101).reshape(10, 10), np.ones((3, 3), dtype=int))
    pairs = neighbors(labels)
    assert len(pairs) >= 180 and (pairs[:, 0] < pairs[:, 1]).all()
    colors = pick_colors(pairs, 100)
    assert (colors[pairs[:, 0]] != colors[pairs[:, 1]]).all()
    clique = np.array([(i, j) for i in range(1, 13) for j in range(i + 1, 13)])
    assert set(pick_colors(clique, 12)[1:11]) == set(range(len(PALETTE)))
    apart = np.zeros((3, 40), dtype=np.int32)
    apart[:, 2], apart[:, 8], apart[:, 30] = 1, 2, 3
    assert neighbors(apart).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((4, 4)), np.zeros((4, 5), dtype=int)), r"image is \(4, 4\), labels are \(4, 5\)"),
        ((np.zeros((4, 4)), np.zeros((4, 4), dtype=int), np.zeros((2, 2), dtype=int)), "expected one shape"),
        ((np.zeros(4), np.zeros(4, dtype=int)), "expected one shape"),
        ((np.zeros((2, 4, 4)), np.zeros((2, 4, 4), dtype=int), None, (1, 1)), "spacing is"),
        ((np.zeros((2, 4, 4)), np.zeros((2, 4, 4), dtype=int), None, (0, 1, 1)), "spacing is"),
    ],
)
def test_errors(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_overlay(*arguments)


def run_saver(
    saver: OverlaySaver, images: dict[str, np.ndarray], spacing: tuple = (1, 1, 1), channel: bool = False
) -> None:
    affine = torch.diag(torch.tensor([*spacing, 1.0]))
    tensors = {path: torch.as_tensor(image[None], dtype=torch.float32) for path, image in images.items()}
    items = [{"image": MetaTensor(t, affine=affine, meta={"filename_or_obj": path})} for path, t in tensors.items()]
    to_ids = Lambdad("pred", lambda x: (x if channel else x[0]).numpy().astype(np.uint16))
    loader = DataLoader(Dataset(items), batch_size=1)
    SupervisedEvaluator(
        torch.device("cpu"), loader, torch.nn.Identity(), postprocessing=to_ids, val_handlers=[saver]
    ).run()


@pytest.mark.parametrize("channel", [False, True])
def test_saver_names_and_transposes(tmp_path: Path, channel: bool) -> None:
    image = np.zeros((40, 20))  # (X, Y)
    image[30:39, 2:8] = 1
    images = {"/d/A/01/t007.tif": image, "/d/x/cell.ome.tif": image, "/d/y/cell.ome.tif": image}
    run_saver(OverlaySaver(str(tmp_path / "out")), images, channel=channel)
    names = ["01_t007_overlay.png", "cell_overlay.png", "y_cell_overlay.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    picture = np.array(Image.open(tmp_path / "out" / names[0]))
    assert picture.shape == (20 * 16, 40 * 16, 3)
    rows, columns = np.nonzero(colored(picture))
    assert (rows.min() // 16, rows.max() // 16) == (2, 7) and (columns.min() // 16, columns.max() // 16) == (30, 38)


def test_saver_stops_at_max_images_of_each_run(tmp_path: Path) -> None:
    saver = OverlaySaver(str(tmp_path), max_images=1)
    for run in range(2):
        run_saver(saver, {f"/d/{run}{i}.tif": np.eye(20) for i in range(3)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00_overlay.png", "10_overlay.png"]


def test_saver_knows_voxel_sizes(tmp_path: Path) -> None:
    volume = np.zeros((20, 16, 6))  # (X, Y, Z)
    volume[4:9, 4:9, 2:4] = 1
    run_saver(OverlaySaver(str(tmp_path)), {"v.tif": volume}, spacing=(0.5, 0.5, 2.0))
    height, width = np.array(Image.open(tmp_path / "v_overlay.png")).shape[:2]
    assert (height, width) == (16 * (16 + 24) + GAP, 16 * (20 + 24) + GAP)


def test_saver_draws_on_the_grid_of_the_prediction(tmp_path: Path) -> None:
    class State:
        output = [{"image": torch.rand(1, 10, 20), "pred": np.ones((20, 40), dtype=np.uint16)}]

    class FakeEngine:
        state = State()

    OverlaySaver(str(tmp_path))(FakeEngine())
    assert Image.open(tmp_path / "image0_overlay.png").size == (20 * 16, 40 * 16)


def test_saver_names_the_file_in_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"/d/a.tif: image is \(5,\)"):
        run_saver(OverlaySaver(str(tmp_path)), {"/d/a.tif": np.ones(5)})


@pytest.mark.parametrize(("folder", "ndim"), [("dsb2018", 2), ("bbbc050", 3)])
def test_real_images(real_data: Path, folder: str, ndim: int) -> None:
    path = sorted((real_data / folder / "images").iterdir())[0]
    image, labels = read_image(path)[0], read_image(real_data / folder / "masks" / path.name)[0]
    assert image.ndim == ndim
    picture = draw_overlay(image, labels, labels, spacing=(1.75, 0.8, 0.8) if ndim == 3 else None)
    gray = picture[~colored(picture)]
    assert gray.mean() > 20 and 0.003 < colored(picture).mean() < 0.2
