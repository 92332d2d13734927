"""Two bundles side by side: where the other one's answers lie, and what got better and worse against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..base.errors import UserError
from ..base.names import EVALUATION, MANIFEST, Record, Values
from ..metrics.paired import compare
from .records import Other, Sheet, read_records


def earlier_answers(other: str, names: Sequence[str], command: str) -> dict[str, list[Record]]:
    """What another bundle answered before, by the names of sheets.

    Args:
        other: Folder of the bundle, of its answers (`--output`), or a file of answers where there is one sheet.
        names: Of the sheets.
        command: What makes such answers, with `{}` for the bundle.

    Raises:
        UserError: It has no answers to one of them, or they cannot be read.
    """
    place = Path(other).expanduser()
    if place.is_file():
        if len(names) > 1:
            raise UserError(f"--against {other} is one file of answers to {len(names)} benchmarks; give the folder.")
        return {names[0]: read_records(place)}
    found = {}
    for name in names:
        lies = [path for path in (place / EVALUATION / f"{name}.jsonl", place / f"{name}.jsonl") if path.is_file()]
        if not lies:
            what = "has no answers to" if place.is_dir() else "is no folder or file with answers to"
            raise UserError(f"--against {other} {what} {name}: run `{command.format(other)}` first.")
        found[name] = read_records(lies[0])
    return found


def not_yet_asked(other: str, names: Sequence[str]) -> list[str]:
    """To which of some sheets a bundle has no answers; none where `other` is a folder or file of answers alone."""
    place = Path(other).expanduser()
    if not (place / MANIFEST).is_file() and (place.exists() or other.partition("@")[0].count("/") != 1):
        return []
    return [name for name in names if not (place / EVALUATION / f"{name}.jsonl").is_file()]


def against(sheet: Sheet, theirs: Sequence[Values], where: str) -> None:
    """Puts another bundle's answers beside those of a sheet, and says how sure the difference is.

    Args:
        sheet: What is filled.
        theirs: The other's records.
        where: Where they come from, in words.

    Raises:
        UserError: A question of theirs with the same id is another one, or they have none in common.
    """
    others = {record["id"]: record for record in theirs}
    entries, pairs, common = [], [], 0
    for entry in sheet.entries:
        record = others.get(entry.id)
        if record is None:
            entries.append(entry)
            continue
        if (record["question"], set(map(str, record["answers"]))) != (entry.question, set(entry.answers)):
            raise UserError(
                f'{where}: its question "{entry.id}" is not that of {sheet.name} here (another text, or other right '
                "answers): evaluate both on the same data."
            )
        other = Other(record["answer"], None if record["score"] is None else float(record["score"]))
        entries.append(replace(entry, other=other))
        common += 1
        if entry.score is not None and other.score is not None:  # a judge may name no score
            pairs.append((entry.score, other.score))
    if not pairs:
        raise UserError(f"{where} and {sheet.name} have no question in common: evaluate both on the same data.")
    sheet.entries, sheet.paired = entries, compare(pairs)
    if alone := len(sheet.entries) - common:
        sheet.notes.append(f"{alone:,} of {len(sheet.entries):,} questions were not asked of the other bundle.")
    if more := len(others) - common:
        sheet.notes.append(f"The other bundle was asked {more:,} more, which are not compared.")
