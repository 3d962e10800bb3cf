# SPDX-License-Identifier: Apache-2.0
"""The configurations at work, on copies and tiny sets: what users, MONAI Label, torchrun and MLflow do."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from monai.bundle import ConfigWorkflow
from monai.engines import SupervisedTrainer
from PIL import Image

from bundle_runs import (
    CONFIGS,
    TINY_NETWORK,
    TINY_SHAPES,
    TINY_TRAINING,
    Trained,
    command,
    config_files,
    infer,
    messages,
    names_in,
    noise,
    run,
    shell,
    shell_environment,
    shipped,
    tiny_set,
    training_paths,
    workflow,
)
from conftest import BUNDLE
from imagefiles import save
from scripts.images import read_image
from scripts.metrics import score_frame, summarize
from scripts.synthetic import ensure_dataset

EVALUATION = ("inference", "evaluate")
TINY_3D = TINY_TRAINING | {"patch_size": [16, 16, 8], "roi_size": [24, 24, 8], "batch_size": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_set(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def data_3d(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_set(tmp_path_factory.mktemp("data"), 3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: str) -> Trained:
    """A training from the command line, started in a folder that has nothing to do with the bundle."""
    folder = tmp_path_factory.mktemp("trained")
    before = shipped()
    arguments = command("train", run_id="training", dataset_dir=data, **training_paths(folder), **TINY_TRAINING)
    printed = shell(arguments, cwd=folder)
    assert shipped() == before
    return Trained(folder / "output", folder / "models", printed)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[SupervisedTrainer]:
    """The trainers that ran."""
    ran, original = [], SupervisedTrainer.run

    def counted(self: SupervisedTrainer) -> None:
        ran.append(self)
        original(self)

    monkeypatch.setattr(SupervisedTrainer, "run", counted)
    return ran


def test_training_writes_weights_and_state(trained: Trained) -> None:
    network = workflow(("train",), "train", **TINY_NETWORK).network_def
    weights = torch.load(trained.models / "model.pt", weights_only=True)
    assert weights.keys() == network.state_dict().keys()
    network.load_state_dict(weights)
    assert names_in(trained.models) == {"model.pt"} and names_in(trained.output) == {"training_state.pt"}
    assert (trained.state["epoch"], trained.state["iteration"]) == (2, 4)
    assert trained.state["best_metric_epoch"] in (1, 2)
    assert trained.printed.count("SupervisedTrainer - INFO - Engine run finished") == 1
    assert "val_OP_CSB" in trained.printed and "train_loss" in trained.printed


@pytest.mark.parametrize("run_id", ["run", "training", ""])
def test_each_run_id_trains_once(
    run_id: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainings: list[SupervisedTrainer]
) -> None:
    """MONAI Label's clients may send an empty id, which evaluates the whole file."""
    monkeypatch.chdir(BUNDLE)
    options = TINY_TRAINING | {"epochs": 1, "bundle_root": "."}
    run(("train",), "train", run_id=run_id, dataset_dir=data, **training_paths(tmp_path), **options)
    assert [trainer.state.epoch for trainer in trainings] == [1]
    assert (tmp_path / "models" / "model.pt").is_file()


