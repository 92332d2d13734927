"""Folders as people have them, small: pictures and what is said of them, in eleven shapes."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

from support.pictures import COPIES, photo, write

COUNT = 12  # pictures, of which the last is a copy of the first: eleven groups
CAPTIONS = [f"a picture of thing number {n}" if n % 2 else f"第{n}张照片里的东西" for n in range(COUNT)]
QUESTIONS = [("How many shapes are there?", "5"), ("这是什么？", "彩色的图形")]


def picture(number: int) -> object:
    """One of twelve; the last is the first one, mirrored, marked and saved anew."""
    small = photo(number if number < COUNT - 1 else 0, (120, 90))
    return COPIES["all of it"](small) if number == COUNT - 1 else small


def pictures(folder: Path, name: str = "{n}.jpg") -> list[str]:
    """Writes all of them; returns their names below the folder."""
    names = [name.format(n=f"{number:03d}") for number in range(COUNT)]
    for number, each in enumerate(names):
        write(picture(number), folder / each)
    return names


def _lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def texts_beside(folder: Path) -> None:
    for name, caption in zip(pictures(folder), CAPTIONS, strict=True):
        (folder / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


def class_folders(folder: Path) -> None:
    for number in range(COUNT):
        write(picture(number), folder / ("猫", "狗", "bird")[number % 3] / f"IMG_{number:04d}.JPG")


def named_pictures(folder: Path) -> None:
    words = "red bus|blue car|old house|green hill|two dogs|a ship|big tree|small boat|橘猫睡觉|窗台上的花|night sky"
    for number, name in enumerate([*words.split("|"), "red bus 2"]):
        write(picture(number), folder / f"{name.replace(' ', '_')}.png")


def excel_table(folder: Path) -> None:
    """A CSV as Excel writes it, in Chinese, its pictures without endings and in a folder of their own."""
    names = pictures(folder / "照片")
    file = io.StringIO(newline="")
    table = csv.writer(file)
    table.writerow(["编号", "图片", "描述"])
    table.writerows(
        [n, Path(name).stem, caption] for n, (name, caption) in enumerate(zip(names, CAPTIONS, strict=True))
    )
    (folder / "说明.csv").write_bytes(file.getvalue().encode("utf-8-sig"))


def questions(folder: Path) -> None:
    """JSON lines of questions, two on each picture, and one that has no answer."""
    names = pictures(folder / "img")
    rows = [{"img_path": f"img/{n}", "query_id": 7, "question": q, "answer": a} for n in names for q, a in QUESTIONS]
    _lines(folder / "vqa.jsonl", [*rows, {"img_path": "img/000.jpg", "query_id": 8, "question": "why?", "answer": ""}])


def llava(folder: Path) -> None:
    rows = [
        {"id": str(n), "image": f"coco/{name}", "conversations": [
            {"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": caption}]}
        for n, (name, caption) in enumerate(zip(pictures(folder / "coco"), CAPTIONS, strict=True))
    ]  # fmt: skip
    (folder / "llava.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def coco(folder: Path) -> None:
    """COCO captions in its own layout, with a validation set."""
    pictures(folder / "train2017", "{n}.jpg")
    write(photo(50, (120, 90)), folder / "val2017" / "900.jpg")
    (folder / "annotations").mkdir()
    for side, ids in (("train", range(COUNT)), ("val", [900])):
        images = [{"id": n, "file_name": f"{n:03d}.jpg"} for n in ids]
        notes = [{"id": 10 * n, "image_id": n, "caption": f"COCO {n}"} for n in ids]
        document = json.dumps({"images": images, "annotations": notes})
        (folder / "annotations" / f"captions_{side}2017.json").write_text(document)


def parquet(folder: Path) -> None:
    """Pictures within the rows, as data sets of the Hub have them."""
    from datasets import Dataset

    names = pictures(folder / "gone")
    rows = {
        "image": [{"bytes": (folder / "gone" / name).read_bytes(), "path": name} for name in names],
        "text": CAPTIONS,
        "n": list(range(COUNT)),
    }
    for name in names:
        (folder / "gone" / name).unlink()
    (folder / "gone").rmdir()
    (folder / "data").mkdir()
    Dataset.from_dict(rows).to_parquet(folder / "data" / "train-00000-of-00001.parquet")


def tar_shards(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "00000.tar", "w") as shard:
        for number in range(COUNT):
            file = io.BytesIO()
            picture(number).save(file, "JPEG")
            for ending, data in (("jpg", file.getvalue()), ("txt", CAPTIONS[number].encode())):
                member = tarfile.TarInfo(f"{number:05d}.{ending}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))


def chats(folder: Path) -> None:
    """Rows as ms-swift writes them, and text alone among them."""
    names = pictures(folder / "a b")
    rows = [{"query": "<image>这是什么？", "response": caption, "images": [f"a b/{name}"]}
            for name, caption in zip(names, CAPTIONS, strict=True)]  # fmt: skip
    _lines(folder / "swift.jsonl", [*rows, {"query": "你好", "response": "你好！"}])


def vqav2(folder: Path) -> None:
    pictures(folder, "COCO_train2014_{n}.jpg")
    for name in sorted(folder.glob("*.jpg")):
        name.rename(name.with_name(f"COCO_train2014_{int(name.stem[-3:]):012d}.jpg"))
    asked = [{"question_id": n, "image_id": n, "question": f"What is {n}?"} for n in range(COUNT)]
    said = [{"question_id": n, "image_id": n, "multiple_choice_answer": "a",
             "answers": [{"answer": f"thing {n}"}]} for n in range(COUNT)]  # fmt: skip
    whole = {"data_subtype": "train2014", "questions": asked}
    (folder / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(json.dumps(whole))
    (folder / "v2_mscoco_train2014_annotations.json").write_text(json.dumps({"annotations": said}))


SHAPES: dict[str, tuple[Callable[[Path], None], str, int]] = {
    "texts beside": (texts_beside, "caption", 12),
    "class folders": (class_folders, "classify", 12),
    "named pictures": (named_pictures, "caption", 12),
    "excel table": (excel_table, "caption", 12),
    "questions": (questions, "answer", 24),
    "llava": (llava, "talk", 12),
    "coco": (coco, "caption", 13),
    "parquet": (parquet, "caption", 12),
    "tar shards": (tar_shards, "caption", 12),
    "chats": (chats, "talk", 13),
    "vqav2": (vqav2, "answer", 12),
}
"""Shape → how it is written, what is learned of it, and how many rows can be used."""
