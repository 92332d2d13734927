"""Rows on three sides: nothing that is seen on one is seen on another."""

from __future__ import annotations

import random

import pytest

from support.pictures import COPIES, photo, write
from vlm_sft.base.errors import UserError
from vlm_sft.start.sides import Shown, share_out


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("vlm_sft.data.looks.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def image(path: str) -> dict:
    return {"path": path, "bytes": None}


def test_copies_of_copies_stay_together(tmp_path):
    """Every picture with three copies; each row shows one, and one row shows two different pictures."""
    chance = random.Random(7)
    rows, owner = [], []
    for number in range(30):
        for copy, change in [("plain", lambda p: p), *chance.sample(sorted(COPIES.items()), 3)]:
            path = write(change(photo(number, (160, 120))), tmp_path / f"{number}-{copy}.png")
            rows.append(Shown([image(path)], f"{number}"))
            owner.append(number)
    rows.append(Shown([rows[0].images[0], rows[4].images[0]], "both"))
    owner.append(0)
    found = share_out(rows, seed=3)
    by_picture = {
        number: {side for side, own in zip(found.of, owner, strict=True) if own == number} for number in range(30)
    }
    assert sum(len(sides) == 1 for sides in by_picture.values()) >= 29, "the search may miss one that was changed twice"
    assert by_picture[0] == by_picture[1]
    assert 29 <= found.groups <= 32
    assert {side: sum(by_picture[n] == {side} for n in by_picture) for side in ("validation", "test")} == pytest.approx(
        {"validation": 3, "test": 3}, abs=1
    )


def test_rows_of_text_that_say_the_same_stay_together_and_classes_are_everywhere():
    rows = [Shown([], f"text {n // 2}", label=("a", "b")[n // 60]) for n in range(120)]
    found = share_out(rows)
    assert all(found.of[n] == found.of[n + 1] for n in range(0, 120, 2))
    for side in ("train", "validation", "test"):
        assert {row.label for row, own in zip(rows, found.of, strict=True) if own == side} == {"a", "b"}
    assert share_out(rows).of == found.of != share_out(rows, seed=1).of


def test_a_side_that_is_given_is_kept():
    rows = [Shown([], f"t{n}", side="test" if n < 3 else "train") for n in range(20)] + [Shown([], "t0", side="train")]
    found = share_out(rows)
    assert found.of[:3] == ["test"] * 3 and "test" not in found.of[3:]
    assert found.of[-1] == "" and found.moved == 1
    assert found.of.count("validation") == 2


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_are_refused(count):
    with pytest.raises(UserError, match=f"There are {count} different pictures"):
        share_out([Shown([], f"{n}") for n in range(count)])


def test_three_are_one_each():
    assert sorted(share_out([Shown([], f"{n}") for n in range(3)]).of) == ["test", "train", "validation"]
