"""Text → ids and labels, for every processor: where tokens lie, which are learned, and rows of them as one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from ..base.errors import RowError
from ..base.names import IGNORED, ROW_HEADS, ROW_LENGTHS, Inputs, Row
from ..rows.merging import apart
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
        heads: Of rows that share a prefix, which counts as one of `lengths`: the number of each one's prefix, or its
            own. None where every row is whole.
    """

    input_ids: list[int]
    labels: list[int]
    num_images: int
    places: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)

    @property
    def answer_place(self) -> int:
        """Where the first token lies that is learned; where none is, the end."""
        return next((place for place, label in enumerate(self.labels) if label != IGNORED), len(self.labels))

    @classmethod
    def packed(cls, chats: Sequence[EncodedChat]) -> EncodedChat:
        """Conversations behind each other; the first token of each is learned no more, as none of its own is before."""
        pack = cls([], [], sum(chat.num_images for chat in chats))
        heads: list[int] = []
        for chat in chats:
            heads += [len(pack.lengths) + head for head in chat.heads or [0]]
            pack.lengths += chat.lengths or [len(chat.input_ids)]
            pack.input_ids += chat.input_ids
            pack.labels += [IGNORED, *chat.labels[1:]]
            pack.places += chat.places
        pack.heads = heads if any(chat.heads for chat in chats) else []
        return pack

    @classmethod
    def sharing(cls, chats: Sequence[EncodedChat]) -> EncodedChat:
        """Conversations on the same images, with the tokens up to these once: that prefix, then the rest of each.

        The prefix is what all have in common, so that each with it has the tokens that it has alone; a token before the
        first that is learned stays with each, as what says it lies there.

        Raises:
            RowError: What they have in common does not reach beyond the images.
        """
        learned = (next(k for k, label in enumerate(chat.labels) if label != IGNORED) for chat in chats)
        common = min(learned) - 1
        first = np.asarray(chats[0].input_ids[: max(common, 0)])
        for chat in chats[1:]:
            common = min(common, len(chat.input_ids))
            differ = np.flatnonzero(first[:common] != np.asarray(chat.input_ids[:common]))
            common = int(differ[0]) if len(differ) else common
        if any(any(chat.places[max(common, 0) :]) for chat in chats):
            raise RowError(
                "the tokens of rows on one image differ before its end, or an answer follows it at once, so they "
                "cannot share it",
                reason="prefix differs",
            )
        rest = [len(chat.input_ids) - common for chat in chats]
        shared = cls([], [], chats[0].num_images, lengths=[common, *rest], heads=[0] * (len(chats) + 1))
        for number, chat in enumerate(chats):
            start = common if number else 0
            shared.input_ids += chat.input_ids[start:]
            shared.labels += chat.labels[start:]
            shared.places += chat.places[start:]
        return shared

    @staticmethod
    def lengths_of(rows: Sequence[EncodedChat]) -> dict[str, torch.Tensor]:
        """(B, R) `ROW_LENGTHS` of packs, and of rows that share their images, with (B, R) `ROW_HEADS`; else nothing."""
        shared = any(row.heads for row in rows)
        if not shared and not rows[0].lengths:
            return {}
        lengths = [row.lengths or [len(row.input_ids)] for row in rows]
        most = max(map(len, lengths))
        if not shared:
            return {ROW_LENGTHS: pad(lengths, most, 0)}
        heads = [row.heads or list(range(len(each))) for row, each in zip(rows, lengths, strict=True)]
        return {ROW_LENGTHS: pad(lengths, most, 0), ROW_HEADS: pad(heads, most, 0)}

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


@dataclass
class Sample:
    """One row, ready to be batched.

    Attributes:
        chat: Ids and labels.
        images: The row's RGB images, in reading order.
        id: The row's id, for messages.
        turns_lost: Turns dropped from the end to fit `max_length`.
        loss_weights: S factors on the loss, or None for 1 everywhere.
        instructions: What the user says beside each image, for a resampler that reads it.
        extra: Anything a subclass wants to carry to `collate`.
        names: Paths of the images, "" where one has none, for messages.
        pack: Number of its pack in the batch, or None for a row alone.
        rows: Of a pack, or of rows that share their images, which became one sample: these, each with its own `extra`.
    """

    chat: EncodedChat
    images: list[Image.Image]
    id: str
    turns_lost: int = 0
    loss_weights: list[float] | None = None
    instructions: list[str] = field(default_factory=list)
    extra: Inputs = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    pack: int | None = None
    rows: list[Sample] = field(default_factory=list)

    @classmethod
    def packed(cls, rows: Sequence[Sample]) -> Sample:
        """The rows of a pack as one sample."""
        weighed = any(row.loss_weights is not None for row in rows)
        weights = [weight for row in rows for weight in row.loss_weights or [1.0] * len(row.chat.input_ids)]
        return cls(
            EncodedChat.packed([row.chat for row in rows]),
            [image for row in rows for image in row.images],
            ", ".join(row.id for row in rows),
            sum(row.turns_lost for row in rows),
            weights if weighed else None,
            [text for row in rows for text in row.instructions],
            names=[name for row in rows for name in row.names],
            rows=list(rows),
        )

    @classmethod
    def sharing(cls, rows: Sequence[Sample], room: int | None) -> Sample:
        """Rows on the same images as one sample that has these once.

        Args:
            rows: Of which the first has the decoded images.
            room: Tokens that the sample may have; None for no limit.

        Raises:
            RowError: Their tokens do not begin alike (see `EncodedChat.sharing`), or they are too many.
        """
        where = f"row {', '.join(row.id for row in rows)}"
        try:
            chat = EncodedChat.sharing([row.chat for row in rows])
        except RowError as error:
            raise RowError(f"{where}: {error}", where=where, reason=error.reason) from error
        if room is not None and len(chat.input_ids) > room:
            sentence = f"{where}: they share an image and have {len(chat.input_ids)} tokens, more than sft.max_length"
            raise RowError(f"{sentence} ({room}).", where=where, reason="too long")
        whole = cls.packed(rows)
        if whole.loss_weights is not None:
            ends = np.cumsum([len(row.chat.input_ids) for row in rows])
            own = [whole.loss_weights[end - rest : end] for end, rest in zip(ends, chat.lengths[1:], strict=True)]
            whole.loss_weights = [1.0] * chat.lengths[0] + [weight for part in own for weight in part]
        first = rows[0]
        return replace(whole, chat=chat, instructions=first.instructions, names=first.names)


def rendered_ahead(collator: MultimodalCollator, rows: Iterable[Row]) -> Iterator[Row]:
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


def _render(collator: MultimodalCollator, row: Row) -> None:
    for each in apart(unpacked(row)):
        collator.render(write_boxes(collator.processor, each["messages"], each["images"], "", collator.fetch))


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
