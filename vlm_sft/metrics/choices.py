"""Which option does an answer choose? The rules of the benchmarks, each to the letter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase

REFUSAL = "Z"  # upstream's letter for a model that refuses to choose
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_FAILED = "Failed to obtain answer via API"
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST = 4  # a letter counts among so many last words: "A person stands near the door" chooses nothing
_VERBOSE = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_STATED = re.compile(r"The answer is ([A-Z]).")


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Options → letter to option.

    Raises:
        ValueError: There are more than letters.
    """
    if len(options) > len(ascii_uppercase):
        raise ValueError(f"{len(options)} options are more than the alphabet has letters.")
    return dict(zip(ascii_uppercase, options, strict=False))


def can_infer_option(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer names, as VLMEvalKit finds it (`matching_util.py`, exact matching).

    Returns:
        A letter of `choices`, `REFUSAL`, or None.
    """
    if _FAILED in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return REFUSAL
    words = answer.translate(_MARKS).split()
    named = [letter for letter in choices if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - _LAST - 1:
        return named[0]
    if not named and REFUSAL in words:
        return REFUSAL
    verbose = _VERBOSE.search(answer)
    if verbose and (letter := verbose[1].upper()) in choices:
        return letter
    return None


def can_infer_text(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the only option whose text stands in an answer, as VLMEvalKit finds it."""
    answer = answer.lower()
    if len(answer) > 2 * sum(len(str(option)) for option in choices.values()):
        return None
    found = [letter for letter, option in choices.items() if str(option).lower() in answer]
    return found[0] if len(found) == 1 else None


def can_infer(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer chooses, named or by its text; see the two above."""
    return can_infer_option(answer, choices) or can_infer_text(answer, choices)


def option_of_llava(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer chooses, by LLaVA's rule for ScienceQA (`eval_science_qa.py`)."""
    if answer in choices:
        return answer
    if len(answer) >= 3 and answer[0] in choices and answer[1:3] == ". ":
        return answer[0]
    stated = _STATED.findall(answer)
    return stated[0] if len(stated) == 1 and stated[0] in choices else None


def option_of_seed(answer: str) -> str:
    """The first letter of an answer, in upper case: what SEED-Bench compares in lmms-eval."""
    return answer.strip()[:1].upper()


def option_of_ai2d(answer: str) -> str:
    """An answer, or the letter before the period that it begins with: what AI2D compares in lmms-eval."""
    begins = re.match(r"\s*([A-Z])\.", answer)
    return begins[1] if begins else answer
