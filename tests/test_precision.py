"""What a run computes in: silence, what a device cannot do, the fp32 Q-Former, and towers that overflow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vlm_sft import build_stack
from vlm_sft.bundle import Provenance, save_bundle
from vlm_sft.configs import build_sft_config, computes_in, settle_precision
from vlm_sft.errors import UserError
from vlm_sft.stack import dtype_of
from vlm_sft.yaml_file import YamlFile

BF16 = "transformers.utils.is_torch_bf16_gpu_available"


@pytest.mark.parametrize(
    ("sft", "able", "name"),
    [
        ({"bf16": None}, False, "float32"),
        ({"bf16": None}, True, "bfloat16"),
        ({"bf16": None, "use_cpu": True}, True, "float32"),
        ({"bf16": False}, True, "float32"),
        ({"bf16": True}, False, "bfloat16"),
        ({"bf16": None, "fp16": True}, True, "float16"),
    ],
)
def test_silence_means_bf16_where_the_device_can(sft, able, name, stack_recipe, monkeypatch):
    monkeypatch.setattr(BF16, lambda: able)
    made = stack_recipe("blip2", resampler="blip2", sft=sft)
    assert computes_in(made) == name
    assert str(dtype_of(made, "language_model")) == str(dtype_of(made, "vision_tower")) == f"torch.{name}"
    assert dtype_of(stack_recipe("blip2", sft=sft, train={"language_model": 1e-4}), "language_model") == torch.float32


def test_a_silent_recipe_runs_on_a_cpu_and_its_bundle_says_in_what(stack_recipe, tmp_path):
    made = stack_recipe(sft={"bf16": None})
    assert build_sft_config(made).bf16 is False and "bf16" in settle_precision(made).sft
    stack = build_stack(made)
    save_bundle(tmp_path / "bundle", stack.model, stack.processor, stack.plan, Provenance(made, stack.pieces))
    assert YamlFile.read(tmp_path / "bundle" / "recipe.yaml").data["sft"]["bf16"] is False
    assert made.sft["bf16"] is None, "the recipe itself is as it was"


def test_bf16_that_was_asked_for_is_refused_in_one_sentence(stack_recipe):
    with pytest.raises(UserError, match=r"line \d+: .* cannot compute in bf16 or tf32; set sft\.bf16=false \(or leave"):
        build_sft_config(stack_recipe(sft={"bf16": True}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_qformer_computes_in_fp32_under_autocast_too(dtype, stack_recipe):
    resampler = build_stack(stack_recipe("blip2", resampler="blip2")).model.model.resampler.eval()
    features = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = resampler(features.float())
    with torch.autocast("cpu", dtype):
        under = resampler(features)
    assert under.dtype == dtype and torch.equal(under, wanted.to(dtype))
    assert torch.equal(resampler(features), wanted.to(dtype))


def test_layer_norms_of_half_precision_weights_compute_in_fp32():
    hidden = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).mul(300).add(1000).bfloat16()
    weight, bias = torch.rand(64).bfloat16(), torch.rand(64).bfloat16()
    exact = F.layer_norm(hidden.float(), (64,), weight.float(), bias.float())
    assert torch.equal(F.layer_norm(hidden, (64,), weight, bias), exact.bfloat16())


@pytest.mark.parametrize(
    ("tower", "sft", "vision", "warned"),
    [
        ("blip2", {"bf16": None, "fp16": True}, {}, True),
        ("blip2", {}, {"dtype": "float16"}, True),
        ("blip2", {"bf16": True}, {}, False),
        ("blip2", {}, {}, False),
        ("clip", {"bf16": None, "fp16": True}, {}, False),
    ],
)
def test_fp16_with_a_tower_known_to_overflow_is_said(tower, sft, vision, warned, stack_recipe):
    said: list[str] = []
    build_stack(stack_recipe(tower, sft=sft, vision=vision), said.append)
    found = [line for line in said if "known to overflow in fp16" in line]
    assert bool(found) == warned
    assert not found or ("LAVIS#267" in found[0] and "use sft.bf16=true" in found[0])
