"""How well a tokenizer knows a language, for each way of not knowing it."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from support.tiny_pieces import make_tokenizer
from vlm_sft.batch.tokenizer_coverage import Coverage, coverage_of


def words(*known):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(("<unk>", *known))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def with_byte_fallback():
    """As LLaMA's: the letters of `a cat`, and 256 bytes for all else."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    vocabulary |= {letter: 257 + i for i, letter in enumerate("▁act")}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_a_language_the_tokenizer_knows():
    (found,) = coverage_of(["a cat", "two dogs"], words("a", "cat", "two", "dogs")).values()
    assert found == Coverage(answers=2, characters=13, tokens=4)
    assert found.tokens_per_character == pytest.approx(4 / 13) and found.problems() == []


def test_unknown_tokens():
    found = coverage_of(["a cat", "a dog"], words("a", "cat"))["en"]
    assert found.unknown == 1 and found.unknown_share == 0.25
    assert found.problems() == ["25.00% of the tokens are unknown (more than 0.1%)"]


def test_byte_fallback_of_one_language_alone():
    found = coverage_of(["a cat", "一只猫"], with_byte_fallback())
    assert list(found) == ["en", "zh"]
    assert found["en"].pieces == 0 and found["en"].tokens == 5
    assert (found["zh"].tokens, found["zh"].pieces, found["zh"].unknown) == (9, 9, 0)
    assert found["zh"].problems() == [
        "100% are parts of a character (more than 10%)",
        "a character takes 3.00 tokens (more than 1.2)",
    ]


def test_bytes_of_a_byte_level_vocabulary():
    tokenizer = make_tokenizer()
    found = coverage_of(["鑫森淼焱垚", "a cat"], tokenizer)
    assert found["zh"].tokens == found["zh"].pieces == 15, "three bytes each, and no token is a character"
    assert found["en"].pieces == 0


def test_a_character_known_whole_is_no_piece():
    found = Coverage()
    found.add("这是什么？", make_tokenizer())  # of which it was trained
    assert found.pieces < found.tokens


def test_nothing_is_no_problem():
    assert coverage_of([], make_tokenizer()) == {}
    assert Coverage().problems() == [] and Coverage().tokens_per_character == 0
