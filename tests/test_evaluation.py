# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
import logging
import math
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from ignite.engine import Engine
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import CheckpointSaver, MLFlowHandler, StatsHandler
from monai.transforms import Lambdad

from scripts.evaluation import InstanceMetrics, ScoreWriter, by_sequence, inside_field, short_names, write_whole
from scripts.labels import IGNORE
from scripts.metrics import score_frame, summarize

LEFT = np.array([[1, 1, 0, 0], [1, 1, 0, 0]], dtype=np.int32)
BOTH = np.array([[1, 1, 0, 2], [1, 1, 0, 2]], dtype=np.int32)
NONE = np.zeros((2, 4), dtype=np.int32)


def meta(array: np.ndarray, path: str = "") -> MetaTensor:
    return MetaTensor(torch.as_tensor(array[None]), meta={"filename_or_obj": path} if path else {})


def item(path: str, pred: np.ndarray, label: np.ndarray | None = BOTH, markers: np.ndarray | None = None) -> dict:
    """An item whose image already is the prediction, so that a network that does nothing predicts it."""
    labels = {"label": label, "markers": markers}
    known = {key: meta(value, path) for key, value in labels.items() if value is not None}
    return {"image": meta(pred.astype(np.float32), path), **known}


def evaluator(items: list[dict], handlers: list | None = None, **arguments: object) -> SupervisedEvaluator:
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items), batch_size=1),
        network=torch.nn.Identity(),
        postprocessing=Lambdad("pred", lambda x: x[0].numpy().astype(np.uint16)),
        val_handlers=handlers,
        **arguments,
    )


ITEMS = [
    item("/data/A/01/t000.tif", BOTH),
    item("/data/A/01/t001.tif", LEFT, markers=BOTH),
    item("/data/A/02/t000.tif", BOTH, label=None, markers=LEFT),
    item("/data/A/empty.tif", NONE, label=NONE),
]


def test_as_key_metric_of_an_evaluator(tmp_path: Path) -> None:
    metric = InstanceMetrics()
    handlers = [StatsHandler(iteration_log=False), ScoreWriter(metric, str(tmp_path / "out"))]
    engine = evaluator(ITEMS, handlers, key_val_metric={"val_SEG": metric})
    engine.run()
    metrics = engine.state.metrics
    expected = summarize([score_frame(BOTH, BOTH), score_frame(LEFT, BOTH), score_frame(BOTH, None, LEFT)])
    assert metrics == {f"val_{key}": pytest.approx(value) for key, value in (expected | {"n_frames": 4}).items()}
    assert {type(value) for value in metrics.values()} == {float}
    assert metrics["val_SEG"] == 0.75 == engine.state.best_metric
    assert metrics["val_DET"] == pytest.approx(1 - (10 + 1) / 50)
    assert [name for name, _ in metric.rows] == ["01/t000", "01/t001", "02/t000", "empty"]
    engine.run()
    assert engine.state.metrics == metrics and len(metric.rows) == 4


def test_score_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metric = InstanceMetrics()
    with caplog.at_level(logging.INFO, "scripts.evaluation"):
        evaluator(ITEMS, [ScoreWriter(metric, str(tmp_path / "out"))], key_val_metric={"val_SEG": metric}).run()
    assert "SEG 0.7500" in caplog.text and "on 4 images" in caplog.text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["scores.csv", "scores.json"]
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").open()))
    assert [row["name"] for row in rows] == ["01/t000", "01/t001", "02/t000", "empty"]
    assert (rows[1]["SEG"], rows[1]["DET"], rows[1]["AP50"], rows[1]["misses"]) == ("0.5", "0.5", "0.5", "1")
    assert (rows[2]["SEG"], rows[2]["DET"], rows[2]["n_true"], rows[2]["n_pred"]) == ("", "0.9", "1", "2")
    assert (rows[3]["SEG"], rows[3]["AP95"], rows[3]["n_true"]) == ("", "", "0")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["summary"]["SEG"] == 0.75 and scores["summary"]["n_frames"] == 4
    assert {name: s["SEG"] for name, s in scores["sequences"].items()} == {"01": 0.75, "02": None}


