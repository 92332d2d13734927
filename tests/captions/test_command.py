"""`vlm-sft data caption`: pictures become rows that a recipe trains on, counted, and a rerun goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from support.forge import LAUNCHER
from support.gloo import in_processes
from support.paths import accelerate_config
from vlm_sft.base.console import make_console
from vlm_sft.base.errors import UserError
from vlm_sft.base.names import RUN_LOCK
from vlm_sft.captions import capfilt
from vlm_sft.captions.capfilt import Wish
from vlm_sft.captions.captioner import PROMPTS
from vlm_sft.captions.command import caption
from vlm_sft.captions.wanted import WantedPictures
from vlm_sft.cli.main import app
from vlm_sft.data.source import source_rows
from vlm_sft.encoders.encoder import ReadsQuestions
from vlm_sft.pieces import expected
from vlm_sft.recipe.sections import Source

SHORT = {"num_beams": 1, "max_new_tokens": 8}


def run(*arguments):
    result = CliRunner().invoke(app, ["data", "caption", *map(str, arguments)])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def manifest(out: Path) -> dict:
    return json.loads(out.with_name(f"{out.name}.manifest.json").read_text(encoding="utf-8"))


def made(out: Path) -> dict[str, dict]:
    """Every line of every process, by the picture's name; each is there once."""
    found = [line for path in sorted(Path(f"{out}.parts").glob("part-*")) for line in lines(path)[1:]]
    assert len({line["id"] for line in found}) == len(found)
    return {line["id"]: line for line in found}


def test_a_folder_of_pictures_becomes_rows_of_captions(blip, album, tmp_path):
    out = tmp_path / "rows.jsonl"
    said = run(album, out, "--captioner", blip["captioner"], "--matcher", blip["matcher"], "--threshold", 0,
               "--captions", 3, "--set", "max_new_tokens=8", "--batch-size", 3)  # fmt: skip
    rows = lines(out)
    counts = manifest(out)["captions"]
    assert counts["made"] == 21 and counts["given"] == 0
    assert counts["kept"] + sum(counts["dropped"].values()) == 21 and counts["kept"] == len(rows)
    assert {row["image"] for row in rows} <= {*(f"album/{n}.png" for n in range(6)), "album/下面/红.jpg"}
    for row in rows:
        assert 0 <= row["score"] <= 1 and row["source"] == blip["captioner"] and row["caption"].strip()
    assert len({(row["image"], row["caption"]) for row in rows}) == len(rows), "no caption of a picture comes twice"
    assert "rows.jsonl: " in said and "format: caption" in said
    read = list(source_rows(Source(path=str(out), format="caption")))
    assert [row["messages"][-1]["content"][0]["text"] for row in read] == [row["caption"] for row in rows]


def test_the_matcher_decides_and_everything_dropped_is_counted(blip, album, tmp_path):
    """Scores are those of transformers' own class; below a half the head itself says that a pair does not belong."""
    import torch
    from transformers import AutoProcessor, BlipForImageTextRetrieval

    out = tmp_path / "rows.jsonl"
    run(album, out, "--captioner", blip["captioner"], "--matcher", blip["matcher"], "--captions", 4,
        "--set", "max_new_tokens=8")  # fmt: skip
    processor = AutoProcessor.from_pretrained(blip["matcher"], use_fast=False)
    model = BlipForImageTextRetrieval.from_pretrained(blip["matcher"]).eval()
    kept = {(row["image"], row["caption"]): row["score"] for row in lines(out)}
    scored = 0
    for line in made(out).values():
        for each in line["captions"]:
            if each["dropped"]:
                assert each["score"] is None
                continue
            picture = Image.open(album / line["id"]).convert("RGB")
            with torch.inference_mode():
                inputs = processor(images=picture, text=each["text"], return_tensors="pt")
                share = model(**inputs).itm_score.softmax(-1)[0, 1].item()
            assert each["score"] == pytest.approx(share, abs=1e-5)
            assert ((f"album/{line['id']}", each["text"]) in kept) == (each["score"] >= 0.5)
            scored += 1
    found = manifest(out)
    assert found["threshold"] == 0.5 and 0 < len(kept) < scored
    assert found["captions"]["dropped"]["below the threshold"] == scored - len(kept)
    assert Path(f"{out}.histogram.png").is_file()
    # Another threshold takes the scores that are there: no model is loaded.
    out.unlink()
    again = pytest.MonkeyPatch()
    with again.context() as patch:
        patch.setattr(capfilt, "load_captioner", pytest.fail)
        run(album, out, "--captioner", blip["captioner"], "--matcher", blip["matcher"], "--captions", 4,
            "--set", "max_new_tokens=8", "--keep", 1)  # fmt: skip
    assert len(lines(out)) == scored


