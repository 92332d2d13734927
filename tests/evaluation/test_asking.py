"""Batches of a benchmark's questions: of like length, pictures close together, shares of processes."""

from __future__ import annotations

from itertools import pairwise

from vlm_sft.evaluation.asking import batches, share_of
from vlm_sft.evaluation.task_rows import Asked


def question(number, picture, length):
    return Asked(str(number), "问" * length, [{"path": f"/{picture}.png", "bytes": None}], ["是"])


def test_batches_hold_questions_of_like_length_the_longest_first():
    asked = [question(n, n % 3, (n * 7) % 20 + 1) for n in range(40)]
    made = list(batches(asked, 8))
    assert sorted(int(a.id) for batch in made for a in batch) == list(range(40))
    lengths = [[len(a.text) for a in batch] for batch in made]
    assert all(min(one) >= max(next_) for one, next_ in pairwise(lengths))


def test_questions_on_a_picture_stay_together_in_a_long_list(monkeypatch):
    monkeypatch.setattr("vlm_sft.evaluation.asking.WINDOW", 1)
    made = list(batches([question(n, n % 4, n) for n in range(16)], 4))
    assert [{a.images[0]["path"] for a in batch} for batch in made] == [{f"/{n}.png"} for n in range(4)]


def test_processes_share_questions_and_no_picture_where_they_can():
    asked = [question(n, n % 4, 3) for n in range(16)]
    shares = [share_of(asked, process, 2) for process in range(2)]
    assert sorted(int(a.id) for share in shares for a in share) == list(range(16))
    assert not {a.images[0]["path"] for a in shares[0]} & {a.images[0]["path"] for a in shares[1]}
    assert [len(share_of(asked[:1], process, 3)) for process in range(3)] == [0, 0, 1]
