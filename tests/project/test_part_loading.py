"""The benchmark of `benchmarks/part_loading.py`, small: only the wanted tensors of a large checkpoint are read."""

from __future__ import annotations

import pytest

from support.paths import ROOT
from support.scripts import script


@pytest.mark.slow
def test_a_tower_costs_its_own_size_and_not_the_checkpoints(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    benchmark = script("benchmarks/part_loading.py")
    sizes = ["--gigabytes", "0.2", "--width", "88", "--layers", "2", "--folder", str(tmp_path)]
    (row,) = benchmark.main([*sizes, "--layouts", "pth"])
    assert row["checkpoint"] > 150 and row["tower"] < 5
    assert row["whole"] > 0.9 * row["checkpoint"], "reading everything takes what it weighs"
    assert row["part"] < 0.2 * row["checkpoint"], "the tower alone was read"
    assert "| pth |" in capsys.readouterr().out and not list(tmp_path.iterdir())
