"""Raw rows → conversations: what `messages`, `llava`, `caption` and `vqa` mean.

A format turns one row into messages whose content is a list of parts, and the images as the row names them, in the
order of the placeholders. Nothing is opened here. Only user messages can hold images: `<image>` in an answer or in a
system message is text. The rules that hold for every conversation are `chat_template.normalise_messages`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .row_view import RowView, kind, short

IMAGE_MARK = "<image>"

Part = dict[str, Any]
Message = dict[str, Any]


class Example(NamedTuple):
    """One conversation.

    Attributes:
        messages: ``{"role": str, "content": [{"type": "image"} | {"type": "text", "text": str}]}``.
        images: what the row gives for each placeholder: a path, bytes, a data URI or ``{"path", "bytes"}``.
        id: the row's own id, if it has one.
    """

    messages: list[Message]
    images: list[Any]
    id: str | None = None


def convert(
    values: Mapping[str, Any],
    format_name: str,
    *,
    where: str,
    columns: Mapping[str, str] | None = None,
    draw_prompt: Callable[[], str] = str,
) -> Iterator[Example]:
    """Turn one row into its conversations: one, except for a row with several captions.

    Args:
        values: column name to value.
        format_name: ``messages``, ``llava``, ``caption`` or ``vqa``.
        where: the row's place in words, put in front of every error.
        columns: our name of a column to its name in the row.
        draw_prompt: gives the instruction that a caption answers; "" for the image alone.

    Raises:
        RowError: the row does not have this format.
    """
    row = RowView(values, where, columns or {})
    own_id = row.get("id")
    own_id = None if own_id is None else row.text(own_id, "id")
    examples = _caption(row, draw_prompt) if format_name == "caption" else [_ONE_EACH[format_name](row)]
    for example in examples:
        yield example._replace(id=own_id)


# --------------------------------------------------------------------------------------------------------- messages


def _messages(row: RowView) -> Example:
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
            parts = split_marks(text) if role == "user" else [_text(text)]
            inline += [None for part in parts if part["type"] == "image"]
        counts.append(sum(part["type"] == "image" for part in parts))
        messages.append({"role": role, "content": parts})
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    written_as_text = not any(isinstance(turn["content"], list) for turn in turns)
    if images and not inline and first is not None and written_as_text:
        # As in TRL: without any mark the images stand in front of the first question.
        messages[first]["content"] = [_image() for _ in images] + messages[first]["content"]
        return Example(messages, images)
    _same_number(row, inline.count(None), len(images))
    column = iter(images)
    return Example(messages, [next(column) if image is None else image for image in inline])


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
        return _text(row.text(part.get("text"), f"{key}.text"))
    if part.get("type") not in ("image", "image_url"):
        shown = short(str(part.get("type")))
        raise row.error(f'{key} has the type "{shown}"', 'only "text" and "image" are known; correct the row')
    found = [part[name] for name in ("image", "path", "bytes", "url", "image_url") if part.get(name) is not None]
    image = found[0] if found else None
    inline.append(image.get("url") if isinstance(image, dict) and "url" in image else image)
    return _image()


def split_marks(text: str) -> list[Part]:
    """Cut text at every ``<image>``; the text between stays as it is, line breaks included."""
    first, *rest = text.split(IMAGE_MARK)
    parts = [_text(first)] + [part for piece in rest for part in (_image(), _text(piece))]
    return [part for part in parts if part["text"] != ""]


# ------------------------------------------------------------------------------------------------------------ llava

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _llava(row: RowView) -> Example:
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
        count = text.count(IMAGE_MARK) if role == "user" else 0
        marks += count
        messages.append({"role": role, "content": _in_front(text, count) if count else [_text(text)]})
    _same_number(row, marks, len(images))
    return Example(messages, images)


def _in_front(text: str, count: int) -> list[Part]:
    text = text.replace(IMAGE_MARK, "").strip()
    return [_image() for _ in range(count)] + ([_text("\n" + text)] if text else [])


# -------------------------------------------------------------------------------------------------- caption and vqa


def _caption(row: RowView, draw_prompt: Callable[[], str]) -> Iterator[Example]:
    images = _some_images(row)
    captions = row.need("caption", "text")
    for caption in captions if isinstance(captions, list) and captions else [captions]:
        answer = row.text(caption, "caption").strip()
        if not answer:
            raise row.error('"caption" is empty', "write a caption or remove the row", "no answer")
        yield Example([_user(row, draw_prompt(), len(images)), _assistant(answer)], images)


def _vqa(row: RowView) -> Example:
    images = _some_images(row)
    question = row.text(row.need("question"), "question").strip()
    if not question.replace(IMAGE_MARK, "").strip():
        raise row.error('"question" is empty', "write a question or remove the row", "no question")
    key = "answer" if row.get("answer") is not None else "answers"
    answers = row.need("answer", "answers")
    records: Iterable[Any] = answers if isinstance(answers, list) else [answers]
    texts = [row.text(r.get("answer") if isinstance(r, dict) else r, key).strip() for r in records]
    texts = [text for text in texts if text]
    if not texts:
        raise row.error(f'"{key}" is empty', "write an answer or remove the row", "no answer")
    answer = Counter(texts).most_common(1)[0][0]  # of equally frequent ones the first
    return Example([_user(row, question, len(images)), _assistant(answer)], images)


def _some_images(row: RowView) -> list[Any]:
    row.need("image", "images")
    images = row.images("image", "images")
    if not images:
        raise row.error('"image" is empty', "name the image file or remove the row", "no image")
    return images


def _user(row: RowView, text: str, images: int) -> Message:
    """Images where the text marks them, else in front of it."""
    if IMAGE_MARK not in text:
        text = IMAGE_MARK * images + text
    _same_number(row, text.count(IMAGE_MARK), images)
    return {"role": "user", "content": split_marks(text)}


def _assistant(answer: str) -> Message:
    return {"role": "assistant", "content": [_text(answer)]}


def _same_number(row: RowView, marks: int, images: int) -> None:
    if marks != images:
        found = f"{_plural(marks, 'image mark')} ({IMAGE_MARK} in user text, or image parts)"
        raise row.error(
            f"{found} but {_plural(images, 'image')}", "give every mark its image, in order", "marks differ"
        )


# ---------------------------------------------------------------------------------------------------------- helpers


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _image() -> Part:
    return {"type": "image", "text": None}


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


_ONE_EACH: dict[str, Callable[[RowView], Example]] = {"messages": _messages, "llava": _llava, "vqa": _vqa}

COLUMNS: dict[str, Sequence[str]] = {
    "messages": ("messages", "prompt", "completion", "images", "image", "id"),
    "llava": ("conversations", "image", "images", "id"),
    "caption": ("image", "images", "caption", "text", "id"),
    "vqa": ("image", "images", "question", "answer", "answers", "id"),
}
"""Format to the names that `columns` may map. The keys are the formats there are."""
