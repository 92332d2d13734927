"""Renders conversations with jinja chat templates and says which characters are images and which are supervised.

A template is untrusted text that prints untrusted text, so nothing is ever searched for in the render: while it runs,
images and the borders of `{% generation %}` blocks are single characters that occur nowhere in the input, and they are
replaced afterwards. What a user or an answer says therefore never makes an image and never moves the mask.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.assets import template_path
from ..base.errors import UserError
from ..base.names import IMAGE_TOKEN
from ..data.messages import normalise_messages
from .sandbox import MARKS, compile_template, run_template


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text.

    Attributes:
        text: The render; every image is one `image_token`.
        spans: Half-open character ranges that are supervised, sorted and disjoint.
        image_spans: Half-open character ranges of the true image placeholders, in the order of the images. The same
            characters anywhere else were typed by somebody and are text.
    """

    text: str
    spans: list[tuple[int, int]]
    image_spans: list[tuple[int, int]]

    @property
    def supervised(self) -> list[str]:
        """The text of each span."""
        return [self.text[start:end] for start, end in self.spans]


def render(
    messages: Sequence[Mapping[str, Any]],
    template: str | Path,
    add_generation_prompt: bool = False,
    *,
    bos_token: str | None = "",
    eos_token: str | None = "</s>",
    image_token: str = IMAGE_TOKEN,
    system: str | None = None,
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

    Raises:
        UserError: The messages are malformed, or the template is unknown, unmarked, broken, unsafe, or does not print
            each image once. Messages are named by index.
    """
    source, label = resolve(template)
    chat = normalise_messages(messages)
    if add_generation_prompt and chat[-1]["role"] == "assistant":
        raise UserError(
            f"message {len(chat) - 1} is already an answer, so there is nothing to generate; "
            f"drop it, or add the user's next message."
        )
    if system is not None and chat[0]["role"] != "system":
        chat.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    texts = [part["text"] for message in chat for part in message["content"] if part["type"] == "text"]
    begin, end, image = _unused_characters(3, source, bos_token or "", eos_token or "", *texts)
    marked = run_template(
        compile_template(source, label),
        label,
        messages=chat,
        add_generation_prompt=add_generation_prompt,
        bos_token=bos_token or "",
        eos_token=eos_token or "",
        image_token=image,
        tools=None,  # transformers defines these two, and templates made for it test them
        documents=None,
        **{MARKS: (begin, end)},
    )
    rendered = _replace_marks(marked, begin, end, image, image_token, label)
    images = sum(part["type"] == "image" for message in chat for part in message["content"])
    if len(rendered.image_spans) != images:
        raise UserError(
            f"{label} prints {len(rendered.image_spans)} image placeholders for {images} images; "
            f"let it print {{{{ image_token }}}} once for each part of type image."
        )
    return rendered


def render_chat(
    messages: Sequence[Mapping[str, Any]],
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
        return path.read_text(encoding="utf-8"), label
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{label} cannot be read ({reason}); give the name or the file of a template.") from error


def _unused_characters(count: int, *texts: str) -> list[str]:
    """Characters that occur in none of `texts` (from a private-use plane, so that hardly any is ever skipped)."""
    found: list[str] = []
    code = 0xF0000
    while len(found) < count:
        if not any(chr(code) in text for text in texts):
            found.append(chr(code))
        code += 1
    return found


def _replace_marks(marked: str, begin: str, end: str, image: str, image_token: str, label: str) -> RenderedChat:
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    images: list[tuple[int, int]] = []
    length, start = 0, None
    for piece in re.split(f"([{begin}{end}{image}])", marked):
        if piece in (begin, end):
            if (piece == begin) != (start is None):
                raise UserError(f"{label} has generation markers inside generation markers; close one before the next.")
            if start is not None and length > start:
                spans.append((start, length))
            start = length if piece == begin else None
            continue
        if piece == image:
            if start is not None:
                raise UserError(f"{label} prints an image inside its generation markers; images are never supervised.")
            images.append((length, length + len(image_token)))
            piece = image_token
        pieces.append(piece)
        length += len(piece)
    return RenderedChat("".join(pieces), spans, images)
