"""Raw rows → conversations: what the formats of a source mean, each a line in `FORMATS`.

A format turns one row into messages whose content is a list of parts, and the images as the row names them, in the
order of the placeholders. Nothing is opened here. Only user messages can hold images: `<image>` in an answer or in a
system message is text. The rules that hold for every conversation are `messages.normalise_messages`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..base.names import IMAGE_TOKEN
from ..base.words import kind, short
from ..reading.raw_row import RowView
from .languages import language_of
from .messages import (
    Example,
    Message,
    Part,
    answer_message,
    check_marks,
    image_part,
    split_marks,
    text_part,
)

QUESTION_MARK = "{question}"

Draw = Callable[[str], str]


def no_prompt(language: str) -> str:
    """The draw of a source without prompts."""
    return ""


class Format(NamedTuple):
    """What is known of a format.

    Attributes:
        examples: a row and the draw of prompts → its conversations.
        columns: the names that `columns` of a source may map.
        prompts: what an instruction of `prompts` goes with: a ``caption``, or a ``question`` that it repeats as
            ``{question}``; None where the rows say themselves what is asked.
    """

    examples: Callable[[RowView, Draw], Iterable[Example]]
    columns: Sequence[str]
    prompts: str | None = None


def examples_of(
    values: Mapping[str, Any],
    format_name: str,
    *,
    where: str,
    columns: Mapping[str, str] | None = None,
    draw_prompt: Draw = no_prompt,
    languages: bool = True,
) -> Iterator[Example]:
    """Turn one row into its conversations: one, except for a row with several captions.

    Args:
        values: column name to value.
        format_name: a key of `FORMATS`.
        where: the row's place in words, put in front of every error.
        columns: our name of a column to its name in the row.
        draw_prompt: language → the instruction that a caption answers, "" for the image alone; or, for a question, the
            text around ``{question}``, "" for the question alone.
        languages: False: nobody asks for the language of an example, which takes longest to find of all about it.

    Raises:
        RowError: the row does not have this format.
    """
    row = RowView(values, where, columns or {})
    own_id = row.get("id")
    own_id = None if own_id is None else row.text(own_id, "id")
    for example in FORMATS[format_name].examples(row, draw_prompt):
        language = example.language or (_language(row, _answers(example)) if languages else "")
        yield example._replace(id=own_id, language=language)


# --------------------------------------------------------------------------------------------------------- messages


def _messages(row: RowView, draw_prompt: Draw) -> Iterator[Example]:
    """TRL's conversational rows: `messages`, or `prompt` and `completion`, with `images` or `image`."""
    images = row.images("images", "image")
    turns = _turns(row)
    counts: list[int] = []
    messages: list[Message] = []
    inline: list[Any] = []  # what the parts themselves carry, None where the image comes from the column
    for index, turn in enumerate(turns):
        key = f"messages[{index}]"
        if not isinstance(turn, dict):
            raise row.error(f"{key} is {kind(turn)}, not an object with role and content", "correct the row")
        if turn.get("tool_calls"):
            raise row.error(f"{key} calls tools, which are not supported", "remove the row", "wrong role")
        role, content = turn.get("role"), turn.get("content")
        if isinstance(content, list):
            parts = [_part(row, part, f"{key}.content[{i}]", inline) for i, part in enumerate(content)]
        else:
            text = row.text(content, f"{key}.content")
            parts = split_marks(text) if role == "user" else [text_part(text)]
            inline += [None for part in parts if part["type"] == "image"]
        counts.append(sum(part["type"] == "image" for part in parts))
        messages.append({"role": role, "content": parts})
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    written_as_text = not any(isinstance(turn["content"], list) for turn in turns)
    if images and not inline and first is not None and written_as_text:
        # As in TRL: without any mark the images stand in front of the first question.
        messages[first]["content"] = [image_part() for _ in images] + messages[first]["content"]
        yield Example(messages, images)
        return
    check_marks(row, inline.count(None), len(images))
    column = iter(images)
    yield Example(messages, [next(column) if image is None else image for image in inline])


