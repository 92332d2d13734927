"""Answers that `evaluate` wrote down, as they are shown: what is wrong, how sure the model was, what another said."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..base.errors import UserError
from ..base.limits import READERS, bounded
from ..base.names import Record, Values
from ..base.whole_files import IrregularError, read_bytes
from ..base.words import reason_of
from ..metrics.paired import Paired

WRONG_BELOW = 0.5  # of a score, where a measure gives shares: of VQA's ten people fewer than two agree
BETTER, WORSE = "better", "worse"


@dataclass(frozen=True)
class Other:
    """What another bundle said to the same question."""

    answer: str
    score: float | None


@dataclass(frozen=True)
class Verdict:
    """What a judge said of an answer, and what it gave the reference and the answer; None where it names no scores."""

    order: str
    reference: float | None
    answer: float | None
    text: str
    error: str


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
        score: From 0 to 1; of captions and what a judge scores it may be more. None where a judge names no score.
        score_blank: Of `answer_blank`.
        error: Why it could not be asked, or "".
        images: As the record names them.
        other: Of the other bundle, if there is one.
        verdicts: Of a judge.
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
    score: float | None
    score_blank: float | None
    error: str
    images: list[str]
    other: Other | None = None
    verdicts: tuple[Verdict, ...] = ()

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
        return self.score is not None and self.score < WRONG_BELOW

    @property
    def blind(self) -> bool:
        """Whether the answer to grey images is the better one."""
        return self.score is not None and self.score_blank is not None and self.score_blank > self.score

    @property
    def change(self) -> str:
        """Whether it got better or worse than the other bundle's, or ""."""
        if self.other is None or self.score is None or self.other.score in (None, self.score):
            return ""
        assert self.other.score is not None
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
        warnings: Those that throw doubt on its scores.
    """

    name: str
    entries: list[Entry]
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    blank: dict[str, dict[str, float]] = field(default_factory=dict)
    paired: Paired | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def sheet_of(name: str, records: Sequence[Values], summary: Values) -> Sheet:
    """A sheet of what `evaluate` found.

    Args:
        name: Of the benchmark, or of the split.
        records: One a question.
        summary: `scores` and maybe `scores_blank`: metric → `value`, `low`, `high`.
    """
    return Sheet(
        name, list(entries_of(name, records)), dict(summary["scores"]), dict(summary.get("scores_blank") or {})
    )


def read_records(path: Path, unfinished: bool = False) -> list[Record]:
    """The lines of a file of answers.

    Args:
        path: As `vlm-sft evaluate` wrote it.
        unfinished: It is still written: answers have no scores yet, and half a record in its last line is left out.

    Raises:
        UserError: It cannot be read, or a line is not one of ours.
    """
    mend = "remove the file and evaluate again" if unfinished else "give a file that `vlm-sft evaluate` wrote"
    try:
        lines = read_bytes(path).split(b"\n")
    except (OSError, IrregularError) as error:
        what = f"it is {error.what}" if isinstance(error, IrregularError) else reason_of(error)
        raise UserError(f"{path} cannot be read ({what}): {mend}.") from None
    records, seen = [], set()
    for number, line in enumerate(lines, start=1):
        if not line.strip(b"\0 \r"):
            continue
        try:
            record = json.loads(bounded(line).decode())
        except (ValueError, RecursionError):
            record, flaw = None, "is no JSON"
        else:
            flaw = flaw_of(record, scored=not unfinished)
        if flaw and unfinished and number == len(lines):
            break
        if not flaw and record["id"] in seen and not unfinished:
            flaw = f'has the id "{record["id"]}" again'
        if flaw:
            raise UserError(f"{path}: line {number} {flaw}: {mend}.")
        seen.add(record["id"])
        records.append(record)
    if not records and not unfinished:
        raise UserError(f"{path} holds no answers: {mend}.")
    return records


def flaw_of(record: object, scored: bool = True) -> str:
    """What makes a line no record of ours, or ""; one that is not scored has no more than its id and an answer."""
    if not isinstance(record, dict):
        return "is no object"
    kinds: dict[str, type] = {"id": str, "answer": str}
    for key, kind in (kinds | {"question": str, "answers": list} if scored else kinds).items():
        if not isinstance(record.get(key), kind):
            return f'has no "{key}" as answers have it'
    if not scored:
        return ""
    if not is_confidence(record.get("confidence")):
        return 'has no "confidence" as answers have it'
    for key, wanted in (
        ("choices", (dict,)),
        ("images", (list,)),
        ("answer_blank", (str,)),
        ("verdicts", (list,)),
    ):
        if record.get(key) is not None and not isinstance(record[key], wanted):
            return f'has no "{key}" as answers have it'
    if record.get("score_blank") is not None and not _is_score(record["score_blank"]):
        return 'has no "score_blank" as answers have it'
    verdicts = record.get("verdicts") or ()
    if not all(map(_is_verdict, verdicts)):
        return 'has no "verdicts" as answers have it'
    unscored = bool(verdicts) and "score" in record and record["score"] is None  # the judge named no scores
    return "" if unscored or _is_score(record.get("score")) else 'has no "score" as answers have it'


def is_confidence(pieces: object) -> bool:
    """Whether it is an answer in pieces, each with its probability; or nothing."""
    return pieces is None or (
        isinstance(pieces, list)
        and all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) and _is_share(p[1]) for p in pieces)
    )


def _is_score(value: object) -> bool:
    """Whether it is a number as measures give them: CIDEr's 10 is the largest."""
    return isinstance(value, int | float) and abs(value) <= READERS.score_magnitude


def _is_verdict(value: object) -> bool:
    scores = [value.get("reference"), value.get("answer")] if isinstance(value, dict) else [""]
    numbers = all(score is None or _is_score(score) for score in scores)
    return numbers and isinstance(value, dict) and isinstance(value.get("text"), str)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1.001


def entries_of(sheet: str, records: Sequence[Values]) -> Iterator[Entry]:
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
            record.get("answer_blank"), None if record["score"] is None else float(record["score"]),
            None if record.get("score_blank") is None else float(record["score_blank"]),
            str(record.get("error") or ""), [str(image) for image in record.get("images") or ()],
            verdicts=tuple(map(_verdict, record.get("verdicts") or ())),
        )  # fmt: skip


def _verdict(one: Values) -> Verdict:
    said = str(one.get("order") or ""), one["reference"], one["answer"], one["text"], str(one.get("error") or "")
    return Verdict(*said)
