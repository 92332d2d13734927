"""The keys that mean something in the rows people have: of TRL, LLaMA-Factory, ms-swift, ShareGPT, Qwen and OpenAI.

`KEYS` is one table for rows, for messages and for parts of a message. A key that a format reads is honoured. One that
it leaves, and that has a value, is refused where the table says a mend, for the row would be trained on as something
that it is not; else it is counted in the ledger, as unknown keys are. To honour a key, read it (`RowView.get` notes
that) and take its mend away, or leave the mend for the formats that do not read it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from ..base.names import Values
from .raw_row import RowView, is_given


class Key(NamedTuple):
    """What is known of a key.

    Attributes:
        means: what it says, in some words.
        mend: what to do with a row whose key is not read, which is refused; None: it is counted.
        of: the type of value that means this; others are counted.
    """

    means: str
    mend: str | None = None
    of: type = object


_ONE_ANSWER = "keep the answer to learn in the row's messages and remove the key"
_GOOD_ONES = "keep the rows with good answers and remove the key"
_TOOLS = "remove the row, or write what is called and what it gives into the text"
_NO_VIDEO = 'write it as a part of its own, {"type": "video", "video": ...}, or under the row\'s `videos`'
_OF_VIDEO = "write it beside the file of a video"
_NO_AUDIO = "write what is heard into the text, or remove the row"

KEYS: dict[str, dict[str, Key]] = {
    "row": {
        "messages": Key("the turns: TRL, OpenAI, ms-swift"),
        "conversations": Key("the turns: LLaVA, ShareGPT, LLaMA-Factory"),
        "conversation": Key("the turns in pairs: ms-swift"),
        "prompt": Key("the question: TRL"),
        "completion": Key("the answer: TRL"),
        "query": Key("the question: ms-swift"),
        "response": Key("the answer: ms-swift"),
        "instruction": Key("the question: Alpaca"),
        "input": Key("what the instruction is about: Alpaca"),
        "output": Key("the answer: Alpaca"),
        "history": Key("earlier questions and answers", "write the turns into the conversation"),
        "system": Key("the system text"),
        "system_prompt": Key("the system text"),
        "tools": Key("what may be called", "remove it, or use the format messages"),
        "mask": Key("whose turns are not learned: NeMo", "write `loss: false` on the messages that are not learned"),
        "chosen": Key("the better answer of a pair", _ONE_ANSWER),
        "rejected": Key("the worse answer of a pair", _ONE_ANSWER),
        "rejected_response": Key("the worse answer of a pair", _ONE_ANSWER),
        "rejected_messages": Key("the worse answer of a pair", _ONE_ANSWER),
        "rejected_images": Key("the pictures of a worse answer", _ONE_ANSWER),
        "kto_tag": Key("whether the answer is a good one: ms-swift", _GOOD_ONES),
        "label": Key("whether the answer is a good one: TRL", _GOOD_ONES, of=bool),
        "functions": Key("what may be called", _TOOLS),
        "videos": Key("videos"),
        "video": Key("a video"),
        "audios": Key("sounds", _NO_AUDIO),
        "audio": Key("a sound", _NO_AUDIO),
        "objects": Key("boxes and the words for them: ms-swift"),
        "bboxes": Key("boxes"),
        "bbox": Key("boxes"),
    },
    "message": {
        "role": Key("who speaks"),
        "from": Key("who speaks: ShareGPT"),
        "content": Key("what is said"),
        "value": Key("what is said: ShareGPT"),
        "loss": Key("whether the answer is learned: ms-swift"),
        "train": Key("whether the answer is learned: axolotl"),
        "training": Key("whether the answer is learned: axolotl"),
        "train_detail": Key("which letters of the answer are learned", "write `train: false`, or remove the key"),
        "loss_scale": Key("whether the answer is learned, 1 or 0: ms-swift"),
        "weight": Key("whether the answer is learned, 1 or 0: OpenAI"),
        "loss_mask": Key("whether the answer is learned, 1 or 0"),
        "mask": Key("whether the answer is kept out of the loss"),
        "reasoning_content": Key("what is thought before the answer"),
        "reasoning": Key("what is thought before the answer"),
        "thinking": Key("what is thought before the answer"),
        "tools": Key("what may be called, on the first message"),
        "answers": Key("what several annotators answered"),
        "tool_calls": Key("what is called", _TOOLS),
        "tool_call_id": Key("what is answered", _TOOLS),
        "function_call": Key("what is called", _TOOLS),
        "refusal": Key("why there is no answer", "write it as the content, or remove the row"),
        "name": Key("which of several people speaks", "write the name into the text, or remove the key"),
        "images": Key("pictures of one message", "write them as parts of its content, or under the row's `images`"),
        "image": Key("a picture of one message", "write it as a part of its content, or under the row's `images`"),
        "videos": Key("videos of one message", _NO_VIDEO),
        "video": Key("a video of one message", _NO_VIDEO),
        "audio": Key("a sound", _NO_AUDIO),
    },
    "part": {
        "type": Key("text, image, video, or a box and the words for it"),
        "box": Key("the numbers of a box"),
        "scale": Key("what the numbers of a box count"),
        "text": Key("text"),
        "image": Key("a picture"),
        "path": Key("the file of a picture"),
        "bytes": Key("an encoded picture"),
        "url": Key("where a picture is"),
        "image_url": Key("where a picture is: OpenAI"),
        "source": Key("the picture, encoded: Anthropic"),
        "index": Key("which of the row's images it is, from 0"),
        "detail": Key("how large a picture is shown: OpenAI"),
        "min_pixels": Key("pixels that a picture has at least: Qwen"),
        "max_pixels": Key("pixels that a picture has at most: Qwen"),
        "resized_height": Key("the height a picture is brought to: Qwen"),
        "resized_width": Key("the width a picture is brought to: Qwen"),
        "file_id": Key("a file that OpenAI keeps", "give the picture itself as `image`"),
        "video": Key("a video", _NO_VIDEO),
        "video_url": Key("where a video is", _NO_VIDEO),
        "fps": Key("frames a second of a video: Qwen", _OF_VIDEO),
        "sample_fps": Key("frames a second of a list of pictures: Qwen", _OF_VIDEO),
        "frames": Key("frames of a video", _OF_VIDEO),
        "nframes": Key("frames of a video: Qwen", _OF_VIDEO),
        "num_frames": Key("frames of a video", _OF_VIDEO),
        "min_frames": Key("frames of a video at least: Qwen", _OF_VIDEO),
        "max_frames": Key("frames of a video at most: Qwen", _OF_VIDEO),
        "video_start": Key("the second that a video begins at: Qwen", _OF_VIDEO),
        "video_end": Key("the second that a video ends at: Qwen", _OF_VIDEO),
        "total_pixels": Key("pixels of all frames: Qwen", "write `max_pixels`, which is of each frame"),
        "audio": Key("a sound", _NO_AUDIO),
    },
}
"""`row`, `message`, `part` → the known keys of each."""

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
ROLES: dict[str, str] = {
    "human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT, "system": SYSTEM,
    "prompter": USER, "developer": SYSTEM, "bot": ASSISTANT, "model": ASSISTANT, "chatbot": ASSISTANT,
    "chatgpt": ASSISTANT, "bing": ASSISTANT, "bard": ASSISTANT,
}  # fmt: skip
"""Who speaks, in small letters, → the three roles there are."""

# `tool` alone is left to the rules of every conversation, which name it.
TOOL_ROLES = ("function", "function_call", "function_response", "tool_call", "tool_response", "observation")


def role_of(row: RowView, speaker: object, key: str) -> Any:
    """One of the three roles for the names that other formats give them; what is not known stays as it is.

    Raises:
        RowError: it is the role of a call or of what a call gives.
    """
    if not isinstance(speaker, str):
        return speaker
    if speaker in ROLES:
        return ROLES[speaker]
    name = speaker.lower()
    if name in TOOL_ROLES:
        raise row.error(f'{key} is of "{name}" and tools that are called are not supported', _TOOLS, "wrong role")
    return ROLES.get(name, speaker)


def check_left(row: RowView, kind: str, values: Values, used: Collection[str | None], place: str) -> None:
    """Refuses the known keys of an object that nobody read, and counts the others in `row.unused`.

    Args:
        row: where the object stands.
        kind: a key of `KEYS`.
        values: the object.
        used: the keys of it that were read.
        place: what to put before a key to name it in errors: `messages[3].`, or nothing for the row itself.

    Raises:
        RowError: one has a value and a mend.
    """
    for key, value in values.items():
        if key in used or not is_given(value):
            continue
        known = KEYS[kind].get(key)
        if known is not None and known.mend is not None and isinstance(value, known.of):
            raise row.error(f'"{place}{key}" ({known.means}) is not used here', known.mend, "key refused")
        row.leave(f"{place}{key}")
