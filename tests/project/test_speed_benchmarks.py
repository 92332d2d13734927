"""The benchmarks of speed, small: the same rows every way, with one loss."""

from __future__ import annotations

import json
import runpy
import sys

import pytest
import torch

from support.paths import ROOT
from vlm_sft.bundle.parity import environment


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
    passes = runpy.run_path(str(ROOT / "benchmarks" / "packing.py"))["passes"]
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "merging.py"))
    model, processor = benchmark["make_stack"](64, 1, benchmark["SIDE"])
    kinds = benchmark["make_batches"](processor, images=4, questions=3, size=2)
    losses = {kind: passes(model, batches)[1] for kind, batches in kinds.items()}
    tokens = {kind: sum(batch["input_ids"].numel() for batch in batches) for kind, batches in kinds.items()}
    assert losses["independent"] == pytest.approx(losses["rows"], rel=1e-5)
    assert tokens == {"rows": 4 * 3 * 155, "independent": 4 * (144 + 3 * 11)}


@pytest.mark.slow
def test_peers_have_the_same_loss_in_alternation_and_what_they_take_is_told(tmp_path, forge):
    """TRL, a loop of one's own and this toolkit, on the same checkpoint; a way with another loss ends it."""
    command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), "--quick", "--out", str(tmp_path)]
    done = forge.fork(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    assert [each["way"] for each in found] == ["TRL", "plain loop", "vlm_sft", "+ packing, cache"]
    assert found[0]["faster"] == [1.0] * 3 and len({round(each["loss"], 3) for each in found}) == 1
    assert found[2]["allowed"] > 1 and found[3]["places"] < found[0]["places"]
    for each in found:
        split = each["split"]
        assert 0 < split["tower"] < split["forward"] < 1 or "cache" in each["way"]
        assert 0 < split["decode"] < split["batches"] or "cache" in each["way"]
        assert each["peak_mb"] > 50 and each["samples_per_second"] > 0 and 0 < each["of_the_machine"] < 1
    assert (tmp_path / "table.md").read_text(encoding="utf-8").count("×") >= 8
    assert (tmp_path / "speed.png").stat().st_size > 5000


def test_a_way_with_another_loss_or_other_tokens_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    peers = runpy.run_path(str(ROOT / "benchmarks" / "peers.py"))
    chosen = {"TRL": peers["Way"]("trl"), "vlm_sft": peers["Way"]("vlm_sft")}
    for other in ({"supervised": 10, "loss": 50.1}, {"supervised": 11, "loss": 55.0}):
        with pytest.raises(SystemExit, match=r"vlm_sft: a loss of 5\.0"):
            peers["check_losses"]({"TRL": {"supervised": 10, "loss": 50.0}, "vlm_sft": other}, chosen)
    near = {"supervised": 10, "loss": 50.004}
    peers["check_losses"]({"TRL": {"supervised": 10, "loss": 50.0}, "vlm_sft": near}, chosen)


@pytest.mark.parametrize("name", ["packing", "merging"])
def test_both_are_programs_that_write_down_what_they_found(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    sizes = {
        "packing": ["--rows", "4", "--batch", "2", "--length", "200"],
        "merging": ["--images", "2", "--batch", "1"],
    }
    words = [name, *sizes[name], "--width", "64", "--layers", "1", "--rounds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["settings"]["rounds"] == 2 and found["faster"]["least"] <= found["faster"]["most"]
    assert len(capsys.readouterr().out.splitlines()) > 3
