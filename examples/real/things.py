"""The things of `make real`: their kinds, their names in two languages, and which of them are held out."""

from __future__ import annotations

import json
import random
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fetch import PACKAGES

LANGUAGES = ("en", "zh")
TEST, VALIDATION = 0.18, 0.12  # share of the things of each kind

# Kind of thing: its subgroups in the data set's own order of them, and its words.
KINDS = {
    "animal": (range(34, 40), "an animal", "动物"),
    "plant": (range(40, 42), "a plant", "植物"),
    "food": (range(42, 49), "food or drink", "食物"),
    "place": (range(49, 54), "a place", "地点"),
    "vehicle": (range(54, 57), "a vehicle", "交通工具"),
    "time": (range(58, 59), "a time", "时间"),
    "sky": (range(59, 60), "in the sky", "天空"),
    "activity": (range(60, 65), "an activity", "活动"),
    "object": (range(65, 83), "an object", "物品"),
}


@dataclass(frozen=True)
class Thing:
    """What a picture shows.

    Attributes:
        hexcode: Its code points.
        kind: One of KINDS.
        names: Language → the name, then further right ones.
        split: `train`, `validation` or `test`.
    """

    hexcode: str
    kind: str
    names: dict[str, tuple[str, ...]]
    split: str


def read_members(cache: Path, package: str, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """The files of an npm package whose path within it matches, with their content."""
    file = next(each.file for each in PACKAGES if each.name == package)
    with tarfile.open(cache / "packages" / file) as archive:
        for member in archive:
            path = member.name.partition("/")[2]
            if member.isfile() and wanted.fullmatch(path):
                yield path, archive.extractfile(member).read()


def own_tags(rows: list[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """For each hexcode the name and those tags that nothing else is called by or tagged with."""
    heard = Counter(
        word for row in rows for word in {row["label"].lower(), *(tag.lower() for tag in row.get("tags", ()))}
    )
    names = {}
    for row in rows:
        label = row["label"]
        tags = [tag for tag in row.get("tags", ()) if heard[tag.lower()] == 1 and tag.lower() != label.lower()]
        names[row["hexcode"]] = (label, *tags)
    return names


def split_of(hexcodes: list[str], rng: random.Random) -> dict[str, str]:
    """Divides the things of one kind."""
    shuffled = rng.sample(hexcodes, len(hexcodes))
    test, validation = round(TEST * len(shuffled)), round(VALIDATION * len(shuffled))
    splits = ["test"] * test + ["validation"] * validation
    return dict(zip(shuffled, splits + ["train"] * (len(shuffled) - len(splits)), strict=True))


def read_things(cache: Path, rng: random.Random, most: int | None = None) -> dict[str, Thing]:
    """The things of all kinds, by hexcode; of each kind the first `most`."""
    wanted = re.compile(r"(en|zh)/data\.json")
    data = {path[:2]: json.loads(text) for path, text in read_members(cache, "emojibase-data", wanted)}
    kind_of = {number: kind for kind, (numbers, *_) in KINDS.items() for number in numbers}
    rows = {language: [row for row in data[language] if row.get("subgroup") in kind_of] for language in LANGUAGES}
    names = {language: own_tags(rows[language]) for language in LANGUAGES}
    codes: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for row in rows["en"]:
        codes[kind_of[row["subgroup"]]].append(row["hexcode"])
    return {
        code: Thing(code, kind, {language: names[language][code] for language in LANGUAGES}, split)
        for kind in KINDS
        for code, split in split_of(codes[kind][:most], rng).items()
    }
