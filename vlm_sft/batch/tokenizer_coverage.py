"""How well a tokenizer knows a language: the first thing to know when an English language model meets Chinese data."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ..base.words import language_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # what a sentencepiece tokenizer falls back to

# Above these, preflight warns. An unknown token teaches the model to say it; a character in pieces costs length, and
# the model has to spell it. English takes about a quarter of a token for a character.
MOST_UNKNOWN = 0.001
MOST_PIECES = 0.1
MOST_TOKENS_PER_CHARACTER = 1.2


@dataclass
class Coverage:
    """The answers in one language, as a tokenizer cuts them.

    Attributes:
        answers: How many were looked at.
        characters: Their characters.
        tokens: Their tokens.
        unknown: Tokens that stand for text the tokenizer does not know.
        pieces: Tokens that are a part of a character: byte fallback, or bytes of a byte-level vocabulary.
    """

    answers: int = 0
    characters: int = 0
    tokens: int = 0
    unknown: int = 0
    pieces: int = 0

    def add(self, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Counts one answer.

        Args:
            text: The answer.
            tokenizer: A fast tokenizer of transformers.
        """
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        self.answers += 1
        self.characters += len(text)
        self.tokens += len(found.input_ids)
        if tokenizer.unk_token_id is not None:
            self.unknown += found.input_ids.count(tokenizer.unk_token_id)
        spans = [span for span in found.offset_mapping if span[1] > span[0]]
        shares = [after[0] < before[1] for before, after in pairwise(spans)]
        cut = [left or right for left, right in zip([False, *shares], [*shares, False], strict=True)] if spans else []
        fallback = sum(BYTE.fullmatch(token) is not None for token in tokenizer.convert_ids_to_tokens(found.input_ids))
        self.pieces += max(sum(cut), fallback)

    @property
    def tokens_per_character(self) -> float:
        """Tokens by characters; 0 without any."""
        return self.tokens / max(self.characters, 1)

    @property
    def unknown_share(self) -> float:
        """Share of tokens that are unknown."""
        return self.unknown / max(self.tokens, 1)

    @property
    def pieces_share(self) -> float:
        """Share of tokens that are a part of a character."""
        return self.pieces / max(self.tokens, 1)

    def problems(self) -> list[str]:
        """What is above a threshold, in words."""
        found = []
        if self.unknown_share > MOST_UNKNOWN:
            found.append(f"{self.unknown_share:.2%} of the tokens are unknown (more than {MOST_UNKNOWN:.1%})")
        if self.pieces_share > MOST_PIECES:
            found.append(f"{self.pieces_share:.0%} are parts of a character (more than {MOST_PIECES:.0%})")
        if self.tokens_per_character > MOST_TOKENS_PER_CHARACTER:
            ratio = f"a character takes {self.tokens_per_character:.2f} tokens"
            found.append(f"{ratio} (more than {MOST_TOKENS_PER_CHARACTER:g})")
        return found


def coverage_of(answers: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Coverage]:
    """Language (`zh`, or `en` for every other) → its coverage.

    Args:
        answers: Texts.
        tokenizer: A fast tokenizer of transformers.
    """
    found: dict[str, Coverage] = {}
    for answer in answers:
        found.setdefault(language_of(answer), Coverage()).add(answer, tokenizer)
    return dict(sorted(found.items()))
