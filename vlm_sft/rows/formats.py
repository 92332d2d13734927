"""Raw rows → conversations: what the formats of a source mean, each a line in `FORMATS`.

A format turns one row into messages whose content is a list of parts, and the images as the row names them, in the
order of the placeholders. Nothing is opened here. `<image>` in an answer is text, unless the row has more images than
its questions show; in a system message it always is. The rules that hold for every conversation are
`messages.normalise_messages`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from ..base.names import IMAGE_TOKEN, VIDEO_TOKEN, Values
from ..base.words import kind, language_of, short
from ..vcr.choices import COPIES, TASKS, choices_of, shown
from .boxes import place_boxes
from .keys import ROLES, check_left, role_of
from .marks import read_marks
from .messages import Example, Message, answer_message, check_marks, image_part, split_marks, text_part
from .raw_row import RowView, is_given
from .turns import COLUMN_REFERENCES, FROM_AND_VALUE, image_entry, message_of, raw_turns, read_turn, tools_in
from .videos import COLUMNS as VIDEOS
from .videos import place_videos

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
    values: Values,
    format_name: str,
    *,
    where: str,
    columns: Mapping[str, str] | None = None,
    draw_prompt: Draw = no_prompt,
    languages: bool = True,
    unused: Callable[[set[str]], None] = lambda keys: None,
    boxes: str | None = None,
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
        unused: told the names of the keys that have a value and mean nothing here, once for the row.
        boxes: what the numbers of boxes count where the row does not say it; see `boxes.place_boxes`.

    Raises:
        RowError: the row does not have this format.
    """
    row = RowView(values, where, columns or {})
    read_marks(row)
    own_id = row.get("id", "annot_id")
    own_id = None if own_id is None else row.text(own_id, "id")
    found = FORMATS[format_name].examples(row, draw_prompt)
    examples = [place_videos(row, _with_row_keys(row, example, boxes)) for example in found]
    row.get("language", "mask")
    check_left(row, "row", row.values, row.read, "")
    unused(row.unused)
    for example in examples:
        language = example.language or (_language(row, _answers(example)) if languages else "")
        yield example._replace(id=own_id, language=language)


def _with_row_keys(row: RowView, example: Example, boxes: str | None) -> Example:
    """An example with what the row says of all its turns: system text, tools, whose turns are masked, and boxes."""
    messages = example.messages
    if is_given(masked := row.get("mask")) and role_of(row, masked, '"mask"') != "user":
        what = f'"mask" is "{short(str(masked))}", and only the user\'s turns are always out of the loss'
        raise row.error(what, "write `loss: false` on the messages that are not learned", "key refused")
    given = {row.text(row.values[key], key) for key in ("system", "system_prompt") if is_given(row.get(key))}
    own = {"".join(part["text"] or "" for part in m["content"]) for m in messages[:1] if m["role"] == "system"}
    if len(given | own) > 1:
        raise row.error("the row has several system texts, and they differ", "keep one of them", "marks differ")
    if given and not own:
        messages = [{"role": "system", "content": [text_part(*given)]}, *messages]
    if is_given(tools := row.get("tools")) and messages:
        messages = [{**messages[0], "tools": tools_in(row, tools, '"tools"')}, *messages[1:]]
    messages = place_boxes(row, messages, len(example.images), boxes)
    return example._replace(messages=messages)


def _messages(row: RowView, draw_prompt: Draw) -> Iterator[Example]:
    """Conversations as TRL, OpenAI, ms-swift and LLaMA-Factory have them, with `images` or `image`."""
    images = _entries(row, "images", "image")
    turns = raw_turns(row)
    inline: list[Any] = []  # what the parts themselves carry, None where the image comes from the column
    messages = [message_of(row, turn, inline) for turn in turns]
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    written_as_text = not any(isinstance(turn.content, list) for turn in turns)
    if images and written_as_text and len(images) > len(inline):
        everywhere: list[Any] = []
        marked = [message_of(row, turn, everywhere, marks=("user", "assistant")) for turn in turns]
        if len(everywhere) == len(images):  # the answers show the others
            messages, inline = marked, everywhere
    if images and not inline and first is not None and written_as_text:
        # As in TRL: without any mark the images stand in front of the first question.
        messages[first]["content"] = [image_part() for _ in images] + messages[first]["content"]
        yield Example(messages, images)
        return
    check_marks(row, inline.count(None), len(images))
    column = iter(images)
    images = [next(column) if image is None else image for image in inline]
    yield Example(messages, images, marked=not written_as_text)


