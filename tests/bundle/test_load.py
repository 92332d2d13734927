"""What is loaded is what was saved, and what a stranger's bundle may not do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from support.bundles import ALTERED, altered, bump, trained
from vlm_sft import load
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.load import load_trained
from vlm_sft.stack.build_stack import build_stack


@pytest.fixture
def recipe(bundle_recipe):
    return bundle_recipe


@pytest.mark.parametrize("part", ALTERED)
def test_another_base_is_named_when_loading(part, recipe, pieces, tmp_path):
    argument, piece, tensor = ALTERED[part]
    base = altered(pieces[piece], tmp_path / "base", lambda state: None)
    trained(recipe(**{argument: base}), tmp_path / "bundle")
    shutil.rmtree(base)
    altered(pieces[piece], Path(base), bump(tensor))
    with pytest.raises(UserError, match=rf"trained on the {part} of '.*base' \(fingerprint \w+\), but .* gives \w+;"):
        load(tmp_path / "bundle")


# -- bundles that are not whole ----------------------------------------------------------------------------------------

WEIGHT = "model.projector.linear.weight"
LORA = "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize(("file", "name"), [("trained.safetensors", WEIGHT), ("adapter_model.safetensors", LORA)])
def test_a_missing_extra_or_misshapen_key_is_named(file, name, recipe, tmp_path):
    folder = tmp_path / "bundle"
    trained(recipe(lora={"r": 2}), folder)
    whole = load_file(folder / file)
    assert name in whole
    changes = [
        ({n: t for n, t in whole.items() if n != name}, rf"{file}' lacks 1 trained tensors, for instance '{name}'"),
        ({**whole, "more.weight": torch.zeros(2)}, rf"{file}' holds 1 tensors .*, for instance 'more\.weight'"),
        ({**whole, name: whole[name][:1].contiguous()}, rf"tensor '{name}' has the shape \(1, \d+\), but this model"),
    ]
    for state, sentence in changes:
        save_file(state, folder / file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=sentence.replace("file.", r"file\.")):
            load(folder)
    (folder / file).write_bytes(b"\x08\x00")
    with pytest.raises(UserError, match=rf"{file}' is no whole safetensors file"):
        load(folder)
    (folder / file).unlink()
    with pytest.raises(UserError, match=rf"has no {file}"):
        load(folder)


def test_a_run_that_trains_more_than_a_checkpoint_holds_cannot_go_on_from_it(recipe, tmp_path):
    trained(recipe(), tmp_path / "bundle")
    stack = build_stack(recipe(train={"projector": 1e-3, "resampler": 1e-3}, name="two"))
    with pytest.raises(UserError, match=r"lacks \d+ trained tensors, for instance 'model\.resampler"):
        load_trained(tmp_path / "bundle", stack.model, stack.plan)


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json"])
def test_a_bundle_without_its_processor_says_so(name, recipe, tmp_path):
    trained(recipe(), tmp_path / "bundle")
    (tmp_path / "bundle" / name).unlink()
    with pytest.raises(UserError, match="is no whole bundle: its processor cannot be read"):
        load(tmp_path / "bundle")


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_a_bundle_cannot_run_code_by_its_own_word(part, recipe, tmp_path, capsys):
    trained(recipe(), tmp_path / "b")
    path = tmp_path / "b" / "recipe.yaml"
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    text["stack"][part]["trust_remote_code"] = True
    path.write_text(yaml.safe_dump(text, allow_unicode=True), encoding="utf-8")
    with pytest.raises(UserError, match=rf"wants to run Python code that .* \(stack\.{part}\.trust_remote"):
        load(tmp_path / "b")
    load(tmp_path / "b", trust_remote_code=True)


def test_loading_reads_no_pickle(recipe, tmp_path, monkeypatch):
    made = recipe(lora={"r": 2})
    trained(made, tmp_path / "bundle")
    for name in ("training_args.bin", "adapter_model.bin", "trained.bin", "pytorch_model.bin", "optimizer.pt"):
        (tmp_path / "bundle" / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    monkeypatch.setattr("torch.load", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.Unpickler", refuse)
    load(tmp_path / "bundle")
    (tmp_path / "bundle" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        load(tmp_path / "bundle")
