"""The judge of logits: rounding passes and a mistake does not, at 2, 12 and 32 layers, in fp32 and in bf16."""

from __future__ import annotations

import contextlib
import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from vlm_sft.stack.judge import judge, layers_of, measure

DEPTHS = [2, 12, 32]
# How far LoRA has moved: its effect is a thousandth of the logits, and a fifth.
MOVED = [1e-4, 1e-2]
SIZES = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
         "num_key_value_heads": 1, "initializer_range": 0.08, "tie_word_embeddings": False}  # fmt: skip


def scaled(model, ids, largest=40.0):
    """The model with a head that makes logits as large as those of a trained one."""
    with torch.no_grad():
        model.lm_head.weight.mul_(largest / model(ids).logits.abs().max())
    return model.eval()


@pytest.fixture(scope="module", params=DEPTHS)
def adapted(request):
    """A random model with LoRA in every layer, and tokens."""
    torch.manual_seed(request.param)
    ids = torch.randint(3, 200, (2, 16))
    model = scaled(LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=request.param)).eval(), ids)
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets)).eval(), ids


def moved(model, size):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits.float()


def off(model, ids):
    with model.disable_adapter():
        return logits(model, ids)


@contextlib.contextmanager
def acting(model, factor, layer=""):
    """LoRA acts by another factor meanwhile, in all layers or in one."""
    found = [m for n, m in model.named_modules() if layer in n and isinstance(getattr(m, "scaling", None), dict)]
    before = [module.scaling for module in found]
    for module in found:
        module.scaling = {key: value * factor for key, value in module.scaling.items()}
    yield model
    for module, scaling in zip(found, before, strict=True):
        module.scaling = scaling


def merged(model):
    return copy.deepcopy(model).merge_and_unload()


@pytest.mark.parametrize("size", MOVED)
def test_in_fp32_a_right_merge_is_equal_and_a_wrong_one_is_not(adapted, size):
    model, ids = moved(adapted[0], size), adapted[1]
    layers, wanted, without = layers_of(model), logits(model, ids), off(model, ids)

    def found(other):
        return judge(measure(wanted, logits(other, ids), without), torch.float32, layers)

    assert found(merged(model))["equal"]
    for factor in (1.02, 0.97, 0.0):
        with acting(model, factor):
            wrong = found(model)
        assert not wrong["equal"] and "its adapter acts" in wrong["why"], factor
        assert (" more " if factor > 1 else " less ") in wrong["why"]
    for layer in (0, layers - 1):
        with acting(model, 0.0, f"layers.{layer}."):
            wrong = found(model)
        assert not wrong["equal"] and "its logits differ" in wrong["why"], layer
    assert found(model)["equal"] and found(model)["max_difference"] == 0.0


def test_in_bf16_other_kernels_are_equal_and_a_wrong_adapter_is_not(adapted):
    model = moved(copy.deepcopy(adapted[0]), 1e-2).to(torch.bfloat16)
    ids, layers = adapted[1], layers_of(adapted[0])
    wanted, without = logits(model, ids), off(model, ids)
    for factor in (1.1, 0.5, 0.0, 2.0):
        with acting(model, factor):
            wrong = judge(measure(wanted, logits(model, ids), without), torch.bfloat16, layers)
        assert not wrong["equal"], factor
    model.base_model.model.set_attn_implementation("eager")
    different = logits(model, ids)
    assert not torch.equal(different, wanted), "what is to be allowed"
    found = judge(measure(wanted, different, without), torch.bfloat16, layers)
    assert found["equal"] and found["max_difference"] > 1e-4, "more than any fixed number would allow"


def test_weights_in_bf16_are_told_from_a_wrong_merge_by_rounding_first(adapted):
    """What `export` compares: the same rounded weights, computed in fp32 on both sides."""
    model = moved(copy.deepcopy(adapted[0]), 1e-3)
    ids, layers, without = adapted[1], layers_of(adapted[0]), off(adapted[0], adapted[1])
    before = logits(model, ids)
    rounded = logits(merged(model).to(torch.bfloat16).float(), ids)
    cost = judge(measure(before, rounded), torch.bfloat16, layers)
    assert cost["equal"] and cost["max_difference"] > 1e-2
    assert not judge(measure(before, rounded), torch.float32, layers)["equal"]
    with acting(model, 0.0, f"layers.{layers - 1}."):
        missed = merged(model).to(torch.bfloat16).float()
    assert not judge(measure(rounded, logits(missed, ids), without), torch.float32, layers)["equal"]


