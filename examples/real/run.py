"""What `make real` runs: published weights and pictures, two stages, evaluation, export, and one table.

`python examples/real/run.py [--seed 0] [--quick] [--variant NAME]` goes through the commands that a user types, and
prints each of them. Everything but the first step works without a network. What a run has done it does not do again,
also when it was cut off; `--again` begins anew. `--quick` trains a few steps on a few drawings: it shows that all parts
work, not what can be learned. `--variant` leaves something out, or trains longer, to see what it is good for,
and ends with the evaluation. Results lie in outputs/real/, as NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from report import VARIANTS, table
from steps import Steps

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DATA, THINGS = Path("data/real"), Path("data/real/things")
QUICK = ["sft.max_steps=2", "sft.warmup_steps=1", "sft.per_device_train_batch_size=1", "sft.logging_steps=1"]
QUICK_THINGS, QUICK_ROWS = ["--most", "6"], ["--max-rows", "1"]
QUESTION = {"en": "What is this?", "zh": "这是什么？"}
RANDOM_TOWER = DATA / "random_tower"
QUESTIONS_ALONE = ", ".join(
    f"{{path: {THINGS}/questions_train_{language}.jsonl, format: llava, images: {THINGS}}}" for language in QUESTION
)


@dataclass(frozen=True)
class Variant:
    """What a run does otherwise than the recipes say.

    Attributes:
        stage1: Changes of the first stage; None leaves it out.
        stage2: Changes of the second.
        tower: The vision tower's folder.
        projector: The solved projector's folder.
    """

    stage1: tuple[str, ...] | None = ()
    stage2: tuple[str, ...] = ()
    tower: Path = DATA / "dinov2"
    projector: Path = DATA / "projector"


WHOLE = Variant()
RANDOM = f"stack.vision_tower.pretrained={RANDOM_TOWER}"
CHANGES = {
    "no_stage1": Variant(stage1=None, stage2=("init_from=null",)),
    "random_tower": Variant((RANDOM,), (RANDOM,), RANDOM_TOWER, DATA / "random_projector"),
    "projector_alone": Variant(stage2=("lora=null",)),
    "lora_alone": Variant(stage1=None, stage2=("init_from=null", "train={}")),
    "three_times": Variant(stage2=("sft.max_steps=540",)),
    "no_names": Variant(stage2=(f"data.train=[{QUESTIONS_ALONE}]",)),
}
assert CHANGES.keys() == VARIANTS.keys(), "the table says in words what each is"


def test_pictures() -> dict[str, str]:
    """Language → picture of the first thing whose name is asked in the test."""
    found = {}
    for language in QUESTION:
        with (THINGS / f"names_test_{language}.jsonl").open(encoding="utf-8") as rows:
            found[language] = str(THINGS / json.loads(next(rows))["image"])
    return found


def drawn_for() -> tuple[int, int | None] | None:
    """Seed and limit of things of the data that are there, or None."""
    file = THINGS / "counts.json"
    if not file.is_file():
        return None
    counts = json.loads(file.read_text(encoding="utf-8"))
    return counts.get("seed"), counts.get("most")


def train_and_ask(steps: Steps, seed: int, quick: bool, cache: Path, out: Path, variant: Variant) -> Path:
    """All steps to the evaluation; returns the bundle."""
    python = sys.executable
    projector = variant.projector.with_name(f"{variant.projector.name}{'_quick' if quick else ''}")
    stages = [out.with_name(f"{out.name}_stage{number}") for number in (1, 2)]
    fetched = (cache / "packages").is_dir()
    steps.run("Fetch the packages  下载", [python, HERE / "fetch.py", "--cache", cache], there=fetched)
    pieces = [python, HERE / "pieces.py", "--cache", cache, "--out", DATA]
    random = ["--random-tower", RANDOM_TOWER] if variant.tower == RANDOM_TOWER else []
    steps.run("Write the folders  转换", [*pieces, *random], there=variant.tower.is_dir())
    draw = [python, HERE / "draw.py", "--cache", cache, "--out", THINGS, "--seed", str(seed)]
    as_needed = drawn_for() == (seed, int(QUICK_THINGS[1]) if quick else None)
    steps.run("Draw the data  生成数据", [*draw, *(QUICK_THINGS if quick else [])], there=as_needed)
    align = [python, HERE / "align.py", "--data", DATA, "--tower", variant.tower, "--out", projector]
    steps.run("Solve for the projector to begin with  求解初始投影层", align, there=projector.is_dir())
    launch = ["accelerate", "launch", "--quiet", "--config_file", "accelerate_configs/cpu.yaml", "-m", "vlm_sft.train"]
    own = [f"sft.seed={seed}", *(QUICK if quick else [])]
    begin = [f"stack.projector.pretrained={projector}"] if projector != WHOLE.projector else []
    if variant.stage1 is None:
        own += [f"stack.projector.pretrained={projector}"]
    else:
        first = [*launch, "recipes/real_stage1.yaml", f"sft.output_dir={stages[0]}", *own, *begin, *variant.stage1]
        step = "Stage 1: the projector learns names  第一阶段：投影层学习名称"
        steps.run(step, first, writes=stages[0])
        own = [f"init_from={stages[0]}", *own]
    second = [*launch, "recipes/real_stage2.yaml", f"sft.output_dir={stages[1]}", *own, *variant.stage2]
    step = "Stage 2: projector and LoRA learn to answer  第二阶段：投影层和 LoRA 学习回答"
    steps.run(step, second, writes=stages[1])
    evaluate = ["vlm-sft", "evaluate", stages[1], *(QUICK_ROWS if quick else [])]
    asked = (stages[1] / "eval.json").is_file()
    steps.run("Evaluate, also without the image  评测", evaluate, there=asked)
    return stages[1]


def export_and_ask(steps: Steps, quick: bool, bundle: Path, out: Path) -> list[dict[str, object]]:
    """Merges the adapter, and asks the bundle, which keeps it, and the merged one, each in a process of its own."""
    merged = out.with_name(f"{out.name}_merged")
    export = ["vlm-sft", "export", bundle, merged, "--to", "bundle-merged"]
    steps.run("Merge the adapter  合并 LoRA", export, writes=merged)
    asks = [(image, QUESTION[language]) for language, image in test_pictures().items()][: 1 if quick else None]
    chats = [["vlm-sft", "chat", at, "--image", image, words] for image, words in asks for at in (bundle, merged)]
    said = steps.run("Ask again, each in a fresh process  在新进程中重新载入并提问", *chats, capture=True)
    asked = []
    for (image, question), *answers in zip(asks, said[::2], said[1::2], strict=True):
        if not all(answers):
            sys.exit(f"Asked about {image}, the bundle says {answers[0]!r} and, merged, {answers[1]!r}: not nothing.")
        asked.append({"image": image, "question": question, "answers": answers})
    return asked


def shown(bundle: Path) -> list[dict[str, object]]:
    """Of each kind of question and language, in the order of the test, the first right answer and the first wrong."""
    first: dict[tuple[str, bool], dict[str, object]] = {}
    lines = (bundle / "evaluation" / "data.test.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines):
        right = row["score"] == 1
        picture = Path(*Path(row["images"][0]).parts[-3:])  # images/twemoji/….png
        about = {"image": str(picture), "question": row["question"], "answer": row["answer"]}
        first.setdefault((row["kind"], right), {**about, "right": right, "expected": row["answers"][0]})
    return list(first.values())


def run(seed: int, quick: bool, cache: Path, variant: str | None = None, again: bool = False) -> Path:
    """All steps; returns the file with the results."""
    out = Path("outputs/real") / "_".join(
        [f"seed{seed}", *([variant] if variant else []), *(["quick"] if quick else [])]
    )
    record = out.with_name(f"{out.name}_steps.json")
    if again:
        record.unlink(missing_ok=True)
    steps = Steps(record)
    bundle = train_and_ask(steps, seed, quick, cache, out, CHANGES[variant] if variant else WHOLE)
    results = {
        "seed": seed,
        "quick": quick,
        "variant": variant,
        "asked": [] if variant else export_and_ask(steps, quick, bundle, out),
        "seconds": steps.seconds,
        "evaluation": json.loads((bundle / "eval.json").read_text(encoding="utf-8")),
        "shown": shown(bundle),
    }
    target = out.with_name(f"{out.name}.json")
    target.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\n{table([results])}\n\nWritten to {target}; curves: {bundle}/curves.png.")
    print(f"Go on asking  继续提问：.venv/bin/vlm-sft chat {bundle} --image {test_pictures()['en']}")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the training and of the questions in it")
    parser.add_argument("--quick", action="store_true", help="a few steps and questions, to see that all of it works")
    parser.add_argument("--variant", choices=CHANGES, help="leave something out, or train longer")
    parser.add_argument("--again", action="store_true", help="do also what this run has done before")
    parser.add_argument(
        "--cache", type=Path, default=os.environ.get("REAL_CACHE") or DATA / "cache", help="of packages"
    )
    given = parser.parse_args()
    os.chdir(ROOT)
    run(given.seed, given.quick, Path(given.cache), given.variant, given.again)


if __name__ == "__main__":
    main()
