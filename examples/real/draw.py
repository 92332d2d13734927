"""Draws the data sets of `make real`: pictures of things, their names and questions about them, in English and Chinese.

`python examples/real/draw.py [--cache data/real/cache] [--out data/real/things] [--seed 0] [--side 112]` writes

- `images/<hand>/<hexcode>.png`: things as several hands have drawn them, and of those that are trained on
  `images/<hand>-varied/<hexcode>.png`, the same turned, mirrored, moved and of other colours,
- `names_train_<language>.jsonl`: rows {"id", "image", "caption"},
- `talks_train_<language>.jsonl`: a question about a picture, in LLaVA's form,
- `questions_train_<language>.jsonl`: of these, those whose answer holds no name that the question does not,
- `<kind>_<split>_<language>.jsonl` of `validation` and `test`, a file a kind of question (QUESTIONS): rows
  {"id", "image", "question", "answer"}; of `names` and `describe` one for each name that is right: the name itself and
  those tags of the thing that nothing else is called by,
- `kinds_train.json`: the kind of each thing that is trained on and asked for it, by hexcode,
- `counts.json`: how many there are of everything.

Twemoji is held out: nothing drawn by this hand is trained on. Of the things in `validation` and `test` no drawing by
any hand is trained on, but for names and descriptions: a name nobody can know who has not heard it, so there things are
known and only the drawings are new. What is held out and how it is asked do not depend on the seed. Run
examples/real/fetch.py first.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

from fetch import CACHE
from PIL import Image, ImageEnhance, ImageOps
from things import KINDS, LANGUAGES, Thing, read_members, read_things

Rows = list[dict[str, Any]]
HELD_OUT = "twemoji"
HANDS = ("noto", "noto-v1", "openmoji", "fluent-emoji-flat", "emojione", "fxemoji")  # those that are trained on
NAMED = 150  # so many known things are asked for their names in `validation`, and as many others in `test`
SPLITS = ("train", "validation", "test")

# Kinds that look tells: of things never seen, the best of many linear probes on the tower puts 86 % of 49 into the
# right one of these four, and 56 % of 104 into the right one of all nine. Things of the others are named alone.
ASKED = ("animal", "food", "place", "vehicle")
MOST = 0.27  # of the things that are asked for their kind so many are of one kind, at most: guessing pays little


def plain(hexcode: str) -> str:
    """A hexcode as all sets write it: without the mark that asks for a picture instead of a letter."""
    return hexcode.upper().replace("-FE0F", "")


def slug(name: str) -> str:
    """A name without what sets write differently: "T-shirt" and "tshirt" are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def write_pictures(cache: Path, things: dict[str, Thing], out: Path, side: int) -> dict[str, set[str]]:
    """Hand → hexcodes of the things that it has drawn; the pictures are then in `out`."""
    from resvg_py import svg_to_bytes

    names = {code: [slug(thing.names["en"][0])] for code, thing in things.items()}
    sets = {}
    for hand in (HELD_OUT, *HANDS):
        wanted = re.compile(r"(icons|chars)\.json")
        found = {path: json.loads(text) for path, text in read_members(cache, f"@iconify-json/{hand}", wanted)}
        sets[hand] = found["icons.json"], {plain(code): name for code, name in found.get("chars.json", {}).items()}
        for code in things.keys() & {code for code in things if plain(code) in sets[hand][1]}:
            names[code].append(slug(sets[hand][1][plain(code)]))  # sets without codes may use another set's name
    drawn: dict[str, set[str]] = {}
    for hand, (icons, by_code) in sets.items():
        folder = out / "images" / hand
        folder.mkdir(parents=True, exist_ok=True)
        by_name = {slug(name): alias["parent"] for name, alias in icons.get("aliases", {}).items()}
        by_name |= {slug(name): name for name in icons["icons"]}
        drawn[hand] = set()
        for code in things:
            candidates = [by_code.get(plain(code)), *(by_name.get(name) for name in names[code])]
            icon = next((icons["icons"][name] for name in candidates if name in icons["icons"]), None)
            if icon is None:
                continue
            box = [icon.get(key, icons.get(key, 0)) for key in ("left", "top", "width", "height")]
            svg = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{" ".join(map(str, box))}" width="{side}" height="{side}">{icon["body"]}</svg>'
            )
            picture = Image.open(io.BytesIO(bytes(svg_to_bytes(svg_string=svg)))).convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            Image.alpha_composite(white, picture).convert("RGB").save(folder / f"{code}.png")
            drawn[hand].add(code)
    return drawn


# Questions, each a pair of question and answer in one language


def list_words(words: Iterable[str], language: str) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if language == "en" else f"{'、'.join(first)}还是{last}"


