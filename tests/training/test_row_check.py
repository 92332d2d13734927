"""What is found out about the rows of one source before the first step."""

from __future__ import annotations

import multiprocessing
import pickle
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.conversations import make_processor, make_row, turn
from support.source_files import captions
from vlm_sft.base.errors import RowError, UserError
from vlm_sft.batch.collator import MultimodalCollator
from vlm_sft.data.dataset import ROW_FEATURES, load_source
from vlm_sft.data.ledger import SourceLedger
from vlm_sft.templates import process
from vlm_sft.training.row_check import CHUNK, Findings, _sample, look_over, summary


@pytest.fixture(scope="module")
def collator():
    return MultimodalCollator(make_processor("vicuna_v1"), max_length=200)


def dataset(rows):
    import datasets

    return datasets.Dataset.from_list(rows, features=ROW_FEATURES)


def test_rows_are_counted_and_shortened_ones_too(collator, photos):
    short, long = turn("a", "b"), turn("这是什么？", "一只猫", images=1) + 3 * turn("hello " * 20, "hi " * 20)
    rows = dataset([make_row(short, photos), make_row(long, photos, 1), make_row(long, photos, 2)])
    lengths = [len(collator.encode(row).chat.input_ids) for row in rows]
    turns = collator.encode(rows[1]).turns_lost
    assert turns > 0
    found = look_over(rows, collator)
    assert found == Findings(3, 3, 0, lengths, [0, turns, turns], [])
    counts = summary([found, Findings(7)], 12)
    histogram = counts.pop("histogram")
    assert counts == {
        "rows": 12,
        "read": 10,
        "measured": 3,
        "decoded": 0,
        "longest": max(lengths),
        "mean_length": round(sum(lengths) / 3, 1),
        "rows_shortened": 2,
        "turns_lost": 2 * turns,
    }
    assert sum(histogram["counts"]) == 3 and len(histogram["edges"]) == len(histogram["counts"]) + 1
    assert summary([Findings()], 0)["mean_length"] == 0.0


def wrong_rows(photos, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"\x89PNG no more")
    (tmp_path / "empty.png").touch()
    rows = [make_row(turn("这是什么？", "猫", images=1), photos, i) for i in range(8)]
    rows[1]["images"] = []
    rows[2]["images"] = [{"path": str(tmp_path / "gone.png"), "bytes": None}]
    rows[3]["messages"][1]["content"][0]["text"] = "word " * 200
    rows[4]["images"] = [{"path": str(damaged), "bytes": None}]
    rows[5]["images"] = [{"path": str(tmp_path / "empty.png"), "bytes": None}]
    rows[6]["images"] = [{"path": "gone.png", "bytes": damaged.read_bytes()}]
    return dataset(rows)


def test_every_wrong_row_is_named_and_none_stops_the_others(collator, photos, tmp_path):
    found = look_over(wrong_rows(photos, tmp_path), collator, decode=None)
    assert [(row.number, row.reason) for row in found.rejected] == [
        (1, "marks differ"), (2, "image missing"), (3, "too long"),
        (4, "image damaged"), (5, "image empty"), (6, "image damaged"),
    ]  # fmt: skip
    assert all(row.sentence.startswith(f"row s/{row.number}: ") for row in found.rejected)
    assert len(found.lengths) == 2
    assert pickle.loads(pickle.dumps(found)) == found
    not_decoded = look_over(wrong_rows(photos, tmp_path), collator)
    assert [row.number for row in not_decoded.rejected] == [1, 2, 3, 5]


def test_a_template_of_ones_own_is_asked_for_many_rows_at_a_time(photos, tmp_path, monkeypatch):
    """And finds what one that ships finds of rows, of which some are wrong."""
    ships = MultimodalCollator(make_processor("vicuna_v1"), max_length=200)
    own = MultimodalCollator(make_processor(ships.processor.chat_template + "{# own #}"), max_length=200)
    rows = [{**make_row(turn(f"a{n}", "b" * n), photos), "id": str(n)} for n in range(1, 150)]
    rows += wrong_rows(photos, tmp_path)
    found = look_over(dataset(rows), ships, decode=0)
    asked = []
    monkeypatch.setattr(process._Child, "ask", _counting(process._Child.ask, asked))
    assert look_over(dataset(rows), own, decode=0) == found
    assert found.rejected and max(asked) == CHUNK and len(asked) <= 2 + len(found.rejected)
    asked.clear()
    assert len(own(rows[:9])["input_ids"]) == 9 and asked == [9]


def _counting(ask, asked):
    def counted(child, questions):
        asked.append(len(questions))
        return ask(child, questions)

    return counted


def test_files_are_looked_for_in_all_rows_also_where_a_sample_is_measured(collator, photos, tmp_path):
    found = look_over(wrong_rows(photos, tmp_path), collator, measure=1)
    assert {2, 5} <= {row.number for row in found.rejected}
    assert (found.rows, found.measured) == (8, 1)


