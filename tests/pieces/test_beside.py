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
from transformers.convert_slow_tokenizer import import_protobuf

from support.ice_text import ice_text
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
    return base64.b64encode((1024).to_bytes(4, "little") + bytes(1024) + b"a\0" + b"b" * longest + b"\0").decode()


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


LONG = "ab" * 10_000


def folder_with(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(tmp_path)


def pieces_file(change):
    proto = import_protobuf().ModelProto.FromString(ice_text())
    change(proto)
    return proto.SerializeToString()


VOCABULARIES = {
    "a word of vocab.txt": ("vocab.txt", f"a\n{LONG}\n", "its vocab.txt has a token of 20,000 characters"),
    "a word of vocab.json": ("vocab.json", json.dumps({LONG: 1}), "its vocab.json has a token of 20,000 characters"),
    "a merge": ("merges.txt", f"a b\n{LONG} b", "its merges.txt has a token of 20,002 characters"),
    "a word of tiktoken": ("tiktoken.model", f"{LONG} 1", "its tiktoken.model has a token of 20,002"),
    "many long words": ("vocab.txt", f"{'ab' * 4000}\n" * 40, "its vocab.txt has too many long tokens"),
    "an added token": ("added_tokens.json", json.dumps({LONG: 3}), "its added_tokens.json has a token of 20,000"),
    "a special token": ("special_tokens_map.json", json.dumps({"pad_token": {"content": LONG}}), "a token of 20,000"),
    "a decoded token": (
        "tokenizer_config.json", json.dumps({"added_tokens_decoder": {"1": {"content": LONG}}}),
        "its tokenizer_config.json has a token of 20,000 characters",
    ),
    # The library that makes a tokenizer of such a piece ends the process; another takes minutes for it.
    "a piece": (
        "tokenizer.model", pieces_file(lambda proto: setattr(proto.pieces[-1], "piece", LONG)),
        r"its tokenizer.model has a token of 20,000 characters; more than 10,000 .`limits.token_characters`.",
    ),
    "a damaged table": (
        "ice_text.model",
        pieces_file(lambda proto: setattr(proto.normalizer_spec, "precompiled_charsmap", b"\4\0\0\0\xff\xff\0\0a\0")),
        "the table of replacements in its ice_text.model is damaged; fetch it again",
    ),
    "a table that grows": (
        "spiece.model",
        pieces_file(lambda proto: setattr(proto.normalizer_spec, "precompiled_charsmap",
                                          proto.normalizer_spec.precompiled_charsmap + b"x" * 1000)),
        "the normalizer of its spiece.model makes up to 1,000 characters of one",
    ),
    "a nested file": ("tokenizer_config.json", '{"a":' * 200 + "1" + "}" * 200, "too deep; the checkpoint is"),
    "settings that are a number": ("tokenizer_config.json", '{"sp_model_kwargs": 5}', "sp_model_kwargs: 5; it is"),
}  # fmt: skip


@pytest.mark.parametrize("case", VOCABULARIES)
def test_a_vocabulary_is_looked_at_before_a_library_makes_a_tokenizer_of_it(case, tmp_path):
    name, content, said = VOCABULARIES[case]
    with pytest.raises(UserError, match=said):
        check_tokenizer(folder_with(tmp_path, name, content), None, "k")


@pytest.mark.parametrize("odd", [5, "x", [1], {"vocab": 5}, {"vocab": "ab"}, {"vocab": [[1]]}, None])
def test_odd_models_and_tokens_of_a_tokenizer_are_left_to_the_library(odd):
    check_growth({"model": odd, "added_tokens": odd, "normalizer": odd, "post_processor": odd}, "k")


def test_a_small_file_behind_a_link_that_leads_out_is_not_read(tmp_path):
    (tmp_path / "secret").write_text("a\nb\n")
    (base := tmp_path / "base").mkdir()
    (base / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"k: '.*vocab.txt' leads out of its checkpoint; put the file itself there"):
        check_tokenizer(str(base), None, "k")
    (base / "vocab.txt").unlink()
    (base / "own.txt").write_text("a\nb\n")
    (base / "vocab.txt").symlink_to("own.txt")
    check_tokenizer(str(base), None, "k")
    (linked := tmp_path / "linked").symlink_to(base)  # the user's own link to a folder
    check_tokenizer(str(linked), None, "k")
