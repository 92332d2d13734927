"""Texts that have nothing to do with pictures: what a language model makes of them says what it has forgotten."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..base.assets import list_text_sets, text_set_path
from ..base.errors import UserError
from ..base.whole_files import digest, read_bytes
from ..base.words import language_of, reason_of

BUNDLED = "everyday"


class Wish(NamedTuple):
    """What of forgetting is to be measured of a bundle.

    Attributes:
        wanted: True reads the language model's base weights where nothing else tells what was before; None measures
            where none are read for it; False nothing.
        texts: File of texts; None for what the bundle's recipe says.
        pictures: Folder of labelled pictures for a vision tower; see `towers.read_pictures`.
    """

    wanted: bool | None = None
    texts: str | None = None
    pictures: str | None = None


USUAL = Wish()


@dataclass(frozen=True)
class Asked:
    """A question about nothing that is seen, with the answers of which one should stand in what is said; or none."""

    question: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextSet:
    """Texts and questions.

    Attributes:
        name: What messages call it.
        mark: Of its contents: numbers of other texts are not compared with those of these.
        texts: Language → texts.
        questions: In order.
    """

    name: str
    mark: str
    texts: dict[str, list[str]] = field(default_factory=dict)
    questions: list[Asked] = field(default_factory=list)


def read_texts(path: str | None = None) -> TextSet:
    """A text set: lines of JSON, each with a `text`, or with a `question` and maybe `answers`; and maybe a `language`.

    Args:
        path: A file, or the name of a set that ships; None for `everyday`.

    Raises:
        UserError: There is no such file, or a line is none of these.
    """
    name = path or BUNDLED
    file = text_set_path(name) if name in list_text_sets() else Path(name).expanduser()
    try:
        data = read_bytes(file)
    except OSError as error:
        raise UserError(
            f"the texts {str(file)!r} cannot be read ({reason_of(error)}); give a file of JSON lines."
        ) from None
    texts: dict[str, list[str]] = {}
    questions: list[Asked] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f'{where} is no JSON; write {{"text": "…"}} on each line.') from None
        if not isinstance(entry, dict):
            raise UserError(f'{where} is no object; write {{"text": "…"}} on each line.')
        text, question = entry.get("text"), entry.get("question")
        if (text is None) == (question is None):
            raise UserError(f"{where} needs a `text` or a `question`, one of them.")
        said = question if text is None else text
        if not isinstance(said, str) or not said.strip():
            raise UserError(f"{where}: `{'question' if text is None else 'text'}` must be text that is not empty.")
        if text is None:
            questions.append(Asked(said, _answers(entry.get("answers", []), where)))
        else:
            language = entry.get("language") or language_of(said)
            if not isinstance(language, str) or not language.isidentifier():
                raise UserError(f"{where}: `language` must be a short name such as en or zh, not {language!r}.")
            texts.setdefault(language, []).append(said)
    if not texts:
        raise UserError(f'{file} has no text; write lines like {{"text": "…"}}.')
    return TextSet(file.stem, digest(data).hex()[:16], texts, questions)


def _answers(given: object, where: str) -> tuple[str, ...]:
    answers = [given] if isinstance(given, str) else given
    if not isinstance(answers, list) or not all(isinstance(each, str) and each.strip() for each in answers):
        raise UserError(f"{where}: `answers` must be a list of texts, of which one should stand in the answer.")
    return tuple(answers)
