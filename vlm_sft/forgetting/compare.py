"""Before and after: how much less likely texts became, which answers were lost, and when to warn of it."""

from __future__ import annotations

from collections.abc import Sequence

from ..base.console import make_console, plain_table, say
from ..base.names import Json
from ..base.words import one_line
from ..metrics.exact_match import contains
from .state import State
from .texts import Asked, TextSet

LIMIT = 1.2  # how many times as large a perplexity may become
LOST = 0.2  # share of the questions whose right answers may be lost
BEFORE_AFTER = [("before", "训练前"), ("after", "训练后")]
SHOWN = 60  # characters of an answer

DROP = 0.05  # how much of a share of right answers a vision tower may lose
TOWER = {"zero_shot": "zero-shot, vision tower", "ranking": "captions above wrong ones"}

Forgetting = Json
"""What is written of it; see docs/evaluation.md."""


def compare(texts: TextSet, before: State, after: State, limit: float = LIMIT) -> Forgetting:
    """What was forgotten.

    Args:
        texts: What both were measured on.
        before: Of the language model before it was trained.
        after: Of the same afterwards.
        limit: How many times as large the perplexity of a language may become without a warning.
    """
    ratios = {name: after["perplexity"][name] / before["perplexity"][name] for name in before["perplexity"]}
    questions = _questions(texts.questions, before["answers"], after["answers"])
    judged = [entry for entry in questions if entry["right_before"] is not None]
    right = {
        when: sum(entry[f"right_{when}"] for entry in judged) / len(judged) if judged else None
        for when in ("before", "after")
    }
    found: Forgetting = nothing(limit) | {
        "texts": texts.name,
        "perplexity": {"before": before["perplexity"], "after": after["perplexity"], "ratio": ratios},
        "right": right,
        "changed": sum(entry["before"] != entry["after"] for entry in questions),
        "questions": questions,
    }
    return {**found, "warning": warning_of(found)}


def nothing(limit: float = LIMIT) -> Forgetting:
    """What is found where no text was measured."""
    return {
        "texts": None, "perplexity": {"before": {}, "after": {}, "ratio": {}}, "right": {"before": None, "after": None},
        "changed": 0, "questions": [], "limit": limit, "tower": {}, "warning": None,
    }  # fmt: skip


def with_tower(found: Forgetting, tower: dict[str, Json]) -> Forgetting:
    """The same with what the vision tower lost, as `TowerTest.compare` gives it."""
    found = {**found, "tower": tower}
    return {**found, "warning": warning_of(found)}


def _questions(asked: Sequence[Asked], before: Sequence[str] | None, after: Sequence[str] | None) -> list[Json]:
    if before is None or after is None:
        return []
    return [
        {
            "question": one.question, "answers": list(one.answers), "before": first, "after": then,
            "right_before": contains(first, one.answers) if one.answers else None,
            "right_after": contains(then, one.answers) if one.answers else None,
        }
        for one, first, then in zip(asked, before, after, strict=True)
    ]  # fmt: skip


def warning_of(found: Forgetting) -> str | None:
    """A sentence where more was forgotten than may be, or None."""
    said = []
    ratios: dict[str, float] = found["perplexity"]["ratio"]
    for language, ratio in ratios.items():
        if not ratio <= found["limit"]:  # this holds for NaN too
            numbers = [found["perplexity"][when][language] for when in ("before", "after")]
            said.append(f"perplexity ({language}) {numbers[0]:,.4g} → {numbers[1]:,.4g}, {ratio:,.2f} times")
    right = found["right"]
    if right["before"] is not None and right["before"] - right["after"] > LOST:
        said.append(f"right answers {right['before']:.0%} → {right['after']:.0%}")
    lost = [
        f"{TOWER[name]} {one['before']:.0%} → {one['after']:.0%}"
        for name, one in found["tower"].items()
        if one["before"] - one["after"] > DROP
    ]
    tower = (
        f"The vision tower forgets: {', '.join(lost)}; lower its rate under `train`, or freeze it." if lost else None
    )
    if not said:
        return tower
    texts = (
        f"The language model forgets: {', '.join(said)} on texts without pictures (limit {found['limit']:g} times); "
        "mix rows of text into `data.train`, lower the learning rate, or train LoRA in place of the whole."
    )
    return f"{texts} {tower}" if tower else texts


def rows_of(found: Forgetting) -> list[list[str]]:
    """What is found as rows: what, before, after, and how they compare."""
    sizes = found["perplexity"]
    rows = [
        [f"perplexity, {name}", f"{sizes['before'][name]:,.4g}", f"{sizes['after'][name]:,.4g}", f"x {ratio:,.3f}"]
        for name, ratio in sizes["ratio"].items()
    ]
    if (right := found["right"])["before"] is not None:
        change = right["after"] - right["before"]
        rows.append(["questions right", f"{right['before']:.0%}", f"{right['after']:.0%}", f"{change:+.0%}"])
    if found["questions"]:
        rows.append(["answers changed", "", f"{found['changed']:,} of {len(found['questions']):,}", ""])
    for name, one in found["tower"].items():
        change = one["after"] - one["before"]
        rows.append([TOWER[name], f"{one['before']:.1%}", f"{one['after']:.1%}", f"{change:+.1%}"])
    return rows


def page_tables(found: Forgetting | None) -> list[Json]:
    """Tables for the page of errors, as `pages.errors.error_page` takes them."""
    if found is None:
        return []
    notes = [{"text": found["warning"], "warn": True}] if found["warning"] else []
    sizes = {
        "title": "Forgetting", "chinese": "遗忘", "notes": notes,
        "columns": [("what", "项目"), *BEFORE_AFTER, ("change", "变化")], "rows": rows_of(found),
    }  # fmt: skip
    changed = [entry for entry in found["questions"] if entry["before"] != entry["after"]]
    if not changed:
        return [sizes]
    answers = {
        "title": "Forgetting: answers that changed", "chinese": "遗忘：改变了的回答", "notes": [],
        "columns": [("question", "问题"), ("right answer", "正确答案"), *BEFORE_AFTER],
        "rows": [[e["question"], " / ".join(e["answers"]), e["before"], e["after"]] for e in changed],
    }  # fmt: skip
    return [sizes, answers]


def is_whole(found: Forgetting) -> bool:
    """Whether what a file says can be shown as it is; the file may be a stranger's.

    Raises:
        Exception: Of many kinds, where something of it is missing or of another one.
    """
    rows = [row for table in page_tables(found) for row in table["rows"]]
    rows += [[entry[name] for name in ("question", "before", "after")] for entry in found["questions"]]
    told = all({"right_before", "right_after"} <= entry.keys() for entry in found["questions"])
    words = all(isinstance(cell, str) for row in rows for cell in row) and isinstance(found["warning"], str | None)
    return told and words and "texts" in found


def print_forgetting(found: Forgetting | None) -> None:
    """Prints what is found, if anything is, and a warning where there is one."""
    if found is None:
        return
    console = make_console(stderr=False, quiet=False, highlight=False, soft_wrap=True)
    table = plain_table("Forgetting: what was known before", "")
    for name in ("what", "before", "after", "change"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in rows_of(found):
        table.add_row(*row)
    console.print(table)
    lost = [entry for entry in found["questions"] if entry["right_before"] and not entry["right_after"]]
    for entry in lost[:3]:
        before, after = one_line(entry["before"])[:SHOWN], one_line(entry["after"])[:SHOWN]
        say(console, f"  {one_line(entry['question'])[:SHOWN]} before: {before}; after: {after or '(nothing)'}")
    if found["warning"]:
        say(console, f"warning: {found['warning']}")
