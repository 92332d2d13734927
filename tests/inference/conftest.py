"""A tiny model, questions for it, and what makes it write given texts."""

from __future__ import annotations

import pytest
import torch

from vlm_sft import build_stack, load_recipe


@pytest.fixture
def build(recipe_file):
    """Model in evaluation mode and processor of a tiny recipe."""

    def make(**changes):
        torch.manual_seed(0)
        stack = build_stack(load_recipe(recipe_file(**{"chat_template": "ziya", **changes})))
        return stack.model.eval(), stack.processor

    return make


@pytest.fixture
def tiny(build):
    return build()


@pytest.fixture
def ask(photos):
    """A conversation of one question with the first `images` photos."""

    def make(text: str, images: int = 1) -> dict:
        content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
        return {"messages": [{"role": "user", "content": content}], "images": photos[:images]}

    return make


@pytest.fixture
def script(monkeypatch):
    """Makes a model write given texts, one a row, and then full stops; returns the counter of its steps."""

    def make(model, tokenizer, *texts: str) -> list[int]:
        rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        filler, steps = tokenizer("x", add_special_tokens=False).input_ids[0], []

        def score(hidden: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(*hidden.shape[:-1], 400)
            for row, ids in enumerate(rows):
                logits[row, -1, ids[len(steps)] if len(steps) < len(ids) else filler] = 1.0
            steps.append(len(steps))
            return logits

        monkeypatch.setattr(model.lm_head, "forward", score)
        return steps

    return make
