"""QLoRA: the language model alone in 4 or 8 bits; everything else keeps its type, and the bundle comes back equal."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset

from support.bundles import logits
from support.conversations import make_row, turn
from vlm_sft import MultimodalCollator, VLMSFTTrainer, build_stack, load, load_recipe, lora_config
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.handover import hand_over
from vlm_sft.bundle.manifest import Provenance
from vlm_sft.bundle.parity import check_parity
from vlm_sft.model.freeze import is_adapter, part_of
from vlm_sft.recipe.libraries import build_sft_config, validate_libraries
from vlm_sft.stack.build_stack import build_empty_stack
from vlm_sft.stack.lora import add_adapter

FOUR, EIGHT = {"load_in_4bit": True}, {"load_in_8bit": True}


@pytest.fixture
def quantised(recipe_file):
    """A recipe with LoRA and `quantization`; top-level keys by keyword."""

    def make(quantization=FOUR, overrides=(), **changes):
        changes = {"lora": {"r": 2}, "chat_template": "ziya", **changes}
        return load_recipe(recipe_file(quantization=quantization, **changes), overrides)

    return make


def trainer_of(recipe, photos, stack=None):
    stack = stack or build_stack(recipe)
    words = ("red", "blue", "红色", "grey")
    rows = [make_row(turn("这是什么？", f"a {word} 3", images=1), photos[i:], i) for i, word in enumerate(words)]
    return VLMSFTTrainer(
        stack.model, build_sft_config(recipe), MultimodalCollator(stack.processor), Dataset.from_list(rows),
        stack.processor, lora_config(recipe, stack.model), plan=stack.plan,
        provenance=Provenance(recipe, stack.pieces),
    )  # fmt: skip


@pytest.mark.parametrize(("quantization", "kind"), [(FOUR, "Linear4bit"), (EIGHT, "Linear8bitLt")])
def test_the_language_models_linears_are_quantised_and_nothing_else(quantization, kind, quantised):
    model = build_stack(quantised(quantization)).model
    found = {n for n, m in model.named_modules() if type(m).__name__ == kind}
    assert len(found) == 14 and all(n.startswith("model.language_model.layers.") for n in found)
    assert {p.dtype for n, p in model.named_parameters() if part_of(n) != "language_model"} == {torch.float32}
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight.dtype == torch.float32
    if kind == "Linear4bit":
        weight = model.get_submodule("model.language_model.layers.0.mlp.up_proj").weight
        assert weight.quant_state.quant_type == "nf4" and weight.dtype == torch.uint8


def test_the_head_stays_when_more_is_left_out_and_the_run_says_what_is_computed_in(quantised):
    model = build_stack(quantised({**FOUR, "llm_int8_skip_modules": ["down_proj"]}, ["sft.bf16=true"])).model
    assert type(model.lm_head) is torch.nn.Linear
    layer = model.model.language_model.layers[0].mlp
    assert type(layer.down_proj) is torch.nn.Linear
    assert layer.up_proj.compute_dtype == torch.bfloat16
    assert {p.dtype for p in model.model.resampler.parameters()} == {torch.float32}
    assert {p.dtype for p in model.model.projector.parameters()} == {torch.float32}
    assert {p.dtype for p in model.model.vision_tower.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("quantization", "name"), [(FOUR, "nf4"), (EIGHT, "int8")])
def test_the_table_counts_weights_not_bytes_also_before_they_are_read(quantization, name, quantised):
    recipe = quantised(quantization)
    plain = load_recipe(recipe.path, ["quantization=null"])
    total = build_stack(plain).plan.rows(build_stack(plain).model)[-1].total
    for stack in (build_stack(recipe), build_empty_stack(recipe)):
        row = stack.plan.rows(add_adapter(stack.model, lora_config(recipe, stack.model)))[-1]
        assert row.total == total and row.adapted > 0 and row.trained == 0
        assert row.dtypes == {name, "float32"}


@pytest.mark.parametrize("quantization", [FOUR, {**FOUR, "bnb_4bit_use_double_quant": True}, EIGHT])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_and_projector_learn_in_fp32_beside_frozen_bits(quantization, checkpointing, quantised, photos, tmp_path):
    recipe = quantised(quantization, [f"sft.gradient_checkpointing={checkpointing}", "sft.max_steps=3"])
    trainer = trainer_of(recipe, photos)
    learns = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {part_of(n) for n in learns} == {"projector", "language_model"}
    assert all(is_adapter(n) or part_of(n) == "projector" for n in learns)
    assert {p.dtype for p in learns.values()} == {torch.float32}, "TRL would cast them to bf16"
    bits = {type(m).__module__.split(".")[-1] for n, m in trainer.model.named_modules() if hasattr(m, "lora_A")}
    assert bits == {"bnb"}, "PEFT must know that it adapts quantised layers"
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in learns), name
    trainer.save_model(str(tmp_path / "bundle"))
    again, processor = load(tmp_path / "bundle")
    assert torch.equal(logits(again, processor), logits(trainer.model.eval(), processor))


def test_a_base_has_one_fingerprint_quantised_or_not(quantised):
    recipe = quantised()
    assert build_stack(recipe).pieces == build_stack(load_recipe(recipe.path, ["quantization=null"])).pieces


@pytest.mark.slow
def test_the_parity_gate_passes_in_a_fresh_process(quantised, photos, tmp_path, fresh_python):
    trainer = trainer_of(quantised(), photos)
    trainer.train()
    trainer.save_model(str(tmp_path / "bundle"))
    batch = trainer.data_collator(list(trainer.train_dataset))
    result = check_parity(tmp_path / "bundle", trainer.model, batch)
    assert result["equal"] and result["max_difference"] <= 1e-5
    saved = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert saved["parity"] == result and saved["held"] == ["projector"]


def test_a_stage_goes_on_quantised_from_one_that_was_not(recipe_file, quantised, tmp_path, photos):
    first = load_recipe(recipe_file("one", chat_template="ziya"))
    trainer = trainer_of(first, photos)
    trainer.train()
    trainer.save_model(str(tmp_path / "one"))
    stack = build_stack(quantised())
    assert hand_over(stack, tmp_path / "one") == ["projector"]
    assert torch.equal(stack.model.model.projector.linear.weight, trainer.model.model.projector.linear.weight)

    whole = trainer_of(load_recipe(recipe_file("whole", train={"language_model": 1e-4})), photos)
    whole.save_model(str(tmp_path / "whole"))
    with pytest.raises(UserError, match="holds a trained language model, which cannot be put into a quantised one"):
        hand_over(build_stack(quantised()), tmp_path / "whole")


@pytest.mark.parametrize(
    ("quantization", "changes", "sentence"),
    [
        (FOUR, {"train": {"language_model": 1e-4}, "lora": None}, r"cannot be trained whole; remove `train\.language"),
        (FOUR, {"lora": None}, "`quantization` needs `lora`"),
        ({}, {}, "needs one of `load_in_4bit: true` and `load_in_8bit: true`"),
        ({**FOUR, **EIGHT}, {}, "needs one of"),
    ],
)
def test_rules_name_the_line(quantization, changes, sentence, quantised):
    with pytest.raises(UserError, match=rf"recipe\.yaml, line \d+: .*{sentence}"):
        quantised(quantization, **changes)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"load_in_4bits": True}, r'unknown key "quantization\.load_in_4bits"; did you mean "load_in_4bit"\?'),
        (
            {"bnb_4bit_quant_type": "nf5"},
            r'"quantization\.bnb_4bit_quant_type" must be \'nf4\' or \'fp4\', not \'nf5\'',
        ),
        ({"bnb_4bit_use_double_quant": 1}, "must be a valid boolean"),
        ({"bnb_4bit_compute_dtype": "bf16"}, "'float32', 'bfloat16' or 'float16', not 'bf16'"),
    ],
)
def test_keys_are_checked_before_anything_is_loaded(option, sentence, quantised):
    with pytest.raises(UserError, match=sentence):
        validate_libraries(quantised({**FOUR, **option}))
