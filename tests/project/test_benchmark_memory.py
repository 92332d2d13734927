"""The benchmark of memory at tiny size on a CPU: it runs, and its formula for FLOPs is the counted number."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from support.paths import ROOT
from vlm_sft.bundle.parity import environment

FOLDER = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(FOLDER))
    try:
        import memory
    finally:
        sys.path.remove(str(FOLDER))
    return memory


@pytest.mark.slow
def test_it_runs_without_a_gpu(tmp_path, forge):
    out = tmp_path / "memory.json"
    options = ["--sizes", "tiny", "--plans", "lora", "--checkpointing", "on", "--steps", "2", "--out", str(out)]
    done = forge.fork(
        [sys.executable, str(FOLDER / "memory.py"), *options], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert "Estimate and real peak of a training step" in done.stdout
    (result,) = json.loads(out.read_text())["results"]
    assert (result["size"], result["plan"], result["peak"], result["mfu"]) == ("tiny", "lora", None, None)
    assert result["estimated"] > 0 and result["tokens_a_second"] > 0


@pytest.mark.parametrize("plan", ["projector", "lora", "full"])
def test_flops_are_those_that_torch_counts(plan, benchmark):
    model = benchmark.build("tiny", plan, "cpu")
    with FlopCounterMode(display=False) as counter:
        model(**benchmark.batch_of("tiny", "cpu"), supervised_only=True, use_cache=False).loss.backward()
    assert benchmark.flops_of_a_step(model, "tiny") == pytest.approx(counter.get_total_flops(), rel=0.2)


def test_a_device_that_is_not_known_has_no_peak(benchmark, monkeypatch):
    assert benchmark.peak_flops("cpu") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert benchmark.peak_flops("cuda") == 989e12
