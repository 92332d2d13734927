"""A run that is not told whether to keep its activations asks how much memory there is."""

from __future__ import annotations

import pytest

from vlm_sft import load_recipe
from vlm_sft.machine.activations import settle_activations
from vlm_sft.recipe.libraries import build_sft_config


@pytest.mark.parametrize("processes", ["1", "1000000"])
def test_a_run_decides_by_the_memory_that_its_processes_share(open_recipe, monkeypatch, processes):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    again, said = processes != "1", []
    recipe = load_recipe(open_recipe)
    args = build_sft_config(recipe)
    assert args.activation_checkpointing, "TRL's default"
    settle_activations(recipe, args, said.append)
    assert args.activation_checkpointing is args.gradient_checkpointing is again
    assert (
        said[0].startswith("Activations are made again" if again else "Activations are kept") and " MiB of " in said[0]
    )
    for on in (True, False):
        recipe = load_recipe(open_recipe, [f"sft.activation_checkpointing={on}"])
        settle_activations(recipe, args := build_sft_config(recipe), said.append)
        assert args.activation_checkpointing is on and len(said) == 1
