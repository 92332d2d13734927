"""What is found out about rows before the first step, by however many processes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from support.conversations import make_processor
from support.gloo import in_processes
from support.source_files import write
from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.batch.collator import MultimodalCollator
from vlm_sft.recipe.libraries import build_sft_config
from vlm_sft.training.run_rows import describe_rows, load_rows


@pytest.fixture(scope="module")
def collator():
    return MultimodalCollator(make_processor("vicuna_v1"), max_length=200)


def test_a_sentence_names_the_loss_of_turns_only_where_there_is_one():
    counts = {
        "rows": 16000,
        "read": 16000,
        "measured": 16000,
        "longest": 1045,
        "mean_length": 31.5,
        "rows_shortened": 0,
        "turns_lost": 0,
    }
    assert describe_rows(counts) == "16,000 rows, 31.5 tokens in the mean, 1,045 at most."
    counts |= {"rows_shortened": 2, "turns_lost": 5}
    assert describe_rows(counts).endswith("; 2 rows lost 5 turns to fit max_length.")
    assert describe_rows(counts | {"measured": 500}).startswith("16,000 rows (measured: a sample of 500, see data.meas")


def test_long_measurements_show_that_they_go_on(recipe_file, collator, monkeypatch):
    monkeypatch.setattr("vlm_sft.base.progress.SECONDS_BETWEEN_LINES", 0.0)
    said = io.StringIO()
    recipe = load_recipe(recipe_file())
    load_rows(recipe, collator, build_sft_config(recipe), Console(file=said, width=120))
    assert "train: captions: read 8 rows" in said.getvalue()
    assert "train: looked for 8 of 8 images" in said.getvalue()
    assert "train: measured 8 of 8 rows" in said.getvalue()


@pytest.mark.parametrize(("rows", "advice"), [(8, "8 rows but"), (1, "1 row but")])
def test_more_processes_than_rows(recipe_file, caption_file, collator, monkeypatch, rows, advice):
    data = {"train": [{"path": caption_file, "format": "caption", "max_rows": rows}]}
    recipe = load_recipe(recipe_file(data=data))
    args = build_sft_config(recipe)
    monkeypatch.setattr(type(args), "world_size", 9)
    with pytest.raises(UserError, match=rf"data\.train has {advice} .*9 processes.*--num_processes {rows} or fewer"):
        load_rows(recipe, collator, args, Console(quiet=True))


@pytest.mark.parametrize(
    ("workers", "processes", "max_rows", "refused"),
    [
        (0, 8, None, False),
        (4, 2, None, False),
        (9, 1, None, True),
        (3, 3, None, True),
        (2, 2, 3, True),
        (1, 1, 1, False),
    ],
)
def test_a_stream_of_fewer_rows_than_shards(
    recipe_file, caption_file, collator, monkeypatch, workers, processes, max_rows, refused
):
    source = {"path": caption_file, "format": "caption", "max_rows": max_rows, "name": "描述"}
    recipe = load_recipe(recipe_file(data={"train": [source], "streaming": True}))
    args = build_sft_config(recipe)
    args.dataloader_num_workers = workers
    monkeypatch.setattr(type(args), "world_size", processes)
    if not refused:
        load_rows(recipe, collator, args, Console(quiet=True))
        return
    with pytest.raises(UserError, match=rf'"描述" has too few rows to be dealt to {workers * processes} processes and'):
        load_rows(recipe, collator, args, Console(quiet=True))


def test_a_long_stream_may_be_dealt_to_more_than_its_first_rows(recipe_file, caption_file, collator, monkeypatch):
    monkeypatch.setattr("vlm_sft.training.run_rows.FIRST_ROWS", 2)
    recipe = load_recipe(recipe_file(data={"train": [{"path": caption_file, "format": "caption"}], "streaming": True}))
    args = build_sft_config(recipe)
    args.dataloader_num_workers = 5
    load_rows(recipe, collator, args, Console(quiet=True))


# ---------------------------------------------------------------------------------------------------------- the ledger


def two_sources(tmp_path, photos, wrong):
    """`a`: eight good captions and `wrong` bad rows of several kinds between them; `b`: three good captions."""
    bad = [{"image": "gone.png", "caption": "x"}, {"caption": "no image"}, {"image": photos[0], "caption": " "}]
    rows = [{"image": photo, "caption": "猫"} for photo in photos]
    for k, row in enumerate(bad[:wrong]):
        rows.insert(2 * k, row)
    a = write(tmp_path / "a.jsonl", rows)
    b = write(tmp_path / "b.jsonl", [{"image": photos[0], "caption": f"{i}"} for i in range(3)])
    return [{"path": path, "format": "caption", "weight": weight} for path, weight in ((a, 1.0), (b, 3.0))]


def loaded(recipe_file, collator, sources, **data):
    return load(load_recipe(recipe_file(data={"train": sources, "sampling": "weights", **data})), collator)


def load(recipe, collator):
    """What `load_rows` gives, or its sentence; and what was shown."""
    console = Console(file=io.StringIO(), width=120)
    try:
        return load_rows(recipe, collator, build_sft_config(recipe), console), console.file.getvalue()
    except UserError as error:
        return str(error), console.file.getvalue()


def test_rejected_rows_are_left_out_before_the_mixture_is_drawn(recipe_file, collator, tmp_path, photos):
    sources = two_sources(tmp_path, photos, 3)
    (rows, _, notes, *_), said = loaded(recipe_file, collator, sources, max_rejected=0.3)
    a, b = (notes["ledger"]["train"]["sources"][name] for name in "ab")
    assert sum(a["rejected"].values()) == 3 and a["rejected"]["image missing"] == 1
    assert (a["read"], b["read"], len(rows)) == (11, 3, 11), "the mixture has as many rows as are left"
    drawn = list(rows["id"])
    assert len(set(drawn)) == a["used"] + b["used"] and len(drawn) == len(rows)
    assert (b["used"], b["repeated"]) == (3, drawn.count("b/1") + drawn.count("b/2") + drawn.count("b/3") - 3)
    assert b["repeated"] > 0 and a["repeated"] == 0
    assert "Rows by source" in said and "× image missing" in said
    clean = [json.loads(line) for line in Path(sources[0]["path"]).read_text().splitlines()]
    clean = [row for row in clean if row.get("image", "gone.png") != "gone.png" and row["caption"].strip()]
    write(tmp_path / "a.jsonl", clean)
    (alone, *_), _ = loaded(recipe_file, collator, sources)
    assert [(row["messages"], row["images"], row["source"]) for row in alone] == [
        (row["messages"], row["images"], row["source"]) for row in rows
    ], "as if the rejected rows had never been in the file"


def test_by_default_one_rejected_row_stops_the_run_with_the_table(recipe_file, collator, tmp_path, photos):
    error, said = loaded(recipe_file, collator, two_sources(tmp_path, photos, 1))
    assert error.startswith("row a/1: the image gone.png was not found") and "a: 1 × image missing" in said
    error, said = loaded(recipe_file, collator, two_sources(tmp_path, photos, 3), max_rejected=0.2)
    assert error.startswith('3 of 11 rows of the source "a" cannot be used, more than data.max_rejected (0.2) allows')
    assert "a.jsonl, line 3" in said.replace("\n", ""), "also what could not be read"


def test_a_source_of_which_no_row_is_left(recipe_file, collator, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"image": "1.png"}] * 4)
    error, said = loaded(recipe_file, collator, [{"path": path, "format": "caption", "weight": 1.0}], max_rejected=0.5)
    assert error.startswith('4 of 4 rows of the source "a" cannot be used') and "4 ×" in said


def test_a_sample_is_called_one(recipe_file, collator, tmp_path, photos):
    (_, _, notes, *_), said = loaded(
        recipe_file, collator, two_sources(tmp_path, photos, 0), measure_rows=2, decode_rows=1
    )
    counts = notes["train_rows"]
    assert (counts["rows"], counts["read"], counts["measured"], counts["decoded"]) == (11, 11, 4, 2)
    assert "train: 11 rows (measured: a sample of 4, see data.measure_rows)" in said


# -------------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("settings", [{"max_rejected": 0.3}, {"max_rejected": 0.3, "measure_rows": 5}, {}])
def test_two_processes_find_what_one_finds(recipe_file, collator, tmp_path, photos, settings):
    """Rows, their order, ledger and notes; or the error and the table that was shown."""
    data = {"train": two_sources(tmp_path, photos, 3), "sampling": "weights", **settings}
    recipe = load_recipe(recipe_file(data=data))

    def found(rank=0):
        outcome, said = load(recipe, collator)
        if isinstance(outcome, str):
            return outcome, said
        rows, _, notes, *_ = outcome
        return rows[:], notes, said

    alone = found()
    (tmp_path / "launch").mkdir()
    assert in_processes(found, tmp_path / "launch") == [alone, alone]
    assert isinstance(alone[0], dict) == bool(settings)


def test_what_one_process_finds_ends_all_with_one_sentence(recipe_file, collator, tmp_path, photos):
    """The row is in the share of the second one."""
    rows = [{"image": photo, "caption": "猫"} for photo in photos]
    path = write(tmp_path / "a.jsonl", [*rows, {"image": "gone.png", "caption": "狗"}])
    recipe = load_recipe(recipe_file(data={"train": [{"path": path, "format": "caption"}]}))

    def found(rank=0):
        return load(recipe, collator)[0]

    alone = found()
    (tmp_path / "launch").mkdir()
    assert in_processes(found, tmp_path / "launch") == [alone, alone]
    assert alone.startswith("row a/9: the image gone.png was not found")
