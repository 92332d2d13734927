"""`benchmarks/real_proofs.py` reads what commands say: a wrong line of a table would be a wrong proof."""

from __future__ import annotations

import pytest
from rich.console import Console

from support.paths import ROOT
from vlm_sft.preflight.launch import Launch
from vlm_sft.preflight.memory import Estimate, PartMemory
from vlm_sft.preflight.step_memory import Counted


@pytest.fixture
def proofs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import real_proofs

    return real_proofs


@pytest.mark.parametrize("width", [60, 200])
def test_the_memory_of_a_run_is_the_line_of_all_of_it(proofs, width):
    """That of the passes alone, which has no weights, was taken for it."""
    found = Estimate({"language_model": PartMemory(600 * 2**20)}, Counted(700 * 2**20, 1000 * 2**20), 0, Launch())
    console = Console(width=width)
    with console.capture() as said:
        console.print(found.table())
    assert proofs.most_of(said.get()) == pytest.approx(found.total / 1e6, rel=0.01)


def test_numbers_are_found_behind_words_that_a_terminal_broke(proofs):
    text = "Parity: reloaded in a fresh process, 18 positions, largest\ndifference of a logit 1.5e-06.\nBundle: x"
    assert proofs.number_after("largest difference of a logit", text) == 1.5e-6
    with pytest.raises(AssertionError):
        proofs.number_after("largest difference of a weight", text)


def test_losses_are_compared_as_shares_and_step_by_step(proofs):
    assert proofs.relative([2.0, 4.0], [2.0, 4.4]) == pytest.approx(0.1)
    with pytest.raises(AssertionError):
        proofs.relative([2.0, 4.0], [2.0])
