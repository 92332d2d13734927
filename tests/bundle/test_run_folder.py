"""Which checkpoints are whole, which is taken, which is deleted, and what is refused."""

from __future__ import annotations

import json
import math
import os
from types import SimpleNamespace

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.base.names import CHECKPOINT_FILES
from vlm_sft.bundle.run_folder import (
    checkpoints,
    flaw_of,
    newest,
    publish,
    read_lines,
    read_object,
    read_value,
    remove,
    rotate,
    settle_resume,
    sweep,
)


def save(folder, step, text="weights"):
    beside = folder / f".unfinished-checkpoint-{step}"
    (beside / "inner").mkdir(parents=True)
    (beside / "trained").write_text(text)
    (beside / "inner" / "state").write_text("state")
    publish(beside, folder / f"checkpoint-{step}")
    return folder / f"checkpoint-{step}"


def test_a_published_checkpoint_is_whole_and_nothing_lies_beside_it(tmp_path):
    checkpoint = save(tmp_path, 3)
    assert flaw_of(checkpoint) is None and os.listdir(tmp_path) == ["checkpoint-3"]
    assert (checkpoint / "inner" / "state").read_text() == "state"


def test_publishing_again_replaces(tmp_path):
    save(tmp_path, 3)
    assert (save(tmp_path, 3, "newer") / "trained").read_text() == "newer"
    assert os.listdir(tmp_path) == ["checkpoint-3"]


def test_steps_are_numbers_and_other_folders_are_none(tmp_path):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20", "checkpoint-best", ".unfinished-checkpoint-300"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-400").write_text("a file")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    assert checkpoints(tmp_path / "missing") == []


def lose_a_file(checkpoint):
    (checkpoint / "trained").unlink()


def cut_a_file(checkpoint):
    (checkpoint / "trained").write_text("wei")


def lose_the_list(checkpoint):
    (checkpoint / CHECKPOINT_FILES).unlink()


def cut_the_list(checkpoint):
    (checkpoint / CHECKPOINT_FILES).write_text('{"files": {"trai')


@pytest.mark.parametrize(
    ("damage", "flaw"),
    [
        (lose_a_file, "its file trained is missing"),
        (cut_a_file, "its file trained has 3 bytes, not 7"),
        (lose_the_list, f"it has no list of its files ({CHECKPOINT_FILES})"),
        (cut_the_list, f"it has no list of its files ({CHECKPOINT_FILES})"),
    ],
)
def test_half_a_checkpoint_is_passed_over_and_named(tmp_path, damage, flaw):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    damage(bad)
    said = []
    assert newest(tmp_path, said.append) == good
    assert said == [f"{bad} is passed over: {flaw}."]


def test_a_checkpoint_whose_deletion_was_cut_off_has_lost_its_name(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors=False: None)
    remove(tmp_path / "checkpoint-1")
    assert checkpoints(tmp_path) == []
    monkeypatch.undo()
    sweep(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (2, [5], [4, 5]),
        (1, [5], [5]),
        (2, [5, 1], [1, 5]),
        (1, [5, 1], [1, 5]),
        (2, [2], [2, 5]),  # gone on from an earlier one: the one just written is not the highest
        (None, [5], [1, 2, 3, 4, 5]),
        (0, [5], [1, 2, 3, 4, 5]),
        (9, [5], [1, 2, 3, 4, 5]),
    ],
)
def test_the_oldest_go_but_never_the_new_or_the_best(tmp_path, limit, keep, left):
    for step in range(1, 6):
        save(tmp_path, step)
    rotate(tmp_path, limit, [tmp_path / f"checkpoint-{step}" for step in keep])
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_broken_ones_do_not_count_as_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    lose_a_file(tmp_path / "checkpoint-3")
    rotate(tmp_path, 2, [tmp_path / "checkpoint-2"])
    assert newest(tmp_path) == tmp_path / "checkpoint-2" and (tmp_path / "checkpoint-1").is_dir()


# Where to go on


def settle(folder, wanted=None, resume=False):
    args = SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=wanted)
    said = []
    settle_resume(args, resume=resume, say=said.append)
    return args.resume_from_checkpoint, said


def test_resume_takes_the_newest_and_starts_where_there_is_none(tmp_path):
    assert settle(tmp_path / "new", resume=True) == (None, [])
    (tmp_path / "notes.txt").write_text("left by a run that was stopped before its first save")
    assert settle(tmp_path, resume=True) == (None, [])
    save(tmp_path, 1)
    newer = save(tmp_path, 12)
    assert settle(tmp_path, resume=True) == (str(newer), [f"Going on from {newer}."])
    assert settle(tmp_path, wanted=True)[0] == settle(tmp_path, wanted="true")[0] == str(newer)


def test_resume_starts_from_a_named_one_until_there_is_an_own(tmp_path):
    other = save(tmp_path / "other", 7)
    assert settle(tmp_path / "run", wanted=str(other), resume=True)[0] == str(other)
    own = save(tmp_path / "run", 8)
    assert settle(tmp_path / "run", wanted=str(other), resume=True)[0] == str(own)
    assert settle(tmp_path / "run", wanted=str(other))[0] == str(other), "without --resume the name counts"


def test_what_a_killed_first_save_left_is_no_earlier_run(tmp_path):
    (tmp_path / ".unfinished-checkpoint-1").mkdir()
    assert settle(tmp_path) == (None, [])


def test_a_finished_run_without_checkpoints_is_not_trained_again(tmp_path):
    (tmp_path / "bundle.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds a finished run without checkpoints, so there is nothing to go on from"):
        settle(tmp_path, resume=True)


def test_a_named_checkpoint_must_be_whole(tmp_path):
    lose_a_file(save(tmp_path, 1))
    with pytest.raises(UserError, match=r"checkpoint-1' is no whole checkpoint: its file trained is missing\."):
        settle(tmp_path / "run", wanted=str(tmp_path / "checkpoint-1"))


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    with pytest.raises(UserError, match=r"cannot be written: '.*' is read-only for this user; choose another"):
        settle(tmp_path / "a" / "b")


def test_lines_with_steps_are_read_and_others_left_out(tmp_path):
    path = tmp_path / "history.jsonl"
    odd = [[], None, 3, "x", {"step": "1"}, {"step": 1.5}, {"step": -1}, {"step": 10**400}, {"step": None}, {}]
    lines = [json.dumps(each) for each in [{"step": 1, "loss": 2.0}, *odd, {"step": 2, "说": "一"}]]
    path.write_text("\n".join(lines) + '\n{"step": 3, "a": ' + "[" * 5000 + '\n\xff\n{"step": 4, "lo', encoding="utf-8")
    assert read_lines(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "说": "一"}]


def test_numbers_are_numbers_that_a_float_can_hold(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"a": ' + "9" * 400 + ', "b": NaN, "c": -3, "d": 123456789012345, "e": 1e999}')
    found = read_object(path)
    assert found["a"] == math.inf and math.isnan(found["b"]) and (found["c"], found["d"]) == (-3, 123456789012345)


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "\xff", "nan", '{"a": ' + "1" * 5000 + "x}"])
def test_what_is_no_object_is_none(tmp_path, text):
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    assert read_object(tmp_path / "run.json") == {}


def test_what_is_no_file_is_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "gone", "."):
        assert read_value(tmp_path / name) is None and read_lines(tmp_path / name) == []
