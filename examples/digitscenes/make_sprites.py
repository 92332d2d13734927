"""Build sprites.png and sprites.json from scikit-learn's copy of the UCI digits (needed once, by maintainers only).

Run `python examples/digitscenes/make_sprites.py` with scikit-learn installed; the sheet that it writes is committed,
and nothing else in the project needs scikit-learn.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
TILE = 8
COLUMNS = 61  # three rows of 61 hold the most frequent label (183 sprites)
GREY_STEP = 15  # the source has grey levels 0..16; times 15 they fit a byte and come back by an exact division


def build_sheet(images: np.ndarray, labels: np.ndarray) -> tuple[Image.Image, list[int]]:
    """Lay the digits out in one band of rows for each label, in the order of the source.

    Args:
        images: grey levels 0..16, shape (n, 8, 8).
        labels: 0..9, shape (n,).

    Returns:
        The sheet (mode "L") and the number of sprites of each label, from which the place of every sprite follows.
    """
    counts = [int((labels == label).sum()) for label in range(10)]
    band = -(-max(counts) // COLUMNS)
    sheet = np.zeros((10 * band * TILE, COLUMNS * TILE), np.uint8)
    for label in range(10):
        for index, image in enumerate(images[labels == label]):
            row, column = label * band + index // COLUMNS, index % COLUMNS
            sheet[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = image * GREY_STEP
    return Image.fromarray(sheet), counts


def main() -> None:
    """Write the sheet and its index beside this file."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    sheet, counts = build_sheet(digits.images.astype(np.uint8), digits.target)
    sheet.save(HERE / "sprites.png", optimize=True)
    index = {"tile": TILE, "columns": COLUMNS, "rows_per_label": 3, "grey_step": GREY_STEP, "counts": counts}
    (HERE / "sprites.json").write_text(json.dumps(index) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
