"""How likely a model finds an answer: what its loss says, and nothing of what stands before."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from support.benchmark_files import png
from vlm_sft.base.errors import UserError
from vlm_sft.inference.generation import answer
from vlm_sft.inference.likelihood import likelihoods
from vlm_sft.stack.build_stack import build_stack


def row(*texts, number=0):
    roles = ("user", "assistant") * len(texts)
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]} for role, text in zip(roles, texts, strict=False)
    ]
    messages[0]["content"].insert(0, {"type": "image"})
    return {"messages": messages, "images": [{"path": None, "bytes": png(number)}], "id": str(number)}


@pytest.fixture
def stack(bundle_recipe):
    built = build_stack(bundle_recipe(chat_template="ziya"))
    built.model.eval()
    return built


def test_it_is_the_loss_of_the_answer_whatever_is_beside_it_in_the_batch(stack):
    rows = [row("这是什么？", "猫"), row("what is it, and why?", "a dog", number=1)]
    both = likelihoods(stack.model, stack.processor, rows)
    alone = [likelihoods(stack.model, stack.processor, [one])[0] for one in rows]
    for one, other in zip(both, alone, strict=True):
        assert one.tokens == other.tokens and one.logs == pytest.approx(other.logs, abs=1e-4)
    assert both[1].log == pytest.approx(sum(both[1].logs)) and "".join(both[1].tokens).startswith("a dog")
    chat = stack.processor.encode_chat(rows[1]["messages"])
    batch = stack.processor.batch([chat]) | stack.processor.image_inputs(
        [stack_image(1)], stack.processor.instructions(rows[1]["messages"])
    )
    loss = stack.model(**batch).loss
    assert float(loss) == pytest.approx(-both[1].log / len(both[1].logs), abs=1e-4)


def stack_image(number):
    return Image.open(io.BytesIO(png(number))).convert("RGB")


def test_what_the_model_says_is_likelier_than_anything_else(stack):
    asked = row("这是什么？")
    said = answer(stack.model, stack.processor, [asked], max_new_tokens=1)[0]
    first = [likelihoods(stack.model, stack.processor, [row("这是什么？", text)])[0] for text in (said, "z", "猫")]
    assert first[0].logs[0] == max(one.logs[0] for one in first)
    assert not any(one.greedy for one in first[1:])


def test_what_the_model_would_write_to_the_end_is_greedy(stack, monkeypatch):
    given = row("这是什么？", "a dog")
    wanted = [label for label in stack.processor.encode_chat(given["messages"]).labels if label >= 0]
    size = stack.model.lm_head.weight.shape[0]
    monkeypatch.setattr(stack.model.lm_head, "forward", lambda hidden: torch.eye(size)[torch.tensor(wanted)])
    assert likelihoods(stack.model, stack.processor, [given])[0].greedy
    monkeypatch.undo()
    assert not likelihoods(stack.model, stack.processor, [given])[0].greedy


def test_earlier_answers_do_not_count(stack):
    whole = likelihoods(stack.model, stack.processor, [row("一", "two", "三", "four")])[0]
    assert "".join(whole.tokens).startswith("four") and "two" not in "".join(whole.tokens)
    assert likelihoods(stack.model, stack.processor, []) == []


def test_what_the_model_cannot_read_is_refused(stack):
    with pytest.raises(UserError, match="reads at most 512"):
        likelihoods(stack.model, stack.processor, [row("x" * 600, "y")])
