"""A piece is looked up once, and by whoever needs it first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from transformers import AutoConfig

from support.hub_server import HubServer
from support.paths import ROOT
from support.tiny_families import tiny
from vlm_sft import build_stack, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.pieces import checkpoints
from vlm_sft.pieces import piece as pieces_module
from vlm_sft.pieces.checkpoints import Checkpoint
from vlm_sft.pieces.piece import Piece, specs_of
from vlm_sft.recipe.sections import VisionTower


def piece(pretrained):
    return Piece("vision_tower", VisionTower(pretrained=str(pretrained)))


def whole(pretrained):
    return piece(pretrained).whole


@pytest.fixture
def looks(monkeypatch) -> Counter:
    """How often a file is looked for by its name, tensors are listed, and transformers reads a configuration."""
    seen: Counter = Counter()

    def counted(name, function):
        def call(*args, **options):
            seen[args[1] if name is None else name] += 1
            return function(*args, **options)

        return call

    fetch = counted(None, checkpoints.fetch_file)
    for module in (checkpoints, pieces_module):
        monkeypatch.setattr(module, "fetch_file", fetch)
    monkeypatch.setattr(Checkpoint, "_list", counted("tensors", Checkpoint._list))
    monkeypatch.setattr(AutoConfig, "from_pretrained", counted("AutoConfig", AutoConfig.from_pretrained))
    return seen


@pytest.mark.parametrize(("tower", "resampler", "lm"), [("blip2", "blip2", "llama"), ("clip", None, "opt")])
def test_building_a_stack_looks_once_for_each_of_its_pieces(tower, resampler, lm, stack_recipe, looks):
    recipe = stack_recipe(tower, lm, resampler)
    named = len(specs_of(recipe))
    build_stack(recipe)
    tokenizer = 1  # transformers asks which tokenizer goes with a model
    expected = {"config.json": named, "model.safetensors": named, "tensors": named, "AutoConfig": named + tokenizer}
    assert looks == expected


def test_building_an_existing_model_looks_for_it_once(recipe_file, looks):
    recipe = load_recipe(recipe_file(stack=None, model={"pretrained": str(tiny("llava"))}, chat_template=None))
    build_stack(recipe)
    assert (looks["config.json"], looks["tensors"], looks["model.safetensors"]) == (1, 1, 1)


def test_a_stack_s_pieces_and_an_existing_model_are_named_alike(stack_recipe, recipe_file):
    assert list(specs_of(stack_recipe("blip2", resampler="blip2"))) == ["vision_tower", "resampler", "language_model"]
    assert list(specs_of(stack_recipe("clip"))) == ["vision_tower", "language_model"]
    assert list(specs_of(load_recipe(recipe_file(stack=None, model={"pretrained": "猫"})))) == ["model"]


def test_nothing_is_looked_for_before_it_is_asked_for(looks, pieces):
    found = piece(pieces["blip2"])
    assert (found.part, found.section, found.key) == (
        "vision_tower",
        "stack.vision_tower",
        "stack.vision_tower.pretrained",
    )
    assert not looks
    assert found.raw["model_type"] == "blip-2" and not found.is_foreign and looks == {"config.json": 1}


TWICE = """
import os, sys, urllib.error, urllib.request
from vlm_sft import build_stack, load_recipe

first = build_stack(load_recipe(sys.argv[1])).pieces
try:
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/again")
except urllib.error.HTTPError:
    pass
assert build_stack(load_recipe(sys.argv[1])).pieces == first
print(*sorted({piece["commit"] for piece in first.values()}))
"""


@pytest.mark.slow
def test_the_hub_is_asked_once_for_each_piece(pieces, recipe_file, tmp_path):
    named = {"vision_tower": {"pretrained": "tiny/blip2"}, "resampler": {"type": "qformer", "pretrained": "tiny/blip2"},
             "projector": {"type": "linear"}, "language_model": {"pretrained": "tiny/llama"}}  # fmt: skip
    recipe = recipe_file(stack=named)
    with HubServer() as hub:
        commits = sorted(hub.add(f"tiny/{name}", pieces[name]) for name in ("blip2", "llama"))
        keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {**keep, **hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", TWICE, str(recipe)], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.split() == commits, "what was trained on is found again"
    again = hub.requests[hub.requests.index("GET /again") + 1 :]
    files = [request.rsplit("/", 1)[-1] for request in again if "/resolve/" in request]
    assert files == ["config.json"] * 3, "everything else is of that commit, and here"
    assert hub.requests.index("GET /again") <= 26


def test_a_folder_without_config_and_a_name_out_of_reach(tmp_path):
    with pytest.raises(
        UserError,
        match=r"^stack\.vision_tower\.pretrained: the folder '.*' has no config\.json that transformers can read\.$",
    ):
        whole(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"has no config\.json that transformers can read"):
        whole(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UserError, match=r"transformers cannot read the config\.json of .*no_such_model") as error:
        whole(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"'Salesforce/none' is no folder here and could not be had from the Hub"):
        whole("Salesforce/none")


def test_code_of_a_checkpoint_is_not_run_unless_it_is_asked_for(tmp_path):
    config = {"model_type": "their_own", "auto_map": {"AutoConfig": "configuration_theirs.TheirConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="trust_remote_code"):
        whole(tmp_path)
    assert not (tmp_path / "ran").exists()
