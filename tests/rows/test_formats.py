"""Raw rows to conversations: every format, their rules, and the sentence for a row that breaks one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.paths import GOLDENS
from vlm_sft.base.errors import UserError
from vlm_sft.rows.formats import FORMATS, examples_of

IMAGE = {"type": "image", "text": None}
ANSWER = {"role": "assistant", "content": "是猫。"}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def one(row: dict, format_name: str, **kwargs):
    (example,) = examples_of(row, format_name, where="f.jsonl, line 3", **kwargs)
    return example


def contents(row: dict, format_name: str, **kwargs) -> list:
    return [message["content"] for message in one(row, format_name, **kwargs).messages]


def refused(row: dict, format_name: str, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        list(examples_of(row, format_name, where="f.jsonl, line 3", **kwargs))
    message = str(error.value)
    assert message.startswith("f.jsonl, line 3: ")
    assert "\n" not in message
    assert message.endswith(".")
    return message


# ---------------------------------------------------------------------------------------------------------- messages


def chat(content, **columns) -> dict:
    return {"messages": [{"role": "user", "content": content}, ANSWER], **columns}


@pytest.mark.parametrize(
    ("row", "content", "images"),
    [
        (chat("你好"), [text("你好")], []),
        (chat("<image>\nWhat?", images=["a.png"]), [IMAGE, text("\nWhat?")], ["a.png"]),
        (chat("比较<image>和<image>", images=["a", "b"]), [text("比较"), IMAGE, text("和"), IMAGE], ["a", "b"]),
        (chat("What?", images=["a", "b"]), [IMAGE, IMAGE, text("What?")], ["a", "b"]),  # no mark: in front, as TRL
        (chat("What?", image="a"), [IMAGE, text("What?")], ["a"]),
        (chat("What?", images=None), [text("What?")], []),
        (chat([text("<image>?"), {"type": "image"}], images=["a"]), [text("<image>?"), IMAGE], ["a"]),
        (chat([{"type": "image", "text": None, "image": None}], images=["a"]), [IMAGE], ["a"]),
        (chat([{"type": "image", "image": "a"}, {"type": "image"}], images=["b"]), [IMAGE, IMAGE], ["a", "b"]),
        (chat([{"type": "image_url", "image_url": {"url": "data:x"}}]), [IMAGE], ["data:x"]),
        (chat([{"type": "image", "bytes": b"x"}]), [IMAGE], [b"x"]),
    ],
)
def test_messages(row, content, images):
    example = one(row, "messages")
    assert example.messages[0] == {"role": "user", "content": content}
    assert example.messages[-1] == {"role": "assistant", "content": [text("是猫。")]}
    assert example.images == images


def test_prompt_and_completion():
    row = {"prompt": "<image>这是什么？", "completion": "猫", "image": "a"}
    assert contents(row, "messages") == [[IMAGE, text("这是什么？")], [text("猫")]]
    listed = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "completion": [ANSWER]}
    assert [message["role"] for message in one(listed, "messages").messages] == ["system", "user", "assistant"]
    assert '"completion" is missing' in refused({"prompt": "q"}, "messages")


def test_a_mark_in_an_answer_or_system_message_is_text():
    row = {
        "messages": [
            {"role": "system", "content": "Tags look like <image>."},
            {"role": "user", "content": "How do I write an image tag?"},
            {"role": "assistant", "content": "Write <image>."},
        ]
    }
    example = one(row, "messages")
    assert example.images == []
    assert example.messages[0]["content"] == [text("Tags look like <image>.")]
    assert example.messages[2]["content"] == [text("Write <image>.")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"mesages": []},
            'the key "messages" is missing (the row has "mesages"): map it with `columns: {messages: mesages}`',
        ),
        ({}, "the row has no key at all"),
        ({"messages": None}, '"messages" is null'),
        ({"messages": "hi"}, '"messages" is text, not a list'),
        ({"messages": ["hi"]}, "messages[0] is text, not an object"),
        (chat("<image><image>", images=["a"]), "2 image marks (<image> in user text, or image parts) but 1 image:"),
        (chat("<image>"), "1 image mark (<image> in user text, or image parts) but 0 images"),
        (chat([text("What?")], images=["a"]), "0 image marks (<image> in user text, or image parts) but 1 image"),
        (chat("What?", images=["a", None]), '"images" has an empty entry'),
        (chat(None), 'the text "messages[0].content" is null'),
        (chat(["hi"]), "messages[0].content[0] is text, not an object with a type"),
        (chat([{"type": "audio"}]), 'messages[0].content[0] has the type "audio"'),
        (chat([{"type": "video"}]), "1 video mark (<video> in user text, or video parts) but 0 videos"),
        (chat([{"type": "text"}]), 'the text "messages[0].content[0].text" is null'),
        (chat("\ud83d"), "half a character"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "calls tools"),
        (chat("q", id=[1]), 'the text "id" is a list'),
    ],
)
def test_messages_refused(row, message):
    assert message in refused(row, "messages")


# ------------------------------------------------------------------------------------------------------------- llava


def as_marks(content: list[dict]) -> str:
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in content)


def test_llava_equals_upstream():
    cases = json.loads((GOLDENS / "llava_templates" / "cases.json").read_text(encoding="utf-8"))
    assert cases
    for case in cases:
        marks = sum(turn.count("<image>") for turn in case["turns"][::2])
        speakers = ["human", "gpt"] * len(case["turns"])
        row = {"conversations": [{"from": s, "value": v} for s, v in zip(speakers, case["turns"], strict=False)]}
        found = [as_marks(content) for content in contents(row | {"image": ["x.jpg"] * marks}, "llava")]
        # Upstream keeps one mark of several in a message; we keep one for each image.
        assert [turn.replace("<image><image>", "<image>") for turn in found] == case["messages_after_multimodal"]
        assert "".join(found[::2]).count("<image>") == marks


def llava(*turns: str, **columns) -> dict:
    speakers = ["human", "gpt"] * len(turns)
    return {"conversations": [{"from": s, "value": v} for s, v in zip(speakers, turns, strict=False)], **columns}


# Rows in the shape of blip_laion_cc_sbu_558k.json, llava_v1_5_mix665k.json (with and without an image) and
# sharegpt4v_instruct_gpt4-vision_cap100k.json.
PUBLISHED = [
    {
        "id": "004539375",
        "image": "00453/004539375.jpg",
        "conversations": [
            {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
            {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam mattress topper"},
        ],
    },
    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
            {"from": "gpt", "value": "The bus in the image is white and red."},
            {"from": "human", "value": "What feature can be seen on the back of the bus?"},
            {"from": "gpt", "value": "The back of the bus features an advertisement."},
        ],
    },
    {
        "id": "wgByO4Y_0",
        "model": "",
        "conversations": [
            {"from": "human", "value": "How to tell if a customer segment is well segmented? In 3 bullet points."},
            {"from": "gpt", "value": "1. Homogeneity\n2. Distinctiveness\n3. Stability"},
        ],
    },
    {
        "id": "000000000009",
        "image": "coco/train2017/000000000009.jpg",
        "conversations": [
            {"from": "human", "value": "What do you see happening in this image?\n<image>"},
            {"from": "gpt", "value": "In the center of the image, a vibrant blue lunch tray holds four containers."},
        ],
    },
]


@pytest.mark.parametrize("row", PUBLISHED, ids=["LLaVA-Pretrain", "mix665k", "mix665k text", "ShareGPT4V"])
def test_llava_as_published(row):
    example = one(row, "llava")
    assert example.images == ([row["image"]] if "image" in row else [])
    places = [[part["type"] for part in message["content"]] for message in example.messages]
    assert places[0] == (["image", "text"] if "image" in row else ["text"])
    assert all(kinds == ["text"] for kinds in places[1:])
    asked = row["conversations"][0]["value"].replace("<image>", "").strip()
    assert example.messages[0]["content"][-1]["text"].strip() == asked
    assert (example.id, example.language) == (row["id"], "en")


def test_llava_keeps_every_image():
    example = one(llava("<image>\n<image>\n比较。", "一样。", "And <image>?", "Red.", image=["a", "b", "c"]), "llava")
    assert example.messages[0]["content"] == [IMAGE, IMAGE, text("\n比较。")]
    assert example.messages[2]["content"] == [IMAGE, text("\nAnd ?")]
    assert example.images == ["a", "b", "c"]


@pytest.mark.parametrize("columns", [{}, {"image": None}, {"image": ""}, {"image": []}])
def test_llava_without_an_image_is_text(columns):
    example = one(llava("Name a colour.", " Blue <image> ", **columns), "llava")
    assert example.images == []
    assert example.messages[1]["content"] == [text(" Blue <image> ")]


def test_llava_skips_an_answer_to_nothing_and_takes_system():
    row = {"conversations": [{"from": s, "value": s} for s in ("gpt", "human", "gpt")]}
    assert [message["role"] for message in one(row, "llava").messages] == ["user", "assistant"]
    row["conversations"][0] = {"from": "system", "value": "s"}
    assert [message["role"] for message in one(row, "llava").messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            llava("<image>\n<image>", "a", image="1.jpg"),
            "2 image marks (<image> in user text, or image parts) but 1 image:",
        ),
        (llava("What?", "a", image="1.jpg"), "0 image marks (<image> in user text, or image parts) but 1 image:"),
        ({"conversation": []}, 'the key "conversations" is missing (the row has "conversation")'),
        ({"conversations": {}}, '"conversations" is an object, not a list'),
        ({"conversations": [3]}, "conversations[0] is a number, not an object"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, 'conversations[0] has from: "robot": human, user, gpt'),
        ({"conversations": [{"from": [], "value": "x"}]}, 'conversations[0] has from: "[]"'),
        ({"conversations": [{"from": "human"}]}, 'the text "conversations[0].value" is null'),
    ],
)
def test_llava_refused(row, message):
    assert message in refused(row, "llava")


# --------------------------------------------------------------------------------------------------- caption and vqa


def test_caption():
    assert contents({"image": "a", "caption": " a red 3\n"}, "caption") == [[IMAGE], [text("a red 3")]]
    assert contents({"images": ["a", "b"], "text": "猫"}, "caption") == [[IMAGE, IMAGE], [text("猫")]]
    assert one({"image": "a", "caption": "<image>", "id": 12}, "caption").id == "12"
    listed = list(examples_of({"image": "a", "caption": ["x", "y"]}, "caption", where=""))
    assert [example.messages[1]["content"][0]["text"] for example in listed] == ["x", "y"]


def test_caption_prompts():
    row = {"image": "a", "caption": "猫"}
    assert contents(row, "caption", draw_prompt=lambda language: "描述。")[0] == [IMAGE, text("描述。")]
    placed = contents(row, "caption", draw_prompt=lambda language: "<Img><image></Img> 描述。")[0]
    assert placed == [text("<Img>"), IMAGE, text("</Img> 描述。")]
    assert "2 image marks" in refused(row, "caption", draw_prompt=lambda language: "<image><image>")


@pytest.mark.parametrize(
    ("columns", "answer"),
    [
        ({"answer": "红色"}, "红色"),
        ({"answer": 3}, "3"),
        ({"answer": ["red", "blue", "blue"]}, "blue"),
        ({"answers": ["b", "a", "a", "b"]}, "b"),  # as frequent: the first
        ({"answers": [{"answer": "no"}, {"answer": "yes"}, {"answer": " yes"}, {"answer": ""}]}, "yes"),
    ],
)
def test_vqa(columns, answer):
    assert contents({"image": "a", "question": " q? ", **columns}, "vqa") == [[IMAGE, text("q?")], [text(answer)]]


def test_vqa_places_the_image_where_the_question_says():
    row = {"image": "a", "question": "Look at <image>: 几个？", "answer": "2"}
    assert contents(row, "vqa")[0] == [text("Look at "), IMAGE, text(": 几个？")]


@pytest.mark.parametrize(
    ("format_name", "row", "message"),
    [
        ("caption", {"image": "a"}, 'the key "caption" is missing (the row has "image")'),
        ("caption", {"caption": "x"}, 'the key "image" is missing'),
        ("caption", {"image": None, "caption": "x"}, '"image" is null'),
        ("caption", {"image": "", "caption": "x"}, '"image" is empty'),
        ("caption", {"image": [], "caption": "x"}, '"image" is empty'),
        ("caption", {"image": "a", "caption": "　 "}, '"caption" is empty'),
        ("caption", {"image": "a", "caption": []}, 'the text "caption" is a list'),
        ("caption", {"image": "a", "caption": ["x", None]}, 'the text "caption" is null'),
        ("caption", {"image": "a", "caption": {"en": "x"}}, 'the text "caption" is an object'),
        ("vqa", {"image": "a", "question": "q", "answer": ""}, '"answer" is empty'),
        ("vqa", {"image": "a", "question": "q", "answers": []}, '"answers" is empty'),
        ("vqa", {"image": "a", "question": "q", "answers": [{"text": "x"}]}, 'the text "answers" is null'),
        ("vqa", {"image": "a", "question": "q", "answer": True}, 'the text "answer" is true or false'),
        ("vqa", {"image": "a", "question": "<image> ", "answer": "x"}, '"question" is empty'),
        ("vqa", {"image": "a", "question": "<image><image>?", "answer": "x"}, "2 image marks"),
    ],
)
def test_caption_and_vqa_refused(format_name, row, message):
    assert message in refused(row, format_name)


def test_vqa_prompts_go_around_the_question():
    row = {"image": "a", "question": "几个{question}？", "answer": "2"}
    asked = contents(row, "vqa", draw_prompt=lambda language: f"{language}: {{question}}\n简短回答。")[0]
    assert asked == [IMAGE, text("zh: 几个{question}？\n简短回答。")], "a brace in a question is text"


@pytest.mark.parametrize(
    ("row", "language"),
    [
        ({"image": "a", "caption": "a red 3"}, "en"),
        ({"image": "a", "caption": "一只 cat"}, "zh"),
        ({"image": "a", "caption": "x", "language": "zh-CN"}, "zh"),
        ({"image": "a", "caption": "x", "language": "De_at"}, "de"),
        ({"image": "a", "caption": "猫", "language": 3}, "zh"),
        ({"image": "a", "caption": "猫", "language": ""}, "zh"),
    ],
)
def test_the_language_of_a_row(row, language):
    asked = []
    example = one(row, "caption", draw_prompt=lambda found: asked.append(found) or "?")
    assert (example.language, asked) == (language, [language])


def test_a_conversation_s_language_is_that_of_all_its_text():
    row = {"messages": [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "是一只猫。"}]}
    assert one(row, "messages").language == "zh"


# ---------------------------------------------------------------------------------------------------------- cauldron


def cauldron(*turns: str, images=("a",)) -> dict:
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return {"images": list(images), "texts": [{"user": u, "assistant": a, "source": "VQAv2"} for u, a in pairs]}


def test_cauldron():
    example = one(cauldron("Q1?", "A1", "Q2?", "A2", images=["a", "b"]), "cauldron")
    assert [message["content"] for message in example.messages] == [
        [IMAGE, IMAGE, text("Q1?")],
        [text("A1")],
        [text("Q2?")],
        [text("A2")],
    ]
    assert example.images == ["a", "b"]
    assert contents(cauldron("Q?", "A", images=()), "cauldron")[0] == [text("Q?")]
    assert contents(cauldron("Q1?", "A1", "<image>Q2?", "A2"), "cauldron")[2] == [IMAGE, text("Q2?")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": []}, 'the key "texts" is missing'),
        ({"images": ["a"], "texts": "x"}, '"texts" is text, not a list'),
        ({"images": ["a"], "texts": []}, "0 image marks"),
        ({"images": ["a"], "texts": ["x"]}, "texts[0] is text, not an object with user and assistant"),
        ({"images": [], "texts": [{"user": "x"}]}, 'the text "texts[0].assistant" is null'),
        (cauldron("<image><image>?", "A"), "2 image marks"),
    ],
)
def test_cauldron_refused(row, message):
    assert message in refused(row, "cauldron")


# ----------------------------------------------------------------------------------------------------------- columns


def test_columns_are_renamed():
    row = {"img": "a", "zh": "猫", "caption": "cat", "key": 7}
    example = one(row, "caption", columns={"image": "img", "caption": "zh", "id": "key"})
    assert (example.images, example.id) == (["a"], "7")
    assert example.messages[1]["content"] == [text("猫")]


def test_a_mapped_column_that_is_missing_is_named():
    message = refused({"image": "a", "caption": "cat"}, "caption", columns={"caption": "zh"})
    assert 'the key "zh" (`columns` maps caption to it) is missing' in message


# -------------------------------------------------------------------------------------------------------------- fuzz

KEYS = sorted({key for known in FORMATS.values() for key in known.columns})
INNER = [
    "user",
    "assistant",
    "role",
    "content",
    "from",
    "value",
    "type",
    "text",
    "image",
    "answer",
    "url",
    "path",
    "bytes",
    "image_url",
]
WORDS = ["user", "assistant", "human", "gpt", "system", "text", "image", "<image>", "", "猫", "\ud83d", "a.png"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), JSON, max_size=6), st.sampled_from(list(FORMATS)))
def test_any_row_is_an_example_or_a_sentence(row, format_name):
    try:
        examples = list(examples_of(row, format_name, where="f.json, row 1"))
    except UserError as error:
        examples, message = [], str(error)
    else:
        message = "f.json, row 1: "
    assert message.startswith("f.json, row 1: ")
    assert "\n" not in message
    for example in examples:
        parts = [part for turn in example.messages for part in turn["content"]]
        assert sum(part["type"] == "image" for part in parts) == len(example.images)


def test_image_and_images_that_differ_are_no_guess():
    turns = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]
    for image, images in (("1.png", ["1.png"]), ("1.png", []), ("", ["1.png"]), (None, ["1.png"])):
        assert one({"messages": turns, "image": image, "images": images}, "messages").images == ["1.png"]
    said = refused({"messages": turns, "image": "1.png", "images": ["2.png"]}, "messages")
    assert 'the row has both "images" and "image", and they differ: keep one of them' in said
