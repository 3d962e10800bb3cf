# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.transforms import Compose, RandGaussianNoise
from torch import nn
from torch.utils.data import RandomSampler

from scripts.training import EarlyStopper, EpochSeeder, GradientClipper


def draws(seed: int, first_epoch: int, num_workers: int = 0, epochs: int = 3) -> list[tuple]:
    """All kinds of random numbers in each epoch of a training that starts with `first_epoch`."""
    dataset = Dataset([torch.full((1, 2), float(i)) for i in range(6)], Compose([RandGaussianNoise(prob=0.5)]))
    dataloader = DataLoader(dataset, batch_size=2, sampler=RandomSampler(dataset), num_workers=num_workers)
    found: dict[int, list] = {}

    def step(engine: Engine, batch: torch.Tensor) -> None:
        found.setdefault(engine.state.epoch, []).append(torch.as_tensor(batch).flatten().tolist())

    def others(engine: Engine) -> None:
        found[engine.state.epoch] += [random.random(), float(np.random.rand()), float(torch.rand(1))]

    engine = Engine(step)
    EpochSeeder(seed, dataloader).attach(engine)
    engine.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "epoch", first_epoch - 1))
    engine.add_event_handler(Events.EPOCH_COMPLETED, others)
    engine.run(dataloader, max_epochs=epochs)
    return [found[epoch] for epoch in range(first_epoch, epochs + 1)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_epoch_depends_on_seed_and_number_alone(num_workers: int) -> None:
    from_start = draws(0, 1, num_workers)
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    assert draws(0, 3, num_workers) == from_start[2:]
    assert from_start[0] != from_start[1]
    assert draws(1, 3, num_workers) != from_start[2:]


def test_processes_draw_different_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> float:
        EpochSeeder(0, SimpleNamespace(dataset=Dataset([1])))(SimpleNamespace(state=SimpleNamespace(epoch=1)))
        return float(torch.rand(1))

    alone = drawn()
    monkeypatch.setattr("scripts.training.idist.get_rank", lambda: 0)
    assert drawn() == alone
    monkeypatch.setattr("scripts.training.idist.get_rank", lambda: 1)
    assert drawn() != alone


def test_sampler_of_a_distributed_training_is_told_the_epoch() -> None:
    told: list[int] = []
    dataloader = SimpleNamespace(dataset=Dataset([1]), sampler=SimpleNamespace(set_epoch=told.append))
    engine = Engine(lambda engine, batch: None)
    EpochSeeder(0, dataloader).attach(engine)
    engine.run([1], max_epochs=3)
    assert told == [1, 2, 3]


@pytest.mark.parametrize("max_norm, expected", [(1.0, 1.0), (2.5, 2.5), (100.0, 5.0)])
def test_gradients_are_clipped_before_the_step(max_norm: float, expected: float) -> None:
    """The gradients of the two weights are 3 and 4; with a learning rate of 1 they are the step."""
    network = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(network.weight)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[{"image": torch.tensor([[3.0, 4.0]]), "label": torch.zeros(1, 1)}],
        epoch_length=1,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        loss_function=lambda pred, label: pred.sum(),
        decollate=False,
        train_handlers=[GradientClipper(network.parameters(), max_norm)],
    )
    trainer.run()
    step = -network.weight.detach()
    assert float(step.norm()) == pytest.approx(expected, rel=1e-4)
    assert float(step[0, 0] / step[0, 1]) == pytest.approx(0.75)


@pytest.mark.parametrize(
    "best_epochs, patience, last",
    [
        ([1, 1, 1, 1, 1, 1], 3, 4),
        ([1, 2, 2, 4, 4, 4], 2, 6),
        ([1, 2, 3, 4, 5, 6], 1, 6),
        ([-1, -1, -1, -1, -1, -1], 1, 6),  # never validated
        ([-1, -1, -1, 4, 4, 4], 1, 5),  # validated every fourth epoch
    ],
)
def test_stops_when_the_best_epoch_is_long_ago(best_epochs: list[int], patience: int, last: int) -> None:
    evaluator = Engine(lambda engine, batch: None)
    trainer = Engine(lambda engine, batch: None)

    def validate(engine: Engine) -> None:
        evaluator.state.best_metric_epoch = best_epochs[engine.state.epoch - 1]

    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    EarlyStopper(evaluator, patience).attach(trainer)
    trainer.run([1], max_epochs=6)
    assert trainer.state.epoch == last
