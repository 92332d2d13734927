"""Rows written in another format are read back as the same rows, and nothing half-written is left behind."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from support.films import film, frame_of
from vlm_sft.base.errors import UserError
from vlm_sft.data.source import source_rows
from vlm_sft.prepare.convert import ROWS_PER_SHARD, TARGETS, convert_rows
from vlm_sft.reading.images import load_image
from vlm_sft.recipe.sections import Source
from vlm_sft.rows.messages import box_part


def png(colour: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (3, 2), colour).save(stream, "PNG")
    return stream.getvalue()


PNG = png(0)


def text(value: str) -> dict:
    return {"type": "text", "text": value}


IMAGE = {"type": "image"}


def row(*content: dict, answer: str = "好", images: list | None = None, row_id: str = "s/1") -> dict:
    messages = [{"role": "user", "content": list(content)}, {"role": "assistant", "content": [text(answer)]}]
    return {"messages": messages, "images": images or [], "source": "s", "id": row_id}


def read(path: Path, kind: str = "messages", **source) -> list[dict]:
    return list(source_rows(Source(path=str(path), format=kind, name="s", **source)))


def plain(rows: list[dict]) -> list[tuple]:
    """What must survive: messages, and the bytes of every image."""
    return [(r["messages"], [i["bytes"] or Path(i["path"]).read_bytes() for i in r["images"]]) for r in rows]


@pytest.fixture
def rows(tmp_path):
    photo = tmp_path / "photos" / "图 1.png"
    photo.parent.mkdir()
    photo.write_bytes(png(1))
    by_path, embedded = {"path": str(photo), "bytes": None}, {"path": None, "bytes": png(2)}
    return [
        row(IMAGE, text("\n这是什么？"), images=[by_path], row_id="s/a"),
        row(IMAGE, IMAGE, text("\nCompare."), answer="Both.", images=[by_path, embedded], row_id="s/b"),
        row(text("Say hello."), answer="Hello!", row_id="s/c"),
    ]


@pytest.mark.parametrize(("to", "name"), [("messages", "out.jsonl"), ("llava", "out.json"), ("webdataset", "out")])
@pytest.mark.parametrize("copy_images", [False, True])
def test_what_is_written_is_read_back_the_same(rows, tmp_path, to, name, copy_images):
    out = tmp_path / "made" / name
    assert convert_rows(iter(rows), to, out, copy_images=copy_images) == 3
    back = read(out, "llava" if to == "llava" else "messages", image_folders=[str(tmp_path / "photos")])
    assert plain(back) == plain(rows)
    assert [r["id"] for r in back] == [f"s/{r['id']}" for r in rows]
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".unfinished")]


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.one_of(st.just("IMAGE"), TEXTS), min_size=1, max_size=5), min_size=1, max_size=4), TEXTS)
def test_messages_keep_every_text_and_every_place_of_an_image(tmp_path_factory, turns, answer):
    """Also a text that says <image>: parts say what is an image."""
    folder = tmp_path_factory.mktemp("any")
    content = [[IMAGE if part == "IMAGE" else text(part) for part in turn] for turn in turns]
    images = [{"path": None, "bytes": PNG} for turn in turns for part in turn if part == "IMAGE"]
    messages = [m for c in content for m in ({"role": "user", "content": c},
                                              {"role": "assistant", "content": [text(answer)]})]  # fmt: skip
    given_row = {"messages": messages, "images": images, "source": "s", "id": "s/1"}
    convert_rows([given_row], "messages", folder / "out.jsonl")
    (back,) = read(folder / "out.jsonl")
    assert plain([back]) == plain([given_row])


def test_the_same_picture_is_stored_once(rows, tmp_path):
    convert_rows(rows, "llava", tmp_path / "made" / "out.json", copy_images=True)
    assert len(list((tmp_path / "made" / "out_images").iterdir())) == 2


def test_a_folder_that_is_moved_keeps_its_images(rows, tmp_path):
    convert_rows(rows[:1], "messages", tmp_path / "out.jsonl")
    line = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert line["images"] == ["photos/图 1.png"]


def test_shards_hold_a_thousand_rows_each(tmp_path):
    rows = (row(text("?"), row_id=f"s/{i}") for i in range(ROWS_PER_SHARD + 1))
    convert_rows(rows, "webdataset", tmp_path / "out")
    sizes = []
    for shard in sorted((tmp_path / "out").iterdir()):
        with tarfile.open(shard) as archive:
            sizes.append(len(archive.getnames()))
    assert sizes == [ROWS_PER_SHARD, 1]


def fails(tmp_path: Path, rows, to: str, name: str) -> str:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        convert_rows(rows, to, tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"
    return str(error.value)


def test_wrong_names_are_refused(rows, tmp_path):
    (tmp_path / "there.jsonl").touch()
    assert "--to coco is not known: it must be one of messages, llava" in fails(tmp_path, rows, "coco", "x.json")
    assert "a file that ends with .jsonl" in fails(tmp_path, rows, "messages", "x.json")
    assert "a folder, whose name has no suffix" in fails(tmp_path, rows, "webdataset", "x.tar")
    assert "there.jsonl exists already" in fails(tmp_path, rows, "messages", "there.jsonl")
    assert "cannot be written (" in fails(tmp_path, rows, "messages", "there.jsonl/x.jsonl")


@pytest.mark.parametrize("to", TARGETS)
def test_a_source_without_rows_writes_nothing(tmp_path, to):
    assert fails(tmp_path, [], to, f"x{TARGETS[to][1]}") == "There are no rows to write: look at the source."


def test_what_a_format_cannot_say_is_refused(rows, tmp_path):
    mark = row(text("what does <image> mean?"), row_id="s/9")
    assert "s/9: its text holds <image>" in fails(tmp_path, [*rows, mark], "llava", "x.json")
    gone = row(IMAGE, images=[{"path": str(tmp_path / "gone.png"), "bytes": None}], row_id="s/9")
    assert "s/9: the image" in fails(tmp_path, [gone], "webdataset", "x")
    behind = row(IMAGE, images=[{"path": "https://example.org/a.png", "bytes": None}], row_id="s/9")
    assert "is a URL: download it first" in fails(tmp_path, [behind], "webdataset", "x")


def test_what_rows_say_beyond_their_features_survives_or_is_refused(tmp_path):
    said = row(IMAGE, text("这是？"), images=[{"path": str(tmp_path / "a.png"), "bytes": None, "max_pixels": 9}])
    said["messages"][1]["loss"] = False
    said["messages"] += [{"role": "user", "content": [text("q")]}, {"role": "assistant", "content": [text("a")]}]
    for kind in ("messages", "llava"):
        convert_rows([said], kind, tmp_path / f"{kind}.json{'l' * (kind == 'messages')}")
        (again,) = read(tmp_path / f"{kind}.json{'l' * (kind == 'messages')}", kind)
        assert [message.get("loss") for message in again["messages"]] == [None, False, None, None]
        assert again["images"] == said["images"]
    with pytest.raises(UserError, match="an image of it has max_pixels, for which shards have no place"):
        convert_rows([said], "webdataset", tmp_path / "shards")
    drawn = row(text("q"), images=said["images"])
    drawn["messages"][1]["content"] = [IMAGE, text("猫")]
    with pytest.raises(UserError, match="an answer of it holds an image"):
        convert_rows([drawn], "llava", tmp_path / "drawn.json")


@pytest.mark.parametrize("to", ["messages", "llava", "webdataset"])
def test_what_is_no_picture_is_not_copied(to, tmp_path):
    """A row that names somebody's key would carry it into a data set that is shared."""
    key, pipe = tmp_path / "id_ed25519", tmp_path / "pipe.png"
    key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n私钥\n", encoding="utf-8")
    os.mkfifo(pipe)
    for path, what in ((key, "is not an image"), (pipe, "is a named pipe")):
        rows = [row(IMAGE, text("?"), images=[{"path": str(path), "bytes": None}])]
        out = tmp_path / f"out{TARGETS[to][1]}"
        with pytest.raises(UserError, match=what):
            convert_rows(rows, to, out, copy_images=True)
        assert not out.exists() and not list(tmp_path.glob("*_images"))


