"""What a template costs that is rendered in a process of its own, against the same one rendered at once.

The template of Vicuna ships with this package; with a comment behind it it is a stranger's. Measured is what a run does
with rows before its first step: each is rendered, tokenised and counted, in alternation between the two.

    python benchmarks/template_process.py --rows 2048 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

from datasets import Dataset
from transformers import AutoTokenizer, CLIPImageProcessorPil

from vlm_sft import ROW_FEATURES, MultimodalCollator, VLMProcessor
from vlm_sft.templates.template import load_template
from vlm_sft.training.row_check import look_over

ROOT = Path(__file__).parent.parent
TEXT = "The picture shows a bus at a stop, a red house and two dogs that play in front of it. 一辆公共汽车停在车站。"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures both in turn; prints and returns the best round of each in rows a second, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=2, help="questions and answers a row")
    given = parser.parse_args(arguments)
    source = load_template("vicuna_v1")
    ways = {"at once": source, "own process": source + "{# another #}"}
    collators = {name: _collator(load_template(template)) for name, template in ways.items()}
    rows = Dataset.from_list([make_row(number, given.turns) for number in range(given.rows)], features=ROW_FEATURES)
    best: dict[str, float] = dict.fromkeys(ways, 0.0)
    for _ in range(given.rounds):
        for name, collator in collators.items():
            start = time.perf_counter()
            found = look_over(rows, collator)
            best[name] = max(best[name], given.rows / (time.perf_counter() - start))
            assert found.lengths and not found.rejected, found.rejected[:1]
    rounded = {name: round(rate) for name, rate in best.items()}
    result = {"rows_per_second": rounded, "times_as_long": round(best["at once"] / best["own process"], 2)}
    print(json.dumps(result))
    return result


def _collator(template: str) -> MultimodalCollator:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "digitscenes" / "llm")
    return MultimodalCollator(VLMProcessor(CLIPImageProcessorPil(), tokenizer, template, 32), max_length=2048)


def make_row(number: int, turns: int) -> dict[str, Any]:
    """A row of the contract about no image, which takes other time than text."""
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": [{"type": "text", "text": f"Question {number}, {turn}?"}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": TEXT}]})
    return {"messages": messages, "images": [], "source": "texts", "id": str(number)}


if __name__ == "__main__":
    main()
