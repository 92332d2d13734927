"""What lies beside the weights of a checkpoint is obeyed as far as a recipe might say the same."""

from __future__ import annotations

import base64
import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import GenerationConfig

from vlm_sft.base.errors import UserError
from vlm_sft.base.limits import limits
from vlm_sft.pieces.beside import (
    check_config_names,
    check_growth,
    check_tokenizer,
    keep_plain_generation,
)


def kept(**settings):
    config = GenerationConfig()
    vars(config).update(settings)  # some values its constructor refuses by itself
    model = SimpleNamespace(generation_config=config)
    keep_plain_generation(model, "a base")
    return vars(model.generation_config)


def test_published_settings_are_kept_and_those_of_their_own_code_are_not():
    # Qwen-VL-Chat's, Baichuan's and old ones of transformers'.
    found = kept(
        top_p=0.8, eos_token_id=[1, 2], chat_format="chatml", user_token_id=195, num_beam_groups=1, low_memory=False
    )
    assert found["top_p"] == 0.8 and found["eos_token_id"] == [1, 2]
    assert found["num_beam_groups"] is None and not {"chat_format", "user_token_id"} & found.keys()


@pytest.mark.parametrize(
    "settings",
    [{"penalty_alpha": 0.6}, {"dola_layers": "high"}, {"bad_words_ids": {"a": 1}}, {"compile_config": {"a": "b"}}],
)
def test_settings_that_ask_for_code_are_refused(settings):
    with pytest.raises(UserError, match=r"^a base: its generation_config\.json is refused: "):
        kept(**settings)


def test_a_model_that_does_not_generate_has_none():
    keep_plain_generation(SimpleNamespace(generation_config=None), "a base")
    keep_plain_generation(SimpleNamespace(), "a base")


CONFIGS = {
    "attn_implementation": "me/kernel",
    "_attn_implementation": "paged|me/kernel:forward",
    "experts_implementation": "me/experts",
    "transformers_weights": "other.safetensors",
    "configuration_files": ["config.9.9.9.json"],
    "use_kernels": True,
    "backbone": "me/backbone",
    "architecture": "hf-hub:me/model",
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("depth", [0, 2])
def test_a_configuration_names_nothing_else_to_read(name, depth):
    config = {name: CONFIGS[name]}
    for _ in range(depth):
        config = {"vision_config": [config]}
    with pytest.raises(UserError, match=rf"^it: its config\.json says {name}: "):
        check_config_names(config, "it")


def test_what_published_configurations_say_passes():
    check_config_names(
        {"attn_implementation": "sdpa", "_attn_implementation": "flash_attention_2", "backbone": None}, "it"
    )
    check_config_names({"_name_or_path": "org/model", "architectures": ["A"], "auto_map": {"AutoModel": "a.B"}}, "it")
    check_config_names({"attn_implementation": {"text_config": "sdpa"}, "use_pretrained_backbone": False}, "it")


@pytest.mark.parametrize(
    "settings",
    [{"sp_model_kwargs": {"model_file": "/etc/passwd"}}, {"vocab": "/etc/passwd"}, {"emoji_file": "../x"},
     {"mecab_kwargs": {"mecab_dic": "/x"}}, {"tokenizer_object": "a.b"}],
)  # fmt: skip
def test_a_tokenizer_names_no_other_files(settings, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UserError, match=rf"its tokenizer_config\.json says {next(iter(settings))}: .*; it is refused"):
        check_tokenizer(str(tmp_path), None, "it")


def charsmap(longest):
    return base64.b64encode((8).to_bytes(4, "little") + b"\1" * 8 + b"a\0" + b"b" * longest + b"\0").decode()


def replace(content, pattern=" "):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


GROWING = {
    "one long text": {"normalizer": replace("x" * 1000)},
    "doubled often": {"normalizer": {"type": "Sequence", "normalizers": [replace("aa", "a")] * 40}},
    "within itself": {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Sequence", "normalizers": [replace("aaaa", "a")] * 4}] * 4}},
    "between characters": {"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 80}},
    "a table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(5000)}},
    "a prefix": {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}},
    "while decoding": {"decoder": {"type": "Sequence", "decoders": [replace("aaa", "a")] * 9}},
}  # fmt: skip


@pytest.mark.parametrize("name", GROWING)
def test_texts_do_not_grow(name):
    with pytest.raises(UserError, match=r"of its tokenizer\.json makes up to [\d,]+ characters of one"):
        check_growth(GROWING[name], "it")


def test_tokens_have_an_end():
    for tokenizer in (
        {"model": {"vocab": {"x" * 10_001: 0}}},
        {"model": {"vocab": [["x" * 10_001, -1.0]]}},
        {"added_tokens": [{"content": "x" * 10_001}]},
    ):
        with pytest.raises(
            UserError,
            match=r"has a token of 10,001 characters; more than 10,000 \(`limits.token_characters`\) are refused",
        ):
            check_growth(tokenizer, "it")


def test_normalizers_of_published_tokenizers_pass():
    check_growth({"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, replace("▁"), {"type": "NFKD"}, replace('"', "``"), replace('"', "''"),
        {"type": "Precompiled", "precompiled_charsmap": charsmap(33)}, {"type": "Lowercase"}]},
        "decoder": {"type": "Sequence", "decoders": [replace(" ", "▁"), {"type": "Fuse"},
                                                     {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"vocab": {"猫": 0}}, "added_tokens": [{"content": "<image>"}]}, "it")  # fmt: skip
    check_growth({"normalizer": None, "decoder": None, "model": {"vocab": None}, "added_tokens": None}, "it")


STEPS = st.recursive(
    st.builds(replace, st.text("ab", max_size=9), st.text("ab", min_size=1, max_size=3)),
    lambda inner: st.builds(lambda steps: {"type": "Sequence", "normalizers": steps}, st.lists(inner, max_size=4)),
    max_leaves=8,
)


@given(STEPS, st.text("ab", min_size=1, max_size=40))
def test_what_passes_does_not_grow_further_than_is_said(normalizer, text):
    """The tokenizers library itself runs each normalizer that passes."""
    try:
        check_growth({"normalizer": normalizer}, "it")
    except UserError:
        return
    tokenizer = {
        "version": "1.0",
        "normalizer": normalizer,
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    }
    grown = Tokenizer.from_str(json.dumps(tokenizer)).normalizer.normalize_str(text) if normalizer else text
    assert len(grown) <= limits().tokenizer_growth * len(text)
