"""MMMU: what an answer chooses or says, as its authors' `eval_utils.py` and lmms-eval read it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_MARKS = (",", ".", "!", "?", ";", ":", "'")  # taken from both ends, one after the other, in this order
_WORDS = 5  # the text of an option is looked for in longer answers alone
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
# An answer is lower-cased before it is cut, so that the capital letter never comes and only new lines cut it.
_SENTENCES = re.compile(r"\.\s(?=[A-Z])|\n")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234
    # Upstream's begin inside a run of digits too, which finds nothing more and takes the square of its length.
    re.compile(r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1e5
    re.compile(r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def choice(response: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer chooses.

    Returns:
        A letter of `choices`; None where upstream would draw one at random.
    """
    for mark in _MARKS:
        response = response.strip(mark)
    response = f" {response} "
    # How a letter may be written, and how the places of several are compared: with " A ", "B " at the very start is
    # nowhere (-1), which upstream has so.
    for written, placed in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in choices if written.format(letter) in response]
        if found:
            return max(found, key=lambda letter: response.rfind(placed.format(letter)))
    if len(response.split()) > _WORDS:
        lower = response.lower()
        found = [letter for letter, option in choices.items() if str(option).lower() in lower]
        return max(found, key=lambda letter: lower.rfind(str(choices[letter]).lower()), default=None)
    return None


def open_answers(response: str) -> list[str | float]:
    """What an answer in words may mean: its telling parts and all numbers in them, normalised, each once."""
    parts = _telling_parts(response)
    numbers = [number for part in parts for pattern in _NUMBERS for number in pattern.findall(part)]
    return list(dict.fromkeys(value for text in (*parts, *numbers) for value in normalised(text)))


def normalised(text: str) -> list[str | float]:
    """A number rounded to 2 decimals, else the text in lower case; a single letter with a space before or behind."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_is_right(response: str, gold: str | Sequence[str]) -> bool:
    """Whether an answer in words is right: a number equal to the right one, or a text that contains it."""
    golds = [value for each in ([gold] if isinstance(gold, str) else gold) for value in normalised(each)]
    texts = [value for value in golds if isinstance(value, str)]
    for said in open_answers(response):
        if any(text in said for text in texts) if isinstance(said, str) else said in golds:
            return True
    return False


def _telling_parts(response: str) -> list[str]:
    """What stands behind the words that lead to an answer, in each line the shortest; else the whole answer."""
    response = response.strip().strip(".").lower()
    lines = _SENTENCES.split(response)
    parts = []
    for number, line in enumerate(lines, start=1):
        keys = (*_KEYS, "=") if number == len(lines) else _KEYS
        shortest = ""
        for key in keys:
            if key in line:
                tail = line.split(key)[-1].strip()
                shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest and shortest not in _TRIVIAL:
            parts.append(shortest)
    return parts or [response]
