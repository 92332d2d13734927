"""What other formats write where an image stands is the place of an image, of the right one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft.base.errors import RowError
from vlm_sft.rows.formats import examples_of

ANSWER = {"role": "assistant", "content": "两只 <|image_1|>"}


def read(asked: str, format_name: str = "messages", **row) -> tuple[list[str], list]:
    """What a question shows and says, part by part, and the images."""
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "两只 <|image_1|>"}]
    (example,) = examples_of({"conversations": turns, **row}, format_name, where="row 1")
    assert example.messages[1]["content"] == [{"type": "text", "text": "两只 <|image_1|>"}], "an answer says it as text"
    return [part["text"] or part["type"] for part in example.messages[0]["content"]], example.images


MARKED = {
    "Qwen-VL": ("Picture 1: <img>a/一.png</img>\nPicture 2: <img>b.png</img>\n哪只？", {}, ["a/一.png", "b.png"]),
    "Phi": ("<|image_1|><|image_2|>哪只？", {"images": ["a", "b"]}, ["a", "b"]),
    "Phi, in another order": ("<|image_2|><|image_1|>哪只？", {"images": ["a", "b"]}, ["b", "a"]),
    "MMMU": ("<image 1> <image 2> 哪只？", {"images": ["a", "b"]}, ["a", "b"]),
    "MiniCPM": ("<image_01>\n<image_00>哪只？", {"image": {"<image_00>": "a", "<image_01>": "b"}}, ["b", "a"]),
    "numbered from 0": ("<image_0> <image_1> 哪只？", {"images": ["a", "b"]}, ["a", "b"]),
    "DeepSeek": ("<image_placeholder><image_placeholder>哪只？", {"images": ["a", "b"]}, ["a", "b"]),
    "Qwen2-VL": ("<|vision_start|><|image_pad|><|vision_end|>" * 2 + "哪只？", {"images": ["a", "b"]}, ["a", "b"]),
    "capitals": ("<Image><IMAGE>哪只？", {"images": ["a", "b"]}, ["a", "b"]),
}


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("format_name", ["messages", "llava"])
def test_the_marks_of_other_formats_are_places_of_images(name, format_name):
    asked, row, images = MARKED[name]
    parts, shown = read(asked, format_name, **row)
    assert parts.count("image") == 2 and shown == images
    assert parts[-1].endswith("哪只？") and not any("<" in part for part in parts)


def test_every_way_to_ask_has_its_marks_read():
    for row, format_name in [
        ({"query": "<|image_1|>几只？", "response": "2", "images": ["a"]}, "messages"),
        ({"messages": [{"role": "user", "content": "<|image_1|>几只？"}, ANSWER], "images": ["a"]}, "messages"),
        ({"question": "<image 1>几只？", "answer": "2", "image": "a"}, "vqa"),
        ({"texts": [{"user": "<image_1>几只？", "assistant": "2"}], "images": ["a"]}, "cauldron"),
        ({"question": "<img>a</img>几只？", "answer": "2"}, "vqa"),
    ]:
        (example,) = examples_of(row, format_name, where="row 1")
        assert [part["type"] for part in example.messages[0]["content"]] == ["image", "text"]
        assert example.messages[0]["content"][1]["text"] == "几只？" and example.images == ["a"]


def test_an_image_may_be_shown_twice():
    assert read("<|image_1|>再看<|image_2|>和<|image_1|>", images=["a", "b"])[1] == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("asked", "row", "said"),
    [
        ("<|image_1|><|image_3|>?", {"images": ["a", "b"]}, "marks images as <|image_1|> <|image_3|>, which are not"),
        ("<|image_1|>?", {"images": ["a", "b"]}, 'are not the 2 of "images": give every mark its image'),
        ("<image_00>?", {"image": {"<image_00>": "a", "<image_01>": "b"}}, 'are not the 2 of "image"'),
        ("<Image>?", {"images": ["a", "b"]}, "marks images as <Image>"),
        ("<img>a</img>?", {"images": ["a"]}, "names the files of images (<img>…</img>), and others are given beside"),
        ("<img>a</img><|image_1|>?", {}, "give all of them in one way"),
    ],
)  # fmt: skip
def test_marks_without_their_images_are_an_error_of_the_row(asked, row, said):
    with pytest.raises(RowError) as caught:
        read(asked, **row)
    assert said in str(caught.value) and str(caught.value).startswith("row 1: ")


@given(st.sampled_from(["<|image_1|>", "<Image>", "<image 1>", "<image_placeholder>", "[IMG]"]), st.text(max_size=8))
def test_a_text_without_images_or_with_our_own_marks_says_them_as_text(mark, text):
    asked = f"问{text.replace('<', '')}{mark}"
    assert read(asked) == ([asked], [])
    assert read(f"<image>{asked}", images=["a"]) == (["image", asked], ["a"])


def test_a_picture_that_says_more_of_itself_is_one_picture():
    assert read("<image_00>几只？", image={"path": "a", "max_pixels": 9})[1] == [{"path": "a", "max_pixels": 9}]
