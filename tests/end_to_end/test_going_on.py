"""Stages with LoRA go on: new words are learned and said, a LoRA is trained on or merged, runs resume by themselves."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import vlm_sft
import vlm_sft.train
from vlm_sft.base.names import ADAPTER

FAKE_PARITY = {"positions": 1, "max_difference": 0.0, "tolerance": 1e-4, "equal": True}
CAPTIONS = [
    "a <defect> 3",
    "a blue 缺陷",
    "左上角是缺陷",
    "a <defect>",
    "a cat 缺陷",
    "这是一只<defect>",
    "a bus",
    "缺陷",
]
SFT = {"per_device_train_batch_size": 8, "bf16": False, "report_to": "none", "logging_steps": 1, "max_length": 128,
       "gradient_checkpointing": False, "learning_rate": 2e-2, "save_strategy": "no"}  # fmt: skip


@pytest.fixture
def stage(recipe_file, photos, tmp_path):
    """Trains a stage on captions with two new words; returns its folder and the losses of its steps and its end."""
    rows = [{"image": image, "caption": said} for image, said in zip(photos, CAPTIONS, strict=True)]
    file = tmp_path / "words.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    source = [{"path": str(file), "format": "caption"}]

    def train(name, *flags, sft=None, **changes):
        out = tmp_path / name
        settings = {**SFT, "output_dir": str(out), "max_steps": 2, **(sft or {})}
        vlm_sft.train.main([str(recipe_file(name, data={"train": source, "eval": source}, sft=settings, **changes)),
                            *flags])  # fmt: skip
        logs = json.loads((out / "metrics.json").read_text())
        return out, [log["loss"] for log in logs if "loss" in log], [x["eval_loss"] for x in logs if "eval_loss" in x]

    return train


def test_words_are_learned_and_a_lora_goes_on(stage, monkeypatch, photos, capsys):
    monkeypatch.setattr("vlm_sft.bundle.parity.check_parity", lambda *args: FAKE_PARITY)
    lora = {"r": 4, "add_tokens": ["<defect>", "缺陷"]}
    one, _, (end,) = stage("one", lora=lora, sft={"max_steps": 40})
    assert "embedding rows, 2 words" in capsys.readouterr().err
    # It says the words, and no other row of a table is another.
    model, processor = vlm_sft.load(one, device="cpu")
    ask = [{"role": "user", "content": [{"type": "image"}]}]
    said = vlm_sft.answer(model, processor, [{"messages": ask, "images": [photos[7]]}], max_new_tokens=6)
    assert "缺陷" in said[0]
    rows = load_file(one / ADAPTER)
    tables = {name for name in rows if "trainable_tokens_delta" in name}
    assert {rows[name].shape for name in tables} == {(2, 32)} and len(tables) == 2
    base = vlm_sft.build_stack(vlm_sft.load_recipe(one / "recipe.yaml")).model
    merged = model.merge_and_unload()
    for table in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(each, table)().weight for each in (base, merged))
        assert (old != new).any(1).nonzero().flatten().tolist() == [word.id for word in processor.words]
    # The next stage begins where this one ended, with its LoRA trained on or merged.
    start = {"init_from": str(one)}
    _, (first, _), _ = stage("on", lora_from="continue", lora={"lora_dropout": 0.0}, **start)
    assert first == pytest.approx(end, abs=2e-4)
    save = {"save_strategy": "steps", "save_steps": 1}
    new, (first, last), _ = stage("new", lora_from="merge", lora={"r": 2}, sft=save, **start)
    assert first == pytest.approx(end, abs=2e-4)
    shutil.rmtree(one)
    shutil.rmtree(new / "checkpoint-2")
    wanted = load_file(new / ADAPTER)
    again, (_, repeated), _ = stage("new", "--resume", lora_from="merge", lora={"r": 2}, sft=save, **start)
    found = load_file(again / ADAPTER)
    assert repeated == last and all(torch.equal(found[name], wanted[name]) for name in wanted)
    # A third stage stands on it, proven by the parity gate in a fresh process, and says what it comes from.
    monkeypatch.undo()
    third, _, _ = stage("third", init_from=str(new), lora_from="merge", train={"projector": 1e-3})
    manifest = json.loads((third / "bundle.json").read_text())
    assert manifest["parity"]["equal"] and manifest["merged"] == [str(one), str(new)]
    card = (third / "README.md").read_text()
    assert "LoRA of `one`, then that of `new`" in card and "merged" in card


def test_a_quantised_stage_learns_words_and_goes_on(stage, monkeypatch):
    """Tables are never in 4 bits; LoRA is not merged into what is."""
    monkeypatch.setattr("vlm_sft.bundle.parity.check_parity", lambda *args: FAKE_PARITY)
    few = {"load_in_4bit": True}
    one, _, (end,) = stage("one", lora={"r": 4, "add_tokens": ["缺陷"]}, quantization=few)
    on, (first, _), _ = stage("on", lora_from="continue", quantization=few, init_from=str(one))
    assert first == pytest.approx(end, abs=5e-3)
    assert sum("trainable_tokens_delta" in name for name in load_file(on / ADAPTER)) == 2


def test_what_cannot_go_on_is_said_before_weights_are_read(recipe_file, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_sft.stack.kinds.StackKind.load", lambda *args: pytest.fail("weights are read"))
    for changes, words in (
        ({"lora": {"r": 2, "target_modules": ["query"]}}, "'query' matches no linear layer of the language model"),
        ({"lora": {"r": 2, "target_modules": "nothing"}}, "the expression 'nothing' matches no module of the model"),
        ({"lora": {"r": 2, "layers_to_transform": [9]}}, "PEFT cannot put `lora` into this model"),
        ({"lora": {"r": 2, "bias": "all"}}, "lora.bias must be none"),
        ({"lora": {"r": 2, "init_lora_weights": "pissa"}}, "also changes the base weights"),
        ({"lora": {"r": 2, "add_tokens": ["a"]}}, "lora.add_tokens: 'a' is one token of this tokenizer already"),
        ({"lora": {"r": 2, "add_tokens": [" "]}}, "`lora.add_tokens` holds an empty word"),
        ({"lora": {"r": 2, "add_tokens": "缺陷"}}, "add_tokens"),
        ({"lora": {"r": 2, "layer_replication": [[0, 1]]}}, "`lora.layer_replication` cannot be used"),
        ({"lora": {"r": 2, "target_parameters": ["w"]}}, "'w' matches no experts of the language model; it has none"),
        ({"lora_from": "continue"}, "`lora_from` says what becomes of the LoRA of `init_from`"),
        ({"lora_from": "merge", "init_from": "out", "lora": {}, "quantization": {"load_in_4bit": True}},
         "LoRA cannot be merged into a language model in 4 or 8 bits"),
        ({"lora_from": "continue", "init_from": "out", "train": {"language_model": 1e-5}}, "while its LoRA is trained"),
    ):  # fmt: skip
        assert words in refused(recipe_file(**changes)), changes
