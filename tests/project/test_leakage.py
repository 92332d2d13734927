"""`benchmarks/leakage.py`, small: every copy is found and nothing else."""

from __future__ import annotations

import json
import runpy
import sys

from support.paths import ROOT
from vlm_sft.data import looks


def test_the_benchmark_of_leakage_finds_its_copies(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(looks.config, "HF_DATASETS_CACHE", str(tmp_path))  # which the benchmark sets
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "leakage.py"))
    monkeypatch.setattr(sys, "argv", ["leakage.py", "--images", "200", "--out", str(tmp_path / "out")])
    benchmark["main"]()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["train"], results["held_out"], results["copies"], results["found"]) == (200, 20, 1, 1)
    assert results["others_found"] == 0 and results["pairs"] == 1 and results["within_train"] == 0
    assert all(results["seconds"][name] > 0 for name in ("first_look", "search", "second_start_in_all"))
    assert results["seconds"]["second_look"] < results["seconds"]["first_look"]
    assert '"found": 1' in capsys.readouterr().out
