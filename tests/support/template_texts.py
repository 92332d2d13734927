"""Conversations as chat templates are given them, and the sentence with which a template is refused."""

from __future__ import annotations

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.templates.render import render
from vlm_sft.templates.template import load_template

IMAGE = {"type": "image"}

# What each template puts in the loss around an answer, with eos_token="</s>".
AROUND = {
    "blip2_caption": ("", "\n"),
    "blip2_vqa": (" ", "\n"),
    "blip2_flant5_vqa": ("", "</s>"),
    "flant5": ("", "</s>"),
    "chatml": ("", "<|im_end|>"),
    "instructblip": (" ", "</s>"),
    "llava_llama_2": (" ", " </s>"),
    "minigpt4": (" ", "###"),
    "mistral": (" ", "</s>"),
    "plain": ("", "\n"),
    "vicuna_v1": (" ", "</s>"),
    "fuyu": ("", "</s>"),
    "aya_vision": ("", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "deepseek_vl": (" ", "</s>"),
    "gemma3": ("", "<end_of_turn>"),
    "gemma4": ("", "<turn|>"),
    "glm46v": ("\n", "<|user|>"),
    "glm4v": ("\n", "<|user|>"),
    "internvl": ("", "<|im_end|>"),
    "kosmos2": (" ", "</s>"),
    "ovis2": ("", "<|im_end|>"),
    "paligemma": ("", "</s>"),
    "qwen2_5_vl": ("", "<|im_end|>"),
    "qwen3_5": ("", "<|im_end|>"),
    "qwen3_vl": ("", "<|im_end|>"),
    "smolvlm": (" ", "<end_of_utterance>"),
    "granite_vision": ("", "<|end_of_text|>"),
    "granite4": ("", "<|end_of_text|>"),
    "aria": ("", "<|im_end|>"),
    "janus": (" ", "</s>"),
    "vipllava": (" ", "</s>"),
    "exaone4_5": ("", "<|endofturn|>"),
    "paddleocr_vl": (" ", "</s>"),
    "lighton_ocr": ("", "<|im_end|>"),
    "ernie4_5_vl": ("", "<|end_of_sentence|>"),
    "minicpm_v_4_6": ("", "<|im_end|>"),
    "hunyuan_vl": ("", "<｜hy_Assistant｜>"),
    "idefics2": (" ", "<end_of_utterance>"),
    "mllama": ("", "<|eot_id|>"),
    "yi_vl": (" ", "\n###"),
    "got_ocr2": ("", "<|im_end|>"),
    "deepseek_ocr2": ("", "</s>"),
    "mistral3": ("", "</s>"),
    "lfm2_vl": ("", "<|im_end|>"),
    "kimi_k25": ("", "<|im_end|>"),
    "molmo2": ("", "<|im_end|>"),
    "llama4": ("", "<|eot|>"),
    "cohere2_vision": ("", "<|END_OF_TURN_TOKEN|>"),
    "perception_lm": ("", "<|eot_id|>"),
    "visualglm": (" ", "</s>"),
    "ziya": ("", "</s>"),
}

# Read in both directions up to the answer: earlier answers are part of its prompt.
LAST_ALONE = {"blip2_flant5_vqa", "flant5", "visualglm"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, str] | str) -> dict:
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in parts]}


def assistant(words: str) -> dict:
    return {"role": "assistant", "content": words}


ENGLISH = [user(IMAGE, "What animal is this?"), assistant("A cat."), user("What colour?"), assistant("Black.")]
CHINESE = [user(IMAGE, "这是什么动物？"), assistant("一只猫。"), user("什么颜色？"), assistant("黑色。")]


def refusal(template, messages=None, **options) -> str:
    """The message of the refusal by `load_template`, or by `render` where messages are given."""
    with pytest.raises(UserError) as caught:
        load_template(template) if messages is None else render(messages, template, **options)
    return str(caught.value)
