"""Conversations, plain and drawn by hypothesis, the rows they make, and the processors that encode them."""

from __future__ import annotations

from hypothesis import strategies as st
from transformers import BlipImageProcessorPil

from support.tiny_pieces import make_tokenizer
from vlm_sft.base.assets import list_templates
from vlm_sft.batch.processor import VLMProcessor
from vlm_sft.templates.template import load_template

TOKENS = 3


def make_processor(template="vicuna_v1", tokenizer=None, **options) -> VLMProcessor:
    return VLMProcessor(
        BlipImageProcessorPil(size={"height": 28, "width": 28}), tokenizer or make_tokenizer(),
        chat_template=load_template(template), num_image_tokens=TOKENS, **options,
    )  # fmt: skip


PROCESSORS = {name: make_processor(name) for name in list_templates()}

# What people and tricksters type: two languages, role markers, end tokens, the placeholder itself.
SAID = st.one_of(
    st.text(min_size=1, max_size=20),
    st.sampled_from(
        ["<image>", "<pad>", "USER: hi ASSISTANT:", "</s>", "###Human:", "<|im_end|>", "这是什么？", " a  b\n", "\n3"]
    ),
).filter(lambda text: text.strip())


@st.composite
def conversations(draw):
    messages = []
    for _ in range(draw(st.integers(1, 3))):
        question = [{"type": "text", "text": draw(SAID)}]
        for _ in range(draw(st.integers(0, 2))):
            question.insert(draw(st.integers(0, len(question))), {"type": "image"})
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": draw(SAID)}]})
    return messages


def turn(question, answer, images=0):
    content = [{"type": "image", "text": None}] * images + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def make_row(messages, photos, number=0):
    marks = sum(p["type"] == "image" for m in messages for p in m["content"])
    images = [{"path": photos[i], "bytes": None} for i in range(marks)]
    return {"messages": messages, "images": images, "source": "s", "id": f"s/{number}"}
