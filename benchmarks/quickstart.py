"""What the quickstart learns, over several seeds, and what stage 1 is worth: the numbers of docs/demo.md.

For each seed: stage 1, stage 2, and a short stage 2 of 30 steps with and without stage 1 before it; each evaluated on
held-out images. `--split eval` measures on validation images (for choosing), `--split test` on test images (read once).

    python benchmarks/quickstart.py --seeds 0 1 2 --split eval --out outputs/benchmark_quickstart
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
SHORT = 30
# A stage 2 that starts from nothing needs what stage 1 would have given its projector at the start.
WITHOUT_STAGE_1 = ["init_from=null", "stack.projector.init=match_embeddings"]


def main() -> None:
    """Runs every seed and prints mean and spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=("eval", "test"), default="eval")
    parser.add_argument("--variant", choices=("quickstart", "quickstart_llava"), default="quickstart")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "benchmark_quickstart")
    parser.add_argument("--overrides", nargs="*", default=[], help="for both stages, for instance sft.max_steps=100")
    given = parser.parse_args()
    results = []
    for seed in given.seeds:
        results.append(run_seed(given.variant, seed, given.split, given.out / f"seed_{seed}", given.overrides))
        print(json.dumps({"seed": seed, **results[-1]}), flush=True)
    report = {"split": given.split, "seeds": given.seeds, "runs": results, "summary": summary(results)}
    (given.out / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name, row in report["summary"].items():
        print(f"{name:<36} {row['mean']:8.3f}  from {row['lowest']:.3f} to {row['highest']:.3f}")


def run_seed(
    variant: str, seed: int, split: str, out: Path, overrides: list[str], max_rows: int | None = None
) -> dict[str, float]:
    """Trains and evaluates one seed, on the first `max_rows` of each source; returns the numbers of one run."""
    shutil.rmtree(out, ignore_errors=True)
    one, two = out / "stage1", out / "stage2"
    common = [f"sft.seed={seed}", "sft.eval_strategy=no", *overrides]
    train(f"{variant}_stage1", one, common)
    train(f"{variant}_stage2", two, [*common, f"init_from={one}"])
    short = [*common, f"sft.max_steps={SHORT}", "sft.warmup_steps=5"]
    train(f"{variant}_stage2", out / "with", [*short, f"init_from={one}"])
    train(f"{variant}_stage2", out / "without", [*short, *WITHOUT_STAGE_1])
    first, second = evaluate(one, split, max_rows), evaluate(two, split, max_rows)
    ahead, behind = (evaluate(out / name, split, max_rows)["answer_accuracy"] for name in ("with", "without"))
    return {
        "captions_after_stage_1": first["caption_exact_match"],
        "answers": second["answer_accuracy"],
        "answers_image_blanked": second["answer_accuracy_blank_image"],
        "captions_after_stage_2": second["caption_exact_match"],
        f"answers_after_{SHORT}_steps": ahead,
        f"answers_after_{SHORT}_steps_without_stage_1": behind,
        "lead_of_stage_1": round(ahead - behind, 4),
        "train_seconds": first["train_seconds"] + second["train_seconds"],
        **{f"answers_{kind}": share for kind, share in second["answer_accuracy_by_kind"].items()},
    }


def train(recipe: str, out: Path, overrides: list[str]) -> None:
    """One stage in a process of its own, as a user runs it."""
    command = [sys.executable, "-m", "vlm_sft.train", str(ROOT / "recipes" / f"{recipe}.yaml")]
    subprocess.run([*command, f"sft.output_dir={out}", *overrides], cwd=ROOT, check=True, stdout=sys.stderr)


def evaluate(bundle: Path, split: str, max_rows: int | None) -> dict[str, Any]:
    """Evaluates a bundle on its recipe's test sources, or on the same sources of the validation images."""
    data = yaml.safe_load((bundle / "recipe.yaml").read_text(encoding="utf-8"))
    if split == "eval":
        for source in data["data"]["test"]:
            source["path"] = source["path"].replace("_test", "_validation")
    data["init_from"] = None
    recipe = bundle.with_name(f"{bundle.name}_{split}.yaml")
    recipe.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    output = bundle.with_name(f"{bundle.name}_{split}.json")
    command = [sys.executable, "-m", "vlm_sft", "evaluate", str(bundle), "--recipe", str(recipe)]
    command += ["--output", str(output), *(["--max-rows", str(max_rows)] if max_rows else [])]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return json.loads(output.read_text(encoding="utf-8"))


def summary(results: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and spread over the seeds of every number."""
    rows = {}
    for name in results[0]:
        values = [result[name] for result in results]
        rows[name] = {"mean": statistics.mean(values), "lowest": min(values), "highest": max(values)}
    return rows


if __name__ == "__main__":
    main()
