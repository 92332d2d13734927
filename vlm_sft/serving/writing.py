"""One answer as it is written among others: what it may show so far, how it is drawn, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria

from ..base.errors import UserError
from ..base.names import Row, Values
from ..batch.encoding import EncodedChat
from ..batch.pictures import Pictures
from ..batch.processor import VLMProcessor
from ..inference.generation import decode
from ..inference.settings import PROCESSORS, ends_of
from ..inference.streaming import HeldBack

UNREADABLE = "\ufffd"


class Share(NamedTuple):
    """A token and its probability.

    Attributes:
        text: What it says.
        log: The logarithm of its probability.
        others: The likeliest tokens of that place.
    """

    text: str
    log: float
    others: tuple[Share, ...] = ()


class Piece(NamedTuple):
    """What an answer went on by; its text may be empty where only tokens came."""

    text: str
    shares: tuple[Share, ...] = ()


class End(NamedTuple):
    """An answer has ended: `stop` by itself, `length` at its most tokens, or with what went wrong."""

    reason: str
    error: Exception | None = None


@dataclass(frozen=True)
class Draw:
    """How tokens are chosen.

    Attributes:
        warpers: What changes the scores of a place before one is drawn; None takes the likeliest.
        seed: Of the draws; None for another one each time.
    """

    warpers: LogitsProcessorList | None = None
    seed: int | None = None


def how_drawn(settings: Values, seed: int | None) -> Draw:
    """Settings of `generate` that are about drawing → how tokens are chosen; as transformers orders them."""
    if settings.get("do_sample") is False or settings.get("temperature") == 0:
        return Draw()
    given = {name: settings[name] for name in DRAWS if settings.get(name) is not None}
    if not given and not settings.get("do_sample"):
        return Draw()
    # What means nothing (0 of top_k, 1 of top_p) is left out, and so is a top_p of 0: it leaves one token.
    if given.get("top_p") == 0:
        return Draw()
    meant = {name: value for name, value in given.items() if value != MEANT_BY_NONE.get(name)}
    return Draw(LogitsProcessorList([PROCESSORS[name](value) for name, value in meant.items()]), seed)


DRAWS = ("temperature", "top_k", "top_p", "min_p", "typical_p")
MEANT_BY_NONE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}


@dataclass(eq=False)
class Writing:
    """An answer that is being written.

    Args:
        chat: The prompt.
        row: The conversation, as `answer` takes it.
        most: The most tokens.
        processor: Of its bundle.
        tell: Is handed each `Piece`, and the `End` last.
        stop: Texts that end the answer.
        draw: How tokens are chosen.
        likely: How many other tokens are told at each place; None: no probabilities.

    Attributes:
        pictures: Of the prompt, decoded when its turn comes.
        ids: Tokens so far, without the one that ended it.
        ended: Why it has ended; None: it goes on.
        gone: Whether nobody waits for it any more.
    """

    chat: EncodedChat
    row: Row
    most: int
    processor: VLMProcessor
    tell: Callable[[Piece | End], None]
    stop: Sequence[str] = ()
    draw: Draw = field(default_factory=Draw)
    likely: int | None = None
    pictures: Pictures | None = None
    ids: list[int] = field(default_factory=list)
    ended: str | None = None
    gone: bool = False

    def __post_init__(self) -> None:
        self._ends, mark = ends_of(self.processor)
        self._held = HeldBack([mark.strip(" "), *self.stop])
        self._read = 0
        self._generator: torch.Generator | None = None

    @property
    def left(self) -> int:
        """How many tokens it may still have."""
        return self.most - len(self.ids)

    @property
    def length(self) -> int:
        """Tokens of the prompt and of what is written."""
        return len(self.chat.input_ids) + len(self.ids)

    def so_far(self) -> EncodedChat:
        """The prompt with what is written behind it, from which a model goes on."""
        more = len(self.ids)
        return replace(
            self.chat,
            input_ids=self.chat.input_ids + self.ids,
            labels=self.chat.labels + [-100] * more,
            places=self.chat.places + [0] * more,
        )

    def choose(self, scores: torch.Tensor) -> int | None:
        """A token drawn by its (1, V) scores; None where the likeliest is taken."""
        if self.draw.warpers is None:
            return None
        if self._generator is None:
            self._generator = torch.Generator(scores.device)
            seed = self.draw.seed
            self._generator.seed() if seed is None else self._generator.manual_seed(seed)
        shares = self.draw.warpers(None, scores).softmax(-1)
        if not bool(shares.isfinite().all()):
            raise UserError("The model's scores are not numbers, so no token can be drawn: ask with temperature 0.")
        return int(torch.multinomial(shares[0], 1, generator=self._generator))

    def take(self, token: int, share: Callable[[], Share] | None = None) -> None:
        """Goes on by a token.

        Args:
            token: Its id.
            share: Says how probable it was.
        """
        if self.gone or self.ended:
            return
        if token in self._ends:
            self.end("stop")
            return
        self.ids.append(token)
        whole = decode(self.processor, self.ids)
        last = self.left <= 0
        shown = whole if last else whole.rstrip(UNREADABLE)  # the last character may not be whole yet
        text = self._held.take(shown[self._read :]) if len(shown) > self._read else ""
        self._read = max(self._read, len(shown))
        shares = (share(),) if share is not None else ()
        if text or shares:
            self.tell(Piece(text, shares))
        if self._held.ended:
            self.end("stop")
        elif last:
            self.end("length")

    def end(self, reason: str, error: Exception | None = None) -> None:
        """Ends it; what was held back is shown, as nothing follows any more."""
        if self.ended is not None:
            return
        self.ended = reason
        if error is None and not self._held.ended:
            whole = decode(self.processor, self.ids)
            if rest := self._held.take(whole[self._read :]) + self._held.rest():
                self.tell(Piece(rest))
        self.tell(End(reason, error))


class Choice(LogitsProcessor):
    """Chooses the token of each answer that draws its own; called by `generate`, which takes the likeliest then.

    Attributes:
        shares: (B, V) logarithms of probabilities, before anything was changed for a draw.
    """

    def __init__(self, writings: Sequence[Writing]) -> None:
        self.writings = writings
        self.shares = torch.empty(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if any(each.likely is not None for each in self.writings):
            self.shares = scores.float().log_softmax(-1)
        for row, writing in enumerate(self.writings):
            if writing.ended or writing.gone:
                continue
            try:
                token = writing.choose(scores[row : row + 1].float())
            except UserError as error:
                writing.end("error", error)
                continue
            if token is not None:
                scores[row] = -torch.inf
                scores[row, token] = 0.0
        return scores


class Step(StoppingCriteria):
    """Hands each answer its next token, and says which have ended; called by `generate` after each step.

    Args:
        writings: In the order of the batch.
        choice: What chose their tokens.
        pause: Whether to stop here although some go on.
    """

    def __init__(self, writings: Sequence[Writing], choice: Choice, pause: Callable[[int], bool]) -> None:
        self.writings, self.choice, self.pause = writings, choice, pause
        self.steps, self._over = 0, False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.steps += 1
        for row, (writing, token) in enumerate(zip(self.writings, input_ids[:, -1].tolist(), strict=True)):
            # On a GPU `generate` may go a step further than it was told to.
            if not self._over:
                writing.take(token, self._share(row, token) if writing.likely is not None else None)
        done = [bool(writing.ended or writing.gone) for writing in self.writings]
        self._over = self._over or all(done) or self.pause(self.steps)
        return torch.tensor([self._over or each for each in done], device=input_ids.device)

    def _share(self, row: int, token: int) -> Callable[[], Share]:
        def found() -> Share:
            writing, shares = self.writings[row], self.choice.shares[row]
            tokenizer = writing.processor.tokenizer
            best = shares.topk(min(writing.likely or 0, len(shares)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            others = tuple(Share(tokenizer.decode([id_]), log) for id_, log in pairs)
            return Share(tokenizer.decode([token]), float(shares[min(token, len(shares) - 1)]), others)

        return found
