"""The card of an export: how to ask it, in words that run, and what of the bundle went into it."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

from vlm_sft.export.export import write_export_card

FOUND = {
    "to": "transformers", "form": "llava", "class": "LlavaForConditionalGeneration", "dtype": "bfloat16",
    "quantised_in_training": False, "chats": True, "positions": 87, "max_difference": 2.5e-7, "tolerance": 0.0123,
    "pixels": 0.0,
}  # fmt: skip


@pytest.fixture
def card(tmp_path):
    """Writes the card of an export; keyword arguments replace what `export` found. Returns its head and its text."""

    def write(adapter=True, kept=False, **found):
        bundle, out = tmp_path / "ziya_stage2", tmp_path / "中文 export"
        for folder in (bundle, out / "adapter" if kept else out):
            folder.mkdir(parents=True, exist_ok=True)
        piece = {"pretrained": "Salesforce/blip2-opt-2.7b", "revision": None, "fingerprint": "abc"}
        own = {"pretrained": "/home/me/ziya-13b", "path": "/home/me/ziya-13b", "revision": None, "fingerprint": "def"}
        pieces = {"vision_tower": piece, "language_model": own}
        manifest = {"format": 1, "pieces": pieces, "adapter": adapter}
        (bundle / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
        read = ModelCard(write_export_card(out, bundle, {**FOUND, **found}).read_text(encoding="utf-8"))
        assert str(tmp_path) not in read.content and "/home/me" not in read.content
        return read.data.to_dict(), read.text

    return write


def program(text: str) -> str:
    """The Python that a card shows, which must at least be Python."""
    found = text.split("```python\n")[1].split("```")[0]
    compile(found, "card", "exec")
    return found


def test_head_and_sentences_say_what_it_is(card):
    head, text = card()
    assert head == {
        "pipeline_tag": "image-text-to-text", "library_name": "transformers", "tags": ["vlm_sft"],
        "base_model": ["Salesforce/blip2-opt-2.7b"], "base_model_relation": "finetune",
    }  # fmt: skip
    sentence = (
        "A `LlavaForConditionalGeneration` of transformers, exported from the bundle `ziya_stage2` of `vlm_sft` (LoRA "
        "merged; weights in bfloat16; names as transformers has them).\n\n"
    )
    assert text.startswith(f"\n# 中文 export\n\n{sentence}") and "| language_model | `ziya-13b` | – | `def` |" in text
    assert "87 positions differ" in text and "at most 2.5e-07 (allowed 0.012)" in text


@pytest.mark.parametrize(("adapter", "kept", "words"), [(False, False, "(no LoRA;"), (True, True, "`adapter/`, unm")])
def test_it_says_where_lora_is(card, adapter, kept, words):
    _, text = card(adapter=adapter, kept=kept)
    assert words in text
    assert ('PeftModel.from_pretrained(asker.model, "中文 export/adapter")' in program(text)) == kept


def test_it_says_that_training_saw_fewer_bits(card):
    assert "Training saw the base in fewer bits; here it is in full.\n" in card(quantised_in_training=True)[1]


@pytest.mark.parametrize(
    ("form", "call"),
    [
        ("llava", "asker(messages, return_full_text=False)"),
        ("blip-2", "asker(messages, return_full_text=False, max_new_tokens=64)"),
        ("instructblip", 'asker(images="photo.jpg", text="What is this?", return_full_text=False, max_new_tokens=64)'),
    ],
)
def test_each_form_is_asked_as_its_pipeline_takes_it(card, form, call):
    asked = program(card(form=form, chats=form != "instructblip")[1])
    assert f"print({call}[0]" in asked and ("messages = [" in asked) == ("messages" in call)


@pytest.mark.parametrize("kept", [False, True])
def test_a_processor_without_conversations_is_asked_through_its_tokenizer(card, kept):
    asked = program(card(form="family", chats=False, kept=kept)[1])
    assert "processor.tokenizer.apply_chat_template(messages" in asked and "pipeline" not in asked
    assert ("model = PeftModel.from_pretrained(model" in asked) == kept


def test_vllm_is_asked_over_http(card):
    _, text = card(to="vllm")
    assert "```\nvllm serve 中文 export\n```" in text and "```python" not in text