@pytest.mark.parametrize("layers", DEPTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_experts_that_changed_places_are_found(layers, dtype):
    torch.manual_seed(0)
    ids = torch.randint(3, 200, (1, 16))
    config = MixtralConfig(**SIZES, num_hidden_layers=layers, num_local_experts=4, num_experts_per_tok=2)
    # Weights of the type, computed in fp32 on both sides, as `export` compares them.
    model = scaled(MixtralForCausalLM(config).eval(), ids).to(dtype).float()
    wrong = copy.deepcopy(model)
    experts = wrong.model.layers[layers // 2].mlp.experts
    with torch.no_grad():
        experts.down_proj[:2] = experts.down_proj[:2].flip(0)
    wanted = logits(model, ids)
    assert judge(measure(wanted, logits(copy.deepcopy(model), ids)), torch.float32, layers)["equal"]
    assert not judge(measure(wanted, logits(wrong, ids)), torch.float32, layers)["equal"]


def random_logits(largest=39.0):
    found = torch.randn(20, 500, generator=torch.Generator().manual_seed(0))
    return found / found.abs().max() * largest


def test_what_a_right_model_of_135m_parameters_gave_is_equal():
    wanted = random_logits()
    noise = torch.empty_like(wanted).uniform_(-2.8e-4, 2.8e-4, generator=torch.Generator().manual_seed(1))
    found = judge(measure(wanted, wanted + noise), torch.float32, 30)
    assert found["equal"] and 1e-4 < found["max_difference"] < found["tolerance"] < 2e-3
    small = judge(measure(wanted / 39, wanted / 39 + noise), torch.float32, 2)
    assert not small["equal"], "a tiny model with logits up to 1 has no room for that"
    assert small["tolerance"] < 2e-5 and "at logits up to 1, 2 layers and float32" in small["why"]


def test_each_number_that_is_too_large_is_named():
    wanted = random_logits()
    one = wanted.clone()
    one[3, 7] += 0.5
    assert "differ from theirs by 0.5 (allowed" in judge(measure(wanted, one), torch.float32, 2, "theirs")["why"]
    assert "in the root mean square" not in judge(measure(wanted, one), torch.bfloat16, 32).get("why", "")
    other = wanted + torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)) * 1.2
    why = judge(measure(wanted, other), torch.bfloat16, 2)["why"]
    assert "in the root mean square (allowed" in why and "its probabilities by a KL divergence of" in why
    flat = torch.zeros(4, 10)
    flat[:, 0] = 20.0
    turned = flat.clone()
    turned[0, :2] = turned[0, :2].flip(0)
    assert (
        "answers another token where the right one led by 20 " in judge(measure(flat, turned), torch.bfloat16, 2)["why"]
    )


def test_a_nearly_even_choice_may_fall_otherwise_and_the_number_of_those_is_told():
    wanted = torch.zeros(3, 8)
    wanted[:, 2], wanted[:, 5] = 10.0, 9.99
    found = wanted.clone()
    found[1, 5] = 10.01
    verdict = judge(measure(wanted, found), torch.bfloat16, 12)
    assert verdict["equal"] and verdict["changed"] == 1 and verdict["lead"] == pytest.approx(0.01, abs=1e-4)


def test_an_adapter_whose_effect_is_rounding_is_no_reason():
    wanted = random_logits()
    noise = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)) * 1e-5
    for without in (wanted, wanted + noise, wanted - noise):
        assert judge(measure(wanted, wanted + noise, without), torch.float32, 12)["equal"]


def test_words_that_are_never_said_and_rows_that_the_vocabulary_grew_by_do_not_count():
    wanted = random_logits()
    masked = torch.cat([wanted, torch.full((20, 1), torch.finfo(torch.float32).min)], 1)
    with_mark = measure(masked, torch.cat([masked, torch.ones(20, 3)], 1))
    assert with_mark["scale"] == pytest.approx(39.0) and with_mark["max_difference"] == 0.0
    masked[:, 0] = -math.inf
    assert judge(measure(masked, masked), torch.float32, 2)["equal"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_not_equal(value):
    wanted = random_logits()
    found = wanted.clone()
    found[0, 0] = value
    verdict = judge(json.loads(json.dumps(measure(wanted, found))), torch.bfloat16, 32)
    assert verdict["equal"] is False and "not all of them are numbers" in verdict["why"]


def test_the_depth_is_that_of_the_language_model():
    assert layers_of(LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=3))) == 3
    assert layers_of(torch.nn.Linear(1, 1)) == 1
