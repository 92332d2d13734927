"""A chat template as llama.cpp and Ollama take it.

llama.cpp hands a template the text of a message with a mark where each picture stands, or parts of the type
`media_marker`, by its release; ours are written for parts of the type `image`. Ollama has templates of its own kind.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..batch.processor import VLMProcessor
from ..rows.messages import Message

# What stands between the ends of the mark is random in llama.cpp's server, and nothing in its other programs.
LEFT, RIGHT = "<__media", "__>"
PARTS = (
    """
{%- set seen = namespace(messages=[], mark='') -%}
{%- for message in messages -%}
    {%- set made = namespace(parts=[]) -%}
    {%- if message['content'] is string -%}
        {%- set pieces = message['content'].split('LEFT') -%}
        {%- for piece in pieces -%}
            {%- set text = piece -%}
            {%- if not loop.first -%}
                {%- set ends = piece.split('RIGHT', 1) -%}
                {%- set seen.mark = 'LEFT' + ends[0] + 'RIGHT' -%}
                {%- set made.parts = made.parts + [{'type': 'image'}] -%}
                {%- set text = ends[1] -%}
            {%- endif -%}
            {%- if text or (loop.first and loop.last) -%}
                {%- set made.parts = made.parts + [{'type': 'text', 'text': text}] -%}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'media_marker' -%}
                {%- set seen.mark = part['text'] -%}
                {%- set made.parts = made.parts + [{'type': 'image'}] -%}
            {%- else -%}
                {%- set made.parts = made.parts + [part] -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set seen.messages = seen.messages + [{'role': message['role'], 'content': made.parts}] -%}
{%- endfor -%}
{%- set messages = seen.messages -%}{%- set image_token = seen.mark -%}
""".strip()
    .replace("LEFT", LEFT)
    .replace("RIGHT", RIGHT)
)


def for_llama_cpp(template: str) -> str:
    """A chat template, with the system text and BOS in it, that reads messages as llama.cpp hands them over."""
    return PARTS + template


class OllamaTemplate:
    """What a processor's template writes around the texts of a conversation, and Ollama's template of the same.

    Args:
        processor: The bundle's processor.

    Attributes:
        text: The template as Ollama writes it; "" where this one is no plain chain of turns.
    """

    def __init__(self, processor: VLMProcessor) -> None:
        self._processor = processor
        self.text = ""
        texts = ["Q0000", "A1111", "Q2222"]
        once, twice = self._render(texts[:1]), self._render(texts)
        if "Q0000" not in once or not all(text in twice for text in texts):
            return
        start, ask = once.split("Q0000", 1)
        asked, rest = twice.split("Q0000", 1)[1].split("A1111", 1)
        glue = asked.removeprefix(ask)  # the space that belongs to an answer's first token
        between = rest.split("Q2222", 1)[0]
        system = self._render(texts[:1], "S9999")
        before, after = system.split("Q0000", 1)[0].split("S9999", 1) if "S9999" in system else ("", "")
        pieces = (start, ask, glue, between, before, after)
        plain = [["What is 这?"], ["one", "two\n\nthree", "four"], ["五", "6", "seven?", "八", "9"]]
        if all(
            self._render(each, words) == _chain(each, words, *pieces)
            for each in plain
            for words in (None, *(["Be brief. 简短。"] if "S9999" in system else []))
        ):
            self.text = _written(*pieces)

    def _render(self, texts: Sequence[str], system: str | None = None) -> str:
        turns = zip(["user", "assistant"] * len(texts), texts, strict=False)
        messages: list[Message] = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        bos = self._processor.tokenizer.bos_token or ""
        return self._processor.render(messages, True).text.removeprefix(bos)  # which Ollama's tokenizer writes


def _chain(
    texts: Sequence[str], words: str | None, start: str, ask: str, glue: str, between: str, before: str, after: str
) -> str:
    written = start if words is None else before + words + after
    for number, text in enumerate(texts):
        written += glue + text + between if number % 2 else text + ask
    return written


def _written(start: str, ask: str, glue: str, between: str, before: str, after: str) -> str:
    """Go's template of the chain; literal text is quoted, so that no brace or quote in it means anything."""

    def quoted(text: str) -> str:
        return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""

    return (
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}'
        f"{quoted(before)}{{{{ .Content }}}}{quoted(after)}{{{{ else }}}}"
        f"{{{{ if eq $i 0 }}}}{quoted(start)}{{{{ end }}}}"
        f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{quoted(ask)}'
        f"{{{{ else }}}}{quoted(glue)}{{{{ .Content }}}}{quoted(between)}"
        "{{ end }}{{ end }}{{ end }}"
    )