def test_of_many_rows_wrong_alike_the_first_have_sentences(collator, tmp_path):
    rows = load_source(captions(tmp_path, "c", 6))
    found = look_over(rows, collator)
    assert [bool(row.sentence) for row in found.rejected] == [True] * 3 + [False] * 3
    ledger = SourceLedger()
    found.write_to(ledger)
    assert ledger.rejected == {"image missing": 6} and len(ledger.examples["image missing"]) == 3
    assert (ledger.read, ledger.measured, ledger.found) == (6, 6, 6)


@given(st.integers(0, 3000), st.integers(0, 3000) | st.none(), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_sample_is_spread_over_all_rows_and_has_none_twice(size, count, seed):
    picked = _sample(size, count, seed)
    assert len(picked) == (size if count is None else min(size, count))
    assert (np.diff(picked) > 0).all() and (len(picked) == 0 or 0 <= picked[0] <= picked[-1] < size)
    assert np.array_equal(picked, _sample(size, count, seed))
    if count and count < size:
        assert np.diff(picked).max(initial=0) <= 2 * -(-size // count)


def test_workers_find_the_same_and_the_global_generator_stays(collator, photos, monkeypatch):
    monkeypatch.setattr("vlm_sft.training.row_check.ROWS_WORTH_A_WORKER", 1)
    rows = [make_row(turn("q" * (1 + i % 50), "b", images=1), photos, i) for i in range(2 * CHUNK + 5)]
    rows[CHUNK + 3]["images"] = []
    before, told = torch.get_rng_state(), []
    with_workers = look_over(dataset(rows), collator, cores=2, decode=9, tick=lambda *now: told.append(now))
    assert with_workers == look_over(dataset(rows), collator, decode=9)
    assert [row.number for row in with_workers.rejected] == [CHUNK + 3]
    assert told[0] == ("looked for", 1, 1, "images")
    assert told[1:] == [("measured", done, len(rows), "rows") for done in (CHUNK, 2 * CHUNK, len(rows))]
    assert torch.equal(torch.get_rng_state(), before)


class ByText:
    """A collator that measures a row by its question: so many tokens, or why it cannot be used."""

    def sample(self, row, with_images):
        said = row["messages"][0]["content"][-1]["text"]
        if said == "broken template":
            raise UserError(f"the template fails at {row['id']}.")
        if not said.isdigit():
            raise RowError(f"{row['id']} {said}{' once decoded' if with_images else ''}", reason=said)
        return SimpleNamespace(
            chat=SimpleNamespace(input_ids=[0] * int(said), places=[]), turns_lost=int(said) % 3, images=[]
        )


KINDS = st.integers(1, 9).map(str) | st.sampled_from(["太长", "no answer", "file gone"])


@given(
    st.lists(KINDS, min_size=1, max_size=40), st.integers(1, 5),
    st.integers(1, 30) | st.none(), st.integers(0, 30) | st.none(), st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_shares_together_find_what_one_process_finds(kinds, processes, measure, decode, seed):
    rows = [make_row(turn(kind, "好"), [], number) for number, kind in enumerate(kinds)]
    for row in rows:
        if row["messages"][0]["content"][-1]["text"] == "file gone":
            row["images"] = [{"path": "/nowhere/猫.png", "bytes": None}]
    given = {"measure": measure, "decode": decode, "seed": seed}
    whole = look_over(dataset(rows), ByText(), **given)
    shares = [look_over(dataset(rows), ByText(), share=(k, processes), **given) for k in range(processes)]
    assert Findings.of_shares(shares) == whole
    assert Findings.of_shares([whole]) == whole
    assert max(share.rows for share in shares) - min(share.rows for share in shares) <= 1


@pytest.mark.parametrize("cores", [1, 2])
def test_an_error_that_no_row_is_to_blame_for_is_one_sentence_also_out_of_a_worker(cores, monkeypatch):
    monkeypatch.setattr("vlm_sft.training.row_check.ROWS_WORTH_A_WORKER", 1)
    rows = [make_row(turn("broken template" if n in (300, 301) else "5", "好"), [], n) for n in range(400)]
    with pytest.raises(UserError) as error:
        look_over(dataset(rows), ByText(), cores=cores)
    assert str(error.value) == "the template fails at s/300."


def test_workers_end_with_an_error_of_the_parent(monkeypatch):
    rows = dataset([{"messages": [], "images": [], "source": "甲", "id": str(i)} for i in range(2000)])
    monkeypatch.setattr("vlm_sft.training.row_check.ROWS_WORTH_A_WORKER", 100)

    def stop(doing: str, *counts: object) -> None:
        if doing == "measured":
            assert multiprocessing.active_children()
            raise KeyboardInterrupt

    class Slow:
        def sample(self, row, with_images):
            time.sleep(0.001)
            raise RowError("no", reason="no")

    with pytest.raises(KeyboardInterrupt):
        look_over(rows, Slow(), cores=2, tick=stop)
    assert not multiprocessing.active_children()
