"""Asks a model the questions of a benchmark, in batches of like length, and writes a record of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from ..base.console import make_console
from ..base.errors import RowError, UserError
from ..base.names import Options, Record, Row
from ..base.progress import waiting
from ..batch.processor import VLMProcessor
from ..bundle.load import load
from ..inference.confidence import pieces_of
from ..inference.generation import answer_each, check_length, decode, encode_question
from ..inference.likelihood import Likelihood, likelihoods
from ..inference.settings import SAMPLING, check_has_settings
from ..recipe.schema import Recipe
from .pictures import EncodedOnce, Pictures, grey
from .task_rows import Asked

WINDOW = 32  # batches whose questions are put in order of length together; within one, pictures stay close


def about(asked: Asked) -> Record:
    """What a record says of its question."""
    return {
        "id": asked.id, "images": asked.names(), "question": asked.text, "choices": asked.choices or None,
        "answers": asked.answers, "kind": asked.kind or None, "group": asked.group or None,
    }  # fmt: skip


@dataclass
class How:
    """How a benchmark is asked.

    Attributes:
        settings: For `generate`.
        batch_size: Questions at a time.
        likelihood: Choose the option that the model finds likeliest, in place of letting it write: by its letter, or
            (`texts`) by its text.
        options: What `likelihood` compares where a question has no choices.
        blank: Ask each question with its pictures blanked too.
        confidence: Write how sure the model was of each token also where it compared options or searched with beams,
            which takes a second pass; of what it wrote itself it is known.
    """

    settings: Options = field(default_factory=dict)
    batch_size: int = 16
    likelihood: bool | Literal["texts"] = False
    options: Sequence[str] = ()
    blank: bool = True
    confidence: bool = False


class Chosen(str):
    """The letter of the option whose text is likeliest.

    Attributes:
        logs: Letter to the logarithm of the probability of the option's text, and how many tokens that has.
        confidence: The tokens of the chosen text, and the probability of each.
    """

    logs: dict[str, tuple[float, int]]
    confidence: list[tuple[str, float]]


class Asker:
    """Asks questions.

    Args:
        model: On its device, in evaluation mode.
        processor: Its processor.
        pictures: Has what lies in tables.
        how: How they are asked.
    """

    def __init__(self, model: PreTrainedModel, processor: VLMProcessor, pictures: Pictures, how: How) -> None:
        self.model, self.processor, self.pictures, self.how = model, processor, pictures, how
        self.grey = grey()
        self.shared = EncodedOnce(model, processor)
        self._blind: dict[tuple[Any, ...], str | RowError] = {}  # question → what is said without its pictures

    def ask(self, questions: Sequence[Asked], write: Callable[[list[Record]], None]) -> None:
        """Asks all, and hands over the records of each batch as soon as there are any.

        Raises:
            UserError: The GPU's memory does not hold a batch.
        """
        with self.shared:
            for batch in batches(questions, self.how.batch_size):
                try:
                    write(self._records(batch))
                except torch.OutOfMemoryError:
                    raise UserError(
                        f"The GPU's memory does not hold {len(batch)} questions at a time: run again with a smaller "
                        "--batch-size (the answers so far are kept)."
                    ) from None

    def _records(self, batch: Sequence[Asked]) -> list[Record]:
        rows = [self._row(asked) for asked in batch]
        said = self._answers(batch, rows)
        records = []
        for asked, found in zip(batch, said, strict=True):
            text = "" if isinstance(found, RowError) else found
            record: Record = {**about(asked), "answer": text, "answer_blank": None, "confidence": None}
            if pieces := getattr(found, "confidence", None):
                record["confidence"] = [[piece, round(share, 4)] for piece, share in pieces]
            if isinstance(found, Chosen):
                record |= {"options": _rounded(found), "options_blank": None}
            records.append({**record, "error": str(found)} if isinstance(found, RowError) else record)
        good = [k for k, found in enumerate(said) if not isinstance(found, RowError)]
        if self.how.confidence:
            unknown = [k for k in good if records[k]["confidence"] is None]  # options compared, or several beams
            pairs = [(rows[k], str(said[k])) for k in unknown]
            for k, likelihood in zip(unknown, self._likelihoods(pairs), strict=True):
                pieces = self._pieces(str(said[k]), likelihood)
                records[k]["confidence"] = [[piece, round(share, 4)] for piece, share in pieces]
        if self.how.blank:
            seeing = [k for k in good if batch[k].images]
            for k, blind in zip(seeing, self._blindly([batch[k] for k in seeing]), strict=True):
                records[k]["answer_blank"] = "" if isinstance(blind, RowError) else blind
                if isinstance(blind, Chosen):
                    records[k]["options_blank"] = _rounded(blind)
        return records

    def _row(self, asked: Asked, blank: bool = False) -> Row:
        content = [*[{"type": "image"} for _ in asked.images], {"type": "text", "text": asked.text}]
        images = [self.grey if blank else self.pictures.whole(image) for image in asked.images]
        return {"messages": [{"role": "user", "content": content}], "images": images, "id": asked.id}

    def _answers(self, batch: Sequence[Asked], rows: list[Row]) -> list[str | RowError]:
        """What the model says to each, or why it cannot be asked."""
        try:
            shown = self.shared.stand_ins(rows)
            for row in shown:
                where = f"row {row['id']}"
                try:
                    check_length(self.model, len(encode_question(self.processor, row, where).input_ids), where)
                except UserError as error:
                    raise error if isinstance(error, RowError) else RowError(str(error), where=where) from None
            compared = [k for k, asked in enumerate(batch) if self.how.likelihood and self._options(asked)]
            written = [k for k in range(len(batch)) if k not in compared]
            said: dict[int, str | RowError] = {}
            if compared:
                chosen = self._likeliest([batch[k] for k in compared], [shown[k] for k in compared])
                said |= dict(zip(compared, chosen, strict=True))
            if written:
                asked_of = [shown[k] for k in written]
                found = answer_each(self.model, self.processor, asked_of, confidence=True, **self.how.settings)
                said |= dict(zip(written, found, strict=True))
            return [said[k] for k in range(len(batch))]
        except RowError as error:
            if len(batch) == 1:
                return [error]
        return [found for asked, row in zip(batch, rows, strict=True) for found in self._answers([asked], [row])]

    def _options(self, asked: Asked) -> dict[str, str]:
        """What may be answered → the text whose likelihood is looked for."""
        if asked.choices and self.how.likelihood == "texts":
            return asked.choices
        return {option: option for option in list(asked.choices) or self.how.options}

    def _likeliest(self, batch: Sequence[Asked], shown: Sequence[Row]) -> Iterator[str]:
        pairs = [(row, text) for asked, row in zip(batch, shown, strict=True) for text in self._options(asked).values()]
        likelihoods = iter(self._likelihoods(pairs, shown=True))
        for asked in batch:
            found = {option: next(likelihoods) for option in self._options(asked)}
            if not (asked.choices and self.how.likelihood == "texts"):
                yield max(found, key=lambda option: found[option].log)
                continue
            # Of a text, as lm-eval has it, without the mark that ends it.
            logs = {option: (sum(one.logs[:-1]), len(one.logs) - 1) for option, one in found.items()}
            chosen = Chosen(max(logs, key=lambda option: logs[option][0]))
            one = found[chosen]
            chosen.logs = logs
            chosen.confidence = self._pieces(asked.choices[chosen], one)
            yield chosen

    def _pieces(self, text: str, found: Likelihood) -> list[tuple[str, float]]:
        """An answer in pieces with the probability of each; the last token, which ends it, is none."""
        shares = [math.exp(log) for log in found.logs[:-1]]
        return pieces_of(text.strip(), found.ids[:-1], shares, partial(decode, self.processor))

    def _likelihoods(self, pairs: Sequence[tuple[Row, str]], shown: bool = False) -> Iterator[Likelihood]:
        for start in range(0, len(pairs), self.how.batch_size):
            some = pairs[start : start + self.how.batch_size]
            rows = [row for row, _ in some]
            rows = rows if shown else self.shared.stand_ins(rows)
            said = [{"role": "assistant", "content": [{"type": "text", "text": text}]} for _, text in some]
            answered = [{**row, "messages": [*row["messages"], one]} for row, one in zip(rows, said, strict=True)]
            yield from likelihoods(self.model, self.processor, answered)

    def _blindly(self, batch: Sequence[Asked]) -> list[str | RowError]:
        """Answers with every picture grey; questions that differ in their pictures alone are asked once."""
        drawn = self.how.settings.get("do_sample") or SAMPLING.keys() & self.how.settings.keys()
        keys = [(a.id if drawn else "", a.text, len(a.images), tuple(a.choices.values())) for a in batch]
        new = {key: asked for key, asked in zip(keys, batch, strict=True) if key not in self._blind}
        rows = [self._row(asked, blank=True) for asked in new.values()]
        self._blind |= dict(zip(new, self._answers(list(new.values()), rows) if rows else [], strict=True))
        return [self._blind[key] for key in keys]


def _rounded(chosen: Chosen) -> dict[str, list[float]]:
    return {option: [round(log, 4), tokens] for option, (log, tokens) in chosen.logs.items()}


def batches(questions: Sequence[Asked], size: int) -> Iterator[list[Asked]]:
    """Questions in batches of like length, those on one picture close to each other."""
    pictures: dict[tuple[str, ...], int] = {}
    order = sorted(questions, key=lambda asked: pictures.setdefault(tuple(asked.names()), len(pictures)))
    for start in range(0, len(order), size * WINDOW):
        window = sorted(order[start : start + size * WINDOW], key=lambda asked: (len(asked.images), len(asked.text)))
        # The longest first: a memory that does not hold them is known at once.
        window.reverse()
        for first in range(0, len(window), size):
            yield window[first : first + size]


def share_of(questions: Sequence[Asked], process: int, processes: int) -> list[Asked]:
    """The questions of one of several processes: those on one picture stay together where they can."""
    pictures: dict[tuple[str, ...], int] = {}
    order = sorted(questions, key=lambda asked: pictures.setdefault(tuple(asked.names()), len(pictures)))
    return order[len(order) * process // processes : len(order) * (process + 1) // processes]


class Loading:
    """A bundle, loaded when it is first asked something: `model, processor = loading()`.

    Args:
        folder: The bundle.
        recipe: Its own.
        trust_remote_code: See `vlm_sft.load`.
        options: What a user says of generation, which a model that writes nothing refuses when it is loaded.
    """

    def __init__(self, folder: Path, recipe: Recipe, trust_remote_code: bool, options: Options | None = None) -> None:
        self.folder, self.recipe, self.trust, self.options = folder, recipe, trust_remote_code, options or {}
        self._loaded: tuple[PreTrainedModel, VLMProcessor] | None = None

    @property
    def loaded(self) -> bool:
        """Whether it was asked something."""
        return self._loaded is not None

    def __call__(self) -> tuple[PreTrainedModel, VLMProcessor]:
        if self._loaded is None:
            state = PartialState()
            device = state.device if state.num_processes > 1 else None
            with waiting(make_console(), f"Loading {self.folder.name}"):
                model, processor = load(self.folder, device=device, trust_remote_code=self.trust)
            check_has_settings(str(self.folder), processor, self.options)
            self._loaded = model, processor  # type: ignore[assignment]
        return self._loaded  # type: ignore[return-value]
