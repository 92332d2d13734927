"""`benchmarks/packing.py` and `merging.py`, small: the same rows both ways, with one loss and fewer places."""

from __future__ import annotations

import runpy
import sys

import pytest

from support.paths import ROOT


def test_packs_have_the_loss_of_the_rows_and_less_padding():
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "packing.py"))
    model, processor = benchmark["make_stack"](width=64, layers=1)
    kinds = benchmark["make_batches"](processor, rows=8, size=4, length=200)
    losses = {kind: benchmark["passes"](model, batches)[1] for kind, batches in kinds.items()}
    padding = {kind: benchmark["padding_share"](batches) for kind, batches in kinds.items()}
    assert losses["packs"] == pytest.approx(losses["rows"], rel=1e-5)
    assert 0 <= padding["packs"] < padding["rows"]


def test_questions_that_share_an_image_have_the_loss_of_the_rows_and_fewer_tokens(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "merging.py"))
    model, processor = benchmark["make_stack"](64, 1, benchmark["SIDE"])
    kinds = benchmark["make_batches"](processor, images=4, questions=3, size=2)
    losses = {kind: benchmark["passes"](model, batches)[1] for kind, batches in kinds.items()}
    tokens = {kind: sum(batch["input_ids"].numel() for batch in batches) for kind, batches in kinds.items()}
    assert losses["independent"] == pytest.approx(losses["rows"], rel=1e-5)
    assert tokens == {"rows": 4 * 3 * 155, "independent": 4 * (144 + 3 * 11)}
