"""The freeze plan: who moves, how fast, and that the table says so."""

from __future__ import annotations

import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import CLIPVisionConfig, LlamaConfig

from vlm_sft.model.configuration import VLMConfig
from vlm_sft.model.freeze import FreezePlan, is_adapter, part_of
from vlm_sft.model.modeling import VLMForConditionalGeneration


@pytest.fixture
def model():
    vision = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                              image_size=14, patch_size=7)  # fmt: skip
    text = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    return VLMForConditionalGeneration(VLMConfig(vision_config=vision, text_config=text))


def adapted(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model\..*(q_proj|v_proj)"))


@pytest.mark.parametrize("wrapper", ["", "module.", "base_model.model.", "module.base_model.model.", "_orig_mod."])
@pytest.mark.parametrize(
    ("name", "part"),
    [("model.vision_tower.encoder.x", "vision_tower"), ("lm_head.weight", "language_model"),
     ("model.projector.linear.bias", "projector"), ("model.language_model.model.x", "language_model")],
)  # fmt: skip
def test_a_name_tells_its_part_under_any_wrapper(wrapper, name, part):
    assert part_of(wrapper + name) == part


def test_a_name_of_no_part_is_a_mistake_of_ours():
    with pytest.raises(KeyError, match="belongs to none of"):
        part_of("model.smell_tower.weight")


def test_what_nothing_reads_is_frozen_whatever_is_trained():
    plan = FreezePlan({"vision_tower": 1e-3})
    assert part_of("model.audio_tower.layers.0.weight") == "vision_tower"
    assert plan.rate_of("model.audio_tower.layers.0.weight") is None
    assert plan.rate_of("base_model.model.model.embed_audio.embedding_projection.weight") is None
    assert plan.rate_of("model.vision_tower.layers.0.weight") == 1e-3


def test_what_is_not_named_is_frozen(model):
    FreezePlan({"projector": 1e-3}).apply(model)
    assert {part_of(n) for n, p in model.named_parameters() if p.requires_grad} == {"projector"}


def test_adapters_and_projector_learn_at_their_own_rates(model):
    plan, wrapped = FreezePlan({"projector": 1e-3}, adapter_rate=2e-4), adapted(model)
    plan.apply(wrapped)
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": parameters, "weight_decay": 0.1}], lr=9.0)
    plan.split_by_rate(optimizer, wrapped)
    plan.check_optimizer(optimizer.param_groups, wrapped)
    assert {(g["part"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups} == {
        ("projector", 1e-3, 0.1),
        ("lora", 2e-4, 0.1),
    }


def test_a_lost_or_stray_parameter_is_noticed(model):
    plan = FreezePlan({"projector": 1e-3})
    plan.apply(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(AssertionError, match=r"should learn at 0\.001"):
        plan.check_optimizer([{"params": trained[:-1], "lr": 1e-3}], model)
    with pytest.raises(AssertionError, match=r"should learn at 0\.001"):
        plan.check_optimizer([{"params": trained, "lr": 1e-4}], model)
    stray = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(AssertionError, match="not the model's"):
        plan.check_optimizer([{"params": [*trained, stray], "lr": 1e-3}], model)


def test_the_table_counts_every_parameter_once(model):
    plan, wrapped = FreezePlan({"projector": 1e-3}, adapter_rate=2e-4), adapted(model)
    plan.apply(wrapped)
    rows = {row.part: row for row in plan.rows(wrapped)}
    assert sum(r.total + r.adapted for r in rows.values()) == sum(p.numel() for p in wrapped.parameters())
    assert rows["projector"].trained == rows["projector"].total == 8 * 8 + 8
    assert rows["language_model"].trained == 0
    assert rows["language_model"].adapted == sum(p.numel() for n, p in wrapped.named_parameters() if is_adapter(n))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(plan.table(wrapped))
    text = console.export_text()
    for word in ("vision_tower", "frozen", "0.001", "0.0002", "float32"):
        assert word in text