def ask_kind(thing: Thing, others: list[Thing], language: str, rng: random.Random) -> tuple[str, str]:
    """Of which kind is it."""
    return ("What kind of thing is this?", thing.kind) if language == "en" else ("这是哪一类？", KINDS[thing.kind][2])


def ask_whether(thing: Thing, others: list[Thing], language: str, rng: random.Random) -> tuple[str, str]:
    """Is it of a kind: half is right, and about half of what is asked of each kind, or the words would tell."""
    right = rng.random() < 0.5
    wrong = [o.kind for o in others if o.kind in ASKED and o.kind != thing.kind]  # as often as there are things of it
    _, english, chinese = KINDS[thing.kind if right else rng.choice(wrong)]
    if language == "en":
        return f"Is this {english}?", "yes" if right else "no"
    return f"这是{chinese}吗？", "是" if right else "不是"


def ask_which(thing: Thing, others: list[Thing], language: str, rng: random.Random) -> tuple[str, str]:
    """Which of four names: its own and three of things of the same split and of other kinds, a kind each, in any order.

    A thing of no kind in ASKED stands beside any three of those.
    """
    own = thing.names[language][0]
    kinds = rng.sample([kind for kind in ASKED if kind != thing.kind], 3)
    names = [own, *(rng.choice([o for o in others if o.kind == kind]).names[language][0] for kind in kinds)]
    rng.shuffle(names)
    options = list_words(names, language)
    return (f"Which is it: {options}?" if language == "en" else f"这是哪个：{options}？"), own


def ask_name(thing: Thing, others: list[Thing], language: str, rng: random.Random) -> tuple[str, str]:
    return ("What is this?" if language == "en" else "这是什么？"), thing.names[language][0]


def described(thing: Thing, name: str, language: str) -> str:
    """Its kind and, after a colon, one of its names."""
    _, english, chinese = KINDS[thing.kind]
    return f"{english}: {name}" if language == "en" else f"{chinese}：{name}"


def ask_describe(thing: Thing, others: list[Thing], language: str, rng: random.Random) -> tuple[str, str]:
    question = "Describe it." if language == "en" else "描述一下。"
    return question, described(thing, thing.names[language][0], language)


QUESTIONS = {
    "kind": ask_kind,
    "whether": ask_whether,
    "which": ask_which,
    "names": ask_name,
    "describe": ask_describe,
}
OF_KNOWN = ("names", "describe")  # asked of known things, since the answer is a name that the question does not hold
# What is asked of a training picture, and how often. One question a row: in a conversation one answer tells the next,
# and an image is one token, so it costs little to be shown again.
TALKS = {"kind": 0.25, "whether": 0.2, "which": 0.2, "names": 0.2, "describe": 0.15}


def others_of(things: Iterable[Thing]) -> dict[str, list[Thing]]:
    """For each thing those of its split that are called otherwise in both languages."""
    things = list(things)
    return {
        thing.hexcode: [
            other for other in things if all(other.names[each][0] != thing.names[each][0] for each in LANGUAGES)
        ]
        for thing in things
    }


def asked_for_kind(things: list[Thing], rng: random.Random) -> list[Thing]:
    """Those that are asked for their kind: no kind has more than MOST of them."""
    counts = Counter(thing.kind for thing in things)
    most = round(MOST * len(things))
    return [thing for thing in things if rng.random() * counts[thing.kind] < most]


def picture(hand: str, thing: Thing) -> dict[str, str]:
    return {"id": f"{thing.hexcode}-{hand}", "image": f"images/{hand}/{thing.hexcode}.png"}


