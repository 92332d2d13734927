"""What `make real` runs: published weights and pictures, two stages, evaluation, export, and one table.

`python examples/real/run.py [--seed 0] [--quick]` goes through the commands that a user types, and prints each of them.
Everything but the first step works without a network. `--quick` trains a few steps and asks a few questions: it shows
that all parts work, not what can be learned. Results lie in outputs/real/, as NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from report import table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DATA, THINGS = Path("data/real"), Path("data/real/things")
QUICK = ["sft.max_steps=2", "sft.warmup_steps=1", "sft.per_device_train_batch_size=1", "sft.logging_steps=1"]
QUICK_ROWS = ["--max-rows", "3"]
QUESTION = {"en": "What is this?", "zh": "这是什么？"}


class Steps:
    """Runs commands one after the other, and knows how long each step took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        }  # fmt: skip

    def run(self, step: str, *command: str | Path, capture: bool = False) -> str:
        """Runs a command of a step; the run ends where it fails.

        Returns:
            What it wrote to standard output, if that is to be captured.
        """
        words = [str(word) for word in command]
        if step not in self.seconds:
            print(f"\n== {step}", flush=True)
        print(f"$ {shlex.join(word if len(word) < 200 else '…' for word in words)}", flush=True)
        start = time.perf_counter()
        done = subprocess.run(words, env=self.environment, stdout=subprocess.PIPE if capture else None, text=True)
        self.seconds[step] = round(self.seconds.get(step, 0) + time.perf_counter() - start, 1)
        if done.returncode:
            sys.exit(done.returncode)
        if capture:
            print(done.stdout, end="", flush=True)
        return (done.stdout or "").strip()


def test_pictures() -> dict[str, str]:
    """Language → picture of the first thing whose name is asked in the test."""
    found = {}
    for language in QUESTION:
        with (THINGS / f"names_test_{language}.jsonl").open(encoding="utf-8") as rows:
            found[language] = str(THINGS / json.loads(next(rows))["image"])
    return found


def run(seed: int, quick: bool, cache: Path) -> Path:
    """All steps; returns the file with the results."""
    steps, python = Steps(), sys.executable
    name = f"seed{seed}{'_quick' if quick else ''}"
    folder = Path("outputs/real")
    stages = [folder / f"{name}_stage{number}" for number in (1, 2)]
    merged = folder / f"{name}_merged"
    for old in (*stages, merged):  # of an earlier run: training never writes over a run
        shutil.rmtree(old, ignore_errors=True)

    steps.run("Fetch the packages  下载", python, HERE / "fetch.py", "--cache", cache)
    steps.run("Write the folders  转换", python, HERE / "pieces.py", "--cache", cache, "--out", DATA)
    steps.run(
        "Draw the data  生成数据", python, HERE / "draw.py", "--cache", cache, "--out", THINGS, "--seed", str(seed)
    )
    align = "Solve for the projector to begin with  求解初始投影层"
    steps.run(align, python, HERE / "align.py", "--data", DATA, "--out", DATA / "projector")
    launch = ["accelerate", "launch", "--quiet", "--config_file", "accelerate_configs/cpu.yaml", "-m", "vlm_sft.train"]
    own = [f"sft.seed={seed}", *(QUICK if quick else [])]
    train = "Stage {}: {}"
    first = train.format(1, "the projector learns names  第一阶段：投影层学习名称")
    steps.run(first, *launch, "recipes/real_stage1.yaml", f"sft.output_dir={stages[0]}", *own)
    second = train.format(2, "projector and LoRA learn to answer  第二阶段：投影层和 LoRA 学习回答")
    changes = [f"sft.output_dir={stages[1]}", f"init_from={stages[0]}", *own]
    steps.run(second, *launch, "recipes/real_stage2.yaml", *changes)
    steps.run(
        "Evaluate, also without the image  评测", "vlm-sft", "evaluate", stages[1], *(QUICK_ROWS if quick else [])
    )
    export = "Merge the adapter  合并 LoRA"
    steps.run(export, "vlm-sft", "export", stages[1], merged, "--to", "bundle-merged")

    asked = []
    for language, image in test_pictures().items():
        ask = ["--image", image, QUESTION[language]]
        step = "Ask again, each in a fresh process  在新进程中重新载入并提问"
        answers = [steps.run(step, "vlm-sft", "chat", bundle, *ask, capture=True) for bundle in (stages[1], merged)]
        if not all(answers):
            sys.exit(f"Asked about {image}, the bundle says {answers[0]!r} and, merged, {answers[1]!r}: not nothing.")
        asked.append({"image": image, "question": QUESTION[language], "answers": answers})

    results = {
        "seed": seed,
        "quick": quick,
        "seconds": steps.seconds,
        "evaluation": json.loads((stages[1] / "eval.json").read_text(encoding="utf-8")),
        "asked": asked,
    }
    target = folder / f"{name}.json"
    target.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\n{table([results])}\n\nWritten to {target}; curves: {stages[0]}/curves.png and {stages[1]}/curves.png.")
    print(f"Go on asking  继续提问：.venv/bin/vlm-sft chat {stages[1]} --image {test_pictures()['en']}")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the training and of the questions in it")
    parser.add_argument("--quick", action="store_true", help="a few steps and questions, to see that all of it works")
    parser.add_argument(
        "--cache", type=Path, default=os.environ.get("REAL_CACHE") or DATA / "cache", help="of packages"
    )
    given = parser.parse_args()
    os.chdir(ROOT)
    run(given.seed, given.quick, Path(given.cache))


if __name__ == "__main__":
    main()
