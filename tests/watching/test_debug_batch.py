"""The rows of a step that went wrong, one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.cli.main import app
from vlm_sft.train import train
from vlm_sft.watching.debug_batch import find_record, find_rows, run


@pytest.fixture
def finished(recipe_file, monkeypatch):
    monkeypatch.setattr("vlm_sft.bundle.parity.check_parity", lambda *args: {"positions": 1, "max_difference": 0.0})
    folder = train(load_recipe(recipe_file(), ["sft.save_strategy=steps", "sft.save_steps=1"]))
    record = {"step": 2, "why": "nonfinite", "loss": float("nan"), "rows": [["captions/3"], ["captions/1"]]}
    (folder / "watch.jsonl").write_text(json.dumps({**record, "step": 1}) + "\n" + json.dumps(record) + "\n")
    return folder


def test_each_row_is_shown_with_the_checkpoint_before(finished, capsys):
    run(str(finished))
    said = capsys.readouterr().out
    assert f"Step 2 (nonfinite): loss nan in training. Looked at with {finished / 'checkpoint-1'}." in said
    third, first = (next(line for line in said.splitlines() if f"captions/{n}" in line) for n in (3, 1))
    assert "40 × 30" in third and "yes" in first and said.index(third) < said.index(first)


def test_a_model_that_is_spoilt_shows(finished, capsys):
    path = finished / "checkpoint-1" / "trained.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(path).items()}, path)
    run(str(finished), checkpoint=str(finished / "checkpoint-1"))
    assert capsys.readouterr().out.count("nan ") >= 2


def test_what_cannot_be_looked_at_is_said(finished, tmp_path):
    with pytest.raises(UserError, match=r"has no whole checkpoint before step 1; name a bundle to look with: --checkp"):
        run(str(finished), step=1)
    with pytest.raises(UserError, match=r"has no record of step 9; it has: 1, 2\."):
        find_record(finished, 9)
    with pytest.raises(UserError, match=r"is no run: it has neither watch\.jsonl nor a checkpoint"):
        find_record(tmp_path, None)
    (finished / "watch.jsonl").write_text(
        json.dumps({"step": 2, "why": "jump", "loss": 9.0, "rows": [["gone/1"]]}) + "\n"
    )
    with pytest.raises(UserError, match=r"The row 'gone/1' is no longer in data\.train"):
        run(str(finished))


def test_rows_are_found_whatever_the_mixture_drew_and_rejected(recipe_file, caption_file, tmp_path):
    lines = Path(caption_file).read_text(encoding="utf-8").splitlines()
    (tmp_path / "more.jsonl").write_text("\n".join([lines[0], '{"image": "no caption"}', *lines[1:]]), encoding="utf-8")
    kind = {"format": "caption", "image_folders": [str(Path(caption_file).parent)]}
    sources = [{"path": path, **kind} for path in (caption_file, str(tmp_path / "more.jsonl"))]
    few = {"train": [{**sources[0], "weight": 99.0}, {**sources[1], "weight": 1.0}], "sampling": "weights"}
    recipe = load_recipe(recipe_file(data={**few, "max_rejected": 0.5}))
    ids = ["more/9", "captions/1", *(f"more/{number}" for number in (1, 3, 4, 5, 6, 7, 8)), "captions/8"]
    assert [row["id"] for row in find_rows(recipe, ids)] == ids


def test_the_command_is_there():
    assert CliRunner().invoke(app, ["debug-batch", "--help"]).exit_code == 0


@pytest.mark.parametrize(
    "line",
    ["[]", '{"step": 3}', '{"step": 3, "why": "x", "loss": "x", "rows": []}',
     '{"step": 3, "why": 1, "loss": 1, "rows": []}',
     '{"step": 3, "why": "x", "loss": 1, "rows": [1]}', '{"step": 3, "why": "x", "loss": 1, "rows": [[{}]]}',
     '{"step": ' + "9" * 400 + ', "why": "x", "loss": 1, "rows": []}', "{" * 10_000 + "}", "\xff}"],
    ids=range(9),
)  # fmt: skip
def test_lines_that_are_no_records_are_passed_over(line, tmp_path):
    whole = {"step": 2, "why": "jump", "loss": 9.0, "rows": [["a/1"]]}
    (tmp_path / "watch.jsonl").write_text(f"{json.dumps(whole)}\n{line}\n", encoding="latin-1")
    assert find_record(tmp_path, None) == whole
    with pytest.raises(UserError, match=r"has no record of step 3; it has: 2\."):
        find_record(tmp_path, 3)
