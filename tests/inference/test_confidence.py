"""How sure a model was of each token: what a forward pass over question and answer says of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.tiny_pieces import make_tokenizer
from vlm_sft.inference import generation
from vlm_sft.inference.confidence import Confidence, Said, pieces_of
from vlm_sft.inference.generation import answer, answer_each, new_tokens, prompt_batch

SHORT = {"max_new_tokens": 12}


def likelihood(model, processor, row, ids) -> float:
    """The log-probability of an answer by one forward pass."""
    batch = prompt_batch(processor, [row])
    start = batch["input_ids"].shape[1]
    batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([ids])], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with torch.inference_mode():
        logits = model(**batch).logits[0, start - 1 : -1].float()
    return float(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum())


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 3.0}])
def test_it_is_what_a_forward_pass_says(tiny, ask, options, monkeypatch):
    rows = [ask("这是什么？"), ask("describe these images, please", 3), ask("hi", 0)]
    written, checked = [], []
    monkeypatch.setattr(generation, "new_tokens", lambda *given: written.append(new_tokens(*given)) or written[-1])
    torch.manual_seed(3)
    said = answer(*tiny, rows, confidence=True, **SHORT, **options)
    torch.manual_seed(3)
    assert said == answer(*tiny, rows, **SHORT, **options), "looking on changes nothing"
    for row, each, ids in zip(rows, said, written[0].tolist(), strict=True):
        assert "".join(piece for piece, _ in each.confidence) == each
        whole = pieces_of("".join(map(str, ids)), ids, [1.0] * len(ids), lambda some: "".join(map(str, some)))
        assert len(whole) == len(ids) == SHORT["max_new_tokens"], "no end was written"
        if tiny[1].tokenizer.decode(ids) == each:  # no white space around it, which is no part of the answer
            found = sum(math.log(share) for _, share in each.confidence)
            checked.append(found == pytest.approx(likelihood(*tiny, row, ids), abs=1e-3))
    assert checked and all(checked)


def test_behind_its_end_an_answer_may_be_filled_with_a_token_that_the_head_does_not_know():
    looking = Confidence()
    looking.see(torch.zeros(2, 4))
    looking.take(torch.tensor([1, 4]))  # of four tokens there is none of number 4: a pad token that was added
    assert looking.probabilities()[0] == [pytest.approx(0.25)]


def test_a_scripted_answer_has_the_probabilities_of_its_logits(tiny, ask, script):
    model, processor = tiny
    script(model, processor.tokenizer, "猫 a</s>", "two dogs</s>")
    said = answer(model, processor, [ask("a"), ask("b")], confidence=True)
    one = math.e / (math.e + 399)
    count = len(processor.tokenizer("猫 a", add_special_tokens=False).input_ids)
    assert said == ["猫 a", "two dogs"]
    assert next(piece for piece, _ in said[0].confidence).strip() == "猫", "the bytes of a character are one piece"
    total = math.prod(share for _, share in said[0].confidence)
    assert total == pytest.approx(one**count, rel=1e-3)


def test_nobody_asked_and_beams_have_none(tiny, ask):
    assert answer(*tiny, [ask("hi")], **SHORT)[0].confidence is None
    assert answer(*tiny, [ask("hi")], confidence=True, num_beams=2, **SHORT)[0].confidence is None


def test_each_row_has_its_own_where_one_cannot_be_asked(tiny, ask, tmp_path):
    broken = {**ask("hi"), "images": [str(tmp_path / "none.png")]}
    good, bad = answer_each(*tiny, [ask("hi"), broken], confidence=True, **SHORT)
    assert isinstance(good, Said) and good.confidence and not isinstance(bad, Said)


TOKENIZER = make_tokenizer()
TEXTS = st.text(st.one_of(st.sampled_from("猫🙂é a\n"), st.characters(codec="utf-8")), max_size=12)


@given(text=TEXTS, cut=st.integers(0, 3))
def test_pieces_joined_are_the_answer(text, cut):
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    ids = ids[: len(ids) - cut] if cut else ids
    shares = [0.5] * len(ids)
    whole = TOKENIZER.decode(ids, clean_up_tokenization_spaces=False)
    pieces = pieces_of(
        whole.strip(), ids, shares, lambda some: TOKENIZER.decode(some, clean_up_tokenization_spaces=False)
    )
    assert "".join(piece for piece, _ in pieces) == whole.strip()
    assert math.prod(share for _, share in pieces) >= 0.5 ** len(ids)
