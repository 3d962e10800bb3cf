# SPDX-License-Identifier: Apache-2.0
"""Run the bundle's configurations in tests: tiny synthetic sets, a tiny network, nothing written into the bundle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.bundle import ConfigWorkflow, create_workflow

from conftest import BUNDLE
from scripts.synthetic import ensure_dataset

CONFIGS = BUNDLE / "configs"
TINY_SHAPES = {2: (56, 64), 3: (10, 36, 40)}  # as on disk
TINY_NETWORK = {
    "network_def#features": 4,
    "network_def#channels": [4, 4],
    "network_def#dense_layers": [1, 1],
    "network_def#growth": 4,
    "device": "cpu",
    "amp": False,
}
TINY_TRAINING = TINY_NETWORK | {
    "epochs": 2,
    "epoch_iterations": 2,
    "batch_size": 2,
    "patch_size": [32, 32],
    "num_workers": 0,
}


def tiny_set(folder: Path, spatial_dims: int = 2, n_frames: int = 3) -> str:
    """A synthetic data set of a few small frames in the layout of the Cell Tracking Challenge."""
    return ensure_dataset(folder / f"tiny_{spatial_dims}d", spatial_dims, n_frames, 2, TINY_SHAPES[spatial_dims])


def config_files(*names: str) -> list[str]:
    return [str(CONFIGS / f"{name}.json") for name in names]


def workflow(names: tuple[str, ...], kind: str, **overrides: object) -> ConfigWorkflow:
    """A workflow of the named configurations in this process, initialized."""
    overrides = {"bundle_root": str(BUNDLE), **overrides}
    return create_workflow(config_file=config_files(*names), workflow_type=kind, logging_file=False, **overrides)


def run(names: tuple[str, ...], kind: str, **overrides: object) -> ConfigWorkflow:
    """Run a workflow of the named configurations to its end."""
    made = workflow(names, kind, **overrides)
    made.run()
    made.finalize()
    return made


def training_paths(folder: Path) -> dict[str, str]:
    """Where a training may write."""
    return {"output_dir": f"$'{folder / 'output'}'", "ckpt_dir": str(folder / "models")}


def command(*names: str, run_id: str = "run", processes: int = 0, **overrides: object) -> list[str]:
    """The command line that runs the named configurations, with `processes` > 0 by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    options = {"run_id": run_id, "config_file": config_files(*names), "bundle_root": str(BUNDLE), **overrides}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return [sys.executable, "-W", "ignore", *torchrun, "-m", "monai.bundle", "run", *arguments]


def shell_environment() -> dict[str, str]:
    """Without the paths that the tests add, and without a GPU: what is compared must not depend on one."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MONAI_DATA_DIRECTORY")}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def shell(arguments: list[str], cwd: Path, expect_failure: bool = False) -> str:
    """Run a command in a folder outside of the bundle and return all that it printed."""
    done = subprocess.run(arguments, cwd=cwd, env=shell_environment(), capture_output=True, text=True, timeout=600)
    printed = done.stdout + done.stderr
    assert (done.returncode != 0) == expect_failure, printed[-4000:]
    return printed


class Trained(NamedTuple):
    """What a training left behind."""

    output: Path
    models: Path
    printed: str

    @property
    def state(self) -> dict[str, Any]:
        return torch.load(self.output / "training_state.pt", weights_only=True)


def shipped() -> dict[str, tuple[int, int]]:
    """Files of the bundle that a training or an evaluation might write to, with size and time."""
    folders = [BUNDLE / name for name in ("models", "eval")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def infer(
    dataset_dir: object,
    output: Path,
    models: Path,
    *names: str,
    network: Mapping[str, object] = TINY_NETWORK,
    **overrides: object,
) -> Path:
    """Segment in this process; returns where the masks are."""
    paths = {"dataset_dir": str(dataset_dir), "output_dir": str(output), "ckpt_dir": str(models)}
    run(names or ("inference",), "infer", **paths, **{**network, **overrides})
    return output


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def messages(error: BaseException | None) -> str:
    """The message of an error with those of its causes, as a user sees them."""
    return f"{error}\n{messages(error.__cause__ or error.__context__)}" if error else ""


def noise(*shape: int, high: float = 255.0) -> np.ndarray:
    return np.random.default_rng(0).random(shape) * high
