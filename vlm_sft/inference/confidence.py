"""How sure a model was of each token that it wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..base.names import Options, Values

UNREADABLE = "\ufffd"


class Said(str):
    """An answer.

    Attributes:
        confidence: Its pieces in order, which joined are the answer, and the probability of each; None where nobody
            asked for them, or several beams found the answer.
    """

    __slots__ = ("confidence",)
    confidence: list[tuple[str, float]] | None

    def __new__(cls, text: str, confidence: list[tuple[str, float]] | None = None) -> Said:
        said = super().__new__(cls, text)
        said.confidence = confidence
        return said


class Confidence:
    """Looks on while answers are written, and keeps what each token's probability was.

    It is the model's own, before temperature and the like: a token that was drawn against the odds is unsure. Of each
    step one (B, V) tensor is there until the next; what is kept are B numbers, on the device.
    """

    def __init__(self) -> None:
        self._scores = torch.empty(0)
        self._taken: list[torch.Tensor] = []

    def watching(self, settings: Values) -> Options:
        """Settings for `generate` with this looking on beside what is there."""
        processors = LogitsProcessorList([*(settings.get("logits_processor") or []), _Before(self)])
        criteria = StoppingCriteriaList([*(settings.get("stopping_criteria") or []), _After(self)])
        return {**settings, "logits_processor": processors, "stopping_criteria": criteria}

    def see(self, scores: torch.Tensor) -> None:
        """Scores (B, V) of the next token."""
        self._scores = scores.float().log_softmax(-1)

    def take(self, tokens: torch.Tensor) -> None:
        """The (B,) tokens that were taken."""
        # Behind its end an answer is filled with a pad token, for which the head may have no row.
        known = tokens.clamp(max=self._scores.shape[1] - 1)
        self._taken.append(self._scores.gather(1, known[:, None])[:, 0])

    def probabilities(self) -> list[list[float]]:
        """Of each answer, the probability of each of its tokens; those behind its end mean nothing."""
        shares: list[list[float]] = torch.stack(self._taken, dim=1).exp().tolist()
        return shares


class _Before(LogitsProcessor):
    def __init__(self, own: Confidence) -> None:
        self.own = own

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.own.see(scores)
        return scores


class _After(StoppingCriteria):
    def __init__(self, own: Confidence) -> None:
        self.own = own

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.own.take(input_ids[:, -1])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def pieces_of(
    text: str, ids: Sequence[int], shares: Sequence[float], decode: Callable[[list[int]], str]
) -> list[tuple[str, float]]:
    """The pieces of an answer with their probabilities; joined they are the answer.

    A piece is what a token adds to the text. Tokens that are bytes of one character, or add nothing, are one piece with
    the next that does, whose probability is their product.

    Args:
        text: The answer, without its end mark and outer white space.
        ids: Its tokens before the one that ends it.
        shares: Their probabilities.
        decode: Ids → what they say.
    """
    whole = decode(list(ids))
    start = len(whole) - len(whole.lstrip())
    end = start + len(text)
    pieces: list[tuple[str, float]] = []
    at, share = 0, 1.0
    for count, probability in enumerate(shares[: len(ids)], start=1):
        share *= probability
        said = decode(list(ids[:count]))
        if count < len(ids) and (said.endswith(UNREADABLE) or not whole.startswith(said) or len(said) == at):
            continue
        piece = whole[max(at, start) : min(len(said), end)]
        if piece:
            pieces.append((piece, share))
        at, share = len(said), 1.0
        if at >= end:
            break
    return pieces
