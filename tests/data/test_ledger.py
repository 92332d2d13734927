"""What became of every row, in numbers, in a table, and in the sentence that stops a run."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from vlm_sft.base.errors import RowError, UserError
from vlm_sft.data.ledger import FEWEST_STREAMED, Ledger, SourceLedger, ledger_table


def shown(*tables) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(*tables)
    return console.file.getvalue()


def filled() -> Ledger:
    ledger = Ledger(0.1)
    reject = ledger.rejecter("网页")
    for number in range(5):
        reject(RowError(f"a.jsonl, line {number}: no [bold]answer[/].", reason="no answer"))
    source = ledger.source("网页")
    source.read += 95
    source.measured, source.used, source.repeated, source.truncated, source.turns_lost = 95, 90, 7, 3, 12
    ledger.source("clean").read = 10
    return ledger


def test_rows_are_counted_by_source_and_reason_with_the_first_examples():
    source = filled().source("网页")
    assert (source.read, source.lost, source.share) == (100, 5, 0.05)
    assert source.rejected == {"no answer": 5}
    assert source.examples["no answer"] == [f"a.jsonl, line {n}: no [bold]answer[/]." for n in range(3)]


def test_the_table_shows_every_source_and_why_rows_were_rejected():
    text = shown(ledger_table({"train": filled(), "eval": Ledger()}))
    line = next(line for line in text.splitlines() if "网页" in line)
    assert [cell.strip() for cell in line.split("│")[1:-1]] == [
        *("train", "网页", "100", "90", "7", "3 (-12 turns)", "5"),
    ]
    assert "网页: 5 × no answer" in text and "a.jsonl, line 2: no [bold]answer[/]." in text


def test_it_comes_back_from_json_as_it_was():
    ledger = filled()
    ledger.meet("clean", "clean/7", "image damaged", "row clean/7: broken.")
    assert Ledger.from_dict(json.loads(json.dumps(ledger.as_dict()))) == ledger


def test_a_share_above_the_threshold_stops_the_run_with_the_table():
    ledger = filled()
    console = Console(file=io.StringIO(), width=120)
    ledger.check(console)
    assert console.file.getvalue() == ""
    ledger.max_rejected = 0.049
    with pytest.raises(UserError) as error:
        ledger.check(console, "train")
    assert str(error.value) == (
        '5 of 100 rows of the source "网页" cannot be used, more than data.max_rejected (0.049) allows; the first: '
        "a.jsonl, line 0: no [bold]answer[/]."
    )
    assert "Rows by source" in console.file.getvalue()


def test_one_rejected_row_speaks_for_itself_and_the_default_lets_none_pass():
    ledger = Ledger()
    ledger.source("a").read = 10**6
    assert ledger.problem() is None
    ledger.meet("a", "a/1", "image damaged", "row a/1: broken.")
    assert ledger.problem() == "row a/1: broken."


def test_a_row_that_is_met_again_is_counted_once():
    ledger = Ledger(1.0)
    for row in ("a/1", "a/2", "a/1"):
        ledger.meet("a", row, "image damaged", f"row {row}: broken.")
    assert ledger.source("a").lost == 2 and list(ledger.source("a").met) == ["a/1", "a/2"]


def test_a_sample_counts_as_a_sample():
    source = SourceLedger(read=1_000_000, measured=1000)
    for _ in range(20):
        source.reject("too long", "")
    source.found = 20
    assert source.share == 0.02


def test_a_stream_counts_what_comes():
    ledger = Ledger(1.0, {"a": SourceLedger(streamed=True)})
    ledger.see("a", 8)
    ledger.meet("a", "a/1", "too long", "row a/1: too long.")
    ledger.see("a", 8)
    ledger.meet("a", "a/1", "too long", "row a/1: too long.")
    source = ledger.source("a")
    assert (source.read, source.used, source.lost, source.met) == (16, 14, 1, {"a/1": "too long"})


def test_the_first_rows_of_a_stream_do_not_stop_it_at_once():
    source = SourceLedger(read=3, streamed=True)
    source.reject("too long", "")
    assert source.share == 1 / FEWEST_STREAMED
    source.read = 10 * FEWEST_STREAMED
    assert source.share == 0.1 / FEWEST_STREAMED


def test_keys_that_are_not_used_are_counted_and_said():
    ledger = filled()
    ledger.source("clean").leave({"model": 3, "来源": 1})
    ledger.source("clean").leave({"model": 2})
    assert ledger.source("clean").unused == {"model": 5, "来源": 1}
    assert 'clean: not used: "model" in 5 rows, "来源" in 1 row' in shown(ledger_table({"train": ledger}))
    assert Ledger.from_dict(json.loads(json.dumps(ledger.as_dict()))) == ledger
    older = ledger.as_dict()
    del older["sources"]["clean"]["unused"]
    assert Ledger.from_dict(older).source("clean").unused == {}


def test_names_without_end_are_counted_together():
    source = SourceLedger()
    for number in range(250):
        source.leave({f"k{number}": 1})
    assert len(source.unused) == 101 and source.unused["(other keys)"] == 150
    assert shown(ledger_table({"train": Ledger(0, {"a": source})})).count("and 93 more") == 1
