"""Texts about scenes for the language model: descriptions in many phrasings, restatements and dialogues.

A document is a list of pieces `(text, weight)`: how much the language model's loss counts the tokens of that text. What
a scene holds is random, so a description cannot be foreseen and counts little; captions and answers follow from it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from digitscenes import COLOURS, COUNTS, EMPTY, KINDS, LANGUAGES, PLACES, Scene, answer, caption, word_question

Piece = tuple[str, float]
UNFORESEEABLE = 0.03
LONGEST_ANSWER = 7  # characters; what is longer is a caption
KIND_WEIGHTS = (2, 2, 1, 3)  # "count" is learnt first, "exists" (a single bit about all cells) last
ITEMS = {
    "en": (
        "a {colour} {digit} at the {place}",
        "at the {place} a {colour} {digit}",
        "the digit at the {place} is a {colour} {digit}",
        "{place}: {colour} {digit}",
        "{place}: {digit}, {colour}",
    ),
    "zh": (
        "{place}是{colour}的{digit}",
        "{place}有一个{colour}的{digit}",
        "{colour}的{digit}在{place}",
        "{place}：{colour}{digit}",
        "{place}：{digit}，{colour}",
    ),
}
SEPARATORS = {"en": (", ", "; ", ". ", "\n"), "zh": ("，", "；", "。", "\n")}
NOTATION = {"en": ((*COLOURS["en"], "none"), "#"), "zh": (("红", "黄", "绿", "蓝", "紫", "粉", "白", "空"), "空")}
PROMPTS = {
    "en": ("Describe the image.", "What does the image show?"),
    "zh": ("描述这张图片。", "图中有什么？"),
}


def random_scene(rng: random.Random) -> Scene:
    """Draw what is in a scene (no sprites are needed for text), distributed as in `sample_scenes`."""
    filled = set(rng.sample(range(4), rng.randint(1, 4)))
    digits = tuple(rng.randrange(10) if cell in filled else EMPTY for cell in range(4))
    colours = tuple(rng.randrange(len(COLOURS["en"])) if cell in filled else EMPTY for cell in range(4))
    return Scene(digits, colours)


def notation(scene: Scene, language: str) -> str:
    """Write the scene in shorthand, cell by cell without naming places: "3red#none7blue#none" or "3红空空7蓝空空".

    Two tokens a cell, the digit and the colour: as long as what the eye's eight queries say about an image.
    """
    colours, empty = NOTATION[language]
    cells = zip(scene.digits, scene.colours, strict=True)
    return "".join(f"{empty if digit == EMPTY else digit}{colours[colour]}" for digit, colour in cells)


def describe(scene: Scene, rng: random.Random, shorthand: float) -> str:
    """Describe a scene in either language: in shorthand with probability `shorthand`, else in sentences or notes."""
    language = rng.choice(LANGUAGES)
    if rng.random() < shorthand:
        return notation(scene, language)
    cells = scene.filled
    rng.shuffle(cells)
    form = rng.choice(ITEMS[language])
    items = [
        form.format(place=PLACES[language][c], colour=COLOURS[language][scene.colours[c]], digit=scene.digits[c])
        for c in cells
    ]
    return rng.choice(SEPARATORS[language]).join(items)


def turn(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Draw a question (or the request for a caption) and its answer, in one language."""
    language = rng.choice(LANGUAGES)
    if rng.random() < 0.2:
        return rng.choice(PROMPTS[language]), caption(scene, language)
    (kind,), about = rng.choices(KINDS, KIND_WEIGHTS), 0
    if kind in ("digit", "colour"):
        about = rng.choice(scene.filled)
    elif kind == "exists":
        present = sorted(set(scene.digits) - {EMPTY})
        about = rng.choice(present if rng.random() < 0.5 else sorted(set(range(10)) - set(present)))
    return word_question(kind, language, rng.randrange(2), about), answer(scene, kind, language, about)


def restatement(scene: Scene, rng: random.Random, shorthand: float) -> list[Piece]:
    """A description, then the caption and a line end: the text twin of captioning an image without a prompt."""
    pieces = [("<s>", 0.0), (describe(scene, rng, shorthand) + rng.choice(("", "\n")), UNFORESEEABLE)]
    return [*pieces, (caption(scene, rng.choice(LANGUAGES)) + "\n", 1.0)]


def dialogue(scene: Scene, rng: random.Random, shorthand: float) -> list[Piece]:
    """Two to five turns of the `ziya` format about a scene whose description stands where an image would stand."""
    pieces = [("<s>", 0.0)] if rng.random() < 0.8 else []
    for number in range(rng.randint(2, 5)):
        question, reply = turn(scene, rng)
        pieces.append(("<human>:", UNFORESEEABLE if number else 0.0))
        if number == 0:
            pieces.append((describe(scene, rng, shorthand) + rng.choice(("", "\n")), UNFORESEEABLE))
        # Without it the many tokens of captions would drown those of answers.
        weight = 2.0 if len(reply) <= LONGEST_ANSWER else 1.0
        pieces += [(f"{question}\n<bot>:", UNFORESEEABLE), (f"{reply}</s>", weight)]
    return pieces


def inventory(scene: Scene, rng: random.Random, shorthand: float) -> list[Piece]:
    """A description, then for every digit whether it is there, or its (first) colour and "none" if it is absent.

    Without these lists the model never learnt questions of kind "exists", a single bit each; with them in 600 steps.
    """
    language = rng.choice(LANGUAGES)
    colours = NOTATION[language][0]
    pieces = [("<s>", 0.0), (describe(scene, rng, shorthand) + "\n", UNFORESEEABLE)]
    coloured = rng.random() < 0.5
    for digit in rng.sample(range(10), 10):
        if coloured:
            which = [cell for cell in scene.filled if scene.digits[cell] == digit]
            pieces += [(f"{digit}", 0.0), (colours[scene.colours[which[0]]] if which else colours[-1], 1.0)]
        else:
            pieces += [(f"{digit}:", 0.0), (answer(scene, "exists", language, digit), 1.0)]
    return pieces


def document(rng: random.Random, shorthand: float = 0.5) -> list[Piece]:
    """Draw a document about a random scene; see `describe` for `shorthand`."""
    (kind,) = rng.choices((restatement, inventory, dialogue), (2, 4, 4))
    return kind(random_scene(rng), rng, shorthand)


def join(pieces: Sequence[Piece]) -> str:
    """The document as plain text."""
    return "".join(text for text, _ in pieces)


def vocabulary_text() -> list[str]:
    """Every word of the world, so that the tokenizer surely knows each."""
    words = [text for language in LANGUAGES for group in (PLACES, COLOURS, COUNTS, PROMPTS) for text in group[language]]
    return words + [f" {word}" for word in words]
