"""Lengths of rows: measured once, and never taken for those of other rows or of another way to measure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.conversations import make_processor
from vlm_sft import MultimodalCollator
from vlm_sft.cache import lengths
from vlm_sft.data import row_cache
from vlm_sft.data.dataset import load_source
from vlm_sft.recipe.sections import Source
from vlm_sft.training.row_check import look_over


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The cache, in which so few rows as a test has are kept."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for module in (row_cache, lengths):
        monkeypatch.setattr(module, "FEWEST", 3)
    return tmp_path / "cache" / "vlm_sft"


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The ids of the rows that were measured."""
    sample, seen = MultimodalCollator.sample, []

    def told(self, row, *args, **given):
        seen.append(row["id"])
        return sample(self, row, *args, **given)

    monkeypatch.setattr(MultimodalCollator, "sample", told)
    return seen


@pytest.fixture
def rows(tmp_path):
    """Reads nine captions anew, as a new start does; the last is too long for 40 tokens."""
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    said = [{"image": "one.png", "caption": f"c 第{n}张" + "长" * 60 * (n == 8)} for n in range(9)]
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(map(json.dumps, said)), encoding="utf-8")
    return lambda: load_source(Source(path=str(path), format="caption"))


def collator(template="plain", max_length=40, kind=MultimodalCollator):
    return kind(make_processor(template), max_length=max_length)


def test_the_second_start_measures_none_but_those_whose_pictures_are_decoded_and_finds_the_same(rows, asked, folder):
    first = look_over(rows(), collator())
    assert len(asked) == 9 and [row.reason for row in first.rejected] == ["too long"] and len(first.lengths) == 8
    asked.clear()
    second = look_over(rows(), collator())
    assert second == first and second.fronts == first.fronts and not asked
    drawn = look_over(rows(), collator(), decode=2)
    assert drawn.decoded == 2 == len(asked)
    halves = [look_over(rows(), collator(), share=(k, 2)) for k in (0, 1)]
    assert [each.lengths for each in halves] == [first.lengths[:4], first.lengths[4:]]
    assert len(list(folder.glob("*.lengths"))) == 3


class Own(MultimodalCollator):
    """Somebody's own."""


OTHERS = {
    "a longer row": {"max_length": 400},
    "another template": {"template": "vicuna_v1"},
    "a collator of one's own": {"kind": Own},
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_would_be_measured_otherwise_is_measured_anew(rows, asked, other):
    look_over(rows(), collator())
    asked.clear()
    look_over(rows(), collator(**OTHERS[other]))
    assert len(asked) == 9


def test_a_word_more_in_the_tokenizer_or_another_row_measures_anew(rows, asked, tmp_path):
    look_over(rows(), collator())
    more = collator()
    more.processor.tokenizer.add_tokens(["图"])
    asked.clear()
    look_over(rows(), more)
    assert len(asked) == 9
    path = tmp_path / "c.jsonl"
    text = path.read_text(encoding="utf-8").replace(json.dumps("c 第3张"), json.dumps("c 第三十三张"))
    path.write_text(text, encoding="utf-8")
    asked.clear()
    found = look_over(rows(), collator())
    assert len(asked) == 9 and found.lengths[3] > found.lengths[4]


def test_a_damaged_file_is_measured_anew_and_rows_in_memory_are_not_kept(rows, asked, folder):
    first = look_over(rows(), collator())
    (file,) = folder.glob("*.lengths")
    for content in (b"", b"no table", file.read_bytes()[:200]):
        file.write_bytes(content)
        asked.clear()
        assert look_over(rows(), collator()) == first and len(asked) == 9
    in_memory = rows().map(lambda row: row, keep_in_memory=True)
    assert lengths.place_of(in_memory, np.arange(9), collator()) is None
    assert lengths.place_of(rows(), np.arange(2), collator()) is None, "so few are measured at once"
