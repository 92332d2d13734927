"""A bundle gives back what was trained, holds nothing else, and says which of its parts is not what it was."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from support.bundles import altered, bump, logits, move, trained
from support.paths import ROOT
from support.tiny_pieces import tiny_stack
from vlm_sft import load
from vlm_sft.base.errors import UserError
from vlm_sft.bundle import save as bundle
from vlm_sft.bundle.manifest import Provenance, update_manifest
from vlm_sft.bundle.save import check_savable, save_bundle
from vlm_sft.model.freeze import part_of
from vlm_sft.stack.build_stack import build_stack
from vlm_sft.stack.lora import lora_config
from vlm_sft.train import main as train_main

CLIP = {"projector": {"type": "mlp"}}


@pytest.fixture
def recipe(bundle_recipe):
    return bundle_recipe


ROUND_TRIPS = {
    "projector": {},
    "projector and LoRA": {"lora": {"r": 2, "lora_alpha": 8}},
    "DoRA on some": {"lora": {"r": 2, "use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}},
    "LoRA that reaches the tower": {"lora": {"r": 2, "target_modules": r".*\.(q_proj|qkv)"}},
    "LoRA on some layers": {"lora": {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [0]}},
    "resampler and projector": {"train": {"projector": 1e-3, "resampler": 1e-4}},
    "language model whole": {"train": {"projector": 1e-3, "language_model": 1e-5}},
    "vision tower": {"train": {"vision_tower": 1e-5}},
    "everything": {"train": dict.fromkeys(("vision_tower", "resampler", "projector", "language_model"), 1e-4)},
    "LLaVA": {"tower": "clip", "resampler": None, "projector": {"type": "mlp"},
              "vision": {"feature_layer": -2, "feature_select": "patch"}, "lora": {"r": 2}},
    "Yi-VL": {"tower": "clip", "resampler": None, "projector": {"type": "mlp_norm"},
              "vision": {"feature_layer": -2, "feature_select": "patch"}, "lora": {"r": 2}},
    "OPT, pixel shuffle": {"tower": "clip", "resampler": None, "lm": "opt", "projector": {"type": "pixel_shuffle"},
                           "vision": {"feature_select": "patch"}, "train": {"projector": 1e-3, "language_model": 1e-4}},
}  # fmt: skip


@pytest.mark.parametrize("case", ROUND_TRIPS)
@pytest.mark.parametrize("state_dict", [False, True], ids=["own", "gathered"])
def test_a_bundle_gives_the_same_logits(case, state_dict, recipe, tmp_path):
    """`gathered`: the trainer hands over a state dict, as it does for sharded models; OPT's has its tied head twice."""
    made = recipe(**ROUND_TRIPS[case])
    model = trained(made, tmp_path / "bundle", state_dict)
    again, processor = load(tmp_path / "bundle")
    assert torch.equal(logits(again, processor), logits(model, processor))
    base = build_stack(made).model.eval()
    assert not torch.allclose(logits(base, processor), logits(model, processor), atol=1e-3), "training moved nothing"
    assert not again.training and not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_a_bundle_holds_no_frozen_weight(case, recipe, tmp_path):
    made = recipe(**ROUND_TRIPS[case])
    model = trained(made, tmp_path / "bundle")
    held = load_file(tmp_path / "bundle" / "trained.safetensors")
    assert {part_of(name) for name in held} == {*made.train, "projector"}
    assert not any("base_layer" in n or "lora_" in n or n.startswith("base_model") for n in held)
    files = {path.name for path in (tmp_path / "bundle").iterdir()}
    assert ("adapter_model.safetensors" in files) == (made.lora is not None)
    if made.lora:
        adapter = load_file(tmp_path / "bundle" / "adapter_model.safetensors")
        assert adapter and all("lora_" in name for name in adapter)
        count = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
        assert sum(t.numel() for t in adapter.values()) == count
    assert files <= {
        "adapter_config.json", "adapter_model.safetensors", "bundle.json", "chat_template.jinja", "config.json",
        "preprocessor_config.json", "processor_config.json", "recipe.yaml", "special_tokens_map.json", "tokenizer.json",
        "tokenizer_config.json", "trained.safetensors",
    }  # fmt: skip


def test_a_tied_head_trained_whole_comes_back_tied(recipe, tmp_path):
    trained(recipe(lm="opt", train={"language_model": 1e-4}), tmp_path / "bundle")
    again, _ = load(tmp_path / "bundle")
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert "lm_head.weight" not in load_file(tmp_path / "bundle" / "trained.safetensors")


