"""Pretrain the two tiny pieces of the demo from nothing: the eye on images alone, the language model on text alone.

    python examples/pretrain_tiny.py all --out examples/digitscenes

One seeded run; about ten minutes a piece on two idle cores. It reports scores on validation sprites and on unseen
scenes of text; sprites of the test split are never drawn. Results land in OUT/eye and OUT/llm.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "digitscenes"))

import pretrain_eye
import pretrain_llm


def make_eye(out: Path, seed: int) -> dict[str, float]:
    """Train and save the eye; score it as saved, that is after rounding to bfloat16."""
    eye, heads = pretrain_eye.train(seed)
    pretrain_eye.save(eye, out)
    return pretrain_eye.score_validation(eye.bfloat16().float(), heads)


def make_llm(out: Path, seed: int) -> dict[str, float]:
    """Train and save the language model and its tokenizer; score it as saved, that is after rounding to bfloat16."""
    model, tokenizer = pretrain_llm.train(seed)
    pretrain_llm.save(model, tokenizer, out)
    return pretrain_llm.score(model.float(), tokenizer, scenes=2000)


PIECES: dict[str, Callable[[Path, int], dict[str, float]]] = {"eye": make_eye, "llm": make_llm}


def main() -> None:
    """Train the pieces asked for, one after the other."""
    parser = argparse.ArgumentParser(description="Pretrain the demo's tiny pieces.")
    parser.add_argument("piece", choices=[*PIECES, "all"])
    parser.add_argument("--out", type=Path, default=Path("examples/digitscenes"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in PIECES if args.piece == "all" else [args.piece]:
        start = time.perf_counter()
        scores = PIECES[name](args.out / name, args.seed)
        report = {"piece": name, "seed": args.seed, "seconds": round(time.perf_counter() - start), **scores}
        print(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    main()