def test_captions_that_rows_have_are_scored_along(blip, album, tmp_path):
    rows = [
        {"image": "0.png", "caption": "two dogs on grass"},
        {"image": "1.png", "caption": ["a red bird", "红色的鸟"]},
        {"image": "0.png", "caption": "a cat"},
    ]
    src = album / "web.jsonl"
    src.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "rows.jsonl"
    run(src, out, "--captioner", blip["captioner"], "--matcher", blip["matcher"], "--threshold", 0,
        "--format", "caption", "--set", "max_new_tokens=8", "--set", "num_beams=1")  # fmt: skip
    found = manifest(out)
    assert found["captions"]["given"] == 4 and found["captions"]["made"] == 2, (
        "a picture that comes again is asked once"
    )
    assert found["captions"]["dropped"]["not read by the matcher"] == 1
    assert found["pictures"]["read"] == 2 and found["pictures"]["came_again"] == 2
    given = [row["caption"] for row in lines(out) if row["source"] == "given"]
    assert given == ["two dogs on grass", "a red bird", "a cat"]


def test_a_broken_picture_is_named_counted_and_stops_nothing_else(blip, album, tmp_path):
    (album / "3.png").write_bytes(b"<html>no picture")
    (album / "9.png").write_bytes(b"")
    out = tmp_path / "rows.jsonl"
    command = (album, out, "--captioner", blip["captioner"], "--set", "max_new_tokens=4", "--set", "num_beams=1")
    wrong = r'2 of 8 rows of the source "album" cannot be used, more than --max-rejected \(0\).*3\.png.*HTML'
    with pytest.raises(UserError, match=wrong):
        run(*command)
    assert not out.exists() and len(made(out)) == 8
    said = run(*command, "--max-rejected", "0.3")
    assert all(row["score"] is None and row["image"] not in ("album/3.png", "album/9.png") for row in lines(out))
    found = manifest(out)["pictures"]
    assert found["read"] == 6
    assert sum(found["rejected"].values()) == 2 and "9.png" in json.dumps(found["examples"]) and "9.png" in said


def test_what_lies_beside_pictures_changes_nothing_and_other_kinds_are_named(album, tmp_path, monkeypatch):
    monkeypatch.setattr(capfilt, "load_captioner", lambda *given: Scripted())
    (album / "0.json").write_text('{"taken": "2026"}')  # as photo services put beside each
    (album / "IMG_1.HEIC").write_bytes(b"ftypheic")
    out = album / "rows.jsonl"
    with pytest.raises(UserError, match=r"IMG_1\.HEIC: the picture .* is a \.heic file: convert it to JPEG"):
        run(album, out, "--captioner", "both")
    run(album, out, "--captioner", "both", "--max-rejected", "0.2")
    assert [row["image"] for row in lines(out)] == [*(f"{n}.png" for n in range(6)), "下面/红.jpg"]
    again = tmp_path / "again.jsonl"
    run(album, again, "--captioner", "both", "--max-rejected", "0.2")
    assert [row["caption"] for row in lines(again)] == [row["caption"] for row in lines(out)]


def test_a_killed_run_goes_on_to_the_same_rows(blip, album, tmp_path, monkeypatch):
    def command(out):
        return (album, out, "--captioner", blip["captioner"], "--matcher", blip["matcher"], "--threshold", 0,
                "--captions", 2, "--set", "max_new_tokens=6", "--batch-size", 2)  # fmt: skip

    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    run(*command(whole))
    real, calls = capfilt._Maker.made, []

    def dies(maker, batch):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(batch)
        return real(maker, batch)

    with monkeypatch.context() as patch:
        patch.setattr(capfilt._Maker, "made", dies)
        with pytest.raises((KeyboardInterrupt, AssertionError)):
            run(*command(killed))
    part = Path(f"{killed}.parts") / "part-00000.jsonl"
    assert len(lines(part)) == 5
    part.write_bytes(part.read_bytes() + b'{"number": 4, "id": "4.p')  # as a kill leaves a line
    monkeypatch.setattr(capfilt._Maker, "made", lambda maker, batch: calls.append(batch) or real(maker, batch))
    run(*command(killed))
    assert sum(len(batch) for batch in calls) == 7, "no picture was asked twice"
    assert killed.read_bytes() == whole.read_bytes()


