"""What a run computes in: silence, what a device cannot do, fp32 resamplers, and towers that overflow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig, LlamaConfig, SiglipVisionConfig

from vlm_sft import build_stack
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.manifest import Provenance
from vlm_sft.bundle.save import save_bundle
from vlm_sft.model.configuration import VLMConfig
from vlm_sft.model.modeling import VLMModel
from vlm_sft.recipe.libraries import build_sft_config, computes_in, settle_precision
from vlm_sft.recipe.yaml_file import YamlFile
from vlm_sft.stack.precision import dtype_of
from vlm_sft.systems.mplug_owl import MPLUGOwlAbstractorConfig
from vlm_sft.systems.qwen_vl import QwenVLResamplerConfig

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


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
         "encoder_hidden_size": 24}  # fmt: skip
RESAMPLERS = {
    "qformer": Blip2QFormerConfig(**SIZES),
    "instruct_qformer": InstructBlipQFormerConfig(**SIZES, vocab_size=50),
    "abstractor": MPLUGOwlAbstractorConfig(**{**SIZES, "hidden_size": 24}),
    "cross_attention": QwenVLResamplerConfig(hidden_size=16, num_attention_heads=2, encoder_hidden_size=24),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", RESAMPLERS)
def test_a_resampler_computes_in_fp32_under_autocast_too(kind, dtype):
    torch.manual_seed(0)
    vision = SiglipVisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                              image_size=28, patch_size=7)  # fmt: skip
    text = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = VLMConfig(vision_config=vision, text_config=text, resampler_type=kind, resampler_config=RESAMPLERS[kind],
                       num_query_tokens=4)  # fmt: skip
    model = VLMModel(config).eval()
    model.vision_tower.to(dtype)
    pixels, words = torch.randn(2, 3, 28, 28), {"qformer_input_ids": torch.tensor([[1, 2], [3, 4]])}
    features = model.vision_tower(pixels.to(dtype)).last_hidden_state
    wanted = model.resampler(features, **(words if kind == "instruct_qformer" else {}))
    model.vision_tower.forward = lambda *args, **kwargs: SimpleNamespace(last_hidden_state=features)
    with torch.autocast("cpu", dtype):
        under = model.encode_images(pixels, **words)
    assert under.dtype == dtype and torch.equal(under, wanted)


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
