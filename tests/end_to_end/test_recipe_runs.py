"""Every recipe that ships trains three steps at tiny size, by the code that a user runs; see shrink.py."""

from __future__ import annotations

import json
import re

import pytest
import torch

from support.shrink import shrink
from vlm_sft import load, load_recipe
from vlm_sft.base.assets import list_recipes
from vlm_sft.model.freeze import is_adapter, part_of
from vlm_sft.preflight.dry_run import weigh
from vlm_sft.preflight.launch import read_launch
from vlm_sft.train import train
from vlm_sft.training.part_trainer import PartTrainer


class Run:
    """What one run left: the bundle, and the parameters before and after it (on the same model, in memory)."""

    def __init__(self, recipe):
        self.recipe = recipe
        self.before, self.after, self.plan = {}, {}, None

    def watch(self, trainer, original, *args, **kwargs):
        names = dict(trainer.model.named_parameters())
        self.before = {n: p.detach().clone() for n, p in names.items()}
        done = original(trainer, *args, **kwargs)
        self.after = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        self.plan = trainer.plan
        return done


@pytest.fixture(scope="module")
def run(pieces, shared_photos, tmp_path_factory):
    """Trains a recipe by its name, once; an earlier stage that it starts from is trained first."""
    done: dict[str, Run] = {}

    def once(name: str) -> Run:
        if name in done:
            return done[name]
        folder = tmp_path_factory.mktemp(name)
        first = load_recipe(name).init_from
        start = once(first.removeprefix("outputs/")).folder if first else None
        this = Run(load_recipe(name, shrink(name, folder, pieces, shared_photos, start)))
        with pytest.MonkeyPatch.context() as patch:
            original = PartTrainer.train
            patch.setattr(
                PartTrainer, "train", lambda *args, **kwargs: this.watch(args[0], original, *args[1:], **kwargs)
            )
            this.folder = train(this.recipe)
        done[name] = this
        return this

    return once


@pytest.mark.slow
@pytest.mark.parametrize("name", list_recipes())
def test_three_steps_move_what_the_recipe_trains_and_nothing_else(name, run):
    done = run(name)
    learns = {n for n in done.before if done.plan.rate_of(n) is not None}
    moved = {n for n in done.before if not torch.equal(done.before[n], done.after[n])}
    assert moved - learns == set(), "frozen weights are bit-identical"
    still = {n for n in learns - moved if not has_no_gradient(n, done)}
    assert still == set(), "every trained tensor has moved"
    assert {part_of(n) for n in learns if not is_adapter(n)} == set(done.recipe.train)
    assert any(map(is_adapter, learns)) == (done.recipe.lora is not None)
    history = json.loads((done.folder / "metrics.json").read_text())
    losses = [row["loss"] for row in history if "loss" in row]
    most = 60 if done.recipe.encoder else 20  # of an mPLUG it is the sum over an answer's letters
    assert len(losses) == 3 and all(0 < loss < most for loss in losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_recipes())
def test_its_bundle_loads_and_gives_the_same_logits(name, run):
    done = run(name)
    manifest = json.loads((done.folder / "bundle.json").read_text())
    assert manifest["parity"]["equal"] and manifest["parity"]["positions"] > 0
    assert set(manifest["trained"]) == set(done.recipe.train)
    model, processor = load(done.folder)
    assert processor.chat_template
    loaded = dict(model.named_parameters())
    for name, wanted in done.after.items():
        assert torch.equal(loaded[name], wanted), name


@pytest.mark.slow
@pytest.mark.parametrize("name", list_recipes())
def test_its_dry_run_counts_what_the_run_trains(name, run):
    done = run(name)
    weighed = weigh(done.recipe, read_launch(None))
    learned: dict[str, int] = dict.fromkeys(weighed.estimate.parts, 0)
    for n, p in done.after.items():
        if done.plan.rate_of(n) is not None:
            learned[part_of(n)] += p.numel() * p.element_size()
    assert {part: held.gradients for part, held in weighed.estimate.parts.items()} == learned
    assert weighed.estimate.step.peak > weighed.estimate.step.kept > 0


def has_no_gradient(name: str, done: Run) -> bool:
    """A bias of the keys, which softmax cancels; the last layer of InstructBLIP's text, of which only queries go on; of
    an mPLUG what its files hold and nobody runs: its first fusion layer, and what the layer of both would cross. What a
    tower does behind the layer that is read.
    """
    resampler = done.recipe.stack and done.recipe.stack.resampler
    without = [r"key\.bias$"]
    if done.recipe.stack is not None and done.recipe.stack.vision_tower.feature_layer == -2:
        without.append(r"vision_tower\..*(layers\.2\.|post_layernorm|k_proj\.bias)")
    if resampler is not None and resampler.type == "instruct_qformer":
        without.append(r"layer\.1\.(intermediate|output)\.")
    if done.recipe.encoder is not None:
        without.append(r"^fusion_encoder\.(embeddings\.|encoder\.layer\.(0\.|4\.crossattention\.))|\.visual\.proj$")
    return any(re.search(each, name) for each in without)
