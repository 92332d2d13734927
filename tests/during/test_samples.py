"""Answers to a few rows: what a line of a log and a line of the file say, whatever stands in the rows."""

from __future__ import annotations

import pytest

from vlm_sft import load_recipe
from vlm_sft.base.console import make_console, say
from vlm_sft.base.errors import RowError, UserError
from vlm_sft.base.names import SAMPLES
from vlm_sft.bundle.run_folder import read_lines
from vlm_sft.during.samples import Samples, in_words
from vlm_sft.inference.confidence import Said


class Pupil:
    """Says what it is told to."""

    processor = None

    class trainer:  # noqa: N801
        class callback_handler:  # noqa: N801
            callbacks = ()

        is_world_process_zero = staticmethod(lambda: True)

    def __init__(self, *said):
        self.said = said

    def answers(self, rows, batch_size, settings):
        assert settings["max_new_tokens"] == 64
        if isinstance(self.said[0], UserError) and not isinstance(self.said[0], RowError):
            raise self.said[0]
        return list(self.said)


@pytest.fixture
def samples(recipe_file, caption_file, tmp_path):
    source = {"path": caption_file, "format": "caption"}
    recipe = load_recipe(recipe_file(data={"train": [source], "eval": [source]}, evaluation={"samples": 2}))
    (tmp_path / "out" / "recipe").mkdir(parents=True)
    said: list[str] = []
    made = Samples(recipe, said.append)
    made.questions = made.drawn
    return made, said


def test_answers_stand_in_the_log_and_in_the_file(samples):
    made, said = samples
    made.ask(Pupil(Said("一只猫"), RowError("row x: the image is damaged")), 20)
    assert len(said) == 1 and said[0].startswith("Step 20, answers to 2 rows:\n") and "→ 一只猫 (right: " in said[0]
    assert "not asked: row x: the image is damaged" in said[0]
    first, second = read_lines(made.file)
    assert first["answer"] == "一只猫" and first["step"] == 20 and second["error"] == "row x: the image is damaged"
    (small,) = first["shown"]  # so that the page needs no other file, and reads none that a run names
    assert small.startswith("data:image/jpeg;base64,") and len(small) < 10_000
    made.ask(Pupil(Said("一只猫"), Said("")), 30)
    assert ["shown" in line for line in read_lines(made.file)] == [True, True, False, False]
    assert made.file.name == SAMPLES and "\\u" not in made.file.read_text(encoding="utf-8")


def test_a_terminal_obeys_nothing_that_a_row_or_an_answer_says(samples, capsys):
    record = {"id": "a[bold]", "question": "q\x1b]52;c;aGk=\x07\n\nsecond", "answers": ["\x1b[2J"], "answer": "x" * 500}
    line = in_words(record)
    assert "\n" not in line and len(line) < 340
    say(make_console(quiet=False), line)
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and "a[bold]" in shown


def test_half_a_character_can_be_written_down(samples):
    made, _ = samples
    made.ask(Pupil(Said("a\ud83d"), Said("")), 1)
    assert [row["answer"] for row in read_lines(made.file)] == ["a\ud83d", ""]


def test_a_model_that_cannot_answer_is_asked_once(samples):
    made, said = samples
    made.ask(Pupil(UserError("the model cannot answer with these settings of `generation`: no")), 1)
    made.ask(Pupil(Said("a"), Said("b")), 2)
    assert len(said) == 1 and said[0].startswith("No answers are shown while this run goes on: the model cannot")
    assert read_lines(made.file) == []


def test_lines_that_are_none_are_passed_over(tmp_path):
    path = tmp_path / SAMPLES
    path.write_text('{"step": 1, "id": "a"}\n[]\n{"step": "x"}\n\n{"step": 2, "i')
    assert read_lines(path) == [{"step": 1, "id": "a"}] and read_lines(tmp_path / "gone") == []
