"""The body of `POST /v1/chat/completions` → what is asked, with a sentence for everything in it that is not understood.

Keys that could change an answer and are not kept are refused; those that cannot (`user`, `metadata`) are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..base.errors import RowError, UserError
from ..base.limits import READERS
from ..base.names import ImageEntry, Json, Options, Values
from ..base.words import closest, kind, short
from ..reading.json_text import parse_json
from ..rows.messages import Message, Part, image_part, text_part
from .refusal import Refusal

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
NOT_LOOKED_AT = {
    *("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"),
    *("tool_choice", "function_call", "verbosity", "prompt_cache_retention"),
}
WITHOUT = {
    "n": (1,),
    "store": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "reasoning_effort": ("none",),
}
"""Keys of which there is one value alone here, and null."""


@dataclass
class Asked:
    """A question of a client.

    Attributes:
        model: The name of a bundle; None where none is given.
        messages: As rows have them.
        images: An entry for each place of an image: `{"url"}`, maybe with `detail`, and where it stands.
        most: The most tokens of the answer; None for as many as the bundle says.
        options: Settings of `generate` that are about drawing.
        stop: Texts that end the answer.
        seed: Of the draws.
        likely: How many other tokens are told at each place; None where no probabilities are asked for.
        stream: Whether the answer comes in pieces.
        usage: Whether a stream ends with its counts.
    """

    model: str | None
    messages: list[Message]
    images: list[ImageEntry]
    most: int | None = None
    options: Options = field(default_factory=dict)
    stop: list[str] = field(default_factory=list)
    seed: int | None = None
    likely: int | None = None
    stream: bool = False
    usage: bool = False


def read_body(data: bytes) -> Asked:
    """What the body of a request asks for.

    Raises:
        Refusal: It is no JSON, or a value of it is not understood.
    """
    # An empty list takes twenty times its bytes, so that a body that may come whole would fill the memory.
    if sum(map(data.count, (b"[", b"{", b",", b":"))) > READERS.asked_values:
        raise Refusal(f"The body has more than {READERS.asked_values:,} values: send fewer.")
    try:
        body = parse_json(data, "the body", "send one object of JSON in UTF-8")
    except RowError as error:
        raise Refusal(str(error)) from None
    if not isinstance(body, dict):
        raise Refusal(f"The body is {kind(body)}: send one object of JSON.")
    _check_keys(body)
    messages, images = _messages(body.get("messages"))
    asked = Asked(_text(body, "model"), messages, images)
    lengths = [_number(body, key, int, 1, math.inf) for key in ("max_completion_tokens", "max_tokens")]
    asked.most = next((length for length in lengths if length is not None), None)
    bounds: dict[str, tuple[type, float, float]] = {
        "temperature": (float, 0, 2), "top_p": (float, 0, 1), "top_k": (int, 0, 2**31), "min_p": (float, 0, 1),
    }  # fmt: skip
    given = {key: _number(body, key, *bound) for key, bound in bounds.items()}
    asked.options = {key: value for key, value in given.items() if value is not None}
    asked.seed = _number(body, "seed", int, -(2**63), 2**63 - 1)
    asked.stop = _stops(body.get("stop"))
    asked.stream, asked.likely = _switch(body, "stream"), _likely(body)
    asked.usage = _switch(_object(body, "stream_options", {"include_usage", "include_obfuscation"}), "include_usage")
    return asked


READ = {
    *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("stop", "stream", "stream_options", "logprobs", "top_logprobs"),
}


def _check_keys(body: Values) -> None:
    known = READ | NOT_LOOKED_AT | set(WITHOUT)
    for key, value in body.items():
        if key not in known:
            near = closest(key, sorted(known))
            meant = f"; did you mean {near!r}?" if near else "; see docs/serving.md for what there is."
            raise Refusal(f"There is no key {short(key)!r} here{meant}", param=short(key), code="unknown_parameter")
        if key in WITHOUT and value is not None and value not in WITHOUT[key]:
            raise Refusal(f"{key} can only be {WITHOUT[key][0]!r} here: leave it out.", param=key)


def _text(body: Values, key: str) -> str | None:
    value = body.get(key)
    if value is not None and not isinstance(value, str):
        raise Refusal(f"{key} is {kind(value)}: write a text.", param=key)
    return value


def _switch(body: Values, key: str) -> bool:
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise Refusal(f"{key} is {kind(value)}: write true or false.", param=key)
    return bool(value)


def _number(body: Values, key: str, of: type, least: float, most: float) -> Any:
    value = body.get(key)
    if value is None:
        return None
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole and not (of is float and isinstance(value, float)):
        what = "a whole number" if of is int else "a number"
        raise Refusal(f"{key} is {kind(value)} that is not understood: write {what}.", param=key)
    if not least <= value <= most:
        upper = "" if most == math.inf else f" to {most:g}"
        raise Refusal(f"{key} is {short(str(value))}: write a number from {least:g}{upper}.", param=key)
    return of(value)


def _object(body: Values, key: str, known: set[str]) -> Json:
    value = body.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict) or (strange := sorted(set(value) - known)):
        what = kind(value) if not isinstance(value, dict) else f"one with {short(strange[0])!r}"
        raise Refusal(f"{key} is {what}: write an object with {' and '.join(sorted(known))} alone.", param=key)
    return value


def _stops(given: object) -> list[str]:
    stops = [given] if isinstance(given, str) else [] if given is None else given
    fine: Callable[[Any], bool] = lambda each: isinstance(each, str) and 0 < len(each) <= READERS.asked_stop  # noqa: E731
    if not isinstance(stops, list) or len(stops) > READERS.asked_stops or not all(map(fine, stops)):
        allowed = f"at most {READERS.asked_stops} texts of 1 to {READERS.asked_stop:,} characters"
        raise Refusal(f"stop is not understood: write a text, or a list of {allowed}.", param="stop")
    return stops


def _likely(body: Values) -> int | None:
    others = _number(body, "top_logprobs", int, 0, READERS.asked_likely)
    if not _switch(body, "logprobs"):
        if others is not None:
            raise Refusal("top_logprobs is given without logprobs: set logprobs to true.", param="top_logprobs")
        return None
    return others or 0


def _messages(given: object) -> tuple[list[Message], list[ImageEntry]]:
    if not isinstance(given, list) or not given:
        what = "is missing" if given is None else "is an empty list" if given == [] else f"is {kind(given)}"
        raise Refusal(f"messages {what}: write a list with at least one message.", param="messages")
    messages, images, count, characters = [], [], 0, 0
    for number, message in enumerate(given):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise Refusal(f"{where} is {kind(message)}: write an object with role and content.", param=where)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            said = f"{short(role)!r}" if isinstance(role, str) else kind(role)
            raise Refusal(f"{where}.role is {said}: write system, user or assistant.", param=f"{where}.role")
        for key, value in message.items():
            if key not in ("role", "content", "name", "refusal") and value not in (None, []):
                raise Refusal(f"{where} has {short(key)!r}, which no bundle reads: leave it out.", param=where)
        parts, shown = _parts(message.get("content"), f"{where}.content")
        if shown and role != "user":
            raise Refusal(f"{where} shows an image as {role}: put images into messages of the user.", param=where)
        messages.append({"role": ROLES[role], "content": parts})
        images += shown
        count += 1 + len(parts)
        characters += sum(len(part["text"] or "") for part in parts)
        if count > READERS.asked_parts or characters > READERS.asked_characters:
            most = f"{READERS.asked_parts:,} messages and parts, or {READERS.asked_characters:,} characters"
            raise Refusal(f"The messages have more than {most}: shorten them.", param="messages")
    if messages[-1]["role"] != "user":
        raise Refusal("The last message is not the user's: end with what is asked.", param="messages")
    return messages, images


def _parts(content: object, where: str) -> tuple[list[Part], list[ImageEntry]]:
    """The parts of a message, and its images."""
    if isinstance(content, str):
        return [text_part(_said(content, where))] if content else [], []
    if not isinstance(content, list):
        raise Refusal(f"{where} is {kind(content)}: write a text or a list of parts.", param=where)
    parts: list[Part] = []
    images: list[ImageEntry] = []
    for number, part in enumerate(content):
        place = f"{where}[{number}]"
        if not isinstance(part, dict) or not isinstance(type_ := part.get("type"), str):
            raise Refusal(f"{place} is no object with a type: write text or image_url.", param=place)
        if type_ == "text" and isinstance(text := part.get("text"), str):
            parts += [text_part(_said(text, place))] if text else []
        elif type_ == "image_url":
            images.append(_image(part.get("image_url"), place))
            parts.append(image_part())
        else:
            what = "has no text" if type_ == "text" else f"is of the type {short(type_)!r}, which no bundle reads"
            raise Refusal(f"{place} {what}: write text or image_url.", param=place)
    return parts, images


def _image(given: object, place: str) -> ImageEntry:
    if isinstance(given, str):
        given = {"url": given}
    if not isinstance(given, dict) or not isinstance(given.get("url"), str) or not given["url"]:
        raise Refusal(f'{place}.image_url is not understood: write {{"url": "data:image/png;base64,…"}}.', param=place)
    if strange := sorted(set(given) - {"url", "detail"}):
        raise Refusal(f"{place}.image_url has {short(strange[0])!r}: write url and detail alone.", param=place)
    return {**given, "where": place}


def _said(text: str, where: str) -> str:
    """A text that is one: half a character of UTF-16 is what no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refusal(f"{where} has half a character (a lone surrogate): send whole UTF-8 text.", param=where) from None
    return text


def as_refusal(error: UserError) -> Refusal:
    """What is wrong with a question as one with a status."""
    # Pictures are refused in the words of a data set.
    return error if isinstance(error, Refusal) else Refusal(str(error).replace("remove the row", "leave it out"))
