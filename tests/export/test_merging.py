"""The steps between a bundle and what is written: a wrong merge is refused whatever type follows, so is such a type."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from transformers import LlamaConfig, LlamaForCausalLM

from vlm_sft.base.errors import UserError
from vlm_sft.export.merging import Comparison

IDS = torch.arange(3, 19)[None]


@pytest.fixture(params=[2, 12])
def model(request):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=request.param, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.08,
    )  # fmt: skip
    made = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 1e-3)
    return made


def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_merge_passes_and_its_weights_are_rounded_in_fp32(model, dtype):
    comparison = Comparison(model, logits)
    merged = comparison.merge(model)
    after = comparison.round(merged, dtype)
    assert "lora_" not in str(list(merged.state_dict())) and comparison.found["merge_difference"] < 1e-5
    assert all(p.dtype == torch.float32 and torch.equal(p, p.to(dtype).float()) for p in merged.parameters())
    torch.testing.assert_close(after, logits(merged), atol=0, rtol=0)
    assert ("type_difference" in comparison.found) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("factor", [1.03, 0.0])
def test_a_merge_by_another_alpha_is_refused_before_anything_is_written(model, factor, monkeypatch):
    comparison, right = Comparison(model, logits), Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: right(self, name) * factor)
    with pytest.raises(UserError, match=r"Merging LoRA gives another model.* adapter acts .* (more|less) \(allowed"):
        comparison.merge(model)


def test_a_layer_that_is_left_out_is_refused(model, monkeypatch):
    comparison = Comparison(model, logits)
    last = [module for module in model.modules() if isinstance(module, Linear)][-1]
    monkeypatch.setattr(last, "merge", lambda *args, **options: None)
    with pytest.raises(UserError, match="Merging LoRA gives another model, which is not written: its logits differ"):
        comparison.merge(model)


def test_weights_that_overflow_in_the_type_are_refused(model):
    merged = model.merge_and_unload()
    with torch.no_grad():
        merged.lm_head.weight[5] *= 1e7
    comparison = Comparison(merged, logits)
    with pytest.raises(UserError, match=r"Writing in float16 gives another model.*not all of them are numbers"):
        comparison.round(merged, torch.float16)
