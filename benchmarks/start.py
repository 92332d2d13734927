"""Seconds from the command to the first step, and from the last step to the bundle, by how many rows there are.

    python benchmarks/start.py --rows 1000 100000 1000000 --out outputs/benchmark_start.json

Each run is a process of its own that trains one step of the quickstart's LLaVA on rows of two turns, all on one
picture. The first start of each count reads the rows, the second finds them kept. `reading`, `looking over` (files,
lengths, a sample of images) and `building` (pieces, model, trainer) are shares of the way to the first step. Wall time,
and processor time of all processes, which counts where the machine does other things too.

    python benchmarks/start.py --rows 1000 --gigabytes 3.5
    python benchmarks/start.py --rows 1000 --pretrained FOLDER

With `--gigabytes` the language model is as the layout of a LLaMA of 7B has it, in bf16 and shards of half a GB, narrow
enough to be so large; `--pretrained` takes one that is there. The first start then finds none of it in the memory of
the system, and what the disk gave until the first step (`from disk`, Linux) is told beside what the files have.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

ROOT = Path(__file__).resolve().parent.parent
SHARD = 5e8  # bytes


def main(arguments: list[str] | None = None) -> None:
    """Runs every count twice; prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--packing", action="store_true", help="rows are packed, so all are measured")
    parser.add_argument("--gigabytes", type=float, help="of a language model that is written for it")
    parser.add_argument("--pretrained", type=Path, help="folder of a LLaMA with its tokenizer, in its place")
    parser.add_argument("--folder", type=Path, help="where all is written; default a temporary folder")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("RECIPE", "BEGAN"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        print(json.dumps(one_run(given.child[0], float(given.child[1]))))
        return
    results = []
    columns = "rows, start, to the first step, reading, looking over, building, from disk, to the bundle, processor"
    print(f"| {' | '.join(columns.split(', '))} |")
    print("|" + "---|" * len(columns.split(", ")))
    for rows in given.rows:
        with tempfile.TemporaryDirectory(prefix="vlm_sft-start-", dir=given.folder) as folder:
            large = given.pretrained
            if given.gigabytes:
                large = write_language_model(Path(folder) / "language_model", given.gigabytes)
            recipe = write_recipe(Path(folder), rows, given.packing, large)
            weights = sorted(large.glob("*.safetensors")) if large else []
            for number in (1, 2):
                shutil.rmtree(Path(folder) / "run", ignore_errors=True)
                if number == 1:
                    forget(weights)
                found = {"rows": rows, "start": number, "packing": given.packing, **fresh_process(recipe, folder)}
                found["files_gb"] = sum(file.stat().st_size for file in weights) / 1e9
                results.append(found)
                print("| {rows:,} | {start} | {first_step:.1f} s | {reading:.1f} s | {looking_over:.1f} s | "
                      "{building:.1f} s | {disk_gb:.2f} of {files_gb:.2f} GB | {end:.1f} s | {processor:.1f} s |"
                      .format(**found), flush=True)  # fmt: skip
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def write_language_model(folder: Path, gigabytes: float) -> Path:
    """Weights of random numbers under the names of a LLaMA of 32 layers, in shards, with the quickstart's tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    small = ROOT / "examples" / "digitscenes" / "llm"
    own = json.loads((small / "config.json").read_text(encoding="utf-8"))
    heads = max(1, round((gigabytes * 1e9 / 2 / 32 / 12) ** 0.5 / 128))  # a layer has some 12 widths squared
    config = LlamaConfig(vocab_size=own["vocab_size"], hidden_size=128 * heads, intermediate_size=344 * heads,
                         num_attention_heads=heads, bos_token_id=1, eos_token_id=2, pad_token_id=3,
                         num_hidden_layers=32, dtype="bfloat16")  # fmt: skip
    folder.mkdir()
    shutil.copy(small / "tokenizer.json", folder)
    shutil.copy(small / "tokenizer_config.json", folder)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: each.shape for name, each in AutoModelForCausalLM.from_config(config).state_dict().items()}
    numbers = torch.randn(max(shape.numel() for shape in shapes.values()), generator=torch.Generator().manual_seed(0))
    numbers = (numbers * 0.02).to(torch.bfloat16)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, shape in shapes.items():
        if sum(each.nbytes for each in shards[-1].values()) > SHARD:
            shards.append({})
        norm = len(shape) == 1
        shards[-1][name] = torch.ones(shape, dtype=torch.bfloat16) if norm else numbers[: shape.numel()].view(shape)
    places = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: each.clone() for name, each in shard.items()}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def forget(files: Sequence[Path]) -> None:
    """Has the system forget what it holds of files in memory, so that the disk is asked."""
    os.sync()
    for file in files:
        opened = os.open(file, os.O_RDONLY)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(opened)


def write_recipe(folder: Path, rows: int, packing: bool, language_model: Path | None = None) -> Path:
    """Rows, their picture, and a recipe of the quickstart's LLaVA, or of another language model, for a step on them."""
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
    if language_model is not None:
        tree["stack"]["language_model"] = {"pretrained": str(language_model.resolve()), "dtype": "bfloat16"}
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
        seconds["disk_gb"] = int(re.findall(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)[0]) / 1e9
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
