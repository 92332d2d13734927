"""Captions against pycocoevalcap's own values, and Chinese by sacrebleu and rouge-chinese."""

from __future__ import annotations

import builtins
import json

import pytest

from support.paths import GOLDENS
from vlm_sft.base.errors import UserError
from vlm_sft.metrics import captions
from vlm_sft.metrics.captions import bleu_of, sacrebleu_of, score_captions, score_chinese, words_of

CASES = json.loads((GOLDENS / "metrics" / "captions.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("language", ["english", "chinese_by_character"])
def test_scores_equal_pycocoevalcap(language):
    case = CASES[language]
    names = list(case["references"])
    said = [text[0] if isinstance(text, list) else text for text in map(case["candidates"].get, names)]
    found = score_captions(said, [case["references"][name] for name in names], tokens="whitespace")
    wanted = case["corpus"]
    assert found.cider.mean() == pytest.approx(wanted["CIDEr"], abs=1e-9)
    assert found.rouge.mean() == pytest.approx(wanted["ROUGE_L"], abs=1e-9)
    for n in (1, 2, 3, 4):
        assert bleu_of(found.bleu.sum(axis=0), n) == pytest.approx(wanted[f"Bleu_{n}"], abs=1e-9)
    if isinstance(per_image := case.get("per_image"), dict):
        assert found.cider.tolist() == pytest.approx([per_image[name]["CIDEr"] for name in names], abs=1e-9)
        assert found.rouge.tolist() == pytest.approx([per_image[name]["ROUGE_L"] for name in names], abs=1e-9)


# What the Java program of pycocoevalcap 1.2 gives.
PTB = {
    "A man's T-shirt, (red) doesn't fit!  Two dogs - in the U.S.A. at 3:30; it's \"fun\"...": (
        "a man 's t-shirt -lrb- red -rrb- does n't fit two dogs in the u.s.a. at 3:30 it 's fun"
    ),
    "A woman in a black-and-white dress isn't looking at the men's room.": (
        "a woman in a black-and-white dress is n't looking at the men 's room"
    ),
    "2 men/women play frisbee; one's 6'2\" tall.": "2 men/women play frisbee one 's 6 2 tall",
    "A plate with $5.00 worth of french fries, ketchup & salt.": (
        "a plate with $ 5.00 worth of french fries ketchup & salt"
    ),
    "I can't see what they're doing": "i ca n't see what they 're doing",
    "Cannot tell; gonna be a jet-ski?": "can not tell gon na be a jet-ski",
    "An apple @ 50% off #sale": "an apple @ 50 % off #sale",
    "A 1,000 lb. bear!!": "a 1,000 lb bear !!",
    "people's dogs' leashes": "people 's dogs leashes",
    "a café on the corner": "a café on the corner",
    "the dog -- a poodle -- sits": "the dog a poodle sits",
    "T.V. show at 9 p.m.": "t.v. show at 9 p.m.",
    "He'd've gone. I'll go; we've been; I'm here": "he 'd 've gone i 'll go we 've been i 'm here",
    "it costs 3.5 dollars.": "it costs 3.5 dollars",
}


@pytest.mark.parametrize(("text", "words"), PTB.items())
def test_words_are_cut_as_the_java_program_cuts_them(text, words):
    assert words_of(text) == words


def test_chinese_is_scored_by_the_libraries():
    from sacrebleu.metrics import BLEU

    said = ["一只猫坐在红色的沙发上", "两个人在公园里骑自行车", "狗"]
    right = [["一只猫坐在沙发上", "红沙发上有一只猫"], ["两个人在公园里跑步"], ["一条狗在草地上"]]
    counts, rouge = score_chinese(said, right)
    wide = [[refs[min(k, len(refs) - 1)] for refs in right] for k in range(2)]
    assert sacrebleu_of(counts.sum(axis=0)) * 100 == pytest.approx(BLEU(tokenize="zh").corpus_score(said, wide).score)
    assert 0 < rouge[1] < rouge[0] < 1 and rouge[2] > 0
    assert score_chinese([""], [["猫"]])[1] == [0.0]


@pytest.mark.parametrize(
    ("module", "call"),
    [("pycocoevalcap", lambda: score_captions(["a"], [["a"]])), ("jieba", lambda: score_chinese(["猫"], [["猫"]]))],
)
def test_what_is_not_installed_is_named(monkeypatch, module, call):
    real = builtins.__import__

    def refuse(name, *more, **kwargs):
        if name.split(".")[0] == module:
            raise ImportError(name=name)
        return real(name, *more, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=rf"needs .*{module}.*pip install \"vlm-sft\[eval\]\""):
        call()


def test_ptb_without_java_is_one_sentence(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="there is no `java`"):
        score_captions(["a"], [["a"]], tokens="ptb")


def test_nothing_to_compare_with_is_refused():
    with pytest.raises(ValueError, match="at least one reference"):
        score_captions(["a"], [[]])
