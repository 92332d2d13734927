"""The answers that an encoder chooses from: out of a file or out of rows, and how right each is for a row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import UserError
from ..base.whole_files import IrregularError, read_text
from ..base.words import reason_of
from ..metrics.vqa import normalised

if TYPE_CHECKING:
    from ..recipe.schema import Recipe

ENOUGH = 3  # annotators who agree make an answer wholly right


class AnswerList:
    """Answers by their numbers; one that is written in another way, as VQA's metric sees it, is the same.

    Args:
        answers: In the order of a model's head, all different.
    """

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self._exactly = {answer: number for number, answer in enumerate(self.answers)}
        self._alike: dict[str, int] = {}
        for number, answer in enumerate(self.answers):
            self._alike.setdefault(_alike(answer), number)

    def number_of(self, answer: str) -> int | None:
        """Its place; None for one that is not in the list."""
        found = self._exactly.get(answer)
        return self._alike.get(_alike(answer)) if found is None else found

    def scores(self, given: Sequence[str]) -> dict[int, float]:
        """Number of each answer that somebody gave → how right it is: min(1, n / 3), as VQA counts n annotators.

        Where there are fewer than three of them, what all gave is wholly right.

        Args:
            given: What each annotator answered; what is not in the list counts as an annotator alone.
        """
        numbers = Counter(self.number_of(answer) for answer in given)
        enough = min(ENOUGH, len(given))
        return {number: min(1.0, count / enough) for number, count in numbers.items() if number is not None}


def _alike(answer: str) -> str:
    """What answers that mean the same have in common; of one that is an article alone, such as the letter A, itself."""
    return normalised(answer) or answer


def read_answer_list(path: str, key: str) -> list[str]:
    """Reads a JSON list of texts, or a text file with one a line; what comes twice counts once.

    Args:
        path: The file.
        key: What messages call it.

    Raises:
        UserError: The file cannot be read, or holds none.
    """
    try:
        text = read_text(Path(path).expanduser())
        found = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError, IrregularError, RecursionError) as error:
        raise UserError(f"{key} {path} cannot be read ({reason_of(error)}): give a list of answers.") from None
    if not all(isinstance(each, str) for each in found):
        raise UserError(f"{key} {path}: an answer is no text: write a list of texts.")
    if not (found := list(dict.fromkeys(filter(None, map(str.strip, found))))):
        raise UserError(f"{key} {path} holds no answers: write one a line.")
    return found


def answers_of_rows(recipe: Recipe, least: int) -> list[str]:
    """The answers of the training rows, the most frequent first; those alike as VQA's metric sees them are one.

    Args:
        recipe: With its `data.train`.
        least: How many rows must have an answer.

    Raises:
        UserError: A source cannot be read, or no answer is left.
    """
    from ..data.dataset import load_source

    seed = recipe.sft.get("data_seed") or recipe.sft.get("seed", 42)
    written: dict[str, Counter[str]] = {}
    for source in recipe.data.train:
        rows = load_source(source, seed=seed, reject=lambda error: None)  # which the ledger names later
        for messages in rows.select_columns(["messages"]):
            for message in messages["messages"]:
                if message["role"] == "assistant":
                    answer = "".join(part["text"] or "" for part in message["content"]).strip()
                    written.setdefault(_alike(answer), Counter())[answer] += 1
    kept = [(-ways.total(), ways.most_common(1)[0][0]) for ways in written.values() if ways.total() >= least]
    if not kept:
        where = recipe.where(("encoder", "min_count"))
        raise UserError(f"{where}: no answer of data.train is that of {least:,} rows; lower `encoder.min_count`.")
    return [answer for _, answer in sorted(kept)]
