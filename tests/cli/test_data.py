"""`vlm-sft data`: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from support.pictures import COPIES, photo, write
from vlm_sft.cli import main as cli
from vlm_sft.prepare import scorer


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process; gives exit code, standard output and standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vlm-sft", "data", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return ended.value.code or 0, shown.out, shown.err

    return call


def test_convert(run, caption_file, tmp_path):
    code, out, _ = run("convert", caption_file, tmp_path / "x.json", "--to", "llava", "--format", "caption")
    assert code == 0 and "x.json: 8 rows." in out
    rows = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert rows[2]["conversations"] == [{"from": "human", "value": "<image>\n"},
                                        {"from": "gpt", "value": "左上角是红色的3"}]  # fmt: skip


def test_further_folders_of_images_are_named(run, photos, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "rows.jsonl").write_text(json.dumps({"image": photos[0], "caption": "猫"}))
    arguments = ["convert", tmp_path / "a" / "rows.jsonl", tmp_path / "out.jsonl", "--to", "messages"]
    arguments += ["--format", "caption", "--copy-images"]
    code, _, err = run(*arguments)
    assert code == 2 and "lies outside" in err and "--image-folder" in err
    assert run(*arguments, "--image-folder", tmp_path / "photos")[0] == 0
    assert len(list((tmp_path / "out_images").iterdir())) == 1


def test_convert_takes_the_training_sources_of_a_recipe(run, recipe_file, tmp_path):
    assert run("convert", recipe_file(), tmp_path / "x.jsonl", "--to", "messages")[0] == 0
    assert len((tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()) == 8


def test_stats(run, caption_file):
    code, out, _ = run("stats", caption_file, "--format", "caption")
    assert code == 0 and "8 rows" in out and "zh: 2 (25.0%)" in out
    assert json.loads(run("stats", caption_file, "--format", "caption", "--json")[1])["images"] == 8


def test_stats_of_rows_of_which_none_can_be_used(run, tmp_path):
    turns = [{"role": "user", "content": "<video>什么？"}, {"role": "assistant", "content": "a cat"}]
    (tmp_path / "v.jsonl").write_text(json.dumps({"video": "没有.mp4", "messages": turns}), encoding="utf-8")
    code, out, err = run("stats", tmp_path / "v.jsonl", "--format", "messages")
    assert code == 2 and "没有.mp4 was not found" in err and "No row of" in err and not out


def test_stats_of_a_recipe_name_images_that_look_like_held_out_ones(run, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_sft.data.looks.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    files = {"训练": [photo(n) for n in range(4)], "评测": [COPIES["darker"](photo(2)), photo(9)]}
    sources = {}
    for name, pictures in files.items():
        rows = [
            {"image": write(each, tmp_path / name / f"图{n}.png"), "caption": "图"} for n, each in enumerate(pictures)
        ]
        rows.append({"image": "坏.png", "caption": "坏"})
        (tmp_path / name / "坏.png").write_bytes(b"\x89PNG")
        sources[name] = tmp_path / name / "rows.jsonl"
        sources[name].write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    train, held_out = ([{"path": str(path), "format": "caption", "name": name}] for name, path in sources.items())
    recipe = recipe_file(data={"train": train, "eval": held_out})
    code, out, err = run("stats", recipe, "--json")
    found = json.loads(out)["look_alikes"]
    assert code == 0 and found["between"] == [{"train": "训练", "held_out": "评测", "images": 1}]
    assert [(pair["train"]["row"], pair["held_out"]["row"]) for pair in found["pairs"]] == [("训练/3", "评测/1")]
    assert "Not compared by look: 1 held-out image that cannot be read; the first: row 评测/3: the image" in err
    assert "1 (20.0%), 1 (33.3%) held-out images" in run("stats", recipe)[1]
    assert json.loads(run("stats", recipe, "--json", "--look-images", "0")[1])["look_alikes"] is None
    sample = json.loads(run("stats", recipe, "--json", "--look-images", "2")[1])["look_alikes"]
    assert sample["looked_at"] == {"train": 2, "held_out": 2}


def test_wrong_rows_stop_or_are_said(run, tmp_path, photos):
    source, out = tmp_path / "rows.jsonl", tmp_path / "x.jsonl"
    lines = [{"image": photos[0], "caption": "a cat"}, {"image": photos[1], "caption": ""}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    code, _, err = run("convert", source, out, "--to", "messages", "--format", "caption")
    assert code == 2 and 'rows.jsonl, line 2: "caption" is empty' in err and not out.exists()
    arguments = ("convert", source, out, "--to", "messages", "--format", "caption", "--max-rejected", "0.5")
    code, said, err = run(*arguments)
    assert code == 0 and "1 rows" in said and "no answer" in err and out.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("stats", "x.jsonl"), "What does x.jsonl hold? Give --format"),
        (("stats", "x.jsonl", "--format", "captoin"), "--format captoin: Input should be 'messages'"),
        (("stats", "x.jsonl", "--format", "caption", "--column", "caption"), "--column caption must be OURS=THEIRS"),
        (("stats", "quickstart_stage1.yaml", "--format", "vqa"), "is a recipe, which says itself"),
        (("stats", "nowhere.jsonl", "--format", "caption"), "nowhere.jsonl"),
        (("stats", "x.jsonl", "--format", "vqa", "--image-folder", "gone"), "--image-folder gone is no folder"),
        (("filter", "x.jsonl", "y.jsonl", "--model", "m", "--threshold", "1", "--keep", "1"), "give one of them"),
        (("filter", "nowhere.jsonl", "y.jsonl", "--model", "m", "--format", "caption"), "nowhere.jsonl"),
        (("filter", "x.jsonl", "y.jsonl", "--model", "m", "--text", "question"), "--text must be one of answers, all"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_sentence(run, arguments, sentence):
    code, _, err = run(*arguments)
    assert code == 2 and sentence in err and "Traceback" not in err and err.count("error:") == 1


class ByLength:
    """Stands for a model: the longer the text, the better."""

    def __init__(self, path: str) -> None:
        assert path == "some-clip"

    def __call__(self, images, texts):
        return [float(len(text)) for text in texts]


def test_filter_scores_first_and_keeps_what_is_asked_for(run, caption_file, tmp_path, monkeypatch):
    monkeypatch.setattr(scorer, "Scorer", ByLength)
    out = tmp_path / "kept.jsonl"
    arguments = ("filter", caption_file, out, "--model", "some-clip", "--format", "caption")
    code, said, _ = run(*arguments)
    assert code == 0 and "choose by the histogram" in said and not out.exists()
    assert Path(f"{out}.histogram.png").is_file()
    assert run(*arguments, "--threshold", "8")[0] == 0
    answers = [json.loads(line)["messages"][-1]["content"][0]["text"] for line in out.open(encoding="utf-8")]
    assert answers == ["a blue 7", "左上角是红色的3", "two dogs", "three birds"]
    assert "exists already" in run(*arguments, "--keep", "0.5")[2]
    out.unlink()
    code, said, _ = run(*arguments, "--keep", "0.25")
    assert code == 0 and "4 of 8 rows have a score of 8 or more" in said, "three are as good as the second"
