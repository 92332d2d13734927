"""Chinese sentences: each stands for an English one that the code still raises, with the same places in it."""

from __future__ import annotations

import ast
import re
import string
import time

import pytest

from support.paths import ROOT
from vlm_sft.base.errors import UserError, exit_on_user_error
from vlm_sft.spoken.catalogue import CHINESE, translated


def template_of(node: ast.AST) -> str | None:
    """A text of the code with `{}` where something is put in; None for what is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
        return "".join(parts)
    return None


@pytest.fixture(scope="module")
def said() -> set[str]:
    """Every text of the package, as a template."""
    found = set()
    for path in sorted((ROOT / "vlm_sft").rglob("*.py")):
        if path.name != "catalogue.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found |= {text for node in ast.walk(tree) if (text := template_of(node)) is not None}
    return found


def test_there_are_the_twenty_that_come_first():
    assert len(CHINESE) >= 20


@pytest.mark.parametrize("english", CHINESE)
def test_the_code_still_says_it_and_the_places_are_the_same(english, said):
    assert english in said
    places = {int(name) for _, name, _, _ in string.Formatter().parse(CHINESE[english]) if name is not None}
    # What is put in may be said twice, or left out where Chinese does not need it, but never be one that is not there.
    assert places <= set(range(english.count("{}")))
    assert re.search(r"[\u4e00-\u9fff]", CHINESE[english])


@pytest.mark.parametrize("english", CHINESE)
def test_a_sentence_is_put_into_chinese_with_what_is_in_it(english, monkeypatch):
    things = [f"值{n}" for n in range(english.count("{}"))]
    sentence = english.replace("{}", "\0").replace("\0", "{}").format(*things) if '{"' not in english else None
    if sentence is None:
        head, *rest = english.split("{}")
        sentence = head + "".join(thing + part for thing, part in zip(things, rest, strict=True))
    monkeypatch.setenv("VLM_SFT_LANG", "zh")
    assert translated(sentence) == CHINESE[english].format(*things)
    monkeypatch.setenv("VLM_SFT_LANG", "en")
    assert translated(sentence) == sentence


def test_the_command_says_it_in_chinese_and_other_sentences_as_they_are(monkeypatch, capsys):
    monkeypatch.setenv("VLM_SFT_LANG", "zh")
    for sentence, words in (
        ("rows {x}.jsonl is no bundle: look", "错误：rows {x}.jsonl 不是训练结果（bundle）：look"),
        ("nobody has translated this.", "错误：nobody has translated this."),
    ):
        with pytest.raises(SystemExit) as ended, exit_on_user_error():
            raise UserError(sentence)
        assert ended.value.code == 2 and capsys.readouterr().err.strip() == words


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("a.jsonl, line 3: the image 猫.png is empty (0 bytes): download it again or remove the row.",
         "a.jsonl, line 3: 图片 猫.png 是空的（0 字节）：请重新下载，或删去这一行。"),
        ("picture 1, a b.png, is truncated or damaged (cut off): download it again or remove the row.",
         "第 1 张图片 a b.png 不完整或已损坏（cut off）：请重新下载，或删去这一行。"),
        ("picture 2, x.png, starts like a PNG but is truncated or damaged: download it again or remove the row.",
         "第 2 张图片 x.png 开头像 PNG，但不完整或已损坏：请重新下载，或删去这一行。"),
        ("picture 2, x.txt, is not an image (it looks like text: download the image again or remove the row).",
         "第 2 张图片 x.txt 不是图片（看起来是 文本：请重新下载图片，或删去这一行）。"),
        ("picture 1, b.png, has 20 x 30 pixels, more than the 500 allowed: scale it down or remove the row.",
         "第 1 张图片 b.png 有 20 x 30 像素，超过允许的 500：请缩小，或删去这一行。"),
        ("'a' is no bundle: there is no such folder; did you mean 'b'?",
         "'a' 不是训练结果（bundle）：没有这个文件夹；是不是 'b'？"),
        ("The messages show 9 images; at most 8 are taken: leave some out.", "共有 9 张图片，最多 8 张：请减少几张。"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_picture_is_said_in_the_readers_language(english, chinese, monkeypatch):
    monkeypatch.setenv("VLM_SFT_LANG", "en")
    assert translated(english, "zh") == chinese and translated(english) == english
    monkeypatch.setenv("VLM_SFT_LANG", "zh")
    assert translated(english) == chinese and translated(english, "en") == english


@pytest.mark.parametrize("english", CHINESE)
def test_a_strangers_name_is_as_long_as_it_likes(english, monkeypatch):
    """Patterns took the fourth power of its length: minutes for 4,000 letters that are like our sentences."""
    monkeypatch.setenv("VLM_SFT_LANG", "zh")
    pieces = english.split("{}")
    before = time.process_time()
    for text in ("x".join(pieces[:-1]), "".join(pieces[:2]), *pieces[1:2], " "):
        translated((pieces[0] + (text or "x") * 100_000)[:100_000])
    assert time.process_time() - before < 2
    assert translated("x is left out: " * 2000 + "x").startswith("略去 x：")
