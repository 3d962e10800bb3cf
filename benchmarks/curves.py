# SPDX-License-Identifier: Apache-2.0
"""Curves of a training from what it logged: loss, and validation metrics, over the epochs.

python benchmarks/curves.py --log training.log --output bundle/docs/training.png
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import fire
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def read_log(log: str) -> dict[str, list[tuple[int, float]]]:
    """(epoch, value) of each metric that MONAI's StatsHandler printed.

    Raises:
        ValueError: when the file holds no metrics.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for epoch, metrics in re.findall(r"Epoch\[(\d+)\] Metrics -- (.*)", Path(log).read_text(errors="replace")):
        for name, value in re.findall(r"(\w+): (-?[\d.]+|nan)", metrics):
            curves.setdefault(name, []).append((int(epoch), float(value)))
    if not curves:
        raise ValueError(f"{log}: found no line with 'Epoch[N] Metrics --', expected the output of a training.")
    return curves


def main(log: str, output: str, metrics: Sequence[str] = ("val_AP50", "val_AP75", "val_SEG", "val_DET")) -> None:
    """Draw the curves.

    Args:
        log: output of a training.
        output: picture to write.
        metrics: of the validation, to draw.
    """
    curves = read_log(log)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(*zip(*curves["train_loss"], strict=True), color="black")
    left.set(xlabel="epoch", ylabel="normalized focal loss", title="training")
    for name in metrics:
        right.plot(*zip(*curves[name], strict=True), marker="o", markersize=3, label=name.removeprefix("val_"))
    right.set(xlabel="epoch", title="validation", ylim=(0, 1))
    right.legend(loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    fire.Fire(main)
