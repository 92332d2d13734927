"""Videos in rows of every format: what marks them, what a row may say of them, and what they become."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from support.conversations import make_processor
from support.films import animation, film, frame_of
from support.source_files import write
from vlm_sft.base.errors import RowError
from vlm_sft.batch.collator import MultimodalCollator
from vlm_sft.data.dataset import load_source
from vlm_sft.data.source import source_rows
from vlm_sft.data.streaming import stream_mixture
from vlm_sft.reading.images import load_image
from vlm_sft.recipe.sections import Data, Source
from vlm_sft.rows.messages import row_key, unpacked

ANSWER = {"role": "assistant", "content": "一只猫走过。"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    film(folder / "a.mp4")
    film(folder / "b.webm", frames=20, codec="libvpx-vp9")
    animation(folder / "c.gif", frames=10)
    for number in range(4):
        animation(folder / f"{number}.png", frames=1)
    return folder


def source_of(folder, rows: list[dict[str, Any]], format_name: str = "messages", **more: Any) -> Source:
    name = f"{abs(hash(json.dumps(rows, default=str)))}.jsonl"
    more = {"video": {"frames": 2}, **more}
    return Source(path=write(folder / name, rows), format=format_name, name="s", **more)


def read(folder, row: dict[str, Any], format_name: str = "messages", **more: Any) -> dict[str, Any]:
    (found,) = source_rows(source_of(folder, [row], format_name, **more))
    return found


def said(row: dict[str, Any], message: int = 0) -> str:
    return "".join(part.get("text") or "<image>" for part in row["messages"][message]["content"])


def shown(row: dict[str, Any]) -> list[tuple[str, float | None]]:
    return [(image["path"].rpartition("/")[2], image.get("time")) for image in row["images"]]


def chat(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, ANSWER], **more}


def spoken(text: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "猫"}]}


A = [("a.mp4", 0.0), ("a.mp4", 3.9)]
TWO = "<0.0 seconds><image><3.9 seconds><image>"


@pytest.mark.parametrize(
    ("format_name", "row", "text"),
    [
        ("messages", chat("<video>What?", videos=["a.mp4"]), f"{TWO}What?"),
        ("messages", chat("看<video>说", video="a.mp4"), f"看{TWO}说"),
        ("messages", chat("What?", videos=[{"path": "a.mp4"}]), f"{TWO}What?"),
        ("messages", chat([{"type": "video"}, {"type": "text", "text": "?"}], videos=["a.mp4"]), f"{TWO}?"),
        ("messages", chat([{"type": "video", "video": "a.mp4"}]), TWO),
        ("messages", chat([{"video": "a.mp4"}, {"text": "?"}]), f"{TWO}?"),
        ("messages", chat([{"type": "video", "path": "a.mp4"}]), TWO),
        ("messages", chat([{"type": "video", "video": {"path": "a.mp4"}}]), TWO),
        ("messages", chat([{"type": "video_url", "video_url": {"url": "a.mp4"}}]), TWO),
        ("messages", {"query": "<video>说", "response": "猫", "videos": ["a.mp4"]}, f"{TWO}说"),
        ("messages", {"instruction": "<video>", "input": "?", "output": "猫", "videos": "a.mp4"}, f"{TWO}\n?"),
        (
            "messages",
            spoken("<video>?") | {"videos": ["a.mp4"]},
            f"{TWO}?",
        ),
        (
            "llava",
            spoken("?\n<video>") | {"video": "a.mp4"},
            f"{TWO}\n?",
        ),
        ("messages", chat("<VIDEO>说", video="a.mp4"), f"{TWO}说"),
        ("messages", chat("看<|vision_start|><|video_pad|><|vision_end|>", video="a.mp4"), f"看{TWO}"),
        ("caption", {"video": "a.mp4", "caption": "猫"}, TWO),
        ("vqa", {"video": "a.mp4", "question": "谁？", "answer": "猫"}, f"{TWO}谁？"),
        ("vqa", {"video": "a.mp4", "question": "谁在<video>里？", "answer": "猫"}, f"谁在{TWO}里？"),
        ("cauldron", {"videos": ["a.mp4"], "texts": [{"user": "谁？", "assistant": "猫"}]}, f"{TWO}谁？"),
    ],
)  # fmt: skip
def test_every_format_shows_frames_with_their_times(folder, format_name, row, text):
    found = read(folder, row, format_name)
    assert said(found) == text and shown(found) == A
    assert {part["type"] for message in found["messages"] for part in message["content"]} <= {"text", "image"}
    assert [frame_of(load_image(image)) for image in found["images"]] == [0, 39]


def test_a_column_of_another_name(folder):
    row = {"clip": "a.mp4", "text": "猫"}
    assert shown(read(folder, row, "caption", columns={"video": "clip"})) == A


def test_images_and_videos_keep_their_places(folder):
    row = chat("<image>a<video>b<image>c<video>", images=["0.png", "1.png"], videos=["b.webm", "a.mp4"])
    found = read(folder, row)
    assert said(found) == "<image>a<0.0 seconds><image><1.9 seconds><image>b<image>c" + TWO
    assert shown(found) == [("0.png", None), ("b.webm", 0.0), ("b.webm", 1.9), ("1.png", None), *A]
    parts = [{"type": "video", "video": "b.webm"}, {"type": "image"}, {"type": "video"}]
    found = read(folder, chat(parts, images=["0.png"], videos=["a.mp4"]))
    assert shown(found) == [("b.webm", 0.0), ("b.webm", 1.9), ("0.png", None), *A]


def test_later_turns_and_several_captions(folder):
    row = chat("<video>?", videos=["a.mp4", "c.gif"])
    row["messages"] += [{"role": "user", "content": "再看<video>"}, ANSWER]
    found = read(folder, row)
    assert said(found, 2) == "再看<0.0 seconds><image><0.9 seconds><image>"
    assert shown(found) == [*A, ("c.gif", 0.0), ("c.gif", 0.9)]
    rows = list(source_rows(source_of(folder, [{"video": "a.mp4", "caption": ["一", "two"]}], "caption")))
    assert [shown(each) for each in rows] == [A, A]


@pytest.mark.parametrize(
    ("more", "times"),
    [
        ({"fps": 0.5}, [0.0, 2.0]),
        ({"fps": 1, "video_start": 2}, [2.0, 3.0]),
        ({"nframes": 3, "video_start": 3.95}, [3.9]),
        ({"nframes": 3}, [0.0, 2.0, 3.9]),
        ({"num_frames": 3, "video_end": 2.0}, [0.0, 1.0, 1.9]),
        ({"fps": 10, "max_frames": 2}, [0.0, 3.9]),
        ({"fps": 0.1, "min_frames": 2}, [0.0, 3.9]),
    ],
)
def test_a_row_says_which_frames(folder, more, times):
    for row in (chat([{"type": "video", "video": "a.mp4", **more}]), chat("?", videos=[{"path": "a.mp4", **more}])):
        assert [image["time"] for image in read(folder, row)["images"]] == times


def test_the_row_goes_before_the_source_and_the_source_before_the_recipe(folder):
    rows = [{"video": "a.mp4", "caption": "猫"}]
    given = source_of(folder, rows, "caption").model_dump()
    plain = {**given, "video": None}
    data = Data(train=[Source(**given), Source(**{**plain, "name": "t"})], video={"fps": 1.0, "time": "第{time}秒"})
    counts = [[*map(said, source_rows(source))] for source in data.train]
    assert counts == [[TWO], ["".join(f"第{k}.0秒<image>" for k in range(4))]]
    (alone,) = source_rows(Source(**plain))
    assert len(alone["images"]) == 8  # the default


def test_sizes(folder):
    assert read(folder, chat("?", videos=["a.mp4"]))["images"][0]["max_pixels"] == 512 * 512
    row = read(folder, chat("?", videos=["a.mp4"]), video={"frames": 1, "max_pixels": 768})
    assert load_image(row["images"][0]).size == (32, 24)
    row = read(folder, chat([{"type": "video", "video": "a.mp4", "resized_height": 28, "resized_width": 56}]))
    assert load_image(row["images"][0]).size == (56, 28)
    row = read(folder, chat([{"type": "video", "video": "a.mp4", "min_pixels": 10**6}]))
    assert load_image(row["images"][0]).width > 1000


@pytest.mark.parametrize("more", [{"sample_fps": 4}, {"fps": 4}])
def test_a_list_of_pictures_is_a_video(folder, more):
    pictures = [f"{number}.png" for number in range(4)]
    found = read(folder, chat([{"type": "video", "video": pictures, **more}]), video={"time": "{time} "})
    assert said(found) == "0.0 <image>0.2 <image>0.5 <image>0.8 <image>"
    assert shown(found) == [(name, None) for name in pictures]
    found = read(folder, chat("<video>?", videos=[pictures]))
    assert said(found).startswith("<0.0 seconds><image><0.5 seconds><image><1.0")
    found = read(folder, chat([{"type": "video", "video": pictures, "nframes": 2, "max_pixels": 99}]))
    assert shown(found) == [("0.png", None), ("3.png", None)] and found["images"][1]["max_pixels"] == 99


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            chat("<video>?"),
            "1 video mark (<video> in user text, or video parts) but 0 videos: give every mark",
        ),
        (chat("<video><video>?", videos=["a.mp4"]), "2 video marks"),
        (
            chat("<video>?", videos=["a.mp4", "b.webm"]),
            "video parts) but 2 videos: give every mark its video, in order.",
        ),
        (chat([{"type": "text", "text": "?"}], videos=["a.mp4"]), "0 video marks"),
        (chat("?", videos=["a.mp4"], video="b.webm"), 'the row has both "videos" and "video", and they differ'),
        (chat("?", videos=[None]), '"videos" has an empty entry'),
        (chat("?", videos=[3]), "videos[0] is a number and names no video"),
        (chat("?", videos=[{"fps": 2}]), "a video is neither a path nor bytes"),
        (chat("?", video="none.mp4"), "none.mp4 was not found: correct the path"),
        (
            chat("?", video="http://a/b.mp4"),
            "http://a/b.mp4 is a URL and no URL is fetched: download it first.",
        ),
        (chat("?", video="0.png"), "is a picture that does not move: name it under `images`"),
        (chat([{"type": "video", "video": "a.mp4", "fps": 2, "nframes": 4}]), "has fps and nframes: keep one of them"),
        (chat([{"type": "video", "video": "a.mp4", "fps": 0}]), "content[0].fps is 0: write a number above zero"),
        (chat([{"type": "video", "video": "a.mp4", "nframes": 2.5}]), "nframes is 2.5: write a whole number from 1 to"),
        (
            chat([{"type": "video", "video": "a.mp4", "nframes": 5000}]),
            "write a whole number from 1 to 4,096 (`limits.video_frames`)",
        ),
        (
            chat([{"type": "video", "video": "a.mp4", "video_start": -1}]),
            "is -1: write a number from zero on",
        ),
        (chat([{"type": "video", "video": "a.mp4", "nframes": 2, "num_frames": 3}]), "says twice and differently"),
        (chat([{"type": "video", "video": "a.mp4", "video_start": 9}]), "4.0 seconds is to be shown from 9 to 4"),
        (chat([{"type": "video", "video": "a.mp4", "total_pixels": 9}]), '"messages[0].content[0].total_pixels"'),
        (chat([{"type": "video", "video": "a.mp4", "max_pixels": "a"}]), "max_pixels of an image is a"),
        (chat([{"type": "video", "fps": 2}], videos=["a.mp4"]), '"messages[0].content[0].fps"'),
    ],
)
def test_what_is_wrong_is_one_sentence(folder, row, message):
    with pytest.raises(RowError) as caught:
        read(folder, row)
    sentence = str(caught.value)
    assert message in sentence and ".jsonl, line 1: " in sentence and "\n" not in sentence


def test_llava_asks_for_a_mark(folder):
    row = {"video": "a.mp4", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "猫"}]}
    with pytest.raises(RowError, match="0 video marks"):
        read(folder, row, "llava")


def test_a_typed_mark_is_text_where_a_typed_image_mark_is(folder):
    row = chat([{"type": "text", "text": "What is a <video> tag?"}])
    assert said(read(folder, row)) == "What is a <video> tag?"
    row = chat("?") | {"system": "Say <video>."}
    row["messages"][1] = {"role": "assistant", "content": "Write <video>."}
    found = read(folder, row)
    assert [said(found, k) for k in range(3)] == ["Say <video>.", "?", "Write <video>."]


def test_an_embedded_video_is_kept_once(folder):
    import datasets

    encoded = (folder / "a.mp4").read_bytes()
    path = folder / "embedded.parquet"
    datasets.Dataset.from_dict(
        {"video": [{"bytes": encoded, "path": "a.mp4"}], "caption": ["猫"]}
    ).to_parquet(str(path))  # fmt: skip
    source = Source(path=str(path), format="caption", video={"frames": 5})
    (row,) = load_source(source)
    assert [image["bytes"] is None for image in row["images"]] == [False, True, True, True, True]
    streamed = next(iter(stream_mixture([source], buffer=1)))
    assert sum(len(image["bytes"] or b"") for image in streamed["images"]) == len(encoded)
    columns = {name: row[name] for name in ("images", "id", "extras")}
    for stored in (row, streamed, columns):
        images = unpacked(stored)["images"]
        assert [set(image) for image in images] == [{"path", "bytes", "time", "max_pixels"}] * 5
        assert [frame_of(load_image(image)) for image in images] == [0, 10, 20, 29, 39]
    uri = "data:video/mp4;base64," + base64.b64encode(encoded).decode()
    assert [
        frame_of(load_image(image)) for image in read(folder, {"video": uri, "caption": "猫"}, "caption")["images"]
    ] == [0, 39]


def test_frames_of_one_video_are_different_images(folder):
    rows = [read(folder, {"video": "a.mp4", "caption": "猫"}, "caption", video={"frames": n}) for n in (2, 3)]
    assert row_key(rows[0]) != row_key(rows[1])
    same = read(folder, {"video": "a.mp4", "caption": "猫"}, "caption")
    assert row_key(same) == row_key(rows[0])


def test_no_row_can_write_a_time_itself(folder):
    found = read(folder, {"image": {"path": "0.png", "time": 1.0}, "caption": "猫"}, "caption")
    assert "time" not in found["images"][0]


def test_the_collator_decodes_the_right_frames(folder):
    source = source_of(folder, [chat("<video>发生了什么？", videos=["a.mp4"]), chat("hi")], video={"frames": 4})
    rows = list(load_source(source))
    collator = MultimodalCollator(make_processor("vicuna_v1"))
    sample = collator.encode(rows[0])
    assert [frame_of(image) for image in sample.images] == [0, 13, 26, 39]
    assert collator(rows)["pixel_values"].shape[0] == 4
    assert collator.encode(rows[0], with_images=False).images == []
