# SPDX-License-Identifier: Apache-2.0
"""What the three classes lose: real truth -> target -> instances, and the score against the truth it came from.

No network is involved: the target itself, as probabilities, goes through the post-processing with default parameters.
SEG is the mean over true objects of the Jaccard index with the object that covers more than half of it, else 0 (Cell
Tracking Challenge). Run: `python benchmarks/roundtrip.py --data_root FOLDER [--border_width 2] [--most 60]`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import fire
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bundle"))

from scripts.images import read_image  # noqa: E402
from scripts.instances import probabilities_to_instances  # noqa: E402
from scripts.metrics import overlap_table, seg_scores  # noqa: E402
from scripts.targets import instances_to_target  # noqa: E402

logger = logging.getLogger("roundtrip")


def truth_files(data_root: Path) -> dict[str, list[Path]]:
    """Return the label files of each set: `<set>/masks/*.tif` and `ctc/<set>/<sequence>_{GT,ST}/SEG/*.tif`."""
    folders = {path.parent.name: path for path in sorted(data_root.glob("*/masks"))}
    for path in sorted(data_root.glob("ctc/*/*_[GS]T/SEG")):
        folders[f"{path.parents[1].name}/{path.parent.name}"] = path
    return {name: sorted(folder.glob("*.tif")) for name, folder in folders.items()}


def round_trip(labels: np.ndarray, border_width: int | Sequence[int] = 2) -> np.ndarray:
    """Return the instances that a network which predicts the target exactly would give, default parameters.

    Args:
        labels: instance labels `([Z,] Y, X)`.
        border_width: see `instances_to_target`.
    """
    target = instances_to_target(labels, border_width)
    probabilities = np.stack([target == value for value in range(3)]).astype(np.float32)
    return probabilities_to_instances(probabilities)


def main(data_root: str, border_width: int | Sequence[int] = 2, most: int = 60) -> None:
    """Print a table with one row for each set.

    Args:
        data_root: folder with `dsb2018/masks`, `ctc/<set>/01_GT/SEG`, ...
        border_width: see `instances_to_target`.
        most: files of each set, evenly spread; 0 for all.

    Raises:
        FileNotFoundError: if the folder holds no truth.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sets = truth_files(Path(data_root))
    if not sets:
        raise FileNotFoundError(
            f"no */masks/*.tif and no ctc/*/*_GT/SEG/*.tif below {data_root}: pass the data's folder"
        )
    logger.info(f"{'set':<24}{'frames':>7}{'objects':>9}{'SEG':>8}{'lost':>6}{'< 0.9':>7}{'us / pixel':>12}")
    for name, paths in sets.items():
        chosen = paths[:: max(1, len(paths) // most)] if most else paths
        scores, pixels, seconds = [], 0, 0.0
        for path in chosen:
            labels = read_image(path)[0].astype(np.int32)
            start = time.process_time()
            instances = round_trip(labels, border_width)
            seconds += time.process_time() - start
            pixels += labels.size
            scores.append(seg_scores(overlap_table(labels, instances)))
        seg = np.concatenate(scores)
        row = f"{name:<24}{len(chosen):>7}{len(seg):>9}{seg.mean():>8.4f}{(seg == 0).sum():>6}{(seg < 0.9).sum():>7}"
        logger.info(f"{row}{seconds / pixels * 1e6:>12.3f}")


if __name__ == "__main__":
    fire.Fire(main)
