"""What people type is text: `</s>` or `<|im_end|>` in a question or an answer never becomes a control token.

The template's own control tokens keep their ids. The render says which characters a person wrote
(`RenderedChat.typed`); where a token was made of them, the text between the template's own tokens is tokenised again
as plain text. Conversations without such text are tokenised as ever.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from itertools import chain, pairwise
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from ..base.errors import UserError
from ..templates.literals import literals
from ..templates.process import asked_now
from ..templates.render import RenderedChat
from .encoding import tokenize

# Words of an answer, though many tokenizers call them special: where things are (`<|box_start|>`, `<ref>`, `<loc0001>`,
# `<patch_index_0001>`), and what a model thinks or calls.
_PLACES = r"box|ref|quad|point|poly|loc|seg|det|object|phrase|grounding|delimiter|patch_index"
PLACES = re.compile(rf"</?\|?/?(?:{_PLACES})", re.I)
WORDS = re.compile(rf"</?\|?/?(?:{_PLACES}|think|tool)", re.I)
MARKUP = re.compile(r"[<\[|]\S+")  # a token of a template that is not called special: `<|user|>`, but no line break

# A character in front of a text keeps tokenizers from adding a space of their own.
ANCHOR = "\n"

Tokens = tuple[list[int], list[tuple[int, int]]]  # ids, and where in the text each begins and ends

_UNSAID: WeakKeyDictionary[PreTrainedTokenizerBase, frozenset[int]] = WeakKeyDictionary()
_CONTROL: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[object, ...], tuple[str, ...]]] = WeakKeyDictionary()


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: str, own: Iterable[str] = ()) -> tuple[str, ...]:
    """Texts that are control tokens of a tokenizer: its special ones, and those that the template writes.

    Args:
        tokenizer: A fast tokenizer.
        template: Jinja source of the chat template.
        own: Further ones, such as those that a model's own processor puts around an image.
    """
    remembered = _CONTROL.setdefault(tokenizer, {})
    key = (template, len(tokenizer), *own)
    if key not in remembered:
        try:
            with asked_now():
                written = "".join(literals(template))
        except UserError:  # the template takes no conversation of the usual kind
            written = ""
        found = {*tokenizer.all_special_tokens}
        for token in tokenizer.added_tokens_decoder.values():
            if token.special or token.content in own or (MARKUP.fullmatch(token.content) and token.content in written):
                found.add(token.content)
        remembered[key] = tuple(sorted(text for text in found if len(text) > 1 and not WORDS.match(text)))
    return remembered[key]


def unsaid_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the special tokens that are not shown as part of an answer: all but those that say where things are."""
    if tokenizer not in _UNSAID:
        added = tokenizer.added_tokens_decoder.items()
        _UNSAID[tokenizer] = frozenset(id_ for id_, token in added if token.special and not PLACES.match(token.content))
    return _UNSAID[tokenizer]


def tokenize_chat(
    tokenizer: PreTrainedTokenizerBase, chat: RenderedChat, supervised: bytearray, marks: Collection[int]
) -> Tokens:
    """`tokenize` of a whole conversation, in which control tokens that somebody typed are text.

    Args:
        tokenizer: A fast tokenizer.
        chat: The conversation.
        supervised: What `supervised_characters` says of it.
        marks: Ids that stand for images or have no row among the embeddings: outside of `chat.image_spans` they are
            text, whoever wrote them.
    """
    ids, borders = tokenize(tokenizer, chat.text, supervised)
    stray = [start + 1 for token, (start, _) in zip(ids, borders, strict=True) if token in marks]
    typed = sorted({*chat.typed, *(place for place in stray if not _in_image(chat, place))})
    if not typed:
        return ids, borders
    added = tokenizer.added_tokens_decoder
    found = [token in added and _holds(typed, *border) for token, border in zip(ids, borders, strict=True)]
    if not any(found):
        return ids, borders
    own = [place for place, token in enumerate(ids) if token in added and not found[place]]
    done: list[Tokens] = []
    for before, after in pairwise([-1, *own, len(ids)]):
        stretch: Tokens = (ids[before + 1 : after], borders[before + 1 : after])
        if any(found[before + 1 : after]):
            start = borders[before][1] if before >= 0 else 0
            end = borders[after][0] if after < len(ids) else len(chat.text)
            first = None if found[before + 1] else ids[before + 1]
            stretch = _as_text(tokenizer, chat.text, supervised, (start, end), first)
            # Some tokenizers find it all the same, as a piece of their vocabulary; then it is cut.
            held = [border for token, border in zip(*stretch, strict=True) if token in added]
            if cuts := [place for place in typed if any(low < place < high for low, high in held)]:
                pieces = pairwise([start, *cuts, end])
                stretch = _joined(_as_text(tokenizer, chat.text, supervised, piece) for piece in pieces)
        done += [stretch, (ids[after : after + 1], borders[after : after + 1])]
    return _joined(done)


def _in_image(chat: RenderedChat, place: int) -> bool:
    image = bisect_right(chat.image_spans, (place, len(chat.text))) - 1
    return image >= 0 and place < chat.image_spans[image][1]


def _joined(parts: Iterable[Tokens]) -> Tokens:
    ids, borders = zip(*parts, strict=True)
    return [*chain(*ids)], [*chain(*borders)]


def _holds(places: Sequence[int], start: int, end: int) -> bool:
    """Whether one of the sorted places lies inside."""
    first = bisect_right(places, start)
    return first < len(places) and places[first] < end


def _as_text(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    supervised: bytearray,
    piece: tuple[int, int],
    first: int | None = None,
) -> Tokens:
    """A piece of the text without special tokens; it begins with the id `first`, where that is known."""
    start, end = piece
    if start:
        ids, borders = tokenize(tokenizer, ANCHOR + text[start:end], supervised, start - 1, plain=True)
        skipped = sum(low < start for low, _ in borders)
        joined = any(low < start < high for low, high in borders)
        if not joined and first in (None, *ids[skipped : skipped + 1]):
            return ids[skipped:], borders[skipped:]
    return tokenize(tokenizer, text[start:end], supervised, start, plain=True)
