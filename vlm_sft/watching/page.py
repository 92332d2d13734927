"""The page of one run, or of several laid over each other: curves, answers, rows, what is trained, what went wrong."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.limits import READERS
from ..base.names import Json, Record
from ..base.words import duration
from ..pages.layout import render
from .charts import COLOURS, Line, Panel, draw
from .runs import Run

TRAINING, VALIDATION = "training", "validation"
CURVES: tuple[tuple[str, str, tuple[tuple[str, str], ...], bool], ...] = (
    ("loss", "损失", (("loss", TRAINING), ("eval_loss", VALIDATION)), False),
    ("token accuracy", "token 准确率", (("token_accuracy", TRAINING), ("eval_token_accuracy", VALIDATION)), True),
    ("image use: loss with another image, less with its own", "图像的作用", (("eval_image_use", VALIDATION),), False),
    ("tokens per second", "每秒 token 数", (("tokens_per_second", ""),), False),
    ("share of time waiting for data", "等待数据的时间", (("data_wait_share", ""),), True),
    ("most memory so far, GiB", "最大内存（GiB）", (("memory_gib", ""),), False),
    ("gradient norm", "梯度范数", (("grad_norm", ""),), False),
)
"""Title, in Chinese, keys of a log with what each is called, and whether they are shares."""

RATE = "learning_rate"
NOT_SHOWN = ("_runtime", "_per_second", "_loss_own_image", "_loss_other_image", "train_loss", "total_flos", "_epoch")
MORE = 12  # further metrics of answers that are drawn
COUNTS = ("total", "trained", "adapted")  # what is counted of a part, in weights
STEPS = 12  # answers of a row that are shown
ROWS = 24
PICTURES = 8  # pictures of a row
_PICTURE = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/]+=*")


@dataclass
class Asked:
    """A row whose answers are shown.

    Attributes:
        run: Name of the run.
        id: Of the row.
        question: What was asked.
        answers: What is right.
        pictures: As data URIs.
        said: (step, answer, whether it is right, why it could not be asked).
        hidden: How many answers in between are not shown.
    """

    run: str
    id: str
    question: str
    answers: list[str]
    pictures: list[str]
    said: list[tuple[int, str, bool, str]]
    hidden: int


def run_page(runs: Sequence[Run], refresh: int | None = None) -> str:
    """The page as text.

    Args:
        runs: One, or several to compare.
        refresh: Seconds after which a browser loads the page again; None for a page that stays as it is.
    """
    return render(
        Path(__file__).with_name("run.html.jinja"),
        runs=list(runs),
        title=" · ".join(run.name for run in runs),
        panels=panels_of(runs),
        asked=[one for run in runs for one in asked_of(run)],
        refresh=refresh,
        made=time.strftime("%Y-%m-%d %H:%M:%S"),
        duration=duration,
        colours=COLOURS,
        lost=lost_of,
        rejected=rejected_of,
        facts=facts_of,
        parts=parts_of,
    )


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """All charts that have a line."""
    found = [draw(title, zh, _lines(runs, keys), share) for title, zh, keys, share in CURVES]
    rates = list(dict.fromkeys(key for run in runs for key in run.keys() if key.startswith(RATE)))  # noqa: SIM118
    parts = [key for key in rates if key != RATE] or rates
    found.insert(
        3, draw("learning rate", "学习率", _lines(runs, [(k, k.removeprefix(RATE).strip("_")) for k in parts]))
    )
    shown = {key for _, _, keys, _ in CURVES for key, _ in keys}
    others = list(dict.fromkeys(key for run in runs for key in run.keys() if key.startswith("eval_")))  # noqa: SIM118
    more = [key for key in others if key not in shown and not key.endswith(NOT_SHOWN)]
    for key in more[:MORE]:
        values = [value for run in runs for _, value in run.series(key)]
        share = all(0 <= value <= 1 for value in values) and not key.endswith("loss")
        found.append(draw(key.removeprefix("eval_").replace("_", " "), "", _lines(runs, [(key, VALIDATION)]), share))
    return [panel for panel in found if panel is not None]


def _lines(runs: Sequence[Run], keys: Sequence[tuple[str, str]]) -> list[Line]:
    """One run: a colour a key. Several: a colour a run, and its validation dashed."""
    if len(runs) == 1:
        return [Line(label, runs[0].series(key), number % COLOURS) for number, (key, label) in enumerate(keys)]
    return [
        Line(f"{run.name}{label and f', {label}'}", run.series(key), number % COLOURS, dashed=place > 0)
        for number, run in enumerate(runs)
        for place, (key, label) in enumerate(keys)
    ]


def asked_of(run: Run) -> list[Asked]:
    """The rows of a run's samples, each with its answers in order."""
    rows: dict[str, list[Record]] = {}
    for record in run.samples:
        rows.setdefault(str(record.get("id")), []).append(record)
    found = []
    for name, records in list(rows.items())[:ROWS]:
        records.sort(key=lambda record: record["step"])
        chosen = _spread(records, STEPS)
        said = [(r["step"], str(r.get("answer", "")), bool(r.get("score")), str(r.get("error", ""))) for r in chosen]
        first = records[-1]
        answers = list(dict.fromkeys(map(str, _list(first.get("answers")))))
        shown = next((record["shown"] for record in reversed(records) if record.get("shown")), None)
        pictures = [picture for picture in _list(shown)[:PICTURES] if _is_picture(picture)]
        hidden = len(records) - len(chosen)
        found.append(Asked(run.name, name, str(first.get("question") or ""), answers, pictures, said, hidden))
    return found


