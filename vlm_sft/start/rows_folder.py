"""The rows of each side as files, and the sources of a recipe that read them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..base.errors import RowError, UserError
from ..base.names import Json, Options
from ..base.words import CHINESE, OTHER, counted
from ..data.source import rows_with_language
from ..recipe.sections import Source
from .gather import Gathered, Given
from .guess import Guess
from .recipe_text import Part, prompts_of
from .sides import TEST, TRAIN, VALIDATION, Shown

SIDE_KEYS = {TRAIN: "train", VALIDATION: "eval", TEST: "test"}
_NUMBER = re.compile(r"/(\d+)(?:#\d+)?$")


@dataclass
class Kind:
    """Rows of one meaning.

    Attributes:
        meant: What they mean.
        held: Whether their pictures came out of shards and lie beside the files of rows.
        rows: Those that can be used.
        shown: What each of them shows.
        languages: Of their texts.
        labels: Their classes, the most frequent first.
    """

    meant: Guess
    held: bool
    rows: list[Given] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    languages: set[str] = field(default_factory=set)
    labels: list[str] = field(default_factory=list)


def check_rows(gathered: Gathered, stage: Path, root: Path | None, tick: Callable[[int], None]) -> list[Kind]:
    """Reads all rows as training will, and leaves out those that are wrong, of which it says the first.

    Args:
        gathered: The rows as they are written.
        stage: A folder to write to.
        root: The folder that pictures are named from.
        tick: Told now and then how many were looked at.
    """
    kinds = []
    for (meant, held), given in gathered.rows.items():
        kind, wrong = Kind(meant, held), []
        file = stage / "unchecked.jsonl"
        try:
            with file.open("w", encoding="utf-8") as opened:
                opened.writelines(_line({**row.values, "id": str(place)}) for place, row in enumerate(given))
            wrong = _check(kind, given, file, root, tick)
        except UserError as error:  # the source as a whole cannot be read
            gathered.left_out.append(str(error).replace(str(file), given[0].where))
        file.unlink()
        if wrong:
            gathered.left_out.append(f"{counted(len(wrong), 'row')} left out, the first: {wrong[0]}")
        if kind.rows:
            kinds.append(kind)
    return kinds


def _check(kind: Kind, given: Sequence[Given], file: Path, root: Path | None, tick: Callable[[int], None]) -> list[str]:
    """Fills in what can be used of rows; returns sentences on the others, which name the files that they came from."""
    wrong: list[str] = []

    def reject(error: RowError) -> None:
        line = re.match(re.escape(str(file)) + r", line (\d+)", error.where)
        place = given[int(line[1]) - 1].where if line else error.where
        sentence = (
            str(error).removeprefix(error.where).replace(f" and {file.parent}", "")
        )  # that folder is not there for long
        wrong.append(place + sentence)

    seen: dict[int, tuple[list[Any], list[str]]] = {}
    source = Source(path=str(file), format=kind.meant.format, **_places(kind, root))  # type: ignore[arg-type]
    for row, language in rows_with_language(source, reject=reject):
        found = _NUMBER.search(row["id"])
        assert found is not None, row["id"]
        _, said = seen.setdefault(int(found[1]), (row["images"], []))
        said.append(json.dumps(row["messages"], ensure_ascii=False, default=str))
        kind.languages.add(language)
        if len(seen) % 500 == 0:
            tick(len(seen))
    label = dict(kind.meant.columns).get("caption", "caption")
    counts: Counter[str] = Counter()
    for place, (images, said) in sorted(seen.items()):
        mine = given[place]
        name = str(mine.values.get(label, "")).strip() if kind.meant.labels else ""
        counts[name] += 1
        kind.rows.append(mine)
        kind.shown.append(Shown(images, "\n".join(said), name, mine.side, mine.where))
    kind.labels = sorted(filter(None, counts), key=lambda name: (-counts[name], name))
    return wrong


def _places(kind: Kind, root: Path | None) -> Json:
    found: Json = {"columns": dict(kind.meant.columns)} if kind.meant.columns else {}
    if root is not None:
        found |= {"image_folders": [str(root)]} if kind.held else {"images": str(root)}
    return found


def write_sides(
    kinds: Sequence[Kind], of: Sequence[str], stage: Path, folder: str, root: Path | None, learn: str, language: str
) -> list[Part]:
    """Writes the rows of each side, and says how a recipe reads them.

    Args:
        kinds: The rows.
        of: The side of each, in their order; "" for one that is left out.
        stage: Where to write now.
        folder: Where that will lie.
        root: The folder that pictures are named from, as the recipe writes it.
        learn: What is learned of captions.
        language: Of questions to captions.
    """
    parts: list[Part] = []
    sides = iter(of)
    for number, kind in enumerate(kinds, start=1):
        own = "" if len(kinds) == 1 else f"-{number}-{kind.meant.format}"
        mine = list(zip(kind.rows, islice(sides, len(kind.rows)), strict=True))
        for side, key in SIDE_KEYS.items():
            rows = [row for row, where in mine if where == side]
            if not rows:
                continue
            name = f"{side}{own}.jsonl"
            with (stage / name).open("w", encoding="utf-8") as opened:
                opened.writelines(_line(row.values) for row in rows)
            settings: Options = {"path": f"{folder}/{name}", "format": kind.meant.format, **_places(kind, root)}
            if kind.meant.format == "caption":
                mixed = bool(kind.languages) and kind.languages <= {CHINESE, OTHER}
                settings["prompts"] = prompts_of(learn, language, kind.labels, mixed)
            parts.append(Part(key, settings))
    return parts


def _line(values: Json) -> str:
    return json.dumps(values, ensure_ascii=False, default=str) + "\n"
