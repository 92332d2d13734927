"""Rows into packs: each once, none too long, as few as may be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vlm_sft.rows.filling import _best_fit, pack

ROOM = 60
SOME = st.lists(st.integers(1, ROOM), max_size=60) | st.lists(st.sampled_from([7, 13, 20, 22, 30, 38]), max_size=60)


def first_fit_decreasing(lengths: list[int], room: int) -> int:
    """How many packs it needs, as the textbook writes it."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = next((k for k, free in enumerate(left) if free >= length), None)
        if place is None:
            left.append(room - length)
        else:
            left[place] -= length
    return len(left)


@given(lengths=SOME)
def test_packs_hold_every_row_once_and_are_as_few_as_first_fit_makes(lengths):
    packs = pack(lengths, ROOM)
    assert sorted(int(row) for rows in packs for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= ROOM for rows in packs)
    assert len(packs) <= first_fit_decreasing(lengths, ROOM)


def test_where_best_fit_is_the_worse_one_first_fit_packs():
    lengths = [25, 21, 16, 16, 15, 10, 7, 6, 4]  # found by search: best fit alone makes one pack more
    assert max(_best_fit(sorted(lengths, reverse=True), ROOM)) + 1 > first_fit_decreasing(lengths, ROOM)
    assert len(pack(lengths, ROOM)) == first_fit_decreasing(lengths, ROOM)


def test_rows_that_cannot_be_measured_or_do_not_fit_are_packed_all_the_same():
    packs = [sorted(rows.tolist()) for rows in pack([0, 200, 58, 0, 61], ROOM)]
    assert sorted(packs) == [[0, 2, 3], [1], [4]] and pack([], ROOM) == []
