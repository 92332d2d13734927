"""Resident memory over an epoch of many rows, and seconds to the first batch of an index of a million.

Rows are captions that share a few small JPEG files, so that the disk is no part of it. Three ways are measured, each in
a process of its own: the first start, the second one, which finds what the first one kept, and `data.streaming`. Memory
is what Linux says in /proc/self/status.

    python benchmarks/data_memory.py --rows 100000 --index 1000000 --out outputs/benchmark_data_memory
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BATCH = 32
POINTS = 20


def main() -> None:
    """Runs each way to read in a process of its own; writes results.json and memory.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the epoch")
    parser.add_argument("--index", type=int, default=1_000_000, help="rows of the index for the first batch")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark_data_memory"))
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "FILE", "ROWS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        way, file, rows = given.measure
        print(json.dumps(measure(way, file, int(rows))))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        epoch, index = write_index(Path(folder) / "epoch", given.rows), write_index(Path(folder) / "index", given.index)
        cache = str(Path(folder) / "cache")
        results = {
            way: {"epoch": in_process(way, epoch, given.rows, cache), "index": in_process(way, index, BATCH, cache)}
            for way in ("first start", "second start", "streaming")
        }
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, given.out / "memory.png")
    for way, found in results.items():
        first, last = found["epoch"]["megabytes"][0], found["epoch"]["megabytes"][-1]
        print(
            f"{way:<12} first batch of {given.index:,} rows after {found['index']['first_batch_seconds']:6.1f} s;"
            f" {first[1]:6.0f} MB after {first[0]:,} rows, {last[1]:6.0f} MB after {last[0]:,}"
        )


def write_index(folder: Path, rows: int) -> str:
    """Captions of eight shared JPEGs, as JSON lines."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    with open(folder / "index.jsonl", "w", encoding="utf-8") as file:
        for i in range(rows):
            file.write(json.dumps({"image": f"{i % 8}.jpg", "caption": f"picture number {i} 第{i}张"}) + "\n")
    return str(folder / "index.jsonl")


def in_process(way: str, file: str, rows: int, cache: str) -> dict[str, Any]:
    """`measure` in a fresh process, whose memory nothing else has grown, and which keeps rows in the folder `cache`."""
    command = [sys.executable, __file__, "--measure", way, file, str(rows)]
    environment = {**os.environ, "HF_DATASETS_CACHE": cache}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure(way: str, file: str, rows: int, points: int = POINTS) -> dict[str, Any]:
    """Seconds to the first batch, and (rows, MB) along the way; every image of every batch is decoded."""
    from vlm_sft import Source, load_image, load_source
    from vlm_sft.data.streaming import stream_mixture

    source = Source(path=file, format="caption")
    start = time.perf_counter()
    data = stream_mixture([source]) if way == "streaming" else load_source(source)
    seconds, megabytes, done = 0.0, [], 0
    for batch in batches(iter(data), rows):
        for row in batch:
            load_image(row["images"][0])
        seconds = seconds or time.perf_counter() - start
        done += len(batch)
        if done * points // rows > (done - len(batch)) * points // rows:
            gc.collect()
            megabytes.append((done, resident()))
    return {"first_batch_seconds": seconds, "megabytes": megabytes, "seconds": time.perf_counter() - start}


def batches(rows: Iterator[dict[str, Any]], limit: int) -> Iterator[list[dict[str, Any]]]:
    """Batches of the first `limit` rows."""
    left = islice(rows, limit)
    while batch := list(islice(left, BATCH)):
        yield batch


def resident() -> float:
    """MB of memory that this process holds now."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def draw(results: dict[str, Any], path: Path) -> None:
    """MB against rows, one line for each way to read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(
        xlabel="rows read and decoded", ylabel="resident memory, MB", title="Memory over an epoch"
    )
    for way, found in results.items():
        axes.plot(*zip(*found["epoch"]["megabytes"], strict=True), marker=".", label=way)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
