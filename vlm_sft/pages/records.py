"""Answers that `evaluate` wrote down, as they are shown: what is wrong, how sure the model was, what another said."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.whole_files import IrregularError, read_text
from ..base.words import reason_of
from ..metrics.paired import Paired

WRONG_BELOW = 0.5  # of a score, where a measure gives shares: of VQA's ten people fewer than two agree
BETTER, WORSE = "better", "worse"


@dataclass(frozen=True)
class Other:
    """What another bundle said to the same question."""

    answer: str
    score: float


@dataclass(frozen=True)
class Entry:
    """One question with its answers.

    Attributes:
        sheet: Name of the benchmark, or of the split.
        id: Of the question.
        kind: The benchmark's own category, or "".
        question: The text that was asked.
        choices: Letter → option, or none.
        answers: Right answer → how often it is there.
        answer: What the model said.
        pieces: It in pieces with the probability of each; None where that is not known.
        answer_blank: What it said to grey images; None where it was not asked.
        score: From 0 to 1; of captions it may be more.
        score_blank: Of `answer_blank`.
        error: Why it could not be asked, or "".
        images: As the record names them.
        other: Of the other bundle, if there is one.
    """

    sheet: str
    id: str
    kind: str
    question: str
    choices: dict[str, str]
    answers: dict[str, int]
    answer: str
    pieces: list[tuple[str, float]] | None
    answer_blank: str | None
    score: float
    score_blank: float | None
    error: str
    images: list[str]
    other: Other | None = None

    @property
    def sure(self) -> float | None:
        """How sure the model was: the geometric mean over the answer's pieces, which no answer loses by its length."""
        if not self.pieces:
            return None
        logs = sum(math.log(max(share, 1e-30)) for _, share in self.pieces)
        return math.exp(logs / len(self.pieces))

    @property
    def wrong(self) -> bool:
        """Whether it counts as wrong."""
        return self.score < WRONG_BELOW

    @property
    def blind(self) -> bool:
        """Whether the answer to grey images is the better one."""
        return self.score_blank is not None and self.score_blank > self.score

    @property
    def change(self) -> str:
        """Whether it got better or worse than the other bundle's, or ""."""
        if self.other is None or self.other.score == self.score:
            return ""
        return BETTER if self.score > self.other.score else WORSE


@dataclass
class Sheet:
    """One benchmark, or the rows of a split.

    Attributes:
        name: Its name.
        entries: Every question, in order.
        scores: Metric → `value`, `low`, `high`, the first what it is ranked by.
        blank: The same with every image grey; empty where that was not asked.
        paired: Against the other bundle.
        notes: Sentences on it.
    """

    name: str
    entries: list[Entry]
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    blank: dict[str, dict[str, float]] = field(default_factory=dict)
    paired: Paired | None = None
    notes: list[str] = field(default_factory=list)


def sheet_of(name: str, records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> Sheet:
    """A sheet of what `evaluate` found.

    Args:
        name: Of the benchmark, or of the split.
        records: One a question.
        summary: `scores` and maybe `scores_blank`: metric → `value`, `low`, `high`.
    """
    return Sheet(
        name, list(entries_of(name, records)), dict(summary["scores"]), dict(summary.get("scores_blank") or {})
    )


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of answers.

    Raises:
        UserError: It cannot be read, or a line is not one of ours.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}): give a file of answers.") from None
    except IrregularError as error:
        raise UserError(f"{path} cannot be read (it is {error.what}): give a file of answers.") from None
    records, seen = [], set()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        flaw = ""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            flaw = "is no JSON"
        else:
            flaw = flaw_of(record)
        if not flaw and record["id"] in seen:
            flaw = f'has the id "{record["id"]}" again'
        if flaw:
            raise UserError(f"{path}: line {number} {flaw}: give a file that `vlm-sft evaluate` wrote.")
        seen.add(record["id"])
        records.append(record)
    if not records:
        raise UserError(f"{path} holds no answers: give a file that `vlm-sft evaluate` wrote.")
    return records


def flaw_of(record: object) -> str:
    """What makes a line no record of ours, or ""."""
    if not isinstance(record, dict):
        return "is no object"
    for key, kinds in (("id", str), ("question", str), ("answers", list), ("answer", str), ("score", int | float)):
        if not isinstance(record.get(key), kinds):
            return f'has no "{key}" as answers have it'
    pieces = record.get("confidence")
    whole = pieces is None or (
        isinstance(pieces, list)
        and all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) and _is_share(p[1]) for p in pieces)
    )
    if not whole:
        return 'has no "confidence" as answers have it'
    for key, wanted in (
        ("choices", (dict,)),
        ("images", (list,)),
        ("answer_blank", (str,)),
        ("score_blank", (int, float)),
    ):
        if record.get(key) is not None and not isinstance(record[key], wanted):
            return f'has no "{key}" as answers have it'
    return "" if math.isfinite(record["score"]) else 'has no "score" as answers have it'


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1.001


def entries_of(sheet: str, records: Sequence[Mapping[str, Any]]) -> Iterator[Entry]:
    """The questions of a file of answers."""
    for record in records:
        answers: dict[str, int] = {}
        for answer in record["answers"]:
            answers[str(answer)] = answers.get(str(answer), 0) + 1
        pieces = record.get("confidence")
        yield Entry(
            sheet, record["id"], str(record.get("kind") or ""), record["question"],
            {str(key): str(value) for key, value in (record.get("choices") or {}).items()}, answers, record["answer"],
            None if pieces is None else [(str(piece), float(share)) for piece, share in pieces],
            record.get("answer_blank"), float(record["score"]),
            None if record.get("score_blank") is None else float(record["score_blank"]),
            str(record.get("error") or ""), [str(image) for image in record.get("images") or ()],
        )  # fmt: skip
