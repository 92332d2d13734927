"""Answers to a few rows, the same at each evaluation: at the terminal, in a file of the run, and in its trackers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import RowError, UserError
from ..base.names import SAMPLES, ImageEntry, Record
from ..base.whole_files import write_whole
from ..base.words import one_line, reason_of
from ..bundle.run_folder import read_lines
from ..evaluation.evaluate import records_of
from ..evaluation.scoring import Answers, Question, merge
from ..metrics.exact_match import exact_match
from ..pages.pictures import thumbnail
from ..reading.images import load_image
from .in_training import InTraining
from .own_rows import draw, row_of
from .trackers import show_in_trackers

if TYPE_CHECKING:
    from ..recipe.schema import Recipe

TOKENS = 64  # tokens of an answer that is shown
SIDE = 200  # pixels of a picture that is written with them
SHOWN = 100  # characters of an answer at the terminal
WRITTEN = ("id", "images", "question", "answers", "answer", "score", "error")


class Samples:
    """The answers of a run to a few rows.

    Args:
        recipe: With its `evaluation`.
        say: Told what the model said.

    Raises:
        UserError: A source cannot be read.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None]) -> None:
        self.drawn, self.say = draw(recipe), say
        most = recipe.generation.get("max_new_tokens") or (None if recipe.encoder else TOKENS)  # an encoder says little
        self.settings = {**recipe.generation, **({"max_new_tokens": min(most, TOKENS)} if most else {})}
        self.batch_size = recipe.evaluation.batch_size
        self.file = Path(str(recipe.sft["output_dir"])) / SAMPLES
        self.questions: list[Question] = []
        self._first, self._asked = True, -1

    def begin(self, pupil: InTraining, step: int) -> None:
        """Before the first step: what the model says; where a run goes on, what was said later is forgotten."""
        if pupil.trainer.is_world_process_zero() and self.drawn:
            kept = [record for record in read_lines(self.file) if record["step"] <= step] if step else []
            self._write(kept)
        if not step:
            self.ask(pupil, step)

    def ask(self, pupil: InTraining, step: int) -> None:
        """Asks, and shows what the model says; one that cannot answer is said once, and asked no more."""
        if not self.drawn or step == self._asked:  # `eval_on_start` evaluates where it was asked already
            return
        self._asked = step
        try:
            self.questions = self.questions or merge(self.drawn, pupil.processor)  # type: ignore[arg-type]
            said = pupil.answers([row_of(each) for each in self.questions], self.batch_size, self.settings)
        except UserError as error:
            self.say(f"No answers are shown while this run goes on: {error}")
            self.drawn = []
            return
        if not pupil.trainer.is_world_process_zero():
            return
        for question, found in zip(self.questions, said, strict=True):
            question.refused = str(found) if isinstance(found, RowError) else ""
        answers = ["" if isinstance(found, RowError) else str(found) for found in said]
        pairs = zip(answers, self.questions, strict=True)
        scores = [float(exact_match(text, question.references)) for text, question in pairs]
        told = records_of(Answers(None, "exact_match", self.questions, answers, scores))
        records = [{"step": step, **{key: record[key] for key in WRITTEN if key in record}} for record, _ in told]
        images = [question.images for question in self.questions]
        # Pictures are written once: they do not change.
        small = [{"shown": thumbnails(some)} if self._first else {} for some in images]
        self._write([*read_lines(self.file), *(one | two for one, two in zip(records, small, strict=True))])
        self.say("\n".join([f"Step {step:,}, answers to {len(records)} rows:", *map(in_words, records)]))
        show_in_trackers(pupil.trainer.callback_handler.callbacks, records, images, step, self._first, self.say)
        self._first = False

    def _write(self, records: Sequence[Record]) -> None:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        try:
            write_whole(self.file, "".join(lines).encode("utf-8", "backslashreplace"))
        except OSError as error:  # a full disk ends no run here: a save says so, where it cannot be made
            self.say(f"{self.file} cannot be written ({reason_of(error)}): these answers stand in the log alone.")


def thumbnails(images: Sequence[ImageEntry]) -> list[str]:
    """Small pictures as data URIs: the page of a run is made of its own files, wherever those lie later."""
    found = []
    for image in images:
        with suppress(UserError):
            found.append(thumbnail(load_image(image), side=SIDE).data_uri)
    return found


def in_words(record: Record) -> str:
    """One answer as a line of a log."""
    if "error" in record:
        return f"  {record['id']}: not asked: {_cut(record['error'])}"
    asked, said = _cut(record["question"]) or "(the image)", _cut(record["answer"]) or "(nothing)"
    return f"  {record['id']}: {asked} → {said} (right: {_cut(' or '.join(dict.fromkeys(record['answers'])))})"


def _cut(text: str) -> str:
    text = one_line(text)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