def _turns(row: RowView) -> list[Any]:
    if "messages" not in row.values and ("prompt" in row.values or "completion" in row.values):
        turns: list[Any] = []
        for key, role in (("prompt", "user"), ("completion", "assistant")):
            value = row.need(key)
            turns += value if isinstance(value, list) else [{"role": role, "content": row.text(value, key)}]
        return turns
    turns = row.need("messages")
    if not isinstance(turns, list):
        raise row.error(f'"messages" is {kind(turns)}, not a list', "write a list of objects with role and content")
    return turns


def _part(row: RowView, part: Any, key: str, inline: list[Any]) -> Part:
    """One explicit part. The text in it is literal; an image may carry its own file or take the column's next."""
    if not isinstance(part, dict):
        raise row.error(f"{key} is {kind(part)}, not an object with a type", 'write {"type": "text", "text": ...}')
    if part.get("type") == "text":
        return text_part(row.text(part.get("text"), f"{key}.text"))
    if part.get("type") not in ("image", "image_url"):
        shown = short(str(part.get("type")))
        raise row.error(f'{key} has the type "{shown}"', 'only "text" and "image" are known; correct the row')
    found = [part[name] for name in ("image", "path", "bytes", "url", "image_url") if part.get(name) is not None]
    image = found[0] if found else None
    inline.append(image.get("url") if isinstance(image, dict) and "url" in image else image)
    return image_part()


# ------------------------------------------------------------------------------------------------------------ llava

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _llava(row: RowView, draw_prompt: Draw) -> Iterator[Example]:
    """LLaVA's rows, with the images of a message moved to its front as in LLaVA's `preprocess_multimodal`.

    Upstream keeps one mark of several in a message; here each image keeps its own, so that none is lost.
    """
    turns = row.need("conversations")
    if not isinstance(turns, list):
        raise row.error(f'"conversations" is {kind(turns)}, not a list', 'write a list of {"from": ..., "value": ...}')
    images = row.images("image", "images")
    messages: list[Message] = []
    marks = 0
    for index, turn in enumerate(turns):
        key = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise row.error(f"{key} is {kind(turn)}, not an object with from and value", "correct the row")
        speaker = turn.get("from")
        role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            known = ", ".join(_SPEAKERS)
            raise row.error(
                f'{key} has from: "{short(str(speaker))}"', f"{known} are known; correct the row", "wrong role"
            )
        text = row.text(turn.get("value"), f"{key}.value")
        if not messages and role == "assistant":
            continue  # upstream skips an answer to nothing, which shared chats begin with now and then
        count = text.count(IMAGE_TOKEN) if role == "user" else 0
        marks += count
        messages.append({"role": role, "content": _in_front(text, count) if count else [text_part(text)]})
    check_marks(row, marks, len(images))
    yield Example(messages, images)


def _in_front(text: str, count: int) -> list[Part]:
    text = text.replace(IMAGE_TOKEN, "").strip()
    return [image_part() for _ in range(count)] + ([text_part("\n" + text)] if text else [])


# -------------------------------------------------------------------------------------------------- caption and vqa


def _caption(row: RowView, draw_prompt: Draw) -> Iterator[Example]:
    images = _some_images(row)
    captions = row.need("caption", "text")
    for caption in captions if isinstance(captions, list) and captions else [captions]:
        answer = row.text(caption, "caption").strip()
        if not answer:
            raise row.error('"caption" is empty', "write a caption or remove the row", "no answer")
        language = _language(row, answer)
        messages = [_user(row, draw_prompt(language), len(images)), answer_message(answer)]
        yield Example(messages, images, language=language)


