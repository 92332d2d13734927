"""ChatGLM's tokenizer as a fast one: the ids, texts and places of upstream's, which asks sentencepiece."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from support.ice_text import CONTROL, ids_of, save_ice_text, text_of
from vlm_sft.base.errors import UserError
from vlm_sft.systems.chatglm_tokenizer import IMAGE_TOKENS, _text_of, read_tokenizer

KINDS = [{"kind": "unigram", "rule": "nmt_nfkc"}, {"kind": "bpe", "rule": "identity"}]
# No signs that join a letter (M): behind one that it rewrites, tokenizers drops them, which sentencepiece does not.
WRITTEN = st.one_of(
    st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "M"]), max_size=30),
    st.lists(st.sampled_from(["a", "red ", "这是", "猫", " ", "  ", "\n", "\t", "：", "Ａ", "é", "🐱", "<", "n>", "3"]),
             max_size=20).map("".join),
    st.sampled_from(["x" + " " * 81 + "y", "a" + "\n" * 5 + " b", "№ ½", "<|blank_2|", "</img>问：猫\n答："]),
)  # fmt: skip


def usual(text):
    """No piece of upstream's spelled out, and no white space in front, which a fast tokenizer takes for the mark."""
    spelled = any(
        piece in text for piece in ("<n>", "<|", "▁", "<pad>", "<unk>", "<s>", "</s>", "<0x", "<piece_", *CONTROL)
    )
    return not spelled and not unicodedata.normalize("NFKC", text).startswith(" ")


@pytest.fixture(scope="module", params=KINDS, ids=["unigram", "bpe"])
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ice")
    save_ice_text(folder, **request.param)
    return read_tokenizer(folder, "k"), request.param


def test_ids_and_texts_are_upstreams(both):
    tokenizer, kind = both

    @settings(max_examples=150, deadline=None)
    @given(WRITTEN.map(str.lstrip).filter(usual))
    def same(text):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == ids_of(text, **kind)
        assert tokenizer.decode(ids) == text_of(ids, **kind)

    same()


def test_tokens_lie_where_they_are_in_the_text(both):
    tokenizer, _ = both
    text = "这是  a red\n3：cat"
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    covered = [number for start, end in places[1:] for number in range(start, end)]  # the first may be the mark alone
    assert covered == sorted(set(covered)) and set(range(len(text))) - set(covered) <= {0, 1}
    assert {"  ", "\n"} <= {text[start:end] for start, end in places}


def test_control_tokens_have_their_ids_and_are_special(both):
    tokenizer, kind = both
    said = tokenizer("Q:[gMASK]<sop> 猫<eop>").input_ids
    wanted = {token: tokenizer.convert_tokens_to_ids(token) for token in CONTROL}
    assert all(tokenizer.added_tokens_decoder[number].special for number in wanted.values())
    assert said == [*ids_of("Q:", **kind), wanted["[gMASK]"], wanted["<sop>"], *ids_of("猫", **kind), wanted["<eop>"]]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<sop>", "<eop>", "<pad>")
    typed = tokenizer("<sop>", add_special_tokens=False, split_special_tokens=True).input_ids
    assert wanted["<sop>"] not in typed and tokenizer.decode(typed) == "<sop>"


def test_it_is_saved_as_any_fast_tokenizer(both, tmp_path):
    tokenizer, _ = both
    tokenizer.save_pretrained(tmp_path)
    again, text = AutoTokenizer.from_pretrained(tmp_path), "问：two  dogs\n\t猫[gMASK]<sop> 🐱"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.decode(again(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)


def test_the_first_releases_have_ids_of_images_before_all_others(tmp_path):
    save_ice_text(tmp_path, images=None)
    tokenizer = read_tokenizer(tmp_path, "k")
    assert tokenizer("这是 a cat").input_ids == [number + IMAGE_TOKENS for number in ids_of("这是 a cat")]


@pytest.mark.parametrize("content", [b"", b"\x00\x01no protobuf", "这不是词表".encode()])
def test_another_file_is_refused_in_a_sentence(content, tmp_path):
    (tmp_path / "ice_text.model").write_bytes(content)
    with pytest.raises(UserError, match=r"^k: ice_text\.model cannot be read as a tokenizer of ChatGLM; fetch it"):
        read_tokenizer(tmp_path, "k")


@pytest.mark.parametrize("number", [10**9, -1])
def test_ids_of_images_are_counted_before_they_are_made(number, tmp_path):
    save_ice_text(tmp_path, images=number)
    with pytest.raises(UserError, match=r"^k: its tokenizer_config\.json says num_image_tokens: .*2,000,000 \(`limits"):
        read_tokenizer(tmp_path, "k")


def test_a_blank_of_any_length_is_bounded():
    assert _text_of("<|blank_3|>") == "   " and len(_text_of("<|blank_999999999999|>")) == 10_000
    assert _text_of("<|blank_" + "9" * 5000 + "|>") == "<|blank_" + "9" * 5000 + "|>"
