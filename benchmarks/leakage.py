"""Time to find training images that look like held-out ones, among many small JPEG files that are drawn for it.

One held-out image is drawn for ten training images, and every twentieth of them is a copy of a training image: made
smaller, saved anew, cut, mirrored. What is measured is what preflight and `vlm-sft data stats` do: looking at all
images for the first time, and for the second, when what was seen is kept, and the search. Beside it, the same hashes
are compared all with all, one by one in Python and in blocks by NumPy, for a part of them and counted up.

    python benchmarks/leakage.py --images 100000 --out outputs/benchmark_leakage
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from datasets import config
from PIL import Image, ImageOps

from vlm_sft.data.look_alikes import find_look_alikes
from vlm_sft.data.look_index import hashes, views
from vlm_sft.data.looks import SIDE, read_looks
from vlm_sft.data.near_images import near_pairs, repeated

EACH = 10  # training images for a held-out one
COPIED = 20  # held-out images for one that is a copy
SIZE = (192, 144)


def main() -> None:
    """Draws the images, measures, prints the results and writes results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="training images")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark_leakage"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train, held_out = draw(Path(folder), given.images)
        config.HF_DATASETS_CACHE = str(Path(folder) / "cache")
        results = measure(train, held_out)
    print(json.dumps(results, indent=1))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def draw(folder: Path, count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Writes the images and returns the rows, training and held out."""
    rng = np.random.default_rng(0)
    sets: dict[str, list[dict[str, Any]]] = {"train": [], "held_out": []}
    for name, number in (("train", count), ("held_out", max(1, count // EACH))):
        for n in range(number):
            copy = name == "held_out" and n % COPIED == 0
            picture = changed(sets["train"][n]["images"][0]["path"]) if copy else clouds(rng)
            path = folder / name / f"{n // 1000}" / f"{n}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, quality=85)
            image = {"path": str(path), "bytes": None}
            sets[name].append({"images": [image], "messages": [], "id": f"{name}/{n}", "source": name})
    return sets["train"], sets["held_out"]


def clouds(rng: np.random.Generator) -> Image.Image:
    """Another picture at every call: coarse colours under finer ones."""
    coarse, fine = (
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize(SIZE, Image.Resampling.BILINEAR)
        for side in (4, 12)
    )
    return Image.blend(coarse, fine, 0.4)


def changed(path: str) -> Image.Image:
    """A copy of an image: mirrored, cut by a thirtieth at each side and of half the size."""
    with Image.open(path) as opened:
        picture = ImageOps.mirror(opened.convert("RGB"))
    x, y = picture.width // 30, picture.height // 30
    return picture.crop((x, y, picture.width - x, picture.height - y)).resize((96, 72))


def measure(train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of each part, and what was found."""
    entries = [[(row["images"][0], row["id"]) for row in rows] for rows in (train, held_out)]
    files = len(train) + len(held_out)
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    ours, theirs = (read_looks(some, len(some)).looks for some in entries)
    seconds["first_look"] = time.perf_counter() - began
    began = time.perf_counter()
    for some in entries:
        read_looks(some, len(some))
    seconds["second_look"] = time.perf_counter() - began
    began = time.perf_counter()
    near = near_pairs(ours, theirs)
    seconds["search"] = time.perf_counter() - began
    began = time.perf_counter()
    among = repeated(ours)
    seconds["search_within_train"] = time.perf_counter() - began
    seconds |= all_with_all(ours, theirs)
    began = time.perf_counter()
    found = find_look_alikes(train, held_out)
    seconds["second_start_in_all"] = time.perf_counter() - began
    copies = {(n, n) for n in range(0, len(held_out), COPIED)}
    right = sum((pair.first, pair.second) in copies for pair in near.pairs)
    return {
        "train": len(train), "held_out": len(held_out), "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "images_a_second": round(files / seconds["first_look"]),
        "copies": len(copies), "found": right, "others_found": len(near.pairs) - right, "within_train": among,
        "pairs": len(found.pairs),
        "python_by_search": round(seconds["all_with_all_in_python"] / seconds["search"], 1),
    }  # fmt: skip


def all_with_all(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Seconds for all pairs of both hashes in all the ways that the search looks at pictures, by what a part takes."""

    def bits(looks: np.ndarray) -> np.ndarray:
        return hashes(looks[:, : SIDE * SIDE].reshape(-1, SIDE, SIDE).astype(np.float32))[:, 0]

    pairs = len(ours) * len(theirs) * 2 * (2 * len(views()) - 2)
    a, b = bits(ours[:4000]), bits(theirs[:1000])
    few, others = a[:500].tolist(), b.tolist()
    began = time.perf_counter()
    sum((one ^ other).bit_count() <= 7 for one in few for other in others)
    in_python = (time.perf_counter() - began) / (len(few) * len(others))
    began = time.perf_counter()
    np.count_nonzero(np.bitwise_count(a[:, None] ^ b[None]) <= 7)
    in_numpy = (time.perf_counter() - began) / (len(a) * len(b))
    return {"all_with_all_in_python": in_python * pairs, "all_with_all_in_numpy": in_numpy * pairs}


if __name__ == "__main__":
    main()
