"""The rule by which a tokenizer cuts words is known by itself, not by a table of published tokenizers."""

from __future__ import annotations

import json

import pytest

from support.tiny_pieces import make_tokenizer
from vlm_sft.llama_cpp.convert import RULES, rule_of

SPLITS = [rule for rule in RULES if rule not in ("", "digits")]


def split(expression):
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }


def test_a_tokenizer_that_was_trained_here_has_the_rule_of_gpt_2(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    assert rule_of(tmp_path) == "gpt-2"


@pytest.mark.parametrize("expression", SPLITS)
def test_published_rules_have_llama_cpps_names(expression, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": split(expression)}))
    assert rule_of(tmp_path) == RULES[expression]


@pytest.mark.parametrize("found", [None, {"type": "Whitespace"}, split("[0-9]+")])
def test_another_rule_has_no_name(found, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": found}))
    assert rule_of(tmp_path) is None
