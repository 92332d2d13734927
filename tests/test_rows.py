"""What is found out about rows before the first step, by however many processes."""

from __future__ import annotations

import io

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from test_collator import make_row, turn
from test_processor import make_processor

from vlm_sft import load_recipe
from vlm_sft.collator import MultimodalCollator
from vlm_sft.configs import build_sft_config
from vlm_sft.errors import UserError, sentence_of
from vlm_sft.rows import CHUNK, describe_rows, load_rows, measure_rows, on_first_process


@pytest.fixture(scope="module")
def collator():
    return MultimodalCollator(make_processor("vicuna_v1"), max_length=200)


def test_rows_are_counted_and_shortened_ones_too(collator, photos):
    short, long = turn("a", "b"), turn("这是什么？", "一只猫", images=1) + 3 * turn("hello " * 20, "hi " * 20)
    rows = Dataset.from_list([make_row(short, photos), make_row(long, photos, 1), make_row(long, photos, 2)])
    lengths = [len(collator.encode(row).chat.input_ids) for row in rows]
    turns = collator.encode(rows[1]).turns_lost
    assert turns > 0
    assert measure_rows(rows, collator) == {
        "rows": 3,
        "longest": max(lengths),
        "mean_length": round(sum(lengths) / 3, 1),
        "rows_shortened": 2,
        "turns_lost": 2 * turns,
    }


def test_a_sentence_names_the_loss_of_turns_only_where_there_is_one():
    counts = {"rows": 16000, "longest": 1045, "mean_length": 31.5, "rows_shortened": 0, "turns_lost": 0}
    assert describe_rows(counts) == "16,000 rows, 31.5 tokens in the mean, 1,045 at most."
    counts |= {"rows_shortened": 2, "turns_lost": 5}
    assert describe_rows(counts).endswith("; 2 rows lost 5 turns to fit max_length.")


def test_workers_count_the_same_and_the_global_generator_stays(collator, photos, monkeypatch):
    monkeypatch.setattr("vlm_sft.rows.WORTH_WORKERS", 1)
    rows = Dataset.from_list([make_row(turn("q" * (1 + i % 50), "b"), photos, i) for i in range(2 * CHUNK + 5)])
    before, told = torch.get_rng_state(), []
    with_workers = measure_rows(rows, collator, workers=2, tick=told.append)
    assert with_workers == measure_rows(rows, collator)
    assert told == [CHUNK, 2 * CHUNK, 2 * CHUNK + 5]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_worker_names_the_first_bad_row_in_one_sentence(collator, photos, monkeypatch):
    monkeypatch.setattr("vlm_sft.rows.WORTH_WORKERS", 1)
    rows = [make_row(turn("q", "b", images=1), photos, i) for i in range(CHUNK + 9)]
    rows[CHUNK + 3]["images"] = rows[CHUNK + 4]["images"] = []
    with pytest.raises(UserError) as raised:
        measure_rows(Dataset.from_list(rows), collator, workers=1)
    assert sentence_of(raised.value).startswith(f"row s/{CHUNK + 3}: its text has room for 1 images")
    assert "Traceback" not in sentence_of(raised.value)


def test_long_measurements_show_that_they_go_on(recipe_file, collator, monkeypatch):
    monkeypatch.setattr("vlm_sft.rows.SECONDS_BETWEEN_LINES", 0.0)
    said = io.StringIO()
    recipe = load_recipe(recipe_file())
    load_rows(recipe, collator, build_sft_config(recipe), Console(file=said, width=120))
    assert "train: measured 8 of 8 rows" in said.getvalue()


@pytest.mark.parametrize(("rows", "advice"), [(8, "8 rows but"), (1, "1 row but")])
def test_more_processes_than_rows(recipe_file, caption_file, collator, monkeypatch, rows, advice):
    data = {"train": [{"path": caption_file, "format": "caption", "max_rows": rows}]}
    recipe = load_recipe(recipe_file(data=data))
    args = build_sft_config(recipe)
    monkeypatch.setattr(type(args), "world_size", 9)
    with pytest.raises(UserError, match=rf"data\.train has {advice} .*9 processes.*--num_processes {rows} or fewer"):
        load_rows(recipe, collator, args, Console(quiet=True))


class Processes:
    """Stands in for accelerate's state and its broadcast: what the first process sends, the second receives."""

    num_processes = 2

    def __init__(self, monkeypatch):
        self.sent = None
        monkeypatch.setattr("accelerate.PartialState", lambda: self)
        monkeypatch.setattr("accelerate.utils.broadcast_object_list", self.broadcast)

    def broadcast(self, outcome):
        if self.is_main_process:
            self.sent = list(outcome)
        else:
            outcome[:] = self.sent


def test_every_process_gets_what_the_first_found_and_its_error_too(monkeypatch):
    state = Processes(monkeypatch)

    def everywhere(work):
        got = []
        for state.is_main_process in (True, False):
            try:
                got.append(on_first_process(work if state.is_main_process else pytest.fail))
            except UserError as error:
                got.append(str(error))
        return got

    def refuse():
        raise UserError("row 7 is bad.")

    assert everywhere(lambda: {"rows": 3}) == [{"rows": 3}, {"rows": 3}]
    assert everywhere(refuse) == ["row 7 is bad.", "row 7 is bad."]
