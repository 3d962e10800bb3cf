# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from scripts.checkpoints import TrainingState, WeightsSaver, save_whole

EPOCHS, STEPS = 5, 3


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def validated(epoch: int, best_epoch: int) -> SimpleNamespace:
    """An evaluator after its run of an epoch."""
    return SimpleNamespace(state=SimpleNamespace(epoch=epoch, best_metric_epoch=best_epoch, best_metric=0.5))


def load(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def test_save_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "model.pt"
    save_whole({"a": torch.ones(2)}, path)
    save_whole({"a": torch.zeros(2)}, path)
    assert load(path)["a"].tolist() == [0, 0]
    assert list(files(path.parent)) == ["model.pt"]


def test_failing_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save_whole({"a": torch.ones(2)}, path)
    before = files(tmp_path)
    with pytest.raises(Exception, match="pickle"):
        save_whole({"a": torch.zeros(2), "b": lambda: None}, path)
    assert files(tmp_path) == before


def test_killed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    save_whole({"a": torch.ones(2)}, path)
    before = path.read_bytes()

    def half(content: object, draft: Path) -> None:
        Path(draft).write_bytes(before[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save_whole({"a": torch.zeros(2)}, path)
    assert files(tmp_path) == {"model.pt": before}


def test_only_the_best_weights_are_written(tmp_path: Path) -> None:
    network, path = nn.Linear(1, 1), tmp_path / "models" / "model.pt"
    saver = WeightsSaver(network, str(path))
    saver(validated(epoch=1, best_epoch=-1))  # no metric
    assert not path.exists()
    for epoch, best_epoch, expected in ((1, 1, 1.0), (2, 1, 1.0), (3, 3, 3.0), (4, 3, 3.0)):
        nn.init.constant_(network.weight, epoch)
        saver(validated(epoch, best_epoch))
        assert float(load(path)["weight"]) == expected
    assert load(path).keys() == network.state_dict().keys()
    assert list(files(path.parent)) == ["model.pt"]  # its own earlier weights need no backup


def test_weights_follow_the_comparison_of_a_real_evaluator(tmp_path: Path) -> None:
    """MONAI compares at the end of the same event that the saver listens to."""
    from ignite.metrics import Average
    from monai.engines import SupervisedEvaluator

    network, path = nn.Linear(1, 1), tmp_path / "model.pt"
    metric = Average(output_transform=lambda output: float(network.weight))
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[{"image": torch.ones(1, 1), "label": torch.ones(1, 1)}],
        epoch_length=1,
        network=network,
        decollate=False,
        key_val_metric={"score": metric},
        val_handlers=[WeightsSaver(network, str(path))],
    )
    written = []
    for epoch, score in enumerate((0.2, 0.1, 0.4), start=1):
        nn.init.constant_(network.weight, score)
        evaluator.run(epoch)
        written.append(round(float(load(path)["weight"]), 3))
    assert written == [0.2, 0.2, 0.4]


@pytest.mark.parametrize("backup", [True, False])
def test_replaced_weights_are_kept(tmp_path: Path, backup: bool) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"trained for days")
    kept = f"model_{hashlib.sha256(b'trained for days').hexdigest()[:8]}.pt"
    saver = WeightsSaver(nn.Linear(1, 1), str(path), backup)
    saver(validated(1, 1))
    saver(validated(2, 2))
    found = files(tmp_path)
    assert found.keys() == ({"model.pt", kept} if backup else {"model.pt"})
    assert found["model.pt"] != b"trained for days"
    assert found.get(kept, b"trained for days") == b"trained for days"


class Training:
    """A few epochs on random numbers that depend on the epoch, of a network with momentum and a schedule."""

    def __init__(self, path: Path, resume: bool = False, features: int = 3, epochs: int = EPOCHS) -> None:
        torch.manual_seed(1)
        self.network = nn.Linear(features, 1)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.1)
        self.lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.1, total_steps=epochs * STEPS)
        self.evaluator = Engine(lambda engine, batch: None)
        self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = -1, -1
        self.trainer = Engine(self.step)
        self.trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: torch.manual_seed(engine.state.epoch))
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.validate)
        self.state = TrainingState(
            str(path), self.network, self.optimizer, self.lr_scheduler, self.evaluator, resume=resume
        )
        self.state.attach(self.trainer)
        self.epochs = epochs
        self.seen: list[int] = []

    def step(self, engine: Engine, batch: object) -> None:
        self.optimizer.zero_grad()
        self.network(torch.randn(4, self.network.in_features)).square().mean().backward()
        self.optimizer.step()
        self.lr_scheduler.step()

    def validate(self, engine: Engine) -> None:
        """The best epoch is the second."""
        self.seen.append(engine.state.epoch)
        if engine.state.epoch == 2:
            self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = torch.tensor(0.75), 2

    def run(self, killed_in: int = 0) -> Training:
        if killed_in:
            self.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=STEPS * (killed_in - 1) + 2), self.kill)
        self.trainer.run(range(STEPS), max_epochs=self.epochs)
        return self

    def kill(self, engine: Engine) -> None:
        raise KeyboardInterrupt


def test_training_goes_on_as_if_never_killed(tmp_path: Path) -> None:
    uninterrupted = Training(tmp_path / "a" / "state.pt").run()
    path = tmp_path / "b" / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        Training(path).run(killed_in=4)
    resumed = Training(path, resume=True).run()
    assert resumed.seen == [4, 5] and resumed.trainer.state.iteration == EPOCHS * STEPS
    assert resumed.evaluator.state.best_metric == 0.75 and resumed.evaluator.state.best_metric_epoch == 2
    for part in ("network", "optimizer"):
        found, expected = (dict(getattr(training, part).state_dict()) for training in (resumed, uninterrupted))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert resumed.lr_scheduler.state_dict() == uninterrupted.lr_scheduler.state_dict()
    assert load(path).keys() >= {"model", "optimizer", "lr_scheduler", "epoch", "iteration", "best_metric"}


def test_finished_training_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    finished = Training(path).run()
    resumed = Training(path, resume=True).run()
    assert resumed.seen == []
    torch.testing.assert_close(dict(resumed.network.state_dict()), dict(finished.network.state_dict()))


def test_without_resume_training_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    Training(path).run()
    assert Training(path).run().seen == [1, 2, 3, 4, 5]


def test_nothing_to_resume_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "scripts.checkpoints"):
        assert Training(tmp_path / "state.pt", resume=True).run().seen == [1, 2, 3, 4, 5]
    assert str(tmp_path / "state.pt") in caplog.text and "starts anew" in caplog.text


def test_state_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    Training(path, features=3).run()
    with pytest.raises(ValueError, match=r"(?s)state\.pt: it belongs to another network.*output_dir"):
        Training(path, resume=True, features=4).run()


def test_weights_alone_are_no_state(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_whole(nn.Linear(3, 1).state_dict(), path)
    with pytest.raises(ValueError, match="another network"):
        Training(path, resume=True).run()


def test_another_number_of_epochs_is_refused(tmp_path: Path) -> None:
    """The schedule of the learning rate ends with the training it was made for."""
    path = tmp_path / "state.pt"
    Training(path).run()
    with pytest.raises(ValueError, match=f"for {EPOCHS * STEPS} steps, .* has {2 * EPOCHS * STEPS}.*pretrained"):
        Training(path, resume=True, epochs=2 * EPOCHS).run()
