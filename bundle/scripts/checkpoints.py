# SPDX-License-Identifier: Apache-2.0
"""What training leaves on disk: the best weights, and a state from which a killed training goes on.

Files are written beside their place and renamed, so a file is always whole. `WeightsSaver` writes what inference,
MONAI Label and `monai.bundle.load` read: a bare state dict. `TrainingState` writes all that training itself needs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events

from scripts.files import whole_file

__all__ = ["TrainingState", "WeightsSaver", "save_whole"]

logger = logging.getLogger(__name__)


def save_whole(content: Any, path: str | os.PathLike[str]) -> None:
    """`torch.save` that leaves either the old file or the whole new one, whenever it is interrupted."""
    with whole_file(path) as draft:
        torch.save(content, draft)


def _unwrapped(network: torch.nn.Module) -> torch.nn.Module:
    """The network itself, also where it is wrapped for several processes."""
    return network.module if isinstance(network, torch.nn.parallel.DistributedDataParallel) else network


class WeightsSaver:
    """Handler of the validating engine: writes the network's weights whenever its key metric is the best so far.

    The weights that the first write would replace are kept beside it as `<stem>_<first 8 digits of their SHA-256>.pt`.

    Args:
        network: whose weights to write.
        path: file to write.
        backup: keep the replaced weights; not wanted when a training goes on with its own file.
    """

    def __init__(self, network: torch.nn.Module, path: str, backup: bool = True) -> None:
        self.network = network
        self.path = Path(path)
        self.backup = backup

    def attach(self, engine: Engine) -> None:
        """Listen to a MONAI evaluator, after its own comparison of the key metric."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write if this epoch is the best."""
        state: Any = engine.state
        if state.best_metric_epoch != state.epoch or idist.get_rank() > 0:
            return
        if self.backup and self.path.is_file():
            digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[:8]
            kept = self.path.with_name(f"{self.path.stem}_{digest}{self.path.suffix}")
            shutil.copy2(self.path, kept)
            logger.info("kept the previous weights as %s", kept)
        self.backup = False
        save_whole(_unwrapped(self.network).state_dict(), self.path)
        logger.info("new best key metric %.4f: wrote %s", state.best_metric, self.path)


class TrainingState:
    """Handler of the trainer, last in its list: writes the state after each epoch, and restores it at the start.

    The state is weights, optimizer, learning-rate schedule, epoch, and the best metric so far. Random numbers need no
    state: `EpochSeeder` makes them a function of the epoch.

    Args:
        path: file to write and to resume from.
        network: in training.
        optimizer: of the training.
        lr_scheduler: of the training.
        evaluator: validating engine, which knows the best metric.
        resume: go on from the file, if it is there.
    """

    def __init__(
        self,
        path: str,
        network: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        evaluator: Engine,
        resume: bool = False,
    ) -> None:
        self.path = Path(path)
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.evaluator = evaluator
        self.resume = resume

    def attach(self, engine: Engine) -> None:
        """Listen to a trainer."""
        if self.resume:
            engine.add_event_handler(Events.STARTED, self.restore)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def save(self, engine: Engine) -> None:
        """Write the state after an epoch."""
        if idist.get_rank() == 0:
            validation: Any = self.evaluator.state
            content = {
                "model": _unwrapped(self.network).state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "lr_scheduler": self.lr_scheduler.state_dict(),
                "epoch": engine.state.epoch,
                "iteration": engine.state.iteration,
                "best_metric": float(validation.best_metric),
                "best_metric_epoch": validation.best_metric_epoch,
            }
            save_whole(content, self.path)

    def restore(self, engine: Engine) -> None:
        """Load the state before the first epoch.

        Raises:
            ValueError: when the file does not fit the network, the optimizer or the planned number of steps.
        """
        if not self.path.is_file():
            logger.warning("nothing to resume: %s is not there, training starts anew", self.path)
            return
        content = torch.load(self.path, map_location="cpu", weights_only=True)
        planned = self.lr_scheduler.state_dict().get("total_steps")
        try:
            _unwrapped(self.network).load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.lr_scheduler.load_state_dict(content["lr_scheduler"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"cannot resume from {self.path}: it belongs to another network or optimizer ({error}). "
                "Give the configuration that wrote it, or another output_dir."
            ) from error
        before = content["lr_scheduler"].get("total_steps")
        if before != planned:
            raise ValueError(
                f"cannot resume from {self.path}: its learning rate is planned for {before} steps, this training has "
                f"{planned}. Give the epochs and epoch_iterations that wrote it; or, for a longer training, another "
                "output_dir and --pretrained True, which starts anew from the weights."
            )
        engine.state.epoch, engine.state.iteration = content["epoch"], content["iteration"]
        validation: Any = self.evaluator.state
        validation.best_metric = content["best_metric"]
        validation.best_metric_epoch = content["best_metric_epoch"]
        logger.info("resumed from %s: epoch %d, best metric %.4f", self.path, content["epoch"], content["best_metric"])