def _spread(records: list[Json], most: int) -> list[Json]:
    """The first, the last, and some between them."""
    if len(records) <= most:
        return records
    return [records[round(number * (len(records) - 1) / (most - 1))] for number in range(most)]


def _is_picture(value: object) -> bool:
    """Whether it is a small picture as a run writes it; no file is read that a run names."""
    return isinstance(value, str) and len(value) <= READERS.sample_picture and _PICTURE.fullmatch(value) is not None


def facts_of(run: Run) -> list[tuple[str, str]]:
    """What is fixed of a run, in words."""
    facts, best = run.facts, _object(run.facts.get("best"))
    given = [
        ("recipe", facts.get("recipe")),
        ("device", facts.get("device") and f"{facts.get('processes', 1)} × {facts['device']}"),
        ("rows a step, each", facts.get("batch")),
        ("training rows", _object(facts.get("train_rows")).get("rows")),
    ]
    if isinstance(best.get("value"), int | float):
        given.append(("best so far", f"{best.get('by')} {best['value']:,.4g}, step {best.get('step')}"))
    return [(name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in given if value]


def parts_of(run: Run) -> list[Json]:
    """What is made of each part, as `run.json` says; nothing where a part lacks something."""
    found = run.facts.get("parts")
    parts = [_object(part) for part in found] if isinstance(found, list) else []
    whole = all(
        isinstance(part.get("dtypes"), list) and all(isinstance(part.get(key), int) for key in COUNTS) for part in parts
    )
    rates = all(isinstance(part.get("learning_rate"), int | float | None) for part in parts)
    return [{"part": "?", "kind": "?", "learning_rate": None, **part} for part in parts] if whole and rates else []


def rejected_of(run: Run) -> list[tuple[str, str, list[int]]]:
    """(set, source, how many rows were read, used, shortened and rejected) of each source, as its ledger says."""
    found = []
    for name, ledger in _object(run.facts.get("ledger")).items():
        for source, entry in _object(_object(ledger).get("sources")).items():
            lost = [count for count in _object(_object(entry).get("rejected")).values() if isinstance(count, int)]
            numbers = [_object(entry).get(key) for key in ("read", "used", "truncated")]
            found.append((name, source, [*(n if isinstance(n, int) else 0 for n in numbers), sum(lost)]))
    return found


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _object(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def lost_of(run: Run) -> list[tuple[int, str]]:
    """(step, what went wrong) of the steps that the run wrote down, the last twenty."""
    found = []
    for entry in run.strange[-20:]:
        rows = [str(name) for ids in _list(entry.get("rows")) for name in _list(ids)]
        loss = entry.get("loss")
        number = f"{loss:,.4g}" if isinstance(loss, int | float) else "?"
        more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
        found.append((entry["step"], f"{entry.get('why', 'strange')}: loss {number}; rows {', '.join(rows[:3])}{more}"))
    return found
