"""A sample's tokens for people: what each says, who says it, and whether it is in the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base.names import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..rows.messages import Message
    from .collator import Sample
    from .processor import VLMProcessor

LONGEST_CHARACTER = 8  # tokens that one character may take before it is shown as what cannot be read
UNREADABLE = "\ufffd"


@dataclass(frozen=True)
class TokenGroup:
    """Some tokens that are shown as one: a token, the bytes of a character, or the span of an image.

    Attributes:
        text: What they say; "" for an image.
        role: `system`, `user`, `assistant`, `template` or `image`.
        learned: Whether they are in the loss.
        ids: Their ids.
        position: Place of the first in the row, from 0.
    """

    text: str
    role: str
    learned: bool
    ids: tuple[int, ...]
    position: int


def token_groups(sample: Sample, messages: Sequence[Message], processor: VLMProcessor) -> list[TokenGroup]:
    """The tokens of a sample in order, as the collator made them: what a subclass changed is shown changed.

    Args:
        sample: What `MultimodalCollator.encode` gave.
        messages: The row's messages; their texts are looked for in what the tokens say, in order.
        processor: A `VLMProcessor`.
    """
    groups = list(_groups(sample.chat.input_ids, sample.chat.labels, processor))
    roles = _roles(groups, messages)
    return [
        TokenGroup(text, "image" if text == "" and image else role, learned, ids, position)
        for (text, learned, ids, position, image), role in zip(groups, roles, strict=True)
    ]


_Group = tuple[str, bool, tuple[int, ...], int, bool]  # text, learned, ids, position, whether it is an image


def _groups(ids: Sequence[int], labels: Sequence[int], processor: VLMProcessor) -> Iterator[_Group]:
    images, at = set(processor.image_token_ids), 0
    while at < len(ids):
        end, learned = at + 1, labels[at] != IGNORED
        if ids[at] in images:
            while end < len(ids) and ids[end] in images:
                end += 1
            yield "", learned, tuple(ids[at:end]), at, True
        else:
            text = _say(ids[at:end], processor.tokenizer)
            while UNREADABLE in text and end < min(len(ids), at + LONGEST_CHARACTER) and ids[end] not in images:
                if (labels[end] != IGNORED) != learned:
                    break
                end += 1
                text = _say(ids[at:end], processor.tokenizer)
            yield text, learned, tuple(ids[at:end]), at, False
        at = end


def _say(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    # A decoder takes the space in front of a text away, and here every token is a text of its own.
    first = tokenizer.convert_ids_to_tokens(int(ids[0]))
    return f" {text}" if first and first[0] in "▁Ġ" and not text.startswith((" ", "\n")) else text


def _roles(groups: Sequence[_Group], messages: Sequence[Message]) -> list[str]:
    """The role of each group: that of the message whose text it lies in, else `template`."""
    whole = "".join(text for text, *_ in groups)
    owners, at = ["template"] * len(whole), 0
    for message in messages:
        for part in message["content"]:
            text = (part.get("text") or "").strip()
            start = whole.find(text, at) if text else -1
            if start >= 0:
                at = start + len(text)
                owners[start:at] = [message["role"]] * len(text)
    roles, at = [], 0
    for text, *_ in groups:
        inside = owners[at : at + len(text)]
        roles.append(next((role for role in inside if role != "template"), "template"))
        at += len(text)
    return roles
