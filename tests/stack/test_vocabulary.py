"""Rows for new words: made where there is no spare one, started from their pieces, in tied and untied heads alike."""

from __future__ import annotations

import pytest
import torch

from support.tiny_pieces import make_tokenizer, sentencepieces, unigram
from vlm_sft.base.errors import UserError
from vlm_sft.batch.encoding import Word
from vlm_sft.stack.build_stack import build_empty_stack, build_stack
from vlm_sft.stack.vocabulary import add_words, make_room
from vlm_sft.templates.template import load_template

WORDS = {"lora": {"r": 2, "add_tokens": ["<defect>", "缺陷"]}}


@pytest.mark.parametrize(("lm", "tied"), [("llama", False), ("opt", True), ("gpt2", True)])
def test_each_word_starts_as_the_mean_of_its_pieces_and_no_other_row_changes(lm, tied, stack_recipe):
    plain = build_stack(stack_recipe(lm=lm)).model
    stack = build_stack(stack_recipe(lm=lm, **WORDS))
    table, head = stack.model.get_input_embeddings(), stack.model.get_output_embeddings()
    assert (head.weight is table.weight) == tied
    for ours, before in ((table, plain.get_input_embeddings()), (head, plain.get_output_embeddings())):
        rows = len(before.weight)
        assert ours.weight.shape[0] == rows + 2 == stack.model.config.get_text_config().vocab_size
        assert torch.equal(ours.weight[:rows], before.weight)
        for word in stack.processor.words:
            assert torch.allclose(ours.weight[word.id], before.weight[list(word.pieces)].mean(0))
    assert stack.processor.image_token_id >= rows + 2  # a placeholder needs no row
    empty = build_empty_stack(stack_recipe(lm=lm, **WORDS)).model
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in stack.model.named_parameters()}


def test_spare_rows_are_used_first(stack_recipe):
    model = build_stack(stack_recipe()).model
    rows = len(model.get_input_embeddings().weight)
    make_room(model, [Word("缺陷", rows - 1, (5, 6))])
    assert len(model.get_input_embeddings().weight) == rows and model.word_ids == [rows - 1]


def test_a_head_with_a_bias_is_refused(stack_recipe):
    """PEFT would leave the bias out of what it computes for the whole vocabulary."""
    model = build_stack(stack_recipe()).model
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(300))
    with pytest.raises(UserError, match=r"lora\.add_tokens: the head of this language model \(llama\) has a bias"):
        make_room(model, [Word("缺陷", 300, ())])


NEW = ["<defect>", "缺陷"]


@pytest.mark.parametrize("make", [make_tokenizer, sentencepieces, unigram])
def test_each_word_becomes_one_token_that_an_answer_keeps(make):
    tokenizer = make()
    before = [tokenizer(word, add_special_tokens=False).input_ids for word in NEW]
    words = add_words(tokenizer, NEW, load_template("plain"), ["<image>"])
    for text in ("a <defect> here", "这是缺陷，<defect>", "<defect><defect>缺陷"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert [ids.count(word.id) for word in words] == [text.count(word.text) for word in words]
        said = tokenizer.decode(ids, skip_special_tokens=True)
        assert said.replace(" ", "") == text.replace(" ", "")
    known = {tokenizer.unk_token_id, *tokenizer.all_special_ids}
    for word, cut in zip(words, before, strict=True):
        assert word.id not in cut and set(word.pieces) <= set(cut) - known
        assert len(word.pieces) >= len(set(cut) - known) - 1  # but for a mark of white space


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("a", "is one token of this tokenizer already; remove it"),
        ("</s>", "is one token of this tokenizer already"),
        (" 缺陷", "begins or ends with white space"),
        ("<image>", r"holds the control token '<image>'"),
        ("x</s>y", r"holds the control token '</s>', which is text where people write it"),
        ("ASSISTANT", r"stands in what the chat template writes \('ASSISTANT:'\)"),
    ],
)
def test_what_cannot_be_a_word(word, reason):
    with pytest.raises(UserError, match=rf"^lora\.add_tokens: .*{reason}"):
        add_words(make_tokenizer(), ["<defect>", word], load_template("vicuna_v1"), ["<image>"])


def test_a_word_named_twice():
    with pytest.raises(UserError, match="'缺陷' is named twice; once is enough"):
        add_words(make_tokenizer(), ["缺陷", "缺陷"], load_template("plain"))