def test_boxes_are_written_as_they_are_and_read_back(tmp_path):
    boxed = row(IMAGE, text("在哪？"), images=[{"path": str(tmp_path / "a.png"), "bytes": None}])
    parts = [{"type": "ref", "text": "猫"}, box_part([1, 2, 30.5, 4], "pixels", 0, "objects.bbox[0]"), text("!")]
    boxed["messages"][1]["content"] = parts
    convert_rows([boxed], "messages", tmp_path / "x.jsonl")
    (again,) = read(tmp_path / "x.jsonl")
    back = again["messages"][1]["content"]
    assert [back[0], back[2]] == [{"type": "ref", "text": "猫"}, text("!")]
    assert {**back[1], "key": ""} == {**parts[1], "key": ""}
    with pytest.raises(UserError, match="it has boxes, which LLaVA's format writes as text: write --to messages"):
        convert_rows([boxed], "llava", tmp_path / "x.json")


def test_frames_of_videos_become_pictures_with_their_times(tmp_path):
    given = {"video": str(film(tmp_path / "a.mp4")), "caption": "变亮了。"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(given))
    source = Source(path=str(tmp_path / "rows.jsonl"), format="caption", name="s", video={"frames": 3})
    for to, name in (("messages", "out.jsonl"), ("webdataset", "shards")):
        convert_rows(source_rows(source), to, tmp_path / "made" / name)
        (back,) = read(tmp_path / "made" / name)
        assert [part.get("text") for part in back["messages"][0]["content"]][::2] == [
            "<0.0 seconds>", "<2.0 seconds>", "<3.9 seconds>",
        ]  # fmt: skip
        assert all("time" not in image and "max_pixels" not in image for image in back["images"])
        assert [frame_of(load_image(image)) for image in back["images"]] == [0, 20, 39]
    with pytest.raises(UserError, match="times between its frames, for which LLaVA's format has no place"):
        convert_rows(source_rows(source), "llava", tmp_path / "out.json")
