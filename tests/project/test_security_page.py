"""The page of security is two pages, shows every bound and names the tests of every promise, which are there."""

from __future__ import annotations

import ast
import re
from dataclasses import fields

from support.paths import ROOT
from vlm_sft.base.limits import Readers

PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
PROMISES = PAGE.partition("## What is promised\n")[2].partition("\n## ")[0]
TESTS = dict(re.findall(r"^\| (.+?) \| (`test_.+) \|$", PAGE.partition("## The tests\n")[2], re.MULTILINE))


def test_every_test_that_the_page_names_is_there() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    there = set(re.findall(r"^ *def (test_\w+)\(", source, re.MULTILINE))
    named = set(re.findall(r"\b(test_\w+)`", PAGE))
    assert len(named) > 90 and named <= there, sorted(named - there)


def test_every_promise_has_its_tests() -> None:
    promises = [text.split("**")[1].rstrip(".") for text in PROMISES.strip().split("\n\n") if text.startswith("**")]
    assert len(promises) > 10 and promises == list(TESTS)


def test_it_is_read_in_two_pages() -> None:
    words = re.sub(r"^\|.*$", "", PAGE.partition("## The tests\n")[0], flags=re.MULTILINE).split()
    assert len(words) <= 1200


def test_it_shows_every_bound_that_has_no_key() -> None:
    for each in fields(Readers):
        assert f"`{each.name}` {each.default:,}" in " ".join(PAGE.split()), each.name


# How much is held, compared or shown at a time: none of these refuses a file.
NO_BUDGET = {
    "MOST_BYTES",
    "MOST_HELD",
    "MOST_REJECTED",
    "MOST_KEPT",
    "MOST_PAIRS",
    "MOST_WORKERS",
    "MOST_ROWS",
    "LONGEST_SHOWN",
    "LONGEST_SENTENCE",
}


def test_no_bound_on_what_is_read_stands_elsewhere() -> None:
    found = []
    for path in sorted((ROOT / "vlm_sft").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
            bound = [name for name in names if re.match(r"_?(MOST|LARGEST|LONGEST|MAX|DEEPEST)_", name)]
            numbers = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
            large = any(type(number) is int and number >= 1000 for number in numbers) or (
                2 in numbers and 20 in numbers
            )
            found += [f"{path.name}: {name}" for name in bound if large and name not in NO_BUDGET]
    assert not found
