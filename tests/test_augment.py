# SPDX-License-Identifier: Apache-2.0
import monai.transforms as mt
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, MetaTensor
from monai.transforms.utils import weighted_patch_samples
from monai.utils import set_determinism
from PIL import Image
from scipy import ndimage

from scripts.augment import (
    WARPS,
    ObjectWeightMapd,
    RandWarpd,
    fold_to_centers,
    intensity_transforms,
    object_weights,
    random_transforms,
    sampling_transforms,
    warp_grid,
)
from scripts.contact_sheet import contact_sheet, draw_patch
from scripts.datalists import make_datalist
from scripts.labels import IGNORE
from scripts.presets import load_transforms
from scripts.synthetic import ensure_dataset, make_frame

# 1 is large, 2 is small and alone, 3 and 4 touch, 5 and 6 have a gap of one pixel, -1 is not annotated
OBJECTS = np.array(
    [
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, -1],
        [1, 1, 1, 0, 0, 0, 0, 0, 3, 4, 4, -1],
        [1, 1, 1, 0, 0, 2, 0, 0, 3, 4, 4, -1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [5, 0, 6, 6, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    dtype=np.int32,
)


def item(spatial_dims, shape=None, seed=0):
    """A synthetic frame as the deterministic part of a pipeline gives it: (1, X, Y[, Z])."""
    shape = shape or ((96, 80) if spatial_dims == 2 else (40, 36, 10))
    image, labels = make_frame(np.random.default_rng(seed), shape[::-1])
    image = (image.T - image.min()) / np.float32(np.percentile(image, 99.8) - image.min())
    return {
        "image": MetaTensor(torch.from_numpy(image[None].astype(np.float32))),
        "label": MetaTensor(torch.from_numpy(labels.T[None].astype(np.int32))),
    }


def assert_valid_objects(label):
    ids = np.unique(label)
    assert ids[ids > 0].tolist() == list(range(1, (ids > 0).sum() + 1))
    assert ids.min() >= IGNORE
    neighborhood = np.ones((3,) * label.ndim)
    assert all(ndimage.label(label == i, neighborhood)[1] == 1 for i in ids[ids > 0])


def sums(weights, labels):
    return {int(i): float(weights[labels == i].sum()) for i in np.unique(labels)}


def test_weights_balance_objects():
    weights = object_weights(OBJECTS, background=0.1, touching=2.0, reach=2)
    unit = 0.9 / 10  # 1 and 2 count once; 3, 4, 5 and 6 twice
    expected = {-1: 0, 0: 0.1, 1: unit, 2: unit, 3: 2 * unit, 4: 2 * unit, 5: 2 * unit, 6: 2 * unit}
    assert weights.dtype == np.float32 and weights.shape == OBJECTS.shape
    assert sums(weights, OBJECTS) == pytest.approx(expected, abs=1e-6)


def test_weights_with_reach_1_do_not_bridge_a_gap():
    total = sums(object_weights(OBJECTS, background=0, touching=3.0, reach=1), OBJECTS)
    assert total == pytest.approx(
        {-1: 0, 0: 0, **dict.fromkeys((1, 2, 5, 6), 0.1), **dict.fromkeys((3, 4), 0.3)}, abs=1e-6
    )


@pytest.mark.parametrize(
    "labels, expected",
    [
        ([[0, 0], [0, -1]], [[1 / 3, 1 / 3], [1 / 3, 0]]),  # no object
        ([[7, 7], [-1, 7]], [[1 / 3, 1 / 3], [0, 1 / 3]]),  # no background
        ([[-1, -1], [-1, -1]], [[0.25, 0.25], [0.25, 0.25]]),  # nothing known: never all zero
        ([[9, 0], [0, 0]], [[0.9, 0.1 / 3], [0.1 / 3, 0.1 / 3]]),
    ],
)
def test_weights_of_edge_cases(labels, expected):
    np.testing.assert_allclose(object_weights(np.array(labels, np.int32)), expected, rtol=1e-6)


def test_weights_3d_touch_along_z():
    labels = np.zeros((6, 6, 7), np.int32)
    labels[2:4, 2:4, 1:3], labels[2:4, 2:4, 3], labels[0, 0, 6] = 1, 2, 3
    total = sums(object_weights(labels, background=0.0), labels)
    assert total == pytest.approx({0: 0, 1: 0.4, 2: 0.4, 3: 0.2}, abs=1e-6)


@pytest.mark.parametrize(
    "shape, patch",
    [((12, 9), (4, 5)), ((12, 9), (11, 9)), ((12, 9), (20, 8)), ((7, 8, 5), (3, 4, 5)), ((7, 8, 5), (6, 1, 2))],
)
def test_folded_weights_lie_where_monai_draws(shape, patch):
    weights = np.random.default_rng(0).random(shape).astype(np.float32)
    folded = fold_to_centers(weights, patch)
    assert folded.sum() == pytest.approx(weights.sum(), rel=1e-5)
    centers = np.array(weighted_patch_samples(patch, np.ones(shape), 500, np.random.RandomState(0)), dtype=int)
    drawable = tuple(slice(c.min(), c.max() + 1) for c in centers.T)
    assert folded[drawable].sum() == pytest.approx(weights.sum(), rel=1e-5)


def test_all_objects_are_seen_as_often_and_touching_ones_twice():
    label = np.zeros((1, 90, 90), np.int32)
    label[0, 30:60, 30:60] = 1  # 900 pixels
    label[0, 0, 0] = 2  # 1 pixel, in the corner
    label[0, 75:78, 10:13] = 3
    label[0, 10:14, 70:80] = 4
    label[0, 14:15, 70:80] = 5  # touches 4
    n, size = 1200, (9, 9)
    crop = mt.Compose(
        [ObjectWeightMapd(background=0.2, patch_size=size), mt.RandWeightedCropd("label", "weight", size, n)]
    ).set_random_state(0)
    patches = [np.asarray(p["label"]) for p in crop({"label": label})]
    share = {i: sum((p == i).any() for p in patches) / n for i in range(1, 6)}
    unit = 0.8 / 7
    # background patches may touch an object, too: its part of the 0.2 is at most 0.05 here
    assert {i: share[i] for i in (1, 2, 3)} == pytest.approx(dict.fromkeys((1, 2, 3), unit), abs=0.05)
    pair = sum((p >= 4).any() for p in patches) / n
    assert pair == pytest.approx(4 * unit, abs=0.05)
    empty = sum(not p.any() for p in patches) / n
    assert 0.1 < empty < 0.22


@pytest.mark.parametrize("strength", ["none", "flips", "heavy"])
@pytest.mark.parametrize("shape, roi_size", [((20, 13), (8, 12)), ((20, 12), (12, 12)), ((9, 8, 5), (8, 8, 4))])
@pytest.mark.parametrize("corner", [0, -1])
def test_an_object_in_the_corner_is_in_every_patch_that_looks_at_objects(strength, shape, roi_size, corner):
    label = torch.zeros(1, *shape, dtype=torch.int32)
    label[(0, *[corner] * len(shape))] = 1
    sampling = sampling_transforms(roi_size, 20, strength, background=0.0)
    patches = mt.Compose(sampling).set_random_state(0)({"image": label.float(), "label": label})
    middle = mt.CenterSpatialCrop(roi_size)
    assert all((middle(patch["label"]) == 1).any() for patch in patches)


def test_weight_map_transform_is_the_function():
    out = ObjectWeightMapd("label", "w", background=0.3, touching=5.0)({"label": OBJECTS[None]})
    np.testing.assert_array_equal(out["w"][0], object_weights(OBJECTS, 0.3, 5.0))
    folded = ObjectWeightMapd("label", "w", patch_size=(3, 3))({"label": OBJECTS[None]})
    np.testing.assert_array_equal(folded["w"][0], fold_to_centers(object_weights(OBJECTS), (3, 3)))


@pytest.mark.parametrize(
    "spatial_dims, shape, roi_size, num_samples",
    [
        (2, (96, 80), (48, 48), 2),
        (2, (96, 80), (33, 47), 1),
        (2, (30, 96), (64, 64), 1),  # smaller than the patch
        (3, (40, 36, 10), (24, 24, 8), 2),
        (3, (40, 36, 5), (17, 25, 12), 1),
    ],
)
@pytest.mark.parametrize("strength", ["none", "flips", "light", "heavy"])
def test_output(spatial_dims, shape, roi_size, num_samples, strength):
    pipeline = mt.Compose(random_transforms(spatial_dims, roi_size, num_samples, strength)).set_random_state(0)
    for seed in range(3):
        samples = pipeline(item(spatial_dims, shape, seed))
        assert len(samples) == num_samples
        for sample in samples:
            assert set(sample) == {"image", "label"}
            assert sample["image"].shape == sample["label"].shape == (1, *roi_size)
            assert (sample["image"].dtype, sample["label"].dtype) == (torch.float32, torch.int32)
            assert type(sample["image"]) is type(sample["label"]) is torch.Tensor
            assert torch.isfinite(sample["image"]).all()
            assert_valid_objects(sample["label"][0].numpy())


def test_unaugmented_patch_is_a_part_of_the_image():
    data = item(2)
    sample = mt.Compose(random_transforms(2, (40, 40), strength="none")).set_random_state(1)(data)[0]
    windows = np.lib.stride_tricks.sliding_window_view(data["image"][0].numpy(), (40, 40))
    assert (windows == sample["image"][0].numpy()).all(axis=(2, 3)).sum() == 1


def test_padding_is_ignored():
    sample = mt.Compose(random_transforms(2, (64, 64), strength="none"))(item(2, (30, 64)))[0]
    ignored = (sample["label"][0] == IGNORE).numpy()
    assert ignored[:17].all() and ignored[47:].all() and not ignored[17:47].any()
    assert sample["image"][0, :17].std() > 0  # mirrored, not a constant


@pytest.mark.parametrize("spatial_dims, roi_size", [(2, (32, 32)), (3, (20, 20, 6))])
def test_same_seed_same_result(spatial_dims, roi_size):
    def run(seed):
        set_determinism(seed)
        pipeline = mt.Compose(random_transforms(spatial_dims, roi_size, 2))
        set_determinism(None)
        return [pipeline(item(spatial_dims)) for _ in range(3)]

    first, again, other = run(5), run(5), run(6)
    for a, b in zip(sum(first, []), sum(again, []), strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])
    assert not torch.equal(first[0][0]["image"], other[0][0]["image"])
    assert not torch.equal(first[0][0]["image"], first[1][0]["image"])


def test_weight_map_is_cached():
    dataset = CacheDataset([item(2)], mt.Compose(random_transforms(2, (32, 32))), progress=False)
    assert dataset._cache[0]["weight"].shape == dataset._cache[0]["label"].shape
    assert "weight" not in dataset[0][0]


@pytest.mark.parametrize("size, roi_size", [((20, 18), (12, 10)), ((15, 15), (15, 15)), ((12, 14, 6), (8, 8, 4))])
def test_warp_without_deformation_cuts_the_center(size, roi_size):
    data = {"image": torch.rand(1, *size), "label": torch.randint(-1, 9, (1, *size), dtype=torch.int32)}
    still = RandWarpd(roi_size, prob=1.0, rotate=0, scale=0, shear=0, elastic=0)(data)
    cut = RandWarpd(roi_size, prob=0.0)(data)
    torch.testing.assert_close(still["image"], cut["image"], atol=1e-4, rtol=0)
    assert torch.equal(torch.as_tensor(still["label"]), torch.as_tensor(cut["label"]))
    middle = tuple(slice((n - m) // 2, (n + m) // 2) for n, m in zip(size, roi_size, strict=True))
    assert np.array_equal(cut["label"][0], data["label"][0][middle])


def test_warp_moves_image_and_label_together_and_ignores_what_lies_outside():
    data = item(2)
    data["image"] = (data["label"] > 0).float() + 1
    warp = RandWarpd((96, 80), **WARPS["heavy"] | {"prob": 1.0}).set_random_state(0)
    agree, ignored = [], []
    for _ in range(20):
        out = warp(data)
        inside = out["label"] >= 0
        agree.append(((out["image"] > 1.5) == (out["label"] > 0))[inside].float().mean())
        ignored.append(1 - inside.float().mean())
        assert out["image"].min() > 0.99  # mirrored: no black corners
        assert set(out["label"].unique().tolist()) <= {IGNORE, *data["label"].unique().tolist()}
    assert min(agree) > 0.97
    assert 0.02 < np.mean(ignored) < 0.4  # no margin here


def test_warp_is_exact_for_large_ids():
    label = torch.full((1, 9, 9), 2**24 + 1, dtype=torch.int32)
    out = RandWarpd((5, 5), prob=1.0)({"image": torch.rand(1, 9, 9), "label": label})
    assert out["label"].unique().tolist() == [2**24 + 1]


def test_warp_rotates_in_the_plane_only():
    label = torch.arange(8, dtype=torch.int32).expand(1, 24, 24, 8)
    warp = RandWarpd((16, 16, 8), prob=1.0, scale=0.0).set_random_state(0)
    for _ in range(5):
        out = warp({"image": label.float(), "label": label})
        inside = out["label"] >= 0
        assert torch.equal(out["label"][inside], label[:, :16, :16][inside])
        torch.testing.assert_close(out["image"], label[:, :16, :16].float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("roi_size", [(64, 64), (192, 192)])
def test_elastic_deformation_does_not_fold(roi_size):
    warp = RandWarpd(roi_size, **WARPS["heavy"]).set_random_state(0)
    folds = []
    for _ in range(40):
        warp.randomize()
        grid = warp_grid(roi_size, roi_size, warp.matrix, warp.offsets)[0].numpy()
        (yx, xx), (yy, xy) = np.gradient(grid[..., 0])[::-1], np.gradient(grid[..., 1])[::-1]
        folds.append((yx * xy - xx * yy <= 0).mean())
    assert np.mean(np.array(folds) > 0) < 0.1 and max(folds) < 0.01


def test_intensity_changes_leave_the_image_visible():
    image = torch.full((1, 48, 48), 0.2)
    image[:, 12:36, 12:36] = 0.6
    image[0, 0, 0], image[0, 0, 1] = -1.0, 4.0  # hot and dead pixels must not turn the rest black
    pipeline = mt.Compose(intensity_transforms((48, 48))).set_random_state(0)
    changed = 0
    for _ in range(60):
        out = torch.as_tensor(pipeline({"image": image})["image"])
        outside, inside = out[:, 3:9, 3:9].mean(), out[:, 16:32, 16:32].mean()
        assert -0.1 < outside < 0.5 and 0.25 < inside < 1.2 and inside - outside > 0.1
        changed += not torch.equal(out, image)
    assert changed > 40


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"spatial_dims": 3, "roi_size": (64, 64)}, r"spatial_dims 3 and roi_size \(64, 64\)"),
        ({"spatial_dims": 1, "roi_size": (64,)}, "spatial_dims 1"),
        ({"spatial_dims": 2, "roi_size": (64, 64), "strength": "strong"}, "strength 'strong'"),
        ({"spatial_dims": 2, "roi_size": (64, 64), "background": 1.5}, "background 1.5"),
        ({"spatial_dims": 2, "roi_size": (64, 64), "touching": 0}, "touching 0"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_transforms(**arguments)


def test_picture_shows_outlines_and_ignored_pixels():
    label = np.zeros((4, 3), np.int32)  # (X, Y)
    label[0, 0], label[3, 2] = 5, IGNORE
    picture = draw_patch(np.full((4, 3), 0.5), label)
    assert picture.dtype == np.uint8 and picture.shape == (144, 192, 3)  # (Y, X, 3)
    assert picture[0, 47].tolist() == [255, 200, 0]
    assert picture[-1, -1, 2] > picture[-1, -1, 0]
    assert picture[0, -1].tolist() == [127, 127, 127]


@pytest.mark.parametrize("spatial_dims, shape", [(2, (64, 72)), (3, (8, 40, 40))])
def test_contact_sheet(tmp_path, spatial_dims, shape):
    data = ensure_dataset(tmp_path / "set", spatial_dims, 2, 1, shape)
    roi_size = (32, 32, 6)[:spatial_dims]
    sheet = contact_sheet(data, str(tmp_path / "new" / "sheet.png"), spatial_dims, rows=2, cols=3, roi_size=roi_size)
    assert Image.open(sheet).size == (3 * (192 + 4), 2 * (192 + 4))
    with pytest.raises(ValueError, match="roi_size"):
        contact_sheet(data, sheet, spatial_dims, roi_size=(8,))


@pytest.mark.parametrize("name, spatial_dims, roi_size", [("dsb2018", 2, (128, 128)), ("bbbc050", 3, (48, 48, 12))])
def test_real_images_keep_valid_objects(real_data, name, spatial_dims, roi_size):
    items = make_datalist(real_data / name, "training", spatial_dims, check=False)[:: 200 if spatial_dims == 2 else 12]
    pipeline = mt.Compose([*load_transforms(True, {}), *random_transforms(spatial_dims, roi_size, 4)]).set_random_state(
        0
    )
    samples = [sample for paths in items for sample in pipeline(paths)]
    assert len(samples) >= 8
    for sample in samples:
        assert_valid_objects(sample["label"][0].numpy())
    assert np.mean([(s["label"] > 0).any().item() for s in samples]) > 0.7
