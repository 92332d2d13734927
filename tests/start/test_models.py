"""Which model fits which machine, and how long it takes there."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from support.scripts import script
from vlm_sft.machine.machine import Machine, flops_of
from vlm_sft.start.models import CANDIDATES, HEADROOM, hours_of, known_model, plan, proposals

GB = 2**30


def machine(name: str | None = None, gib: int = 0, count: int = 1, ram: int = 64) -> Machine:
    return Machine(((name, gib * GB),) * count if name else (), 8, ram * GB, 500 * GB)


@pytest.mark.parametrize(
    ("gpu", "gib", "first"),
    [("NVIDIA GeForce RTX 3060", 12, "Qwen3-VL-4B"), ("Tesla T4", 16, "Qwen3-VL-4B"), ("RTX 4090", 24, "Qwen3-VL-8B"),
     ("NVIDIA A100-SXM4-80GB", 80, "Qwen3-VL-8B"), ("GTX 1650", 4, "SmolVLM-500M"), (None, 0, "SmolVLM-500M")],
)  # fmt: skip
def test_what_is_proposed_first_fits(gpu, gib, first):
    found = proposals(machine(gpu, gib), chinese=False, rows=1000, hours=1e6)
    assert first in found[0].pretrained
    planned = plan(found[0].pretrained, 1000, machine(gpu, gib), 8.0)
    if gpu:
        assert planned.memory <= HEADROOM * gib * GB
    assert planned.rows * planned.accumulation == pytest.approx(16, abs=4)


def test_chinese_goes_first_where_it_is_spoken_and_a_licence_that_allows_all():
    found = proposals(machine("RTX 3080", 10), chinese=True, rows=100, hours=8)
    assert found[0].chinese and found[0].license == "Apache-2.0"


def test_time_decides_the_epochs_and_the_size():
    slow, fast = machine("Tesla T4", 16), machine("NVIDIA H100 80GB HBM3", 80)
    name = "Qwen/Qwen3-VL-4B-Instruct"
    known = known_model(name)
    assert hours_of(known, 1000, slow) / hours_of(known, 1000, fast) == pytest.approx(989 / 65)
    assert plan(name, 1000, fast, 8).epochs == 3
    assert 0 < plan(name, 1_000_000, slow, 8).epochs < 1
    assert plan(name, 1_000_000, slow, 8).hours == pytest.approx(8, rel=0.2)
    first = proposals(machine(None), chinese=False, rows=100_000, hours=1)[0]
    assert first == CANDIDATES[0], "where none is fast enough, the smallest"


def test_names_of_gpus():
    assert flops_of("NVIDIA H100 PCIe") < flops_of("NVIDIA H100 80GB HBM3")
    assert flops_of("NVIDIA A100-SXM4-40GB") == 312e12 and flops_of("Nobody knows") == 40e12
    assert known_model("smolvlm-instruct").pretrained == "HuggingFaceTB/SmolVLM-Instruct" and known_model("x/y") is None


def test_the_memory_of_the_table_is_counted_at_the_published_sizes(tmp_path):
    """A count takes minutes; that each model of the script has as many weights as the published one takes seconds."""
    sizes = script("benchmarks/starting_models.py")
    assert [each.pretrained.rpartition("/")[2] for each in CANDIDATES] == list(sizes.SIZED)
    for known in CANDIDATES[::3]:
        folder = sizes.write_model(known.pretrained.rpartition("/")[2], tmp_path / f"{known.billions}")
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        assert model.num_parameters() == pytest.approx(known.billions * 1e9, rel=0.03)
