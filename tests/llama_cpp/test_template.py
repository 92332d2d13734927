"""A template reads llama.cpp's messages as it reads ours, and Ollama's template writes the same around the texts."""

from __future__ import annotations

import jinja2
import pytest

from support.paths import ROOT
from vlm_sft.llama_cpp.template import for_llama_cpp

MARK = "<__media_aB3__>"
TEMPLATES = ["vicuna_v1", "chatml", "ziya", "minigpt4", "llava_llama_2", "mistral", "plain"]
IMAGE, MEDIA = {"type": "image"}, {"type": "media_marker", "text": MARK}
TEXT = {"type": "text", "text": "What is this? 这是什么？"}


def rendered(source, messages, **values):
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    source = source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    source = source.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    return environment.from_string(source).render(
        messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>", **values
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_of_llama_cpp_are_read_as_ours(name):
    source = (ROOT / "chat_templates" / f"{name}.jinja").read_text()
    wanted = rendered(source, [{"role": "user", "content": [IMAGE, TEXT]}], image_token=MARK)
    assert MARK in wanted
    for content in (MARK + TEXT["text"], [MEDIA, TEXT]):
        assert rendered(for_llama_cpp(source), [{"role": "user", "content": content}]) == wanted
    if name == "plain":
        return
    talk = [("user", "a"), ("assistant", "b"), ("user", "c")]
    ours = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in talk]
    theirs = [{"role": role, "content": text} for role, text in talk]
    assert rendered(for_llama_cpp(source), theirs) == rendered(source, ours)
