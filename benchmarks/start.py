"""Seconds from the command to the first step, and from the last step to the bundle, by how many rows there are.

    python benchmarks/start.py --rows 1000 100000 1000000 --out outputs/benchmark_start.json

Each run is a process of its own that trains one step of the quickstart's LLaVA on rows of two turns, all on one
picture. The first start of each count reads the rows, the second finds them kept. `reading`, `looking over` (files,
lengths, a sample of images) and `building` (pieces, model, trainer) are shares of the way to the first step. Wall time,
and processor time of all processes, which counts where the machine does other things too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> None:
    """Runs every count twice; prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--packing", action="store_true", help="rows are packed, so all are measured")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("RECIPE", "BEGAN"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        print(json.dumps(one_run(given.child[0], float(given.child[1]))))
        return
    results = []
    print("| rows | start | to the first step | reading | looking over | building | to the bundle | processor |")
    print("|---|---|---|---|---|---|---|---|")
    for rows in given.rows:
        with tempfile.TemporaryDirectory(prefix="vlm_sft-start-") as folder:
            recipe = write_recipe(Path(folder), rows, given.packing)
            for number in (1, 2):
                shutil.rmtree(Path(folder) / "run", ignore_errors=True)
                found = {"rows": rows, "start": number, "packing": given.packing, **fresh_process(recipe, folder)}
                results.append(found)
                print("| {rows:,} | {start} | {first_step:.1f} s | {reading:.1f} s | {looking_over:.1f} s | "
                      "{building:.1f} s | {end:.1f} s | {processor:.1f} s |".format(**found), flush=True)  # fmt: skip
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def write_recipe(folder: Path, rows: int, packing: bool) -> Path:
    """Rows, their picture, and a recipe of the quickstart's LLaVA that trains on them for a step."""
    import yaml
    from PIL import Image

    Image.new("RGB", (64, 64), "teal").save(folder / "one.png")
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for number in range(rows):
            said = [
                {"from": "human", "value": f"<image>\nWhat is in picture {number}?"},
                {"from": "gpt", "value": "A red 3 above a blue 7."},
                {"from": "human", "value": "右上角的数字是什么颜色？"},
                {"from": "gpt", "value": "蓝色。"},
            ]
            line = {"id": str(number), "image": "one.png", "conversations": said}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    tree = yaml.safe_load((ROOT / "recipes" / "quickstart_llava_stage1.yaml").read_text(encoding="utf-8"))
    tree["data"] = {"train": [{"path": str(folder / "rows.jsonl"), "format": "llava"}]}
    for part in ("vision_tower", "language_model"):
        tree["stack"][part]["pretrained"] = str(ROOT / tree["stack"][part]["pretrained"])
    tree["sft"] |= {"output_dir": str(folder / "run"), "max_steps": 1, "eval_strategy": "no", "packing": packing,
                    "warmup_steps": 0, "use_cpu": True}  # fmt: skip
    tree["sft"].pop("eval_steps", None)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return folder / "recipe.yaml"


def fresh_process(recipe: Path, folder: str) -> dict[str, float]:
    """A run in a process of its own, with a cache of its own."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(recipe), str(time.time())],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, "HF_DATASETS_CACHE": str(Path(folder) / "cache")},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def one_run(recipe: str, began: float) -> dict[str, float]:
    """Trains, and says how long what took; `began` is when the command was given."""
    from transformers import Trainer

    from vlm_sft import load_recipe
    from vlm_sft.data import dataset
    from vlm_sft.train import train
    from vlm_sft.training import build_trainer, run_rows

    seconds: dict[str, float] = {"reading": 0.0, "looking_over": 0.0, "building": 0.0}
    for name, owner, function in (
        ("reading", dataset, "read_source"),
        ("looking_over", run_rows, "look_over"),
        ("building", build_trainer, "build_trainer"),
    ):
        setattr(owner, function, timed(getattr(owner, function), name, seconds))
    step = Trainer.training_step

    def first(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        seconds["first_step"] = time.time() - began
        loss = step(trainer, *args, **kwargs)
        seconds["end"] = time.time()
        return loss

    Trainer.training_step = first  # type: ignore[method-assign]
    train(load_recipe(recipe))
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    processor = sum(each.ru_utime + each.ru_stime for each in used)
    return {**seconds, "end": time.time() - seconds["end"], "processor": processor}


def timed(work: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    """The same function, its seconds added up."""

    @wraps(work)
    def inside(*args: Any, **kwargs: Any) -> Any:
        start = time.time()
        try:
            return work(*args, **kwargs)
        finally:
            seconds[name] += time.time() - start

    return inside


if __name__ == "__main__":
    main()