def test_key_metric_is_finite_where_nothing_is_true(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metric = InstanceMetrics(key="AP50", prefix="")
    saver = CheckpointSaver(str(tmp_path), {"net": torch.nn.Linear(1, 1)}, save_key_metric=True)
    engine = evaluator([item("a.tif", NONE, NONE)], [saver], key_val_metric={"key": metric})
    engine.run()
    assert engine.state.metrics["key"] == 0.0 == engine.state.best_metric
    assert math.isnan(engine.state.metrics["AP50"])
    assert "undefined" in caplog.text
    assert list(tmp_path.glob("*key_metric=0.0*"))


def test_mlflow_takes_the_metrics_also_undefined_ones(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    handler = MLFlowHandler(f"sqlite:///{tmp_path / 'runs.db'}", iteration_log=False, close_on_complete=False)
    evaluator([item("a.tif", NONE, NONE)], [handler], key_val_metric={"val_SEG": InstanceMetrics()}).run()
    logged = handler.client.get_run(handler.cur_run.info.run_id).data.metrics
    handler.close()
    assert logged["val_SEG"] == 0 and logged["val_n_frames"] == 1 and "val_AP95" in logged


FORMS = {
    "numpy (X, Y)": lambda a: a.astype(np.uint16),
    "numpy (1, X, Y)": lambda a: a[None],
    "tensor (1, X, Y)": lambda a: torch.as_tensor(a[None]),
    "float MetaTensor (1, X, Y)": lambda a: meta(a.astype(np.float32)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 4), (1, 8), (2, 2, 2), (1, 1, 8)])
def test_forms_of_predictions(form: str, shape: tuple) -> None:
    truth = BOTH.reshape(shape)
    metric = InstanceMetrics()
    metric.update([{"pred": FORMS[form](truth), "label": meta(truth)}])
    assert metric.compute()["SEG"] == 1


def test_ignored_regions() -> None:
    metric = InstanceMetrics()
    metric.update([{"pred": BOTH, "label": meta(np.where(BOTH == 2, IGNORE, BOTH), "a.tif")}])
    assert metric.compute()["AP95"] == 1 and metric.summary["n_pred"] == 1


def test_an_image_is_scored_once() -> None:
    metric = InstanceMetrics()
    twice = {"image": meta(LEFT, "/d/a.tif"), "pred": LEFT, "label": meta(BOTH)}
    metric.update([twice, {"image": meta(BOTH, "/d/b.tif"), "pred": BOTH, "label": meta(BOTH)}])
    metric.update([twice])
    assert metric.compute()["SEG"] == 0.75 and [name for name, _ in metric.rows] == ["a", "b"]
    unnamed = {"image": torch.zeros(1, 2, 4), "pred": LEFT, "label": torch.as_tensor(BOTH[None])}
    metric.update([unnamed, unnamed])
    assert metric.compute()["n_frames"] == 4


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([{"pred": LEFT, "label": meta(BOTH[:1], "/d/a.tif")}], r"/d/a.tif: prediction \(2, 4\) and truth \(1, 4\)"),
        ([{"pred": LEFT, "image": meta(BOTH, "/d/a.tif")}], "/d/a.tif: there is nothing to score"),
        ([{"label": meta(BOTH, "/d/a.tif")}], "/d/a.tif: there is no pred, only label"),
        ([{"pred": LEFT, "label": torch.as_tensor(BOTH)}], "one channel first"),
        ([{"pred": LEFT / 2, "label": meta(BOTH)}], "fractions"),
        ({"pred": LEFT, "label": meta(BOTH)}, "list of dicts"),
    ],
)
def test_errors_name_the_file(output: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InstanceMetrics().update(output)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="key is 'Dice', but must be one of SEG, DET"):
        InstanceMetrics(key="Dice")
    with pytest.raises(ValueError, match="key is 'AP50'"):
        InstanceMetrics(key="AP50", iou_thresholds=(0.7,))
    with pytest.raises(ValueError, match="between 0.5 and 1"):
        InstanceMetrics(iou_thresholds=(0.3,))
    with pytest.raises(ValueError, match="no scores to write"):
        ScoreWriter(InstanceMetrics(), "unused")(Engine(lambda engine, batch: None))


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/d/a.tif", "/d/b.ome.tif", "/d/c.nii.gz"], ["a", "b", "c"]),
        (["/d/x/a.tif", "/d/y/a.tif"], ["x/a", "y/a"]),
        (["/d/S/01/t000.tif", "/d/S/02/t000.tif", "/d/a.tif"], ["01/t000", "02/t000", "a"]),
        (["/d/S/01/t000.tif", "/d/R/01/t000.tif"], ["S/01/t000", "R/01/t000"]),
        (["t000.tif"], ["t000"]),
        ([], []),
    ],
)
def test_short_names(paths: list[str], names: list[str]) -> None:
    assert short_names(paths) == names


def test_sequences() -> None:
    frame = score_frame(BOTH, BOTH)
    names = ["01/t000", "01/t001", "S/02/t000", "01/cell", "t000", "x/t000"]
    found = by_sequence([(name, frame) for name in names])
    assert {name: len(frames) for name, frames in found.items()} == {"01": 2, "S/02": 1}


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "new" / "a.txt", b"old")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "new" / "a.txt", b"new")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.txt"]
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"old"


def score_on_a_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=limit)
    metric = InstanceMetrics()
    items = [item("/d/01/t000.tif", BOTH), item(f"/d/01/t00{rank + 1}.tif", LEFT if rank else NONE)]  # t000: padded
    evaluator(items, [ScoreWriter(metric, f"{folder}/rank")], key_val_metric={"val_SEG": metric}).run()
    Path(folder, f"summary{rank}.json").write_text(json.dumps([metric.summary, [name for name, _ in metric.rows]]))
    dist.barrier()
    dist.destroy_process_group()


def test_processes_share_their_images(tmp_path: Path) -> None:
    multiprocessing.start_processes(score_on_a_process, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (json.loads((tmp_path / f"summary{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first[0]["SEG"] == pytest.approx(3 / 6) and first[0]["n_frames"] == 3
    assert first[1] == ["01/t000", "01/t001", "01/t002"]
    assert (tmp_path / "rank" / "scores.csv").exists()


def test_objects_outside_the_field_are_not_scored() -> None:
    labels = np.array(
        [
            [1, 1, 0, 2, 2],
            [0, 0, 0, 2, 0],
            [3, 0, 0, 0, 0],
            [3, 3, 0, 0, 4],
            [0, 0, 0, 0, 4],
        ]
    )
    np.testing.assert_array_equal(np.unique(inside_field(labels, 0)), [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(np.unique(inside_field(labels, 1)), [0, 2, 3])
    np.testing.assert_array_equal(np.unique(inside_field(labels, 3)), [0])
