"""The numbers are those of the language model itself, with and without what was trained into it."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from support.bundles import move
from vlm_sft.base.errors import UserError
from vlm_sft.forgetting.state import measure, without_adapter
from vlm_sft.forgetting.texts import Asked, TextSet

TEXTS = TextSet("own", "m", {"en": ["a red bus", "two dogs</s> run"], "zh": ["一只猫"]}, [Asked("2+2?", ("4",))])


def by_hand(pieces, processor, texts):
    """Mean loss of texts by transformers' own model."""
    model = LlamaForCausalLM.from_pretrained(pieces["llama"]).eval()
    losses = []
    for text in texts:
        ids = torch.tensor([processor.tokenizer(text, split_special_tokens=True)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        losses += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    return sum(losses) / len(losses)


def test_perplexity_is_that_of_the_language_model_alone(make_trainer, pieces):
    trainer = make_trainer(chat_template="ziya")
    found = measure(trainer.model.eval(), trainer.processing_class, TEXTS)
    for language, texts in TEXTS.texts.items():
        wanted = math.exp(by_hand(pieces, trainer.processing_class, texts))
        assert found["perplexity"][language] == pytest.approx(wanted, rel=1e-4)
    every = [text for texts in TEXTS.texts.values() for text in texts]
    assert found["loss"] == pytest.approx(by_hand(pieces, trainer.processing_class, every), rel=1e-5)
    assert len(found["answers"]) == 1 and found["texts"] == "m"
    end = trainer.processing_class.tokenizer.eos_token_id
    ids = trainer.processing_class.tokenizer("two dogs</s> run", split_special_tokens=True)["input_ids"]
    assert end not in ids, "what looks like a control token in a text is text"


def test_without_its_adapter_a_model_is_what_it_was(make_trainer):
    trainer = make_trainer(lora={"r": 2}, chat_template="ziya")
    model = trainer.model.eval()
    before = measure(model, trainer.processing_class, TEXTS, answers=False)
    move(model)
    after = measure(model, trainer.processing_class, TEXTS, answers=False)
    with without_adapter(model):
        again = measure(model, trainer.processing_class, TEXTS, answers=False)
    assert again == before != after and before["answers"] is None


def test_a_template_without_words_is_asked_nothing(make_trainer):
    trainer = make_trainer(chat_template="plain")
    assert measure(trainer.model.eval(), trainer.processing_class, TEXTS)["answers"] is None


def test_texts_of_one_token_cannot_be_measured(make_trainer):
    trainer = make_trainer()
    with pytest.raises(UserError, match="needs two tokens"):
        measure(trainer.model.eval(), trainer.processing_class, TextSet("own", "m", {"en": [""]}))
