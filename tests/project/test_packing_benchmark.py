"""`benchmarks/packing.py`, small: the same rows both ways, with one loss and less padding."""

from __future__ import annotations

import runpy

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
