"""One answer as it is written: pieces that are never taken back, and a thread that ends."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft.inference.generation import answer, cut_at
from vlm_sft.inference.streaming import hold_back, stream_answer

SHORT = {"max_new_tokens": 16}


def test_streamed_pieces_joined_are_the_answer(tiny, ask):
    for row in (ask("这是什么？"), ask("what is this?", 2), ask("hi", 0)):
        pieces = list(stream_answer(*tiny, row["messages"], row["images"], **SHORT))
        assert len(pieces) > 1 and all(pieces)
        assert "".join(pieces) == answer(*tiny, [row], **SHORT)[0]


def test_chinese_is_streamed_in_whole_characters(tiny, ask, script):
    model, processor = tiny
    script(model, processor.tokenizer, "左上角是红色的3，🙂</s>")
    pieces = list(stream_answer(model, processor, **ask("这是什么？")))
    assert "".join(pieces) == "左上角是红色的3，🙂" and len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)


def test_beams_are_not_streamed_but_answered(tiny, ask):
    row, options = ask("这是什么？"), {**SHORT, "num_beams": 2}
    assert list(stream_answer(*tiny, **row, **options)) == answer(*tiny, [row], **options)


MARKS = st.sampled_from(["</s>", "\n", "###", "<|im_end|>", ""])
PIECES = st.lists(
    st.one_of(st.text(max_size=6), st.sampled_from(["#", "##", "###", "</", "s>", "\n", " ", "<|im", "_end|>", "猫"])),
    max_size=12,
)


@given(pieces=PIECES, mark=MARKS)
def test_nothing_of_the_mark_or_after_it_is_let_through(pieces, mark):
    shown = list(hold_back(pieces, mark))
    assert all(shown)
    assert "".join(shown) == cut_at("".join(pieces), mark)
    assert not mark or mark not in "".join(shown)


@given(pieces=PIECES, mark=MARKS)
def test_what_is_shown_is_never_taken_back(pieces, mark):
    shown = ""
    for piece in hold_back(pieces, mark):
        shown += piece
        assert cut_at("".join(pieces), mark).startswith(shown)


def test_a_closed_stream_stops_the_model(tiny, ask, script):
    steps = script(tiny[0], tiny[1].tokenizer, "an answer without an end")
    before = threading.active_count()
    stream = stream_answer(*tiny, **ask("hi"), max_new_tokens=450)
    assert len(list(itertools.islice(stream, 2))) == 2
    stream.close()
    assert threading.active_count() == before and len(steps) < 450


def test_what_goes_wrong_in_the_model_is_raised_here(tiny, ask, monkeypatch):
    def fail(hidden):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(tiny[0].lm_head, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        list(stream_answer(*tiny, **ask("hi")))