def varied(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The same picture on white, perhaps mirrored, turned a little, smaller and elsewhere, in other colours."""
    side = picture.width
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    small = int(side * rng.uniform(0.7, 1))
    picture = picture.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor="white").resize((small, small))
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(picture, (rng.randint(0, side - small), rng.randint(0, side - small)))
    for change in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        canvas = change(canvas).enhance(rng.uniform(0.75, 1.25))
    hue, saturation, value = canvas.convert("HSV").split()
    turn = rng.randint(-10, 10)
    return Image.merge("HSV", (hue.point(lambda level: (level + turn) % 256), saturation, value)).convert("RGB")


def vary_pictures(hands: dict[str, set[str]], out: Path) -> dict[str, set[str]]:
    """Hand → hexcodes, of the varied pictures that are then in `out`."""
    for hand, codes in hands.items():
        (out / "images" / f"{hand}-varied").mkdir(exist_ok=True)
        for code in sorted(codes):
            with Image.open(out / "images" / hand / f"{code}.png") as file:
                varied(file, random.Random(f"{hand} {code}")).save(out / "images" / f"{hand}-varied" / f"{code}.png")
    return {f"{hand}-varied": codes for hand, codes in hands.items()}


def talk(thing: Thing, others: list[Thing], language: str, rng: random.Random) -> tuple[str, list[dict[str, str]]]:
    """The kind of a question, and it with its answer; only for its name is a thing asked whose kind is not in ASKED."""
    kind = rng.choices(list(TALKS), list(TALKS.values()))[0] if thing.kind in ASKED else "names"
    question, answer = QUESTIONS[kind](thing, others, language, rng)
    return kind, [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]


def training_rows(
    things: list[Thing], hands: dict[str, set[str]], language: str, rng: random.Random
) -> dict[str, Rows]:
    """For each drawing of each thing a name and a conversation."""
    others = others_of(things)
    drawn = [(hand, thing) for hand, codes in hands.items() for thing in things if thing.hexcode in codes]
    names = [{**picture(hand, thing), "caption": thing.names[language][0]} for hand, thing in drawn]
    talks, questions = [], []
    for hand, thing in drawn:
        kind, conversation = talk(thing, others[thing.hexcode], language, rng)
        talks.append({**picture(hand, thing), "conversations": conversation})
        questions += [] if kind in OF_KNOWN else talks[-1:]
    return {"names": names, "talks": talks, "questions": questions}


def write_rows(file: Path, rows: Rows) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def right_answers(kind: str, thing: Thing, answer: str, language: str) -> Iterable[str]:
    """All that is right: with each name of the thing, where the answer is or holds one that the question does not."""
    names = thing.names[language]
    return {"names": names, "describe": [described(thing, name, language) for name in names]}.get(kind, [answer])


def held_out_rows(things: list[Thing], known: list[Thing], language: str, rng: random.Random) -> dict[str, Rows]:
    """For each kind of question and each thing that is asked a row for every right answer."""
    others = others_of(things)
    asked = [thing for thing in things if thing.kind in ASKED]
    known_asked = [thing for thing in known if thing.kind in ASKED]
    rows: dict[str, Rows] = {}
    for kind, ask in QUESTIONS.items():
        them = {"kind": asked_for_kind(asked, rng), "names": known, "describe": known_asked}.get(kind, asked)
        rows[kind] = []
        for thing in them:
            question, answer = ask(thing, others.get(thing.hexcode, []), language, rng)
            right = right_answers(kind, thing, answer, language)
            rows[kind] += [{**picture(HELD_OUT, thing), "question": question, "answer": each} for each in right]
    return rows


def write_dataset(cache: Path, out: Path, seed: int, side: int, most: int | None = None) -> dict[str, Any]:
    """Draws everything, of each kind at most so many things; returns what is in `counts.json`."""
    (out / "counts.json").unlink(missing_ok=True)  # the last file to be written: without it, what is there is not whole
    things = read_things(cache, random.Random(0), most)  # what is held out does not depend on the seed
    drawn = write_pictures(cache, things, out, side)
    things = {code: thing for code, thing in things.items() if code in drawn[HELD_OUT]}
    by_split = {split: [t for t in things.values() if t.split == split] for split in SPLITS}
    trained = {hand: drawn[hand] & {thing.hexcode for thing in by_split["train"]} for hand in HANDS}
    trained |= vary_pictures(trained, out)
    known = random.Random("known").sample(by_split["train"], len(by_split["train"]))
    named = min(NAMED, len(known) // 2)
    names_of = {"validation": known[:named], "test": known[-named:]}
    kinds = {thing.hexcode: thing.kind for thing in by_split["train"] if thing.kind in ASKED}
    (out / "kinds_train.json").write_text(json.dumps(kinds, indent=1) + "\n", encoding="utf-8")
    counts: dict[str, Any] = {
        "seed": seed,
        "most": most,
        "things": {split: dict(Counter(t.kind for t in each)) for split, each in by_split.items()},
        "drawings": {hand: len(codes & things.keys()) for hand, codes in drawn.items()},
        "rows": {},
    }
    for split, language in product(SPLITS, LANGUAGES):
        if split == "train":
            found = training_rows(by_split[split], trained, language, random.Random(f"{seed} {language}"))
        else:
            rng = random.Random(f"{split} {language}")
            found = held_out_rows(by_split[split], names_of[split], language, rng)
        for kind, rows in found.items():
            write_rows(out / f"{kind}_{split}_{language}.jsonl", rows)
            counts["rows"][f"{kind}_{split}_{language}"] = len(rows)
    (out / "counts.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the packages; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("data/real/things"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of what is asked in training; default: %(default)s")
    parser.add_argument("--side", type=int, default=112, help="width of the pictures in pixels; default: %(default)s")
    parser.add_argument("--most", type=int, help="draw only so many things of each kind, for a look")
    given = parser.parse_args()
    sys.path.insert(0, str(given.cache / "tools"))  # what draws SVG
    counts = write_dataset(given.cache, given.out, given.seed, given.side, given.most)
    for what, numbers in counts.items():
        print(f"{what}: {json.dumps(numbers)}")


if __name__ == "__main__":
    main()
