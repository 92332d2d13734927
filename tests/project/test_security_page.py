"""The page of security names the test of every promise, and each of them is there."""

from __future__ import annotations

import re

from support.paths import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
PROMISES = PAGE.partition("## What is promised\n")[2].partition("\n## ")[0]


def test_every_test_that_the_page_names_is_there() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    there = set(re.findall(r"^ *def (test_\w+)\(", source, re.MULTILINE))
    named = set(re.findall(r"\b(test_\w+)`", PAGE)) - {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(named) > 20 and named <= there, sorted(named - there)


def test_every_promise_has_a_test() -> None:
    promises = [text for text in PROMISES.split("\n\n") if text.startswith("**")]
    assert len(promises) > 8
    assert [text.split("**")[1] for text in promises if not re.search(r"`test_\w+`", text)] == []
