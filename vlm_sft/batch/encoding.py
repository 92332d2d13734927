"""Text → ids and labels, for every processor: where tokens lie, which are learned, and rows of them as one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..base.names import IGNORED
from ..rows.messages import unpacked
from ..templates.process import TOGETHER, asked_ahead
from ..templates.render import RenderedChat
from .box_text import write_boxes

if TYPE_CHECKING:
    from .collator import MultimodalCollator

UNLEARNED = 2  # what `supervised_characters` says of an answer that is not learned is above
PAD = "<pad>"  # added where a tokenizer has no pad token


class Word(NamedTuple):
    """A word that was added.

    Attributes:
        text: The word.
        id: Its token.
        pieces: The tokens that it was cut into before; none where the tokenizer did not know it at all.
    """

    text: str
    id: int
    pieces: tuple[int, ...]


@dataclass
class EncodedChat:
    """A conversation as ids.

    Attributes:
        input_ids: S token ids, image placeholders expanded.
        labels: S labels, -100 outside the answers.
        num_images: Number of images the ids have room for.
        places: S flags, 1 where an image feature goes.
        lengths: Of a pack, how many tokens each of its rows has; of one conversation, none.
    """

    input_ids: list[int]
    labels: list[int]
    num_images: int
    places: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @classmethod
    def packed(cls, chats: Sequence[EncodedChat]) -> EncodedChat:
        """Conversations behind each other; the first token of each is learned no more, as none of its own is before."""
        pack = cls([], [], sum(chat.num_images for chat in chats), lengths=[len(chat.input_ids) for chat in chats])
        for chat in chats:
            pack.input_ids += chat.input_ids
            pack.labels += [IGNORED, *chat.labels[1:]]
            pack.places += chat.places
        return pack

    def append(self, token: int, learned: bool = False, place: bool = False) -> None:
        """Adds one token."""
        self.input_ids.append(token)
        self.labels.append(token if learned else IGNORED)
        self.places.append(int(place))

    def extend(self, tokens: Sequence[int], labels: Sequence[int] | None = None, place: bool = False) -> None:
        """Adds tokens with their labels; without labels they are not learned."""
        self.input_ids += tokens
        self.labels += [IGNORED] * len(tokens) if labels is None else labels
        self.places += [int(place)] * len(tokens)


def rendered_ahead(collator: MultimodalCollator, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows as they are, each when its conversation and those behind it were rendered, many in one message.

    Where a template does not ship with this package, another process renders it: to wait for it takes longer than that.

    Args:
        collator: Is about to encode each row.
        rows: Rows of a dataset.
    """
    rows = iter(rows)
    while chunk := list(islice(rows, TOGETHER)):
        with asked_ahead(partial(_render, collator, row) for row in chunk):
            yield from chunk


def _render(collator: MultimodalCollator, row: dict[str, Any]) -> None:
    row = unpacked(row)
    collator.render(write_boxes(collator.processor, row["messages"], row["images"], "", collator.fetch))


def supervised_characters(chat: RenderedChat) -> bytearray:
    """0 for each character of a rendered conversation that nobody answers; 1 and 2 in turn for those of spans.

    3 and 4 in turn for those of answers that are not learned: they have the same tokens as if they were.
    """
    supervised = bytearray(len(chat.text))
    for first, spans in ((1, chat.spans), (1 + UNLEARNED, chat.unlearned)):
        for number, (start, end) in enumerate(spans):
            supervised[start:end] = bytes([first + number % 2]) * (end - start)
    return supervised


def in_loss(character: int) -> bool:
    """Whether a character is in the loss, by what `supervised_characters` says of it."""
    return 0 < character <= UNLEARNED


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, supervised: bytearray, offset: int = 0, plain: bool = False
) -> tuple[list[int], list[tuple[int, int]]]:
    """The id of every token, and its (start, end); no token lies across the border of an answer.

    At inference the answer follows a prompt that was tokenised by itself, so a token that joins the last character of a
    prompt with the first of an answer would never be seen there: the text is cut at such borders.

    Args:
        tokenizer: A fast tokenizer.
        text: A rendered conversation, or a piece of it.
        supervised: What `supervised_characters` says of the conversation.
        offset: Where in the conversation the text begins.
        plain: Whether special tokens in it are text.
    """
    output = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=plain)
    ids, borders = output.input_ids, output.offset_mapping
    if offset:
        borders = [(start + offset, end + offset) for start, end in borders]
    crossing = [(s, e) for s, e in borders if e - s > 1 and supervised.count(supervised[s], s, e) < e - s]
    if not crossing:
        return ids, borders
    cuts = {i for s, e in crossing for i in range(s + 1, e) if supervised[i] != supervised[i - 1]}
    pieces = pairwise([offset, *sorted(cuts), offset + len(text)])
    done = [tokenize(tokenizer, text[a - offset : b - offset], supervised, a, plain) for a, b in pieces]
    return [i for ids, _ in done for i in ids], [border for _, borders in done for border in borders]


_FIRST_IDS: WeakKeyDictionary[PreTrainedTokenizerBase, int | None] = WeakKeyDictionary()


def first_id_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that a tokenizer begins every text with by itself (asked for every row, so it is remembered)."""
    if tokenizer not in _FIRST_IDS:
        ids = tokenizer("a").input_ids
        _FIRST_IDS[tokenizer] = ids[0] if ids else None
    return _FIRST_IDS[tokenizer]


def add_missing_tokens(tokenizer: PreTrainedTokenizerBase, image_token: str) -> list[str]:
    """Adds the image token and, where there is none, a pad token; returns what was added, to be said.

    Neither needs a row of the embedding matrix: placeholders are replaced by features and padding is masked. The pad
    token is never the end token, or the model would not learn to stop.
    """
    added = []
    vocabulary = tokenizer.get_vocab()
    if image_token not in vocabulary:
        tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
        added.append(image_token)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        if PAD not in vocabulary:
            added.append(PAD)
        tokenizer.add_special_tokens({"pad_token": PAD})
    return added


def pad(rows: Sequence[Sequence[float]], length: int, fill: float, side: str = "right") -> torch.Tensor:
    """Rows of different lengths → (B, `length`), in int64, or in fp32 where `fill` is a float.

    Args:
        rows: B rows of numbers.
        length: Of each row then.
        fill: What is put in.
        side: Where it is put in: `right` or `left`.
    """
    table = np.full((len(rows), length), fill, dtype=np.float32 if isinstance(fill, float) else np.int64)
    for line, row in zip(table, rows, strict=True):
        line[slice(len(row)) if side == "right" else slice(length - len(row), None)] = row
    return torch.from_numpy(table)
