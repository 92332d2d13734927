"""What a run writes down of itself: every log with its time and memory, and what is fixed, while it goes on."""

from __future__ import annotations

import json
import math

import pytest

from vlm_sft import load_recipe
from vlm_sft.bundle.run_folder import read_lines
from vlm_sft.during.run_log import most_memory
from vlm_sft.train import train
from vlm_sft.watching.page import run_page
from vlm_sft.watching.runs import read_run


@pytest.mark.slow
def test_a_run_can_be_watched_and_goes_on_where_it_was(recipe_file, caption_file):
    source = {"path": caption_file, "format": "caption"}
    path = recipe_file(chat_template="ziya", lora={"r": 2}, data={"train": [source], "eval": [source]})
    more = ["sft.eval_strategy=steps", "sft.eval_steps=2", "sft.save_strategy=steps", "sft.save_steps=1"]
    folder = train(load_recipe(path, [*more, "sft.max_steps=2"]))
    lines = read_lines(folder / "history.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert all(line["memory_gib"] > 0 and line["time"] > 1e9 for line in lines)
    assert [line["step"] for line in lines if "eval_loss" in line] == [2]
    facts = json.loads((folder / "run.json").read_text())
    assert facts["max_steps"] == 2 and facts["step"] == 2 and facts["recipe"] == str(path)
    learns = {part["part"]: (part["trained"], part["adapted"]) for part in facts["parts"]}
    assert learns["projector"][0] > 0 and learns["language_model"][1] > 0 and learns["vision_tower"] == (0, 0)
    assert facts["ledger"]["train"]["sources"]["captions"]["used"] == 8
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 9}\n{"ste')  # of a step that was never saved
    train(load_recipe(path, [*more, "sft.max_steps=3"]), resume=True)
    assert [line["loss"] for line in read_lines(folder / "history.jsonl") if "loss" in line and line["step"] == 3] != [
        9
    ]
    assert [line["step"] for line in read_lines(folder / "history.jsonl") if "loss" in line] == [1, 2, 3]
    run = read_run(folder)
    assert run.state == "finished" and len(run.series("loss")) == 3 and {row["step"] for row in run.samples} >= {0, 2}
    page = run_page([run])
    assert "LinearProjector" in page and "Answers at each evaluation" in page and "a red 3" in page


def test_lines_hold_numbers_that_json_has_not(tmp_path):
    from vlm_sft.during.run_log import _dump

    (path := tmp_path / "h.jsonl").write_bytes(_dump({"step": 1, "loss": math.nan, "text": "\ud83d"}) + b'{"step": 2')
    assert read_lines(path) == [{"step": 1, "loss": "nan", "text": "\ud83d"}] and read_lines(tmp_path / "gone") == []
    assert most_memory() > 2**20


def test_a_disk_that_takes_nothing_ends_no_run_and_is_said_once(make_trainer, tmp_path, capsys, monkeypatch):
    from vlm_sft.during import run_log

    trainer = make_trainer()
    trainer.args.output_dir = str(tmp_path / "out")
    log = run_log.RunLog(trainer)

    def full(*more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_log, "write_whole", full)
    monkeypatch.setattr(run_log, "write_json", full)
    log.on_train_begin(trainer.args, trainer.state, trainer.control)
    log.on_log(trainer.args, trainer.state, trainer.control, logs={"loss": 1.0})
    assert capsys.readouterr().err.count("cannot be written (No space left on device)") == 1