def test_a_new_projector_is_kept_where_lora_alone_is_trained(recipe, tmp_path):
    """It is in no base piece: without it the bundle would load with another, random one."""
    made = recipe(train={}, lora={"r": 2})
    model = trained(made, tmp_path / "bundle")
    again, processor = load(tmp_path / "bundle")
    assert torch.equal(logits(again, processor), logits(model, processor))


def test_a_projector_that_came_from_elsewhere_is_in_the_bundle(recipe, pieces, tmp_path):
    shutil.copytree(pieces["blip2"], tmp_path / "theirs")
    made = recipe(projector={"type": "linear", "pretrained": str(tmp_path / "theirs")}, train={}, lora={"r": 2})
    model = trained(made, tmp_path / "bundle")
    shutil.rmtree(tmp_path / "theirs")
    again, processor = load(tmp_path / "bundle")
    assert torch.equal(logits(again, processor), logits(model, processor))


def test_a_template_of_ones_own_comes_from_the_bundle(recipe, tmp_path):
    source = (ROOT / "chat_templates" / "vicuna_v1.jinja").read_text()
    mine = tmp_path / "mine.jinja"
    mine.write_text(source.replace("USER", "用户"))
    trained(recipe(chat_template=str(mine)), tmp_path / "bundle")
    mine.unlink()
    _, processor = load(tmp_path / "bundle")
    assert "用户" in processor.render([{"role": "user", "content": "这是什么？"}]).text


