"""Values in the words of a message: on one line, short, with units that a person reads; and the language of a text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from datetime import timedelta

CHINESE, OTHER = "zh", "en"
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
_KANA_HANGUL = re.compile(r"[\u3040-\u30ff\u31f0-\u31ff\uac00-\ud7af]")
_WORD = re.compile(r"[^\W\d_]+")
LONGEST_NUMBER = 18  # digits
_LONG = 2000  # characters that decide; a long conversation does not take longer


def closest(word: str, words: Iterable[str]) -> str | None:
    """Returns the one of `words` that is most like `word`, or None when nothing is like it."""
    # Below 0.6, difflib's default, `lr` already resembles half of SFTConfig: no hint is better than a wrong one.
    matches = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return matches[0] if matches else None


def one_line(text: object) -> str:
    """A text, or what an error says, without line breaks and runs of spaces."""
    return " ".join(str(text).split())


def first_line(error: Exception) -> str:
    """The first line of what an error says, without its full stop; the kind of error where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def reason_of(error: Exception) -> str:
    """Why something failed, to be put into a sentence: of an error of the system without its number and path."""
    return one_line(getattr(error, "strerror", None) or error).rstrip(".") or type(error).__name__


def short(text: str) -> str:
    """Text of a row as it may stand in a message: one line, 40 characters."""
    text = one_line(text).encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= 40 else text[:37] + "..."


def kind(value: object) -> str:
    """What a value is, in the words of JSON."""
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"of type {type(value).__name__}")


def whole_number(text: str) -> int | None:
    """The number that a stranger's text is; None where it is none ("²" is a digit too), or longer than Python reads."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= LONGEST_NUMBER else None


def counted(count: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def short_count(number: int) -> str:
    """`934,528`, `13.0M`, `6.74B`: exact below a million, else three digits."""
    if number < 10**6:
        return f"{number:,}"
    size, letter = (10**9, "B") if number >= 999_500_000 else (10**6, "M")
    share = number / size
    return f"{share:,.{(share < 9.995) + (share < 99.95)}f}{letter}"


def gib(size: int) -> str:
    """Bytes as `12.34 GiB`, or MiB below a quarter of one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """`0:12:30`, from a day on `2d 7h`."""
    whole = round(seconds)
    return f"{whole // 86400}d {whole % 86400 // 3600}h" if whole >= 86400 else str(timedelta(seconds=whole))


def language_of(text: str) -> str:
    """`zh` where there are at least as many Chinese characters as words of other scripts, else `en`.

    A Chinese sentence with a few Latin names in it is Chinese, an English one that quotes a sign is not. Text with
    Japanese kana or Korean letters is `en`, which stands for every other language: data in, say, German and Chinese
    says so in a `language` column.
    """
    text = text[:_LONG]
    if text.isascii():
        return OTHER
    others, runs = _HAN.subn(" ", text)
    chinese = len(text) - len(others) + runs
    if not chinese or _KANA_HANGUL.search(text):
        return OTHER
    return CHINESE if chinese >= len(_WORD.findall(others)) else OTHER
