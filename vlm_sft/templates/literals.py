"""What chat templates put around messages, so that it can be looked for inside answers, where it does not belong."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..base.assets import list_templates
from ..base.errors import UserError
from ..rows.messages import Message
from .render import render

_QUESTION, _ANSWER, _IMAGE = "\ue000", "\ue001", "\ue002"  # private-use characters: no template prints them
# `<human>:` `<|im_start|>` `<<SYS>>` `[/INST]` `###Human` `USER:`; not `Answer:`, which honest answers hold.
_MARKER = re.compile(
    r"<\|[\w/]+\|>\w*|<</?[A-Z]+>>|</?[A-Za-z_]+>:?|\[/?[A-Z]{3,}\]|#{2,3} ?[A-Z][a-z]+|\b[A-Z]{3,}:", re.ASCII
)
_WORD = re.compile(r"\b[A-Z]\w*(?: \w+)?:", re.ASCII)
# Templates that bring no name of their own for the roles, but stand in data scraped from others.
WELL_KNOWN = ("<human>:", "<bot>:", "USER:", "ASSISTANT:", "[INST]", "[/INST]", "###Human", "###Assistant")


def literals(template: str) -> list[str]:
    """What a template prints around two turns with an image: its own words, in order.

    Args:
        template: A name in `chat_templates/`, a path, or jinja source.
    """
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _QUESTION}]}
    turns: list[Message] = [user, {"role": "assistant", "content": _ANSWER}] * 2
    try:
        chat = render(turns, template, eos_token="", image_token=_IMAGE)
    except UserError:  # the template wants a system text, or takes one turn alone
        system = {"role": "system", "content": _QUESTION}
        try:
            chat = render([system, *turns], template, eos_token="", image_token=_IMAGE)
        except UserError:
            chat = render(turns[:2], template, eos_token="", image_token=_IMAGE)
    return [text for text in re.split(f"[{_QUESTION}{_ANSWER}{_IMAGE}]", chat.text) if text.strip()]


def role_markers(own: str) -> list[str]:
    """Markers of roles: of every chat template that ships and, more of them, of the one that is used.

    Args:
        own: The template of the recipe; also words such as `Question:` count, which others may well say.
    """
    found = dict.fromkeys(WELL_KNOWN)
    for name in list_templates():
        found.update(dict.fromkeys(m.strip() for text in literals(name) for m in _MARKER.findall(text)))
    for text in literals(own):
        found.update(dict.fromkeys([*_MARKER.findall(text), *_WORD.findall(text)]))
    return sorted(found)


def find_markers(texts: Iterable[tuple[str, str]], markers: Iterable[str]) -> dict[str, list[str]]:
    """Marker → ids of the (id, text) pairs that hold it, of those that any holds; spaces after `###` do not matter."""
    patterns = {marker: re.escape(marker).replace(r"\#\#\#", r"\#\#\#\ ?") for marker in markers}
    any_of = re.compile("|".join(f"(?<![A-Za-z]){p}" if m[0].isalpha() else p for m, p in patterns.items()))
    found: dict[str, list[str]] = {}
    for name, text in texts:
        for marker in {match.group().replace("### ", "###") for match in any_of.finditer(text)}:
            found.setdefault(marker, []).append(name)
    return found
