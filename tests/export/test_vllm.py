"""What vLLM takes of a composed stack, as its own classes and loader took it; the rest is refused."""

from __future__ import annotations

import json
import re

import pytest
from safetensors.torch import load_file
from transformers.utils.chat_template_utils import render_jinja_template

from support.bundles import BLIP2, LLAVA, MESSAGES
from support.paths import ROOT
from vlm_sft.base.errors import UserError
from vlm_sft.export.export import export
from vlm_sft.export.native_model import native_form, native_model
from vlm_sft.export.native_processor import native_template
from vlm_sft.export.vllm import check_stack, named_tensors, without_images
from vlm_sft.stack.build_stack import build_stack

# Names of exported tensors, numbers of layers left out, with which vLLM 0.33.0's classes built themselves from the
# exported config.json and filled all of their parameters.
LOADED = json.loads((ROOT / "tests" / "vllm_names.json").read_text(encoding="utf-8"))
VQA = {**BLIP2, "chat_template": "blip2_vqa"}
STACKS = {
    "LLaVA: CLIP, LLaMA": LLAVA,
    "LLaVA: SigLIP, LLaMA": {**LLAVA, "tower": "siglip", "vision": {"feature_layer": -2}},
    "LLaVA: CLIP, OPT": {**LLAVA, "lm": "opt"},
    "BLIP-2: OPT": {**VQA, "lm": "opt"},
    "BLIP-2: LLaMA": VQA,
}
REFUSED = {
    "tower": ({**LLAVA, "tower": "dino"}, "vLLM cannot take this bundle: its LLaVA has a CLIP or a SigLIP .* 'dinov2'"),
    "language model": ({**LLAVA, "lm": "gpt2"}, "GPT2LMHeadModel has them in a `transformer`; use --to transformers"),
    "language model of a BLIP-2": ({**VQA, "lm": "gpt2"}, "it looks for layers in a `model`, and GPT2LMHeadModel"),
    "tiles": (
        {**LLAVA, "chat_template": "mistral", "vision": {**LLAVA["vision"], "tiles": "anyres"}},
        "it cuts tiles, and what vLLM makes of them was never compared",
    ),
    "activation": ({**LLAVA, "projector": {"type": "mlp", "activation": "mish"}}, "no activation 'mish' for the proj"),
    "words before the image": (BLIP2, "vLLM puts the image of a BLIP-2 in front of the whole prompt"),
    "BOS before the image": ({**BLIP2, "chat_template": "plain"}, "do not begin with {{ image_token }}; use --to"),
}


@pytest.fixture
def build(bundle_recipe, more_pieces):
    """A stack by the names of its pieces, without LoRA."""

    def make(**stack):
        named = {key: more_pieces.get(stack[key], stack[key]) for key in ("tower", "lm") if key in stack}
        return build_stack(bundle_recipe(**{**stack, **named, "lora": None, "train": {"projector": 1e-3}}))

    return make


@pytest.mark.parametrize("case", STACKS)
def test_tensors_have_the_names_that_vllm_loaded(case, build):
    stack = build(**STACKS[case])
    check_stack(native_form(stack.model), stack.model, stack.processor)
    native = native_model(stack.model, stack.processor)
    assert sorted({re.sub(r"\.\d+\.", ".*.", name) for name in named_tensors(native)}) == LOADED[case]
    assert native.config.text_config.architectures and native.config.image_token_index is not None


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_cannot_take_is_refused_in_one_sentence(case, build):
    pieces, sentence = REFUSED[case]
    stack = build(**pieces)
    with pytest.raises(UserError, match=sentence):
        check_stack(native_form(stack.model), stack.model, stack.processor)


@pytest.mark.parametrize("template", ["blip2_vqa", "blip2_caption"])
def test_a_blip2s_prompt_leaves_the_placeholders_to_vllm(template, build):
    processor = build(**{**BLIP2, "chat_template": template}).processor
    (text,), _ = render_jinja_template(
        [MESSAGES], chat_template=without_images(native_template(processor)), add_generation_prompt=True,
        bos_token="<s>", eos_token="</s>", image_token="<image>",
    )  # fmt: skip
    assert "<image>" not in text and "<image>" + text == processor.render(MESSAGES, True).text


# Of vLLM 0.33.0 (4ba787ec9): the beginnings that `hf_to_vllm_mapper` of LlavaForConditionalGeneration gives names of a
# base and of an adapter, and the endings that `parse_fine_tuned_lora_name` takes.
MAPPER = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
ENDINGS = (".lora_A.weight", ".lora_B.weight")


@pytest.mark.slow
def test_an_unmerged_adapter_has_the_names_that_vllms_loader_maps_onto_the_base(bundle, tmp_path):
    out = tmp_path / "export"
    lora = {"r": 2, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"self_attn.v_proj": 16}}
    found = export(bundle(**{**LLAVA, "lora": lora}), out, "vllm", keep_adapter=True)  # base and adapter, through PEFT
    assert found["max_difference"] <= 1e-4 and found["rank"] == 3
    base = load_file(out / "model.safetensors")
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    layers = set()
    said = json.loads((out / "adapter" / "adapter_config.json").read_text())
    for name in adapter:
        assert name.startswith("base_model.model.") and name.endswith(ENDINGS), name
        name = name.removeprefix("base_model.model.")
        layer = name.split(".lora_")[0]
        # Its `PEFTHelper.get_rank_and_scaling`: a key matches the end of a layer's name from a dot on.
        ranks = [rank for key, rank in said["rank_pattern"].items() if re.match(rf"(.*\.)?({key})$", layer)]
        assert (ranks or [said["r"]])[0] in adapter[f"base_model.model.{name}"].shape
        old = next(old for old in MAPPER if name.startswith(old))
        layers.add((MAPPER[old] + name.removeprefix(old)).split(".lora_")[0])
    assert layers and all(f"{layer}.weight" in base for layer in layers)
    assert all(layer.startswith("language_model.model.layers.") for layer in layers)
    assert (said["r"], said["bias"], said["modules_to_save"], said["use_dora"]) == (2, "none", None, False)
    assert said["alpha_pattern"] == {"self_attn.v_proj": 16}
    card = (out / "README.md").read_text()
    assert "--enable-lora --max-lora-rank 3 --lora-modules adapter=" in card and "its LoRA lies in `adapter/`" in card


ADAPTERS = {
    "DoRA": ({"use_dora": True}, "its loader knows no DoRA"),
    "new tokens": ({"add_tokens": ["<loc>"]}, "its loader knows no rows of new tokens"),
    "the tower": ({"target_modules": r".*\.(q_proj|fc1)"}, "it puts LoRA into language models, and .*vision_tower"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_vllm_would_not_take_is_refused(case, bundle, tmp_path):
    options, sentence = ADAPTERS[case]
    with pytest.raises(UserError, match=f"vLLM cannot take this adapter unmerged: {sentence}"):
        export(bundle(**{**LLAVA, "lora": {"r": 2, **options}}), tmp_path / "x", "vllm", keep_adapter=True)
    assert not (tmp_path / "x").exists()


def test_an_adapter_of_a_blip2_is_not_kept_for_vllm(bundle, tmp_path):
    with pytest.raises(UserError, match="the names of a blip-2's layers were never compared"):
        export(bundle(**VQA), tmp_path / "x", "vllm", keep_adapter=True)
