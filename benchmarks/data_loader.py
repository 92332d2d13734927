"""Rows a second that the training data loader makes, for stacks like LLaVA-1.5 and BLIP-2, and where its time goes.

Each row shows a JPEG of 640 x 480 pixels of its own; the image processor makes 336 pixels (LLaVA's, padded to squares)
or 224 (BLIP-2's). The model is not there: measured is all that a data-loader worker does. The tokenizer is that of the
quickstart.

    python benchmarks/data_loader.py --rows 256 --workers 0 2 --out outputs/benchmark_data_loader
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

import numpy as np
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BlipImageProcessorPil, CLIPImageProcessorPil

from vlm_sft import MultimodalCollator, VLMProcessor
from vlm_sft.templates.template import load_template

ROOT = Path(__file__).parent.parent
BATCH = 16
TEXT = "The picture shows a bus at a stop, a red house and two dogs that play in front of it. "


def main() -> None:
    """Measures both stacks with each number of workers; prints a line each and writes results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark_data_loader"))
    given = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photos(Path(folder), given.rows)
        for name, (processor, turns, words) in {"llava": (llava(), 3, 4), "blip2": (blip2(), 1, 1)}.items():
            rows = [make_row(photo, turns, words) for photo in photos]
            for workers in given.workers:
                results.append({"stack": name, "workers": workers, **measure(rows, processor, workers)})
                print(json.dumps(results[-1]), flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def llava() -> VLMProcessor:
    """LLaVA-1.5: 336 pixels, squares, 576 tokens an image."""
    images = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    return VLMProcessor(images, _tokenizer(), load_template("vicuna_v1"), 576, pad_to_square=True)


def blip2() -> VLMProcessor:
    """BLIP-2: 224 pixels, 32 tokens an image."""
    images = BlipImageProcessorPil(size={"height": 224, "width": 224})
    return VLMProcessor(images, _tokenizer(), load_template("blip2_caption"), 32)


def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "examples" / "digitscenes" / "llm")


def write_photos(folder: Path, count: int) -> list[str]:
    """JPEGs with shapes and noise, of the size in bytes that photographs have."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        noise = Image.fromarray(rng.integers(0, 255, (480, 640, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(1))
        Image.blend(coarse, noise, 0.2).save(folder / f"{i}.jpg", quality=90)
    return [str(folder / f"{i}.jpg") for i in range(count)]


def make_row(photo: str, turns: int, words: int) -> dict[str, Any]:
    """A row of the contract: one image, and as many questions and answers."""
    messages = []
    for turn in range(turns):
        image = [{"type": "image", "text": None}] if turn == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": f"Question {turn}?"}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": TEXT * words}]})
    if turns == 1:
        messages[0]["content"].pop()  # a caption answers the image alone
    return {"messages": messages, "images": [{"path": photo, "bytes": None}], "source": "photos", "id": photo}


def measure(rows: list[dict[str, Any]], processor: VLMProcessor, workers: int) -> dict[str, Any]:
    """Rows a second of an epoch; in this process also the share of the time in each step."""
    collator = MultimodalCollator(processor, max_length=2048)
    seconds: dict[str, float] = {}
    if workers == 0:
        _timed(collator, "decode", "decode", seconds)
        _timed(collator, "render", "render", seconds)
        _timed(processor, "encode_rendered", "tokenize", seconds)
        _timed(processor, "encode_images", "image processor", seconds)
        _timed(processor, "batch", "pad", seconds)
    loader: DataLoader[Any] = DataLoader(rows, batch_size=BATCH, collate_fn=collator, num_workers=workers)  # type: ignore[arg-type]
    batches = iter(loader)
    if workers:
        next(batches)  # starting workers is no part of an epoch's speed
    start, done = time.perf_counter(), 0
    for batch in batches:
        done += len(batch["input_ids"])
    took = time.perf_counter() - start
    shares = {name: round(part / took, 3) for name, part in seconds.items()}
    return {"rows_per_second": round(done / took, 1), "shares": shares}


def _timed(owner: Any, method: str, name: str, seconds: dict[str, float]) -> None:
    function: Callable[..., Any] = getattr(owner, method)

    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    setattr(owner, method, timed)


if __name__ == "__main__":
    main()
