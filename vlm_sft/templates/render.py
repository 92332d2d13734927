"""Renders conversations with jinja chat templates and says which characters are images and which are supervised.

A template is untrusted text that prints untrusted text, so nothing is ever searched for in the render: while it runs,
images and the borders of `{% generation %}` blocks are single characters that occur nowhere in the input, and they are
replaced afterwards. What a user or an answer says therefore never makes an image and never moves the mask.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from ..base.assets import template_path
from ..base.errors import UserError
from ..base.names import IMAGE_TOKEN, Values
from ..base.whole_files import read_text
from ..rows.messages import Message, normalise_messages
from .process import ask
from .sandbox import MARKS
from .typed import mark_where_typed


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text.

    Attributes:
        text: The render; every image is one `image_token`.
        spans: Half-open character ranges that are supervised, sorted and disjoint.
        image_spans: Half-open character ranges of the true image placeholders, in the order of the images. The same
            characters anywhere else were typed by somebody and are text.
        unlearned: The ranges that `spans` would have for answers whose `loss` is False, sorted and disjoint.
        typed: A position inside each control token that somebody typed (between its first character and the second).
    """

    text: str
    spans: list[tuple[int, int]]
    image_spans: list[tuple[int, int]]
    unlearned: list[tuple[int, int]] = field(default_factory=list)
    typed: list[int] = field(default_factory=list)

    @property
    def supervised(self) -> list[str]:
        """The text of each span."""
        return [self.text[start:end] for start, end in self.spans]


def render(
    messages: Sequence[Values],
    template: str | Path,
    add_generation_prompt: bool = False,
    *,
    bos_token: str | None = "",
    eos_token: str | None = "</s>",
    image_token: str = IMAGE_TOKEN,
    system: str | None = None,
    control: tuple[str, ...] = (),
) -> RenderedChat:
    """Renders a conversation.

    Args:
        messages: As `normalise_messages` takes them.
        template: A name in `chat_templates/`, a path, or jinja source.
        add_generation_prompt: Ends with what stands before the next answer (for inference); the last message must be
            the user's.
        bos_token: Value of the template's variable of that name.
        eos_token: Likewise; most templates end an answer with it.
        image_token: Text of an image placeholder.
        system: System text for a conversation that brings none; None leaves the template's own default, a string,
            also an empty one, replaces it.
        control: Control tokens of a tokenizer; where the messages hold one, its place is in `typed`.

    Raises:
        UserError: The messages are malformed, or the template is unknown, unmarked, broken, unsafe, or does not print
            each image once. Messages are named by index.
    """
    source, label = resolve(template)
    chat = normalise_messages(messages)
    if add_generation_prompt and chat[-1]["role"] == "assistant":
        answered = f"message {len(chat) - 1} is already an answer, so there is nothing to generate"
        raise UserError(f"{answered}; drop it, or add the user's next message.")
    if system is not None and chat[0]["role"] != "system":
        chat.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    tools = next((message["tools"] for message in chat if message.get("tools")), None)
    texts = [part["text"] for message in chat for part in message["content"] if part["type"] == "text"]
    texts += _check_printed(chat, tools, source, label)
    begin, end, image, inside = _unused_characters(4, source, bos_token or "", eos_token or "", *texts)
    chat, tools = mark_where_typed(chat, tools, control, inside)
    marked = ask(
        "render",
        source,
        label,
        messages=chat,
        add_generation_prompt=add_generation_prompt,
        bos_token=bos_token or "",
        eos_token=eos_token or "",
        image_token=image,
        tools=tools,  # transformers defines these two, and templates made for it test them
        documents=None,
        **{MARKS: (begin, end)},
    )
    shown_by = [message["role"] for message in chat for part in message["content"] if part["type"] == "image"]
    rendered, blocks = _replace_marks(marked, (begin, end, image, inside), image_token, label, shown_by)
    if len(rendered.image_spans) != len(shown_by):
        printed = f"{label} prints {len(rendered.image_spans)} image placeholders for {len(shown_by)} images"
        raise UserError(f"{printed}; let it print {{{{ image_token }}}} once for each part of type image.")
    return _without_unlearned(rendered, blocks, [m for m in chat if m["role"] == "assistant"], label)


