"""The numbers of a source are those that one can count by hand."""

from __future__ import annotations

import io

from PIL import Image
from rich.console import Console

from support.films import film
from vlm_sft.data.look_alikes import Compared, LookAlike, LookAlikes, Place
from vlm_sft.prepare.stats import DataStats, spread, stats_table


def row(question: str, answers: list[str], images: list[dict], row_id: str, source: str = "s") -> dict:
    messages = []
    for answer in answers:
        messages += [{"role": "user", "content": [{"type": "text", "text": question}]},
                     {"role": "assistant", "content": [{"type": "text", "text": answer}]}]  # fmt: skip
    return {"messages": messages, "images": images, "source": source, "id": row_id}


def picture(path, size) -> dict:
    Image.new("RGB", size).save(path)
    return {"path": str(path), "bytes": None}


def counted(tmp_path) -> DataStats:
    stream = io.BytesIO()
    Image.new("L", (10, 30)).save(stream, "PNG")
    wide, embedded = picture(tmp_path / "a.png", (40, 20)), {"path": None, "bytes": stream.getvalue()}
    (tmp_path / "b.png").write_bytes(b"<html>")
    found = DataStats()
    for each in (
        row("?", ["a cat", "两只猫"], [wide], "s/1"),
        row("?", ["a cat"], [wide, embedded], "s/2"),
        row("?", ["a cat"], [wide, embedded], "s/3"),
        row("?", ["yes"], [], "t/1", source="t"),
        row("?", ["no"], [{"path": str(tmp_path / "b.png"), "bytes": None}], "t/2", source="t"),
    ):
        found.add(each)
    return found


def test_everything_is_counted(tmp_path):
    found = counted(tmp_path).as_dict()
    assert found["rows"] == 5 and found["rows_by_source"] == {"s": 3, "t": 2}
    assert found["text_only"] == 1 and found["repeated_rows"] == 1
    assert found["images"] == 6 and found["different_images"] == 3 and found["images_in_a_row"] == {
        "0": 1, "1": 2, "2": 2,
    }  # fmt: skip
    assert found["image_width"] == {"min": 10, "median": 25, "p95": 38.5, "max": 40}
    assert found["images_opened"] == 3 and found["unreadable"] == ["t/2"]
    assert found["answers"] == 6 and found["different_answers"] == 4 and found["languages"] == {"en": 5, "zh": 1}
    assert found["answer_length"]["min"] == 2 and found["answer_length"]["max"] == 5
    assert next(iter(found["commonest_answers"].items())) == ("a cat", 3)


def test_the_table_says_it_in_words_and_takes_brackets_as_text(tmp_path):
    found = counted(tmp_path)
    found.add(row("?", ["[red]x[/blue]"] * 9, [], "s/[9]"))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(stats_table(found.as_dict()))
    shown = console.export_text()
    assert "from s" in shown and "4 (66.7%)" in shown
    assert "1, the first in t/2" in shown and "[red]x[/blue]" in shown


def test_look_alikes_stand_in_the_table_and_the_numbers():
    pair = LookAlike(Place("s/[1]", "s", "照片.png"), Place("e/2", "e", None), 0.98765, True)
    found = DataStats(look_alikes=LookAlikes([pair], Compared(10, 12), Compared(4, 4), repeated=2))
    found.add(row("?", ["a cat"], [], "s/1"))
    numbers = found.as_dict()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(stats_table(numbers))
    shown = console.export_text()
    for words in ("2 (20.0%) of 10 looked at", "1 (10.0%), 1 (25.0%) held-out images", "from s in e", "0.99 mirrored"):
        assert words in shown
    assert "s/[1] (照片.png) ≈ e/2" in shown
    assert numbers["look_alikes"]["pairs"][0]["likeness"] == 0.9877 and numbers["look_alikes"]["train_like_train"] == 2


def test_of_nothing_there_is_no_spread():
    assert spread([]) == {} and DataStats().as_dict()["answers"] == 0
    Console(file=io.StringIO()).print(stats_table({**DataStats().as_dict(), "answers_in_a_row": spread([0]),
                                                   "answer_length": spread([0])}))  # fmt: skip


def test_frames_of_videos_are_counted(tmp_path):
    clips = [{"path": str(film(tmp_path / f"{name}.mp4", frames=4)), "bytes": None} for name in "ab"]
    found = DataStats()
    found.add(row("?", ["yes"], [{**clips[0], "time": t} for t in (0.0, 0.3)], "s/1"))
    found.add(row("?", ["no"], [{**clip, "time": 0.3, "max_pixels": 768} for clip in clips], "s/2"))
    said = found.as_dict()
    assert (said["images"], said["different_images"], said["frames"], said["different_videos"]) == (4, 3, 4, 2)
    assert said["image_width"]["min"] == 32 and said["image_width"]["max"] == 64 and not said["unreadable"]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(stats_table(said))
    assert "4, of 2 videos" in console.export_text()
