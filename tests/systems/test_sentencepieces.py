"""A table of replacements is walked through before a library that believes it is."""

from __future__ import annotations

import base64
import random
import struct

import pytest
from tokenizers import normalizers
from transformers.convert_slow_tokenizer import import_protobuf

from support.ice_text import ice_text
from vlm_sft.systems.sentencepieces import is_sound, longest_of, read_pieces, table_of

TEXTS = ["Ａ ① ½ é 这是 №\t x", "".join(map(chr, range(1, 600))), "한국어 ｶﾞ ﷺ 🐱"]


@pytest.fixture(scope="module")
def table():
    """Sentencepiece's own, as most published tokenizers have it."""
    return bytes(import_protobuf().ModelProto.FromString(ice_text()).normalizer_spec.precompiled_charsmap)


def test_the_published_table_is_sound_and_grows_by_eighteen(table):
    assert is_sound(table) and 18 <= longest_of(table) < 64
    encoded = base64.b64encode(table).decode()
    assert table_of(encoded) == table_of(table) == table and table_of(None) == b"" and longest_of(None) == 1


def test_a_changed_table_is_refused_or_read_without_an_end_of_the_process(table):
    rng, refused = random.Random(0), 0
    end = 4 + int.from_bytes(table[:4], "little")
    for _ in range(60):
        changed = bytearray(table)
        for _ in range(rng.choice([1, 1, 20])):
            place = rng.choice([rng.randrange(4, end), rng.randrange(4, 1028), rng.randrange(end, len(table))])
            changed[place] = rng.randrange(256)
        if not is_sound(bytes(changed)):
            refused += 1
            continue
        try:
            made = normalizers.Precompiled(bytes(changed))
        except Exception:
            continue  # no text behind the trie: said when the tokenizer is read
        for text in TEXTS:
            made.normalize_str(text)
    assert 3 < refused < 60


@pytest.mark.parametrize(
    "table",
    [b"\1", b"\0" * 4, bytes(100), struct.pack("<I", 8) + b"\xff" * 8 + b"a\0", struct.pack("<I", 2**31) + b"x",
     struct.pack("<I", 7) + b"abcdefg\0", struct.pack("<I", 4) + bytes(4)],
    ids=range(7),
)  # fmt: skip
def test_what_is_no_table_is_not_sound(table):
    assert not is_sound(table)


def test_what_is_no_file_of_sentencepiece_is_none():
    assert read_pieces(b"aGk= 1\naGo= 2\n") is None and read_pieces(b"") is None
    assert len(read_pieces(ice_text()).pieces) > 100
