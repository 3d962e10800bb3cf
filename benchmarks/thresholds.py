# SPDX-License-Identifier: Apache-2.0
"""Which post-processing parameters score best on validation images: each image goes through the network once.

    python benchmarks/thresholds.py --overlays "['configs/dataset_dsb2018.json']" --output thresholds.csv

prints SEG, DET, OP_CSB, AP50 and AP75 for each combination of seed threshold, foreground threshold and minimum size.
The best row is what `seed_threshold`, `foreground_threshold` and `min_size` in the configs are set to.
"""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import fire
import numpy as np
import torch
from monai.bundle import ConfigParser
from tqdm import tqdm

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
sys.path.insert(0, str(BUNDLE))

from scripts.instances import probabilities_to_instances  # noqa: E402
from scripts.metrics import FrameScore, score_frame, summarize  # noqa: E402

SHOWN = ("SEG", "DET", "OP_CSB", "AP50", "AP75", "mAP")


def load(overlays: Sequence[str], overrides: dict[str, object]) -> ConfigParser:
    """The evaluation's configuration, with the bundle as its root."""
    parser = ConfigParser()
    files = ["configs/inference.json", "configs/evaluate.json", *overlays]
    parser.read_config([str(BUNDLE / name) for name in files])
    parser.read_meta(str(BUNDLE / "configs" / "metadata.json"))
    parser.update({"bundle_root": str(BUNDLE), **overrides})
    return parser


def main(
    overlays: Sequence[str] = (),
    seed_thresholds: Sequence[float] = (0.4, 0.5, 0.6, 0.7, 0.8),
    foreground_thresholds: Sequence[float] = (0.4, 0.5, 0.6),
    min_sizes: Sequence[int] = (10, 20),
    output: str = "",
    **overrides: object,
) -> None:
    """Score all combinations.

    Args:
        overlays: config files to add, relative to the bundle.
        seed_thresholds: to try.
        foreground_thresholds: to try.
        min_sizes: to try, in pixels.
        output: CSV file to write.
        overrides: config values, such as dataset_dir, weights or section.
    """
    parser = load(overlays, overrides)
    network = parser.get_parsed_content("network").eval()
    weights = Path(parser.get_parsed_content("ckpt_dir")) / parser.get_parsed_content("weights")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    inferer = parser.get_parsed_content("inferer")
    combinations = list(itertools.product(seed_thresholds, foreground_thresholds, min_sizes))
    scores: dict[tuple, list[FrameScore]] = {combination: [] for combination in combinations}
    for item in tqdm(parser.get_parsed_content("dataset"), desc="images"):
        with torch.no_grad():
            probabilities = inferer(item["image"][None], network)[0].numpy()
        truth, markers = (np.asarray(item[key])[0] if key in item else None for key in ("label", "markers"))
        for combination in combinations:
            instances = probabilities_to_instances(probabilities, *combination)
            scores[combination].append(score_frame(instances, truth, markers))
    rows = [(*combination, *(summarize(frames)[key] for key in SHOWN)) for combination, frames in scores.items()]
    names = ("seed_threshold", "foreground_threshold", "min_size", *SHOWN)
    for row in sorted(rows, key=lambda row: -row[3 + SHOWN.index("OP_CSB")]):
        print("  ".join(f"{name} {value:.3f}" for name, value in zip(names, row, strict=True)))
    if output:
        with open(output, "w", newline="") as file:
            csv.writer(file).writerows([names, *rows])


if __name__ == "__main__":
    fire.Fire(main)