def test_base_pieces_by_relative_path_load_from_another_folder(recipe, pieces, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    for name in ("blip2", "llama"):
        shutil.copytree(pieces[name], home / "parts" / name)
    monkeypatch.chdir(home)
    made = recipe(tower="parts/blip2", resampler="parts/blip2", lm="parts/llama", lora={"r": 2})
    model = trained(made, "out/bundle")
    monkeypatch.chdir(tmp_path)
    again, processor = load("home/out/bundle")
    assert torch.equal(logits(again, processor), logits(model, processor))
    # Another folder of that name is not taken for it: what lies where the recipe says comes first, and is checked.
    altered(pieces["llama"], tmp_path / "parts" / "llama", bump("model.norm.weight"))
    with pytest.raises(UserError, match="trained on the language_model of 'parts/llama'"):
        load(home / "out" / "bundle")


def test_the_bundle_can_be_moved(recipe, tmp_path):
    model = trained(recipe(lora={"r": 2}), tmp_path / "bundle")
    (tmp_path / "bundle").rename(tmp_path / "别的 地方")
    again, processor = load(tmp_path / "别的 地方")
    assert torch.equal(logits(again, processor), logits(model, processor))


def test_the_adapter_names_the_language_model_it_is_for(recipe, pieces, tmp_path, recwarn):
    trained(recipe(lora={"r": 2}), tmp_path / "bundle")
    config = json.loads((tmp_path / "bundle" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == pieces["llama"]
    again, _ = load(tmp_path / "bundle")
    assert again.peft_config["default"].base_model_name_or_path == pieces["llama"]
    assert not [w for w in recwarn if "base_model_name_or_path" in str(w.message)]


def test_generation_options_and_dtype_reach_the_loaded_model(recipe, tmp_path):
    trained(recipe(generation={"max_new_tokens": 7, "num_beams": 2}), tmp_path / "bundle")
    model, processor = load(tmp_path / "bundle", dtype=torch.bfloat16)
    assert (model.generation_config.max_new_tokens, model.generation_config.num_beams) == (7, 2)
    assert {p.dtype for p in model.model.language_model.parameters()} == {torch.bfloat16}
    assert logits(model, processor).isfinite().all()


# -- writing -----------------------------------------------------------------------------------------------------------


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(state, path, **kwargs):
    Path(path).write_bytes(b"half")
    full_disk()


@pytest.mark.parametrize("step", ["save_file", "_save_adapter", "write_json"])
def test_a_full_disk_is_one_sentence_and_leaves_the_earlier_bundle_whole(step, recipe, tmp_path, monkeypatch):
    made = recipe(lora={"r": 2})
    before = trained(made, tmp_path / "bundle")
    listing = {p.name: p.read_bytes() for p in (tmp_path / "bundle").iterdir()}
    stack = build_stack(made)
    model = get_peft_model(stack.model, lora_config(made, stack.model))
    stack.plan.apply(model)
    move(model, seed=5)
    monkeypatch.setattr(bundle, step, half_written if step == "save_file" else full_disk)
    with pytest.raises(UserError, match=r"^The bundle cannot be written to '.*bundle': No space left on device\.$"):
        save_bundle(tmp_path / "bundle", model, stack.processor, stack.plan, Provenance(made, stack.pieces))
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in (tmp_path / "bundle").iterdir()} == listing, "nothing is left half written"
    again, processor = load(tmp_path / "bundle")
    assert torch.equal(logits(again, processor), logits(before, processor))


def test_what_the_system_refuses_is_one_sentence(recipe, tmp_path):
    """Not a monkeypatch: safetensors reports a failed write with an error of its own kind."""
    made = recipe()
    stack = build_stack(made)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(UserError, match=r"^The bundle cannot be written to '.*bundle': .*File too large"):
            save_bundle(tmp_path / "bundle", stack.model, stack.processor, stack.plan, Provenance(made, stack.pieces))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_in_the_place_of_the_folder(recipe, tmp_path):
    (tmp_path / "bundle").write_text("")
    stack = build_stack(recipe())
    with pytest.raises(UserError, match=r"^The bundle cannot be written to '.*bundle': File exists\.$"):
        save_bundle(tmp_path / "bundle", stack.model, stack.processor, stack.plan)


def test_saving_again_replaces_all_of_it(recipe, tmp_path):
    """A parity result of earlier weights would say of the new ones what nobody has checked."""
    made = recipe()
    trained(made, tmp_path / "bundle")
    update_manifest(tmp_path / "bundle", {"parity": {"equal": True}})
    (tmp_path / "bundle" / "curves.png").write_bytes(b"mine")
    (tmp_path / "bundle" / "README.md").write_text("mine")
    model = trained(recipe(name="two", lora={"r": 2}), tmp_path / "bundle")
    assert "parity" not in json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert (tmp_path / "bundle" / "curves.png").read_bytes() == b"mine"
    assert (tmp_path / "bundle" / "README.md").read_text() == "mine", "PEFT would put its own card there"
    again, processor = load(tmp_path / "bundle")
    assert torch.equal(logits(again, processor), logits(model, processor))


KEY = "ghp_" + "0123456789abcdefghijklmnopqrstuvwxyz"
HIDES = {
    "a token of the tokenizer": lambda processor: processor.tokenizer.add_tokens([KEY]),
    "a setting of the tokenizer": lambda processor: processor.tokenizer.init_kwargs.update(note=[{"猫": KEY}]),
    "the template": lambda processor: setattr(
        processor, "chat_template", processor.chat_template + "{# " + KEY + " #}"
    ),
}


@pytest.mark.parametrize("place", HIDES)
def test_nothing_is_saved_that_holds_a_key(place, recipe, tmp_path):
    stack = build_stack(recipe())
    check_savable(stack.processor)
    HIDES[place](stack.processor)
    with pytest.raises(
        UserError, match=r"holds what looks like a token, .*; remove it there, then train with it"
    ) as caught:
        check_savable(stack.processor)
    assert KEY not in str(caught.value)
    with pytest.raises(UserError, match=r"holds what looks like a token, .*; remove it there, then save it"):
        save_bundle(tmp_path / "bundle", stack.model, stack.processor, stack.plan, Provenance(recipe(), stack.pieces))
    assert list((tmp_path / "bundle").iterdir()) == []


def test_a_key_in_the_tokenizer_of_a_base_is_said_before_a_run_reads_weights(recipe_file, pieces, tmp_path, capsys):
    base = shutil.copytree(pieces["llama"], tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8")) | {"note": KEY}
    (base / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (base / "model.safetensors").unlink()
    stack = tiny_stack({**pieces, "llama": str(base)})
    with pytest.raises(SystemExit):
        train_main([str(recipe_file(stack=stack))])
    said = capsys.readouterr().err
    assert "tokenizer_config.json holds what looks like a token" in said and KEY not in said


def test_what_the_ledger_quotes_of_rows_holds_no_key(recipe, tmp_path):
    trained(recipe(), tmp_path / "bundle")
    ledger = {"train": {"sources": {"a": {"examples": {"wrong mark": [f"row 3: 猫 {KEY} is no mark"]}}}}}
    update_manifest(tmp_path / "bundle", {"ledger": ledger})
    said = (tmp_path / "bundle" / "bundle.json").read_text(encoding="utf-8")
    assert KEY not in said and "row 3: 猫 … is no mark" in said
