# SPDX-License-Identifier: Apache-2.0
"""Small handlers of the trainer: seeds, gradient clipping, early stop."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, set_rnd
from monai.engines.utils import IterationEvents

__all__ = ["EarlyStopper", "EpochSeeder", "GradientClipper"]

logger = logging.getLogger(__name__)


class EpochSeeder:
    """Seeds all random numbers from the epoch, so that epoch N is the same in an interrupted training.

    Args:
        seed: of the training.
        dataloader: whose transforms are seeded too (those of worker processes follow from PyTorch's seed). Each
            process of a distributed training draws its own augmentations.
    """

    def __init__(self, seed: int, dataloader: DataLoader) -> None:
        self.seed = seed
        self.dataloader = dataloader

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer; the epoch's data iterator is made after this event."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed the epoch."""
        entropy = (self.seed, engine.state.epoch, idist.get_rank())
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        set_rnd(self.dataloader.dataset, seed)
        sampler: Any = getattr(self.dataloader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(engine.state.epoch)


class GradientClipper:
    """Scales the gradients down to a norm of at most `max_norm` before each step of the optimizer.

    Args:
        parameters: of the network.
        max_norm: largest L2 norm over all gradients together.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> None:
        self.parameters = list(parameters)
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Listen to a MONAI trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Clip."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)


class EarlyStopper:
    """Ends the training when the key metric of the validation has not improved for `patience` epochs.

    Args:
        evaluator: validating engine, which knows the best epoch.
        patience: number of epochs.
    """

    def __init__(self, evaluator: Engine, patience: int) -> None:
        self.evaluator = evaluator
        self.patience = patience

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Stop if it is time."""
        state: Any = self.evaluator.state
        best_epoch = state.best_metric_epoch
        if best_epoch > 0 and engine.state.epoch - best_epoch >= self.patience:
            logger.info("no better key metric since epoch %d: stopping early", best_epoch)
            engine.terminate()