def _vqa(row: RowView, draw_prompt: Draw) -> Iterator[Example]:
    images = _some_images(row)
    question = row.text(row.need("question"), "question").strip()
    if not question.replace(IMAGE_TOKEN, "").strip():
        raise row.error('"question" is empty', "write a question or remove the row", "no question")
    key = "answer" if row.get("answer") is not None else "answers"
    row.need("answer", "answers")
    texts = [text.strip() for text in answers_in(row, key) if text.strip()]
    if not texts:
        raise row.error(f'"{key}" is empty', "write an answer or remove the row", "no answer")
    answer = Counter(texts).most_common(1)[0][0]  # of equally frequent ones the first
    language = _language(row, f"{question} {answer}")
    asked = (draw_prompt(language) or QUESTION_MARK).replace(QUESTION_MARK, question)
    yield Example([_user(row, asked, len(images)), answer_message(answer)], images, language=language)


def answers_in(row: RowView, key: str) -> list[str]:
    """The answers of a column that holds one, several, or a record of each as VQAv2 has it of its annotators."""
    value = row.need(key)
    records = value if isinstance(value, list) else [value]
    return [row.text(record.get("answer") if isinstance(record, dict) else record, key) for record in records]


# --------------------------------------------------------------------------------------------------------- cauldron


def _cauldron(row: RowView, draw_prompt: Draw) -> Iterator[Example]:
    """The Cauldron's rows: `images`, and `texts` of {user, assistant}; the images stand in front of all turns."""
    images = row.images("images", "image")
    turns = row.need("texts")
    if not isinstance(turns, list):
        raise row.error(f'"texts" is {kind(turns)}, not a list', 'write a list of {"user": ..., "assistant": ...}')
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        key = f"texts[{index}]"
        if not isinstance(turn, dict):
            raise row.error(f"{key} is {kind(turn)}, not an object with user and assistant", "correct the row")
        asked = row.text(turn.get("user"), f"{key}.user").strip()
        answer = row.text(turn.get("assistant"), f"{key}.assistant").strip()
        messages += [{"role": "user", "content": split_marks(asked)}, answer_message(answer)]
    marks = sum(part["type"] == "image" for message in messages for part in message["content"])
    if messages and not marks:
        messages[0]["content"] = [image_part() for _ in images] + messages[0]["content"]
        marks = len(images)
    check_marks(row, marks, len(images))
    yield Example(messages, images)


# ------------------------------------------------------------------------------------------------------- what is shared


def _some_images(row: RowView) -> list[Any]:
    row.need("image", "images")
    images = row.images("image", "images")
    if not images:
        raise row.error('"image" is empty', "name the image file or remove the row", "no image")
    return images


def _user(row: RowView, text: str, images: int) -> Message:
    """Images where the text marks them, else in front of it."""
    if IMAGE_TOKEN not in text:
        text = IMAGE_TOKEN * images + text
    check_marks(row, text.count(IMAGE_TOKEN), images)
    return {"role": "user", "content": split_marks(text)}


def _answers(example: Example) -> str:
    """What is learnt to say."""
    said = (message["content"] for message in example.messages if message["role"] == "assistant")
    return " ".join(part["text"] or "" for content in said for part in content)


def _language(row: RowView, text: str) -> str:
    """The row's own `language` without its country (`zh-CN` is `zh`), else that of its text."""
    own = row.get("language")
    return re.split("[-_]", own.lower())[0] if isinstance(own, str) and own else language_of(text)


_CAPTION = Format(_caption, ("image", "images", "caption", "text", "id", "language"), prompts="caption")
_VQA = Format(_vqa, ("image", "images", "question", "answer", "answers", "id", "language"), prompts="question")

FORMATS: dict[str, Format] = {
    "messages": Format(_messages, ("messages", "prompt", "completion", "images", "image", "id", "language")),
    "llava": Format(_llava, ("conversations", "image", "images", "id", "language")),
    "caption": _CAPTION,
    "vqa": _VQA,
    "cauldron": Format(_cauldron, ("images", "image", "texts", "id", "language")),
    # Whole documents, which `published` takes apart into rows of these kinds.
    "coco": _CAPTION,
    "cc_sbu_align": _CAPTION,
    "vqav2": _VQA,
    "gqa": _VQA,
}
"""The formats there are, under the names that a source gives them."""