def _llava(row: RowView, draw_prompt: Draw) -> Iterator[Example]:
    """LLaVA's rows, with the images of a message moved to its front as in LLaVA's `preprocess_multimodal`.

    Upstream keeps one mark of several in a message; here each image keeps its own, so that none is lost.
    """
    turns = row.listed("conversations", '{"from": ..., "value": ...}')
    images = _entries(row, "image", "images")
    messages: list[Message] = []
    marks = 0
    for index, raw in enumerate(turns):
        key = f"conversations[{index}]"
        turn = read_turn(row, raw, key, FROM_AND_VALUE)
        if turn.role not in ("user", "assistant", "system"):
            speaker = raw.get("from", raw.get("role"))
            mend = f"{', '.join(ROLES)} are known; correct the row"
            raise row.error(f'{key} has from: "{short(str(speaker))}"', mend, "wrong role")
        text = row.text(turn.content, f"{key}.value")
        if not messages and turn.role == "assistant":
            continue  # upstream skips an answer to nothing, which shared chats begin with now and then
        shown = [part for part in split_marks(text) if part["type"] != "text"] if turn.role == "user" else []
        marks += sum(part["type"] == "image" for part in shown)
        if shown:
            text = text.replace(IMAGE_TOKEN, "").replace(VIDEO_TOKEN, "").strip()
            text = "\n" + text if text else ""
        content = [*shown, *([text_part(text)] if text or not shown else [])]
        messages.append({"role": turn.role, "content": content, **turn.more})
    check_marks(row, marks, len(images))
    yield Example(messages, images, marked=True)


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
    if not question.replace(IMAGE_TOKEN, "").replace(VIDEO_TOKEN, "").strip():
        raise row.error('"question" is empty', "write a question or remove the row", "no question")
    key = "answer" if row.get("answer") is not None else "answers"
    row.need("answer", "answers")
    texts = [text.strip() for text in answers_in(row, key) if text.strip()]
    if not texts:
        raise row.error(f'"{key}" is empty', "write an answer or remove the row", "no answer")
    answer = Counter(texts).most_common(1)[0][0]  # of equally frequent ones the first
    language = _language(row, f"{question} {answer}")
    asked = (draw_prompt(language) or QUESTION_MARK).replace(QUESTION_MARK, question)
    said = answer_message(answer)
    if len(set(texts)) > 1:
        said["answers"] = texts
    yield Example([_user(row, asked, len(images)), said], images, language=language)


def _vcr(row: RowView, draw_prompt: Draw, tasks: Sequence[str] = TASKS) -> Iterator[Example]:
    """VCR's rows: an example for the right one of four answers, and one for the right one of four reasons for it."""
    images = _entries(row, "image", "img_fn")
    values, row.values = row.values, {key: value for key, value in row.values.items() if key != "objects"}  # no boxes
    row.read |= {*COPIES, *_VCR.columns}
    for asked in choices_of(values, tasks, row.error):
        user = {**_user(row, shown(asked), len(images)), "choices": asked}
        yield Example([user, answer_message(asked["said"][asked["right"]])], images, language="en")


def answers_in(row: RowView, key: str) -> list[str]:
    """The answers of a column that holds one, several, or a record of each as VQAv2 has it of its annotators."""
    value = row.need(key)
    records = value if isinstance(value, list) else [value]
    for record in (record for record in records if isinstance(record, dict)):
        check_left(row, "message", record, ("answer",), f"{key}[].")
    return [row.text(record.get("answer") if isinstance(record, dict) else record, key) for record in records]


def _cauldron(row: RowView, draw_prompt: Draw) -> Iterator[Example]:
    """The Cauldron's rows: `images`, and `texts` of {user, assistant}; the images stand in front of all turns."""
    images = _entries(row, "images", "image")
    turns = row.listed("texts", '{"user": ..., "assistant": ...}')
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        key = f"texts[{index}]"
        if not isinstance(turn, dict):
            raise row.error(f"{key} is {kind(turn)}, not an object with user and assistant", "correct the row")
        check_left(row, "message", turn, ("user", "assistant"), f"{key}.")
        asked = row.text(turn.get("user"), f"{key}.user").strip()
        answer = row.text(turn.get("assistant"), f"{key}.assistant").strip()
        messages += [{"role": "user", "content": split_marks(asked)}, answer_message(answer)]
    marks = sum(part["type"] == "image" for message in messages for part in message["content"])
    if messages and not marks:
        messages[0]["content"] = [image_part() for _ in images] + messages[0]["content"]
        marks = len(images)
    check_marks(row, marks, len(images))
    yield Example(messages, images)


def _some_images(row: RowView) -> list[Any]:
    filmed = any(is_given(row.values.get(name)) for name in VIDEOS)
    if not filmed:
        row.need("image", "images")
    images = _entries(row, "image", "images")
    if not images and not filmed:
        raise row.error('"image" is empty', "name the image file or remove the row", "no image")
    return images


def _entries(row: RowView, *keys: str) -> list[Any]:
    """The row's images, each a file or an object that says more of it."""
    given = enumerate(row.images(*keys))
    return [image_entry(row, image, f"images[{index}]", COLUMN_REFERENCES) for index, image in given]


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


_ANY = ("video", "videos", "system", "tools", "objects", "bboxes", "bbox", "id", "language")
_CHATS = (
    "messages", "conversations", "prompt", "completion", "query", "response", "instruction", "input", "output",
    "history",
)  # fmt: skip
_CAPTION = Format(_caption, ("image", "images", "caption", "text", *_ANY), prompts="caption")
_VQA = Format(_vqa, ("image", "images", "question", "answer", "answers", *_ANY), prompts="question")

_VCR = Format(_vcr, ("image", "id", "question", "answer_choices", "rationale_choices", "answer_label",
                     "rationale_label", "boxes", "width", "height"))  # fmt: skip

FORMATS: dict[str, Format] = {
    "messages": Format(_messages, (*_CHATS, "images", "image", *_ANY)),
    "llava": Format(_llava, ("conversations", "image", "images", *_ANY)),
    "caption": _CAPTION,
    "vqa": _VQA,
    "cauldron": Format(_cauldron, ("images", "image", "texts", *_ANY)),
    # Whole documents, which `published` takes apart into rows of these kinds.
    "vcr": _VCR,
    "vcr_q2a": _VCR._replace(examples=partial(_vcr, tasks=TASKS[:1])),
    "vcr_qa2r": _VCR._replace(examples=partial(_vcr, tasks=TASKS[1:])),
    "coco": _CAPTION,
    "cc_sbu_align": _CAPTION,
    "vqav2": _VQA,
    "gqa": _VQA,
}
"""The formats there are, under the names that a source gives them."""
