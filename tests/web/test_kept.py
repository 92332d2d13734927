"""What a person keeps of answers: rows that a recipe reads at once, each once, with the pictures beside them."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from support.tiny_pieces import tiny_recipe
from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.data.dataset import load_mixture
from vlm_sft.train import main
from vlm_sft.web import kept as module
from vlm_sft.web.kept import Judged, Kept, folder_for


@pytest.fixture
def judged(photos):
    """A good answer to a question that spells a mark."""
    pictures = [Path(photos[0]), Path(photos[1])]
    return Judged("<image> 两张图有什么不同？", pictures, "birds", "一红 & 一蓝", "一红 & 一蓝", good=True)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_recipe_trains_on_what_was_kept(judged, pieces, tmp_path) -> None:
    kept = Kept(tmp_path / "kept")
    assert kept.keep(judged) == (tmp_path / "kept" / "rows.jsonl", 1, True)
    kept.keep(replace(judged, question="这是什么？", said="猫", text="狗", good=False, pictures=judged.pictures[:1]))
    source = [{"path": str(tmp_path / "kept" / "rows.jsonl"), "format": "messages"}]
    recipe = tiny_recipe(pieces, "", tmp_path / "out", chat_template="ziya", data={"train": source})
    recipe["sft"]["per_device_train_batch_size"] = 2
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    loaded = load_recipe(tmp_path / "recipe.yaml")
    rows = list(load_mixture(loaded.data.train))
    said = [[part["text"] for message in row["messages"] for part in message["content"]] for row in rows]
    assert said == [[None, None, "<image> 两张图有什么不同？", "一红 & 一蓝"], [None, "这是什么？", "狗"]]
    for row, pictures in zip(rows, (judged.pictures, judged.pictures[:1]), strict=True):
        copies = [Path(image["path"]) for image in row["images"]]
        assert [copy.read_bytes() for copy in copies] == [picture.read_bytes() for picture in pictures]
    main([str(tmp_path / "recipe.yaml")])
    assert (tmp_path / "out" / "bundle.json").exists()


def test_the_same_is_kept_once_with_the_last_verdict(judged, tmp_path) -> None:
    kept = Kept(tmp_path / "kept")
    bad = replace(judged, good=False)
    counts = [kept.keep(each)[1:] for each in (judged, judged, bad, bad, judged)]
    assert counts == [(1, True), (1, False), (1, True), (1, False), (1, True)]
    (row,) = lines(tmp_path / "kept" / "rows.jsonl")
    assert lines(tmp_path / "kept" / "bad.jsonl") == [] and row["verdict"] == "good"
    assert len(list((tmp_path / "kept" / "images").iterdir())) == 2
    assert kept.keep(replace(bad, text="两只狗"))[:2] == (tmp_path / "kept" / "rows.jsonl", 2)
    assert lines(tmp_path / "kept" / "rows.jsonl")[1]["said"] == "一红 & 一蓝"


def test_several_people_keep_at_a_time(judged, tmp_path) -> None:
    threads = [
        threading.Thread(target=Kept(tmp_path / "kept").keep, args=(replace(judged, text=f"答案 {number}"),))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    said = {row["messages"][1]["content"][0]["text"] for row in lines(tmp_path / "kept" / "rows.jsonl")}
    assert said == {f"答案 {number}" for number in range(8)}


def test_a_write_that_fails_leaves_what_was_there(judged, tmp_path, monkeypatch) -> None:
    kept = Kept(tmp_path / "kept")
    kept.keep(judged)
    before = (tmp_path / "kept" / "rows.jsonl").read_bytes()

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_whole", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): start the page with another"):
        kept.keep(replace(judged, text="另一个"))
    assert (tmp_path / "kept" / "rows.jsonl").read_bytes() == before


def test_what_cannot_be_kept_is_one_sentence(judged, tmp_path, monkeypatch) -> None:
    kept = Kept(tmp_path / "kept")
    with pytest.raises(UserError, match="The pictures are no longer here: ask again"):
        kept.keep(replace(judged, pictures=[tmp_path / "gone.png"]))
    (tmp_path / "page.png").write_text("<html>", encoding="utf-8")
    with pytest.raises(UserError, match="HTML"):
        kept.keep(replace(judged, pictures=[tmp_path / "page.png"]))
    assert not (tmp_path / "kept").exists()
    kept.keep(judged)
    monkeypatch.setattr(module, "MOST", 1)
    with pytest.raises(UserError, match=r"has 1 rows: start again with another --keep"):
        kept.keep(replace(judged, text="另一个"))
    assert kept.keep(judged)[1:] == (1, False)
    with pytest.raises(UserError, match="The answer has half a character"):
        kept.keep(replace(judged, text="猫\ud83d"))
    for wrong, said in (("{", "line 1: not JSON"), ('{"question": 1}', "line 1 is no row that this page kept")):
        (tmp_path / "kept" / "rows.jsonl").write_text(wrong + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=said):
            kept.keep(judged)


def test_the_folder_is_judged_before_the_page_opens(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    assert folder_for(str(tmp_path / "新" / "kept")) == tmp_path / "新" / "kept"
    for wrong in (str(tmp_path / "file"), str(tmp_path / "file" / "kept"), " "):
        with pytest.raises(UserError, match=r"--keep .*; name another folder\.$"):
            folder_for(wrong)


def test_a_picture_keeps_its_kind_whatever_it_is_called(judged, tmp_path) -> None:
    path = tmp_path / "image"
    Image.new("RGB", (8, 8), "red").save(path, "JPEG")
    Kept(tmp_path / "kept").keep(replace(judged, pictures=[path]))
    (copy,) = (tmp_path / "kept" / "images").iterdir()
    assert copy.suffix == ".jpg" and copy.read_bytes() == path.read_bytes()