def test_two_processes_share_the_pictures_and_one_goes_on(blip, album, tmp_path):
    out = tmp_path / "rows.jsonl"
    wish = Wish(blip["captioner"], blip["matcher"], options=SHORT, batch_size=2)

    def work(rank):
        expected._root.cache_clear()  # processes of a launch have no folder in common
        caption(WantedPictures(str(album)), str(out), wish, make_console(), threshold=0.0)
        return "done"

    assert in_processes(work, tmp_path) == ["done", "done"]
    parts = sorted(Path(f"{out}.parts").glob("part-*"))
    assert [len(lines(path)) for path in parts] == [5, 4] and len(made(out)) == 7
    first = lines(out)
    # One of them lost what it had made: whoever goes on makes it again, and nothing twice.
    parts[1].write_bytes(b"".join(parts[1].read_bytes().splitlines(keepends=True)[:2]))
    out.unlink()
    run(album, out, "--captioner", blip["captioner"], "--matcher", blip["matcher"], "--threshold", 0,
        "--set", "num_beams=1", "--set", "max_new_tokens=8", "--batch-size", 2)  # fmt: skip
    assert len(made(out)) == 7 and [row["caption"] for row in lines(out)] == [row["caption"] for row in first]
    # A mistake that one process meets ends all of them.
    parts[0].write_text("[]\n")
    out.unlink()
    (tmp_path / "again").mkdir()
    assert all("is not a file of captions" in said for said in in_processes(work, tmp_path / "again"))