def test_a_killed_training_goes_on_as_if_nothing_had_happened(tmp_path: Path, data: str) -> None:
    options = TINY_TRAINING | {"epochs": 6, "epoch_iterations": 10, "dataset_dir": data}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tmp_path.joinpath("elsewhere").mkdir()
    process = subprocess.Popen(
        command("train", **options, **training_paths(killed)),
        cwd=tmp_path / "elsewhere",
        env=shell_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 240
        while not (killed / "output" / "training_state.pt").exists() and process.poll() is None:
            assert time.monotonic() < deadline, "no epoch was finished"
            time.sleep(0.01)
        time.sleep(0.05)  # into the next epoch
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    parts = [Trained(folder / "output", folder / "models", "") for folder in (killed, whole)]
    assert 1 <= parts[0].state["epoch"] < 6
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other process: sums of floats depend on it
    try:
        run(("train",), "train", **options, **training_paths(killed), resume=True)
        run(("train",), "train", **options, **training_paths(whole))
    finally:
        torch.set_num_threads(threads)
    resumed, expected = (part.state for part in parts)
    assert (resumed["epoch"], resumed["iteration"]) == (6, 60)
    assert resumed["best_metric"] == pytest.approx(expected["best_metric"])
    assert resumed["best_metric_epoch"] == expected["best_metric_epoch"]
    torch.testing.assert_close(resumed["model"], expected["model"])
    best = [torch.load(part.models / "model.pt", weights_only=True) for part in parts]
    torch.testing.assert_close(*best)
    leftovers = {name for name in names_in(killed) if not Path(name).name.startswith(".")}  # drafts of the killed one
    assert leftovers == {"output/training_state.pt", "models/model.pt"}


def test_new_training_keeps_the_weights_that_it_replaces(tmp_path: Path, data: str, trained: Trained) -> None:
    paths = training_paths(tmp_path)
    shutil.copytree(trained.models, paths["ckpt_dir"])
    run(("train",), "train", dataset_dir=data, **paths, **TINY_TRAINING | {"epochs": 1, "seed": 3})
    old, new = sorted((tmp_path / "models").iterdir(), key=lambda path: path.name != "model.pt", reverse=True)
    assert old.name.startswith("model_") and old.read_bytes() == (trained.models / "model.pt").read_bytes()
    assert new.read_bytes() != old.read_bytes()


def test_bad_image_stops_the_training_before_it_starts(
    tmp_path: Path, data: str, trainings: list[SupervisedTrainer]
) -> None:
    broken = shutil.copytree(data, tmp_path / "broken") / "01" / "t001.tif"
    broken.write_bytes(broken.read_bytes()[:-1000])
    with pytest.raises(Exception) as caught:
        run(("train",), "train", dataset_dir=str(tmp_path / "broken"), **training_paths(tmp_path), **TINY_TRAINING)
    assert str(broken) in messages(caught.value)
    assert not trainings and names_in(tmp_path / "broken") == names_in(Path(data))
    assert not (tmp_path / "models").exists() and not (tmp_path / "output").exists()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, tuple[int, int]]:
    """Images of all kinds, none of them square, with their shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    shapes = {
        save(folder / "u8.tif", noise(30, 50).astype(np.uint8)): (30, 50),
        save(folder / "u16.tiff", noise(41, 33, high=65535).astype(np.uint16)): (41, 33),
        save(folder / "float.tif", noise(20, 64, high=1e-3).astype(np.float32)): (20, 64),
        save(folder / "png16.png", noise(37, 28, high=65535).astype(np.uint16)): (37, 28),
        save(folder / "head.nii.gz", noise(25, 40).astype(np.int16)): (25, 40),
        save(folder / "large.tif", noise(90, 20).astype(np.uint8)): (90, 20),
    }
    save(folder / "u8_mask.tif", np.ones((30, 50), np.uint16))  # lies there from an earlier run
    (folder / "notes.txt").write_text("no image")
    return shapes


def test_folder_of_images_of_all_kinds(pictures: dict[Path, tuple[int, int]], trained: Trained, tmp_path: Path) -> None:
    """From the command line, in a foreign folder, with the output in a relative path."""
    folder = next(iter(pictures)).parent
    options = {"dataset_dir": folder, "output_dir": "out/", "ckpt_dir": trained.models, "roi_size": [48, 48]}
    shell(command("inference", **options, **TINY_NETWORK), cwd=tmp_path)
    masks = {"head": "head_mask.nii.gz"}
    for path, shape in pictures.items():
        stem = path.name.split(".")[0]
        mask = read_image(tmp_path / "out" / masks.setdefault(stem, f"{stem}_mask.tif"))[0]
        assert mask.shape == shape and mask.dtype == np.uint16
    assert names_in(tmp_path / "out") == set(masks.values())
    assert names_in(tmp_path / "out_overlays") == {f"{stem}_overlay.png" for stem in masks}
    for picture in (tmp_path / "out_overlays").iterdir():
        assert Image.open(picture).mode == "RGB"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out_overlays"}


def test_single_image(pictures: dict[Path, tuple[int, int]], trained: Trained, tmp_path: Path) -> None:
    image = next(path for path in pictures if path.name == "u16.tiff")
    output = infer(image, tmp_path / "out", trained.models)
    assert names_in(output) == {"u16_mask.tif"}
    assert names_in(tmp_path / "out_overlays") == {"u16_overlay.png"}


def test_challenge_folder_gives_the_challenge_s_names(data: str, trained: Trained, tmp_path: Path) -> None:
    output = infer(data, tmp_path / "out", trained.models)
    expected = {f"01_RES/mask00{t}.tif" for t in range(3)} | {f"02_RES/mask00{t}.tif" for t in range(2)}
    assert names_in(output) == expected
    for name in expected:
        mask = tifffile.imread(output / name)
        assert mask.shape == TINY_SHAPES[2] and mask.dtype == np.uint16
    assert len(names_in(tmp_path / "out_overlays")) == 5


def test_same_mask_whatever_the_window(data: str, trained: Trained, tmp_path: Path) -> None:
    """Windows as large as the image, or larger, are the same; the network sees the image unpadded."""
    image = Path(data) / "01" / "t000.tif"
    masks = [
        tifffile.imread(
            infer(image, tmp_path / str(size), trained.models, roi_size=[size, size]) / "01_RES/mask000.tif"
        )
        for size in (64, 512)
    ]
    np.testing.assert_array_equal(*masks)


@pytest.mark.parametrize(
    "folder, message", [("empty", "no image found"), ("missing", "no such file or folder"), ("volume", "3D")]
)
def test_nothing_to_segment_is_said(folder: str, message: str, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save(tmp_path / "volume" / "stack.tif", noise(5, 20, 20).astype(np.uint8))
    with pytest.raises(Exception) as caught:
        infer(tmp_path / folder, tmp_path / "out", trained.models)
    assert message in messages(caught.value) and str(tmp_path / folder) in messages(caught.value)
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_said(data: str, tmp_path: Path) -> None:
    with pytest.raises(Exception) as caught:
        infer(data, tmp_path / "out", tmp_path / "no_models")
    assert str(tmp_path / "no_models" / "model.pt") in messages(caught.value)


def test_black_image_gives_an_empty_mask_with_the_shipped_weights(tmp_path: Path) -> None:
    save(tmp_path / "in" / "black.tif", np.zeros((70, 90), np.uint8))
    paths = {"dataset_dir": str(tmp_path / "in"), "output_dir": str(tmp_path / "out"), "device": "cpu"}
    run(("inference",), "infer", **paths)
    mask = tifffile.imread(tmp_path / "out" / "black_mask.tif")
    assert mask.shape == (70, 90) and not mask.any()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, trained: Trained) -> tuple[str, Path]:
    """A set of three validation frames, and the output of its evaluation by one process."""
    folder = tmp_path_factory.mktemp("evaluated")
    data = ensure_dataset(folder / "set", 2, n_frames=1, n_val_frames=3, shape=TINY_SHAPES[2], seed=5)
    return data, infer(data, folder / "out", trained.models, *EVALUATION)


def test_evaluation_scores_what_it_writes(evaluated: tuple[str, Path]) -> None:
    data, output = evaluated
    masks = {f"02_RES/mask00{t}.tif" for t in range(3)}
    assert names_in(output) == masks | {"scores.csv", "scores.json"}
    frames = [
        score_frame(*(tifffile.imread(path).astype(np.int32) for path in paths))
        for t in range(3)
        for paths in [
            [
                output / f"02_RES/mask00{t}.tif",
                *(Path(data, "02_GT", kind) for kind in (f"SEG/man_seg00{t}.tif", f"TRA/man_track00{t}.tif")),
            ]
        ]
    ]
    scores = json.loads((output / "scores.json").read_text())
    assert scores.keys() == {"summary", "sequences"}
    for key, value in summarize(frames).items():
        assert scores["summary"][key] == (None if np.isnan(value) else pytest.approx(value, abs=1e-6)), key
    assert scores["summary"].keys() >= {"SEG", "DET", "OP_CSB", "AP50", "mAP", "n_true", "n_pred", "n_frames"}
    assert scores["sequences"] == {"02": scores["summary"]}
    rows = list(csv.DictReader((output / "scores.csv").open()))
    assert [row["name"] for row in rows] == ["02/t000", "02/t001", "02/t002"]
    assert [int(row["n_pred"]) for row in rows] == [int(tifffile.imread(output / name).max()) for name in sorted(masks)]


def test_volumes(data_3d: str, tmp_path: Path) -> None:
    run(("train", "3d"), "train", dataset_dir=data_3d, **training_paths(tmp_path), **TINY_3D | {"epochs": 1})
    assert names_in(tmp_path / "models") == {"model_3d.pt"}
    volumes = tmp_path / "in"
    save(volumes / "stack.tif", noise(9, 30, 41).astype(np.uint16))
    save(volumes / "scan.nii.gz", noise(7, 26, 20).astype(np.float32))
    options = {key: value for key, value in TINY_3D.items() if key.startswith(("network", "roi"))}
    output = infer(volumes, tmp_path / "out", tmp_path / "models", "inference", "3d", **options)
    assert read_image(output / "stack_mask.tif")[0].shape == (9, 30, 41)
    assert read_image(output / "scan_mask.nii.gz")[0].shape == (7, 26, 20)
    scored = infer(data_3d, tmp_path / "scored", tmp_path / "models", *EVALUATION, "3d", **options)
    assert json.loads((scored / "scores.json").read_text())["summary"]["n_frames"] == 2


def test_training_by_monai_label(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch, trainings: list[SupervisedTrainer]
) -> None:
    """It sets lists of items and the device as text, and puts a loader of weights first. Labels are plain masks."""
    mask = np.zeros((48, 40), np.uint8)
    mask[5:15, 5:15] = mask[25:40, 10:30] = 1
    for stem in ("a", "b", "c"):
        save(tmp_path / "studies" / f"{stem}.png", (noise(48, 40) + 100 * mask).astype(np.uint8))
        save(tmp_path / "studies" / "labels" / f"{stem}.tif", mask)
    items = [
        {"image": str(tmp_path / "studies" / f"{s}.png"), "label": str(tmp_path / "studies/labels" / f"{s}.tif")}
        for s in ("a", "b", "c")
    ]
    loader = {
        "_target_": "CheckpointLoader",
        "load_path": str(trained.models / "model.pt"),
        "load_dict": {"model": "$@network"},
    }
    monkeypatch.chdir(tmp_path)
    options = TINY_TRAINING | {
        "train#trainer#max_epochs": 2,
        "train#dataset#data": items[:2],
        "validate#dataset#data": items[2:],
        "device": "cpu",
        "learning_rate": 0.0,
        "bundle_root": str(BUNDLE),
    }
    made = ConfigWorkflow(config_files("train"), logging_file=False, run_id="", **training_paths(tmp_path), **options)
    made.parser["train#handlers"].insert(0, loader)
    made.initialize()
    made.run()
    assert [trainer.state.epoch for trainer in trainings] == [2]
    start, end = (
        torch.load(folder / "model.pt", weights_only=True) for folder in (trained.models, tmp_path / "models")
    )
    parameters = dict(made.network_def.named_parameters())
    assert parameters.keys() < end.keys()
    for name in parameters:
        torch.testing.assert_close(end[name], start[name], msg=name)
    metrics = made.parser.get_parsed_content("validate#evaluator").state.metrics
    assert metrics["val_n_true"] == 2  # the regions of the plain mask


def test_distributed_training(data: str, tmp_path: Path) -> None:
    options = TINY_TRAINING | {"dataset_dir": data, **training_paths(tmp_path)}
    printed = shell(command("train", "multi_gpu_train", processes=2, run_id="training", **options), cwd=tmp_path)
    weights = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert weights.keys() == workflow(("train",), "train", **TINY_NETWORK).network_def.state_dict().keys()
    state = Trained(tmp_path / "output", tmp_path / "models", printed).state
    assert (state["epoch"], state["iteration"]) == (2, 4) and state["model"].keys() == weights.keys()
    assert names_in(tmp_path) == {"models/model.pt", "output/training_state.pt"}
    assert printed.count("Engine run finished") <= 1 + 2  # of the first process alone: training, and each validation


def test_distributed_evaluation_gives_the_same_scores(
    evaluated: tuple[str, Path], trained: Trained, tmp_path: Path
) -> None:
    """Three frames for two processes: none is left out, none counts twice."""
    data, output = evaluated
    options = TINY_NETWORK | {"dataset_dir": data, "output_dir": tmp_path / "out", "ckpt_dir": trained.models}
    shell(command(*EVALUATION, "multi_gpu_evaluate", processes=2, **options), cwd=tmp_path)
    assert names_in(tmp_path / "out") == names_in(output)
    for name in ("scores.json", "scores.csv"):
        assert (tmp_path / "out" / name).read_text() == (output / name).read_text()


def test_tracking(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    options = TINY_TRAINING | {"dataset_dir": data, "tracking": str(CONFIGS / "mlflow.json")}
    run(("train",), "train", **options, **training_paths(tmp_path))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'output' / 'mlruns.db'}")
    runs = [one for experiment in client.search_experiments() for one in client.search_runs([experiment.experiment_id])]
    assert Counter(one.info.status for one in runs) == {"FINISHED": 1}
    data_of_run = runs[0].data
    assert data_of_run.params["network"] == "GRUUNet" and data_of_run.params["loss"] == "NormalizedFocalLoss"
    assert {"seed": "0", "train_images": "3", "validation_images": "2"}.items() <= data_of_run.params.items()
    version = json.loads((CONFIGS / "metadata.json").read_text())["version"]
    assert data_of_run.params["bundle_version"] == version
    assert {"val_OP_CSB", "val_SEG", "train_loss"} <= data_of_run.metrics.keys()
    assert len(client.get_metric_history(runs[0].info.run_id, "val_OP_CSB")) == 2
    assert [file.path for file in client.list_artifacts(runs[0].info.run_id) if file.path.startswith("config_")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overlays", "epochs", "augmentation"), [((), 8, "heavy"), (("3d",), 8, "flips")], ids=["2d", "3d"]
)
def test_learns(overlays: tuple[str, ...], epochs: int, augmentation: str, tmp_path: Path) -> None:
    """From random weights to unseen images, the default network on the synthetic set that comes with the bundle."""
    data = ensure_dataset(tmp_path / "set", 3 if overlays else 2)
    options = {"epochs": epochs, "epoch_iterations": 50, "val_interval": 2, "augmentation": augmentation}
    run(("train", *overlays), "train", dataset_dir=data, **training_paths(tmp_path), **options)
    scored = infer(data, tmp_path / "out", tmp_path / "models", *EVALUATION, *overlays, network={})
    scores = json.loads((scored / "scores.json").read_text())["summary"]
    assert scores["SEG"] >= 0.8 and scores["n_frames"] == 4, scores
