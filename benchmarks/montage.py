# SPDX-License-Identifier: Apache-2.0
"""One picture of several overlay pictures, cropped to squares: what the README shows.

python benchmarks/montage.py --overlays "['a_overlay.png','b_overlay.png']" --output bundle/docs/results.png
"""

from __future__ import annotations

from collections.abc import Sequence

import fire
from PIL import Image

GAP = 6  # pixels


def main(overlays: Sequence[str], output: str, size: int = 320, cols: int = 3, crop: float = 1.0) -> None:
    """Put the pictures side by side.

    Args:
        overlays: pictures.
        output: picture to write.
        size: of a square, in pixels.
        cols: squares in a row.
        crop: share of a picture's shorter side that its square shows.
    """
    rows = -(-len(overlays) // cols)
    sheet = Image.new("RGB", (cols * (size + GAP) - GAP, rows * (size + GAP) - GAP), "white")
    for i, path in enumerate(overlays):
        with Image.open(path) as picture:
            side = int(min(picture.size) * crop)
            left, top = ((length - side) // 2 for length in picture.size)
            square = picture.convert("RGB").crop((left, top, left + side, top + side)).resize((size, size))
        sheet.paste(square, (i % cols * (size + GAP), i // cols * (size + GAP)))
    sheet.save(output)


if __name__ == "__main__":
    fire.Fire(main)