def test_a_launch_of_which_one_process_is_killed_goes_on_to_every_picture_once(blip, tmp_path, forge):
    album, out, said = tmp_path / "album", tmp_path / "rows.jsonl", tmp_path / "said.txt"
    album.mkdir()
    chance = np.random.default_rng(0)
    for number in range(30):
        Image.fromarray(chance.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(album / f"{number}.png")
    given = (str(album), str(out), "--captioner", blip["captioner"], "--matcher", blip["matcher"], "--threshold", "0",
             "--set", "num_beams=1", "--set", "max_new_tokens=8", "--batch-size", "1")  # fmt: skip
    command = [sys.executable, "-m", LAUNCHER, "--config_file", str(accelerate_config("cpu_2")), "--main_process_port",
               "0", "-m", "vlm_sft", "data", "caption", *given]  # fmt: skip
    parts = Path(f"{out}.parts")

    def there() -> int:
        return sum(path.read_bytes().count(b"\n") - 1 for path in parts.glob("part-*"))

    with said.open("w") as file:
        launched = forge.start(command, stdout=file, stderr=file)
        while there() < 6 and launched.poll() is None:
            time.sleep(0.01)
        assert launched.poll() is None, said.read_text()
        os.kill(json.loads((parts / RUN_LOCK).read_text())["process"], signal.SIGKILL)
        assert launched.wait(120) != 0
    assert 6 <= there() < 30 and not out.exists(), said.read_text()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert made(out).keys() == {f"{number}.png" for number in range(30)}
    assert done.stdout.count("rows.jsonl: ") == 1 and manifest(out)["pictures"]["read"] == 30
    alone = tmp_path / "alone.jsonl"
    run(album, alone, *given[2:])
    assert lines(alone) == lines(out)


def test_rows_without_captions_and_embedded_pictures_are_read(blip, album, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    photo = (album / "0.png").read_bytes()
    rows = [{"photo": {"bytes": photo, "path": None}}, {"photo": {"bytes": photo, "path": None}},
            {"photo": {"bytes": b"\x89PNG broken", "path": "坏.png"}}, {"photo": None}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    out = tmp_path / "rows.jsonl"
    run(tmp_path / "data.parquet", out, "--captioner", blip["captioner"], "--column", "image=photo",
        "--set", "max_new_tokens=4", "--set", "num_beams=1", "--max-rejected", "0.5")  # fmt: skip
    (row,) = lines(out)
    assert (tmp_path / row["image"]).read_bytes() == photo
    assert sum(manifest(out)["pictures"]["rejected"].values()) == 2


class Scripted(ReadsQuestions):
    """Stands for a model that answers in Chinese and in English, but one picture in English alone."""

    prompts = PROMPTS

    def __init__(self) -> None:
        self.reader, self.asked, self.image_processor = self, [], None

    def check(self, prompts):
        self.asked += prompts

    def captions(self, rows, prompt, count):
        for number in range(count):
            yield [
                f"{number} dogs." if "picture" in prompt or row.where == "2.png" else f"{number}只狗。" for row in rows
            ]


def test_prompts_in_both_languages_are_asked(album, tmp_path, monkeypatch):
    model = Scripted()
    monkeypatch.setattr(capfilt, "load_captioner", lambda *given: model)
    out = tmp_path / "rows.jsonl"
    said = run(album, out, "--captioner", "both", "--language", "en", "--language", "zh", "--captions", 2)
    assert model.asked == list(PROMPTS.values())
    found = manifest(out)["captions"]
    assert (
        found["made"] == 28 and found["languages"] == {"en": 14, "zh": 12} and found["dropped"] == {"other language": 2}
    )
    assert [row["caption"] for row in lines(out)][:4] == ["0 dogs.", "1 dogs.", "0只狗。", "1只狗。"]
    assert "prompts: {en: [Describe this picture.], zh: [描述这张图片。]}" in said
    out.unlink()
    with pytest.raises(UserError, match=r"made in another way \(captions, languages, prompts\)"):
        run(album, out, "--captioner", "both", "--prompt", "这是什么？")
    # In one's own words nobody knows which language is meant, and what is said again counts once.
    out = tmp_path / "own.jsonl"
    run(album, out, "--captioner", "both", "--prompt", "这是什么？", "--prompt", "图片里有什么？")
    assert manifest(out)["captions"]["dropped"] == {"said twice": 7} and len(lines(out)) == 7


@pytest.mark.parametrize(("arguments", "says"), [
    (("album", "rows.json"), "written as .jsonl"),
    (("album", "there.jsonl"), "exists already"),
    (("album", "rows.jsonl", "--threshold", 0.5), "name one \\(--matcher\\)"),
    (("album", "rows.jsonl", "--matcher", "m", "--threshold", 0.5, "--keep", 0.5), "give one of them"),
    (("album", "rows.jsonl", "--language", "de"), "--language must be one of en, zh, not de"),
    (("album", "rows.jsonl", "--language", "zh"), "is asked in en alone"),
    (("album", "rows.jsonl", "--language", "en", "--prompt", "a"), "leave out --language"),
    (("album", "rows.jsonl", "--prompt", " "), "is empty"),
    (("album", "rows.jsonl", "--prompt", "a", "--prompt", "a"), "given twice"),
    (("album", "rows.jsonl", "--prompt", "一张照片"), "does not know the words of the prompt '一张照片'"),
    (("album", "rows.jsonl", "--captions", 2, "--set", "num_beams=3"), "which --set num_beams=3 rules out"),
    (("album", "rows.jsonl", "--captions", 2, "--set", "temperature=0"), "which --set temperature=0 rules out"),
    (("album", "rows.jsonl", "--set", "top_q=1"), "no generation setting"),
    (("album", "rows.jsonl", "--set", "max_new_tokens=1000"), "may have 1,004 tokens, and .* has 40 positions"),
    (("album", "rows.jsonl", "--set", "max_length=90"), "may have 90 tokens"),
    (("album", "rows.jsonl", "--matcher", "captioner"), "--matcher .*has no matching head"),
    (("album", "rows.jsonl", "--matcher", "nowhere"), "--matcher"),
    (("album", "rows.jsonl", "--column", "image"), "of no use without --format"),
    (("album", "rows.jsonl", "--column", "caption=text"), "of no use without --format"),
    (("nowhere.jsonl", "rows.jsonl"), "nowhere.jsonl"),
    (("empty", "rows.jsonl"), "holds no pictures"),
    (("there.jsonl", "rows.jsonl"), "\"image\" is missing"),
])  # fmt: skip
def test_what_is_wrong_is_one_sentence(blip, album, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    Path("there.jsonl").write_text('{"picture": "0.png"}\n')
    Path("empty").mkdir()
    given = [blip["captioner"] if each == "captioner" else each for each in arguments]
    with pytest.raises(UserError, match=says) as raised:
        run(*given, "--captioner", blip["captioner"])
    assert "\n" not in str(raised.value)
    assert not Path("rows.jsonl").exists()


def test_names_that_are_no_text_are_counted(album, tmp_path, monkeypatch):
    monkeypatch.setattr(capfilt, "load_captioner", lambda *given: Scripted())
    try:
        shutil.copy(album / "0.png", album / os.fsdecode(b"\xff.png"))
    except OSError:
        return  # this disk has no such names
    out = tmp_path / "rows.jsonl"
    run(album, out, "--captioner", "both", "--max-rejected", "0.2")
    assert sum(manifest(out)["pictures"]["rejected"].values()) == 1 and len(lines(out)) == 7


def test_other_pictures_than_before_are_named(blip, album, tmp_path):
    out = tmp_path / "rows.jsonl"
    command = partial(
        run, album, out, "--captioner", blip["captioner"], "--set", "max_new_tokens=4", "--set", "num_beams=1"
    )
    command()
    out.unlink()
    shutil.copy(album / "0.png", album / "00.png")
    with pytest.raises(UserError, match=r"has '1\.png' where .* has '00\.png': its pictures are others than before"):
        command()
