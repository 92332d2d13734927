"""Answers before a judge: what it is asked of each, in both orders, and what its verdicts say together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console

from ..base.errors import RowError
from ..base.names import Json, Options, Record, Values
from .judge import Judge, ask_all
from .server import Message, Reply
from .verdicts import scores_of

REFERENCE_FIRST, ANSWER_FIRST, ALONE = "reference first", "answer first", "alone"

Render = Callable[[str, str, Json], str]
"""A prompt, where it is of, and what it sees → text."""


class Rules(Protocol):
    """What a benchmark says of its judge; see `evaluation.tasks.Judging`."""

    prompt: str
    system: str | None
    compare: bool
    scale: list[float]
    settings: Options


def review(
    records: Sequence[Record],
    columns: Mapping[str, Values],
    rules: Rules,
    render: Render,
    judge: Judge,
    path: Path,
    console: Console,
) -> Json:
    """Has answers judged: `verdicts` and, where images were blanked, `verdicts_blank` go into their records.

    Args:
        records: Of the questions; those that could not be asked are not judged.
        columns: Id of a question → its row and what was asked.
        rules: Of the benchmark.
        render: Fills a prompt.
        judge: Who judges.
        path: File in which verdicts are kept.
        console: Where to say how far it is.

    Returns:
        `url`, `model`, `verdicts` (how many were wanted), `unparsable` (that name no scores), `refused` (that the
        server would not give) with the `first` reason, and `cost`.
    """
    wanted = [
        (record, name, order)
        for record in records
        if "error" not in record
        for name, said in (("verdicts", "answer"), ("verdicts_blank", "answer_blank"))
        if record[said] is not None
        for order in ((REFERENCE_FIRST, ANSWER_FIRST) if rules.compare else (ALONE,))
    ]
    for record in records:
        record["verdicts"] = record["verdicts_blank"] = None
    prompts = [list(_messages(*each, columns[each[0]["id"]], rules, render)) for each in wanted]
    replies, cost = ask_all(judge, prompts, rules.settings, path, console)
    unparsable, refused = 0, []
    for (record, name, order), reply in zip(wanted, replies, strict=True):
        verdict = _verdict(order, reply, rules)
        record[name] = [*(record[name] or []), verdict]
        if isinstance(reply, RowError):
            refused.append(str(reply))
        else:
            unparsable += verdict["answer"] is None
    found = {
        "url": judge.shown, "model": judge.model, "settings": {**rules.settings, **judge.settings},
        "verdicts": len(wanted), "unparsable": unparsable, "refused": len(refused), "cost": cost.report(judge.price),
    }  # fmt: skip
    return found | ({"first": refused[0]} if refused else {})


def _messages(
    record: Values, name: str, order: str, columns: Values, rules: Rules, render: Render
) -> Iterator[Message]:
    answer = record["answer" if name == "verdicts" else "answer_blank"]
    reference = "\n".join(record["answers"][:1])
    shown = (reference, answer) if order == REFERENCE_FIRST else (answer, reference)
    values = {**columns, "answer": answer, "reference": reference, "first": shown[0], "second": shown[1]}
    if rules.system:
        yield {"role": "system", "content": rules.system}
    where = f"question {record['id']}, judge"
    yield {"role": "user", "content": render(rules.prompt, where, {**values, "kind": record["kind"] or ""})}


def _verdict(order: str, reply: Reply | RowError, rules: Rules) -> Json:
    """A verdict as it is written: what it gives the reference and the answer, or null where it names no scores."""
    if isinstance(reply, RowError):
        return {"order": order, "reference": None, "answer": None, "text": "", "error": str(reply)}
    low, high = rules.scale
    found = scores_of(reply.text, 2 if rules.compare else 1, low, high)
    scores: tuple[float | None, float | None] = (None, None)
    if found is not None:
        # An answer that stands alone is measured against the top of the scale.
        scores = (high, found[0]) if order == ALONE else (found[0], found[1])
        scores = scores[::-1] if order == ANSWER_FIRST else scores
    return {"order": order, "reference": scores[0], "answer": scores[1], "text": reply.text}


def in_words(found: Values) -> str:
    """What judging cost and what it left out, in a sentence."""
    cost = found["cost"]
    tokens = f"{cost['prompt_tokens']:,} tokens asked and {cost['completion_tokens']:,} answered"
    price = f", which cost {cost['cost']:,.4g} ({cost['paid']:,.4g} now)" if "cost" in cost else ""
    unknown = f"; of {cost['uncounted']:,} the server did not count them" if cost["uncounted"] else ""
    lost = [f"{found[name]:,} {what}" for name, what in (("unparsable", "name no scores"), ("refused", "were refused"))
            if found[name]]  # fmt: skip
    left = f"; {' and '.join(lost)}, and count nowhere" if lost else ""
    return (
        f"Judged by {found['model']}: {found['verdicts']:,} verdicts ({cost['asked']:,} asked for now), {tokens}"
        f"{unknown}{price}{left}."
    )