def _check_printed(chat: Sequence[Message], tools: object, source: str, label: str) -> list[str]:
    """The texts of what messages have beside their contents; refuses what the template would leave out."""
    if any(part["type"] in ("box", "ref") for message in chat for part in message["content"]):
        raise UserError("the conversation has boxes, which `MultimodalCollator.encode` writes as text: encode its row.")
    if tools and "tools" not in ask("variables", source, label):
        raise UserError(f"the row has tools, which {label} does not print; use one that does, or remove them.")
    thinks = next((i for i, message in enumerate(chat) if message.get("reasoning_content")), None)
    if thinks is not None and "reasoning_content" not in ask("words", source, label):
        raise UserError(
            f"message {thinks} has reasoning_content, which {label} does not print; use one that does, write it into "
            f"the answer, or remove it."
        )
    thoughts = [message["reasoning_content"] for message in chat if message.get("reasoning_content")]
    return [*thoughts, json.dumps(tools, ensure_ascii=False)] if tools else thoughts


def _without_unlearned(
    chat: RenderedChat, blocks: Sequence[int], answers: Sequence[Message], label: str
) -> RenderedChat:
    """Takes the answers whose `loss` is False out of what is supervised.

    Args:
        chat: The conversation, in which all answers are supervised.
        blocks: For each of its spans, which of the template's generation blocks it comes from, and last their number.
        answers: Its messages of the assistant.
        label: What to call the template.
    """
    off = {number for number, answer in enumerate(answers) if answer.get("loss") is False}
    if not off:
        return chat
    if blocks[-1] != len(answers):
        raise UserError(
            f"{label} has {blocks[-1]} supervised blocks for {len(answers)} answers, so the loss of one cannot be "
            f"switched off; let it write one {{% generation %}} block for each answer."
        )
    spans = list(zip(chat.spans, blocks, strict=False))
    learned = [span for span, block in spans if block not in off]
    return replace(chat, spans=learned, unlearned=[span for span, block in spans if block in off])


def render_chat(
    messages: Sequence[Values],
    template: str | Path,
    add_generation_prompt: bool = False,
    *,
    bos_token: str | None = "",
    eos_token: str | None = "</s>",
    image_token: str = IMAGE_TOKEN,
    system: str | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a conversation; returns its text and the half-open character ranges that are supervised.

    Args and Raises: see `render`, which also says where the images are.
    """
    chat = render(
        messages,
        template,
        add_generation_prompt,
        bos_token=bos_token,
        eos_token=eos_token,
        image_token=image_token,
        system=system,
    )
    return chat.text, chat.spans


def resolve(template: str | Path) -> tuple[str, str]:
    """Jinja source, and what to call it in an error."""
    if isinstance(template, str) and re.search(r"\{[{%#]|\n", template):
        return template, "the chat template"
    # A file of that name is taken only where no template ships under it: a stray `ziya` must not shadow ours.
    path = Path(template)
    if isinstance(template, str):
        try:
            path = template_path(template)
        except UserError:
            if not os.path.isfile(template):
                raise
    label = f"the chat template {path}"
    try:
        return read_text(path), label
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{label} cannot be read ({reason}); give the name or the file of a template.") from error


def _unused_characters(count: int, *texts: str) -> list[str]:
    """Characters that occur in none of `texts` (from a private-use plane, so that hardly any is ever skipped)."""
    return list(islice((c for c in map(chr, range(0xF0000, 0x110000)) if not any(c in text for text in texts)), count))


def _replace_marks(
    marked: str, marks: tuple[str, str, str, str], image_token: str, label: str, shown_by: Sequence[str]
) -> tuple[RenderedChat, list[int]]:
    """The text without marks; and for each of its spans which generation block it is of, and last how many there are.

    Args:
        marked: What the template printed.
        marks: The characters for where a block begins, where it ends, an image, and a typed control token.
        image_token: What an image is then.
        label: What to call the template.
        shown_by: The role of each image's message: an answer's own image parts its span in two.
    """
    begin, end, image, inside = marks
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    images: list[tuple[int, int]] = []
    blocks: list[int] = []
    typed: list[int] = []
    length, start, block = 0, None, -1
    for piece in re.split(f"([{''.join(marks)}])", marked):
        if piece == inside:
            typed.append(length)
            continue
        if piece in (begin, end, image) and start is not None and length > start:
            spans.append((start, length))
            blocks.append(block)
        if piece in (begin, end):
            if (piece == begin) != (start is None):
                raise UserError(f"{label} has generation markers inside generation markers; close one before the next.")
            block += piece == begin
            start = length if piece == begin else None
            continue
        if piece == image:
            if start is not None and shown_by[len(images) : len(images) + 1] != ["assistant"]:
                raise UserError(f"{label} prints an image inside its generation markers; images are never supervised.")
            images.append((length, length + len(image_token)))
            piece = image_token
            start = None if start is None else length + len(piece)
        pieces.append(piece)
        length += len(piece)
    return RenderedChat("".join(pieces), spans, images, typed=typed), [*blocks, block + 1]
