"""transformers' own processors make of a conversation the tokens and pixels that ours makes."""

from __future__ import annotations

import pytest
from transformers import LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils.chat_template_utils import render_jinja_template

from support.bundles import BLIP2, LLAVA, MESSAGES
from vlm_sft.export.check import inputs_of, noise_picture
from vlm_sft.export.native_processor import native_processor, native_template, question_template
from vlm_sft.stack.build_stack import build_stack

CASES = {
    "LLaVA": LLAVA,
    "LLaVA, every token": {**LLAVA, "vision": {"feature_layer": -2}},
    "LLaVA, padded to a square": {**LLAVA, "vision": {**LLAVA["vision"], "pad_to_square": True}},
    "BLIP-2": BLIP2,
    "BLIP-2, a template that writes BOS": {**BLIP2, "chat_template": "blip2_vqa"},
    "a system text": {**LLAVA, "system": "It's 简短."},
}


def rendered(template: str, messages: list, **more) -> str:
    """As transformers renders a template."""
    (text,), _ = render_jinja_template([messages], chat_template=template, bos_token="<s>", eos_token="</s>", **more)
    return text


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_pixels_are_those_of_our_processor(case, bundle_recipe):
    built, picture = build_stack(bundle_recipe(**CASES[case])), noise_picture()
    wanted = built.processor.encode_chat(MESSAGES, True, [picture.size]).input_ids
    pixels = built.processor.image_inputs([picture], built.processor.instructions(MESSAGES))["pixel_values"]
    native = native_processor(built.model, built.processor)
    assert type(native) is LlavaProcessor
    assert (type(native.image_processor) is LlavaImageProcessorPil) == (case == "LLaVA, padded to a square")
    _, inputs = inputs_of(native, MESSAGES, [picture])
    assert inputs["input_ids"][0].tolist() == wanted and "这" in native.decode(wanted)
    assert (inputs["pixel_values"] - pixels).abs().max() <= 1e-3


def test_a_system_text_with_quotes_survives_in_the_template(bundle_recipe):
    stack = build_stack(bundle_recipe(**{**LLAVA, "system": 'It\'s "short" \\ 简短 {{ x }}'}))
    text = rendered(native_template(stack.processor), MESSAGES)
    assert text.removeprefix("<s>") == stack.processor.render(MESSAGES).text


def test_instructblip_is_given_the_question_alone(bundle_recipe):
    template = question_template(build_stack(bundle_recipe(**{**BLIP2, "chat_template": "instructblip"})).processor)
    assert rendered(template, MESSAGES, add_generation_prompt=True).strip() == "这是什么？ What?"
    answered = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "一只猫"}]}]
    for messages in (answered, [{"role": "system", "content": "Be short."}]):
        with pytest.raises(Exception, match="InstructBLIP is asked one question"):
            rendered(template, messages)
