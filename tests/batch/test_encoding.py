"""Ids and labels: no token across a border, what somebody typed is text, and rows of one length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.conversations import TOKENS, make_processor
from support.tiny_pieces import make_tokenizer
from vlm_sft.batch.encoding import EncodedChat, add_missing_tokens, first_id_of, pad


def joining_tokenizer(before=":"):
    """A tokenizer whose merges would join what stands before an answer with the answer's first letter."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("<human>:\n<bot>:catdog question?"))
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters, f"{before}c"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(before, "c")], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_no_token_lies_across_the_border_of_an_answer():
    processor = make_processor("ziya", joining_tokenizer())
    messages = [{"role": "user", "content": "question?"}, {"role": "assistant", "content": "cat"}]
    assert ":c" in processor.tokenizer.tokenize("<bot>:cat")
    chat = processor.encode_chat(messages)
    learned = processor.tokenizer.convert_ids_to_tokens([n for n in chat.labels if n != -100])
    assert learned == ["c", "a", "t", "</s>"]
    prompt = processor.encode_chat(messages[:1], add_generation_prompt=True)
    assert chat.input_ids[: len(prompt.input_ids)] == prompt.input_ids


def test_no_token_lies_across_the_border_of_two_answers():
    processor = make_processor("plain", joining_tokenizer("\n"))
    two = [{"role": "user", "content": "question?"}, {"role": "assistant", "content": "cat"}] * 2
    assert "\nc" in processor.tokenizer.tokenize("cat\ncat\n")
    first, both = processor.encode_chat(two[:2]), processor.encode_chat(two)
    assert both.input_ids[: len(first.input_ids)] == first.input_ids
    assert processor.tokenizer.convert_ids_to_tokens([n for n in both.labels if n != -100]) == [*"cat\ncat\n"]


def test_a_typed_pad_token_is_text_for_it_may_have_no_embedding():
    processor = make_processor()
    rows = len(make_tokenizer())
    chat = processor.encode_chat(
        [{"role": "user", "content": "what is <pad>?"}, {"role": "assistant", "content": "<pad> fills rows"}]
    )
    assert processor.tokenizer.pad_token_id >= rows > max(chat.input_ids)
    assert "<pad> fills rows" in processor.tokenizer.decode([n for n in chat.labels if n != -100])


@pytest.mark.parametrize("special", [True, False, None])
def test_a_typed_placeholder_is_text(special):
    """Also where the tokenizer has it already, special to it or not."""
    tokenizer = make_tokenizer()
    if special is not None:
        tokenizer.add_tokens(["<image>"], special_tokens=special)
    processor = make_processor(tokenizer=tokenizer)
    content = [{"type": "text", "text": "what does <image> mean?"}, {"type": "image"}]
    chat = processor.encode_chat(
        [{"role": "user", "content": content}, {"role": "assistant", "content": "<image> is a mark"}]
    )
    assert chat.input_ids.count(processor.image_token_id) == TOKENS
    assert processor.image_token_id not in chat.labels
    text = processor.tokenizer.decode([n for n in chat.labels if n != -100])
    assert "<image> is a mark" in text


def test_missing_tokens_are_added_and_told_and_pad_is_never_the_end():
    tokenizer = make_tokenizer()
    assert add_missing_tokens(tokenizer, "<image>") == ["<image>", "<pad>"]
    assert add_missing_tokens(tokenizer, "<image>") == []
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert "<pad>" in add_missing_tokens(tokenizer, "<image>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_first_id_is_asked_of_the_tokenizer_once():
    tokenizer = make_tokenizer()
    assert first_id_of(tokenizer) == 1
    tokenizer.backend_tokenizer.post_processor = None
    assert first_id_of(tokenizer) == 1, "it is remembered"
    assert first_id_of(make_tokenizer()) == 1


def test_tokens_without_labels_are_not_learned():
    chat = EncodedChat([], [], 1)
    chat.append(1)
    chat.append(5, learned=True)
    chat.extend([7, 7], place=True)
    chat.extend([8, 9], [-100, 9])
    assert chat == EncodedChat([1, 5, 7, 7, 8, 9], [-100, 5, -100, -100, -100, 9], 1, [0, 0, 1, 1, 0, 0])


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 2**40), max_size=9), min_size=1, max_size=5),
    more=st.integers(0, 3),
    fill=st.sampled_from([0, -100, 7]),
)
def test_rows_are_padded_as_nested_lists_would_be(rows, more, fill):
    length = max(map(len, rows)) + more
    right = [row + [fill] * (length - len(row)) for row in rows]
    left = [[fill] * (length - len(row)) + row for row in rows]
    assert torch.equal(pad(rows, length, fill), torch.tensor(right, dtype=torch.int64).view(len(rows), length))
    assert torch.equal(pad(rows, length, fill, "left"), torch.tensor(left, dtype=torch.int64).view(len(rows), length))
    weights = pad([[float(value) for value in row] for row in rows], length, 0.0)
    assert weights.dtype == torch.float32 and weights.shape == (len(rows), length)
