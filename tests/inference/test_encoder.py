"""The commands on an encoder: lines at the terminal, lines in a file, a picture; and what is wrong in one sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from support.mplug import model, save_words
from support.vle import ANSWERS, save_vle
from vlm_sft.base.errors import UserError
from vlm_sft.cli.main import app


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model `vle`, one without heads, pictures and a file of questions."""
    root = tmp_path_factory.mktemp("asked")
    save_vle(root / "vle", "vqa_classifier", "itm_score", "pbc_classifier")
    save_vle(root / "bare")
    for number in range(3):
        Image.effect_noise((50, 40), 60 + number).convert("RGB").save(root / f"{number}.png")
    (root / "blank.txt").write_text("\n \n")
    (root / "numbers.json").write_text("[1, 2]")
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    rows = [{"id": f"q{n}", "image": f"{n % 3}.png", "question": text, "answer": "right"}
            for n, text in enumerate(["how many dogs", "两只猫 在哪", "red or a dog", "what", "is it"])]  # fmt: skip
    rows += [{"image": "broken.png", "question": "what"}, {"image": ["0.png", "1.png"], "question": "what"},
             {"image": "0.png", "question": " "}, {"image": "0.png", "question": "dogs " * 99}]  # fmt: skip
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (root / "questions.jsonl").write_text(text, encoding="utf-8")
    return root


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_answers_stand_a_line_each(place):
    lines = run("answer", place / "vle", "how many dogs", "--image", place / "0.png", "--top", 4).splitlines()
    shares, answers = zip(*(line.split("\t") for line in lines), strict=True)
    assert len(lines) == 4 and set(answers) <= set(ANSWERS)
    assert sorted(map(float, shares), reverse=True) == list(map(float, shares))


def test_a_file_is_answered_row_by_row_and_goes_on(place, tmp_path):
    out = tmp_path / "answers.jsonl"
    command = ("answer", place / "vle", "--questions", place / "questions.jsonl", "-o", out, "--top", 2)
    with pytest.raises(UserError, match=r"4 of 9 rows could not be answered"):
        run(*command, "--batch-size", 4)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["q0", "q1", "q2", "q3", "q4", 6, 7, 8, 9]
    for line in lines[:5]:
        assert (
            line["answer"] == line["top_answers"][0][0]
            and len(line["top_answers"]) == 2
            and line["reference"] == "right"
        )
    for line, says in zip(lines[5:], ["broken.png", "one question about one image", "empty", "at most"], strict=True):
        assert says in line["error"] and "answer" not in line
    out.write_text("\n".join(out.read_text(encoding="utf-8").splitlines()[:3]), encoding="utf-8")
    with pytest.raises(UserError, match=r"4 of 9 rows"):
        run(*command, "--batch-size", 1)
    again = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line.get("answer") for line in again] == [line.get("answer") for line in lines]
    one = run("answer", place / "vle", "how many dogs", "--image", place / "0.png", "--top", 1)
    assert one.strip().split("\t")[1] == lines[0]["answer"]


def test_texts_are_matched_and_drawn(place, tmp_path):
    lines = run("match", place / "vle", "two dogs", "一只猫", "--image", place / "1.png").splitlines()
    assert [line.split("\t")[1] for line in lines] == ["two dogs", "一只猫"]
    assert all(0 <= float(line.split("\t")[0]) <= 1 for line in lines)
    out = tmp_path / "found.png"
    assert "brightest in row" in run("match", place / "vle", "two dogs", "--image", place / "1.png", "--draw", out)
    with Image.open(out) as drawn, Image.open(place / "1.png") as picture:
        assert drawn.size == picture.size and np.asarray(drawn).mean() < np.asarray(picture).mean()


def test_an_mplug_writes_its_answers_or_chooses_them(place, tmp_path):
    model("large").save_pretrained(tmp_path / "mplug")
    save_words(tmp_path / "mplug")
    asked = ("answer", tmp_path / "mplug", "a red dog ?", "--image", place / "0.png", "--top", 2)
    assert len(run(*asked).splitlines()) == 2
    (tmp_path / "lines.txt").write_text("dog\n\n猫\na dog\ndog\n", encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(["dog", "猫", "a dog"]), encoding="utf-8")
    found = [run(*asked, "--candidates", tmp_path / name) for name in ("lines.txt", "list.json")]
    assert found[0] == found[1] and {line.split("\t")[1] for line in found[0].splitlines()} <= {"dog", "猫", "a dog"}
    out = tmp_path / "answers.jsonl"
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "a red dog ?", "image": str(place / "0.png")}))
    run(
        "answer",
        tmp_path / "mplug",
        "--questions",
        tmp_path / "q.jsonl",
        "-o",
        out,
        "--candidates",
        tmp_path / "list.json",
        "--image-folder",
        place,
    )
    assert json.loads(out.read_text(encoding="utf-8"))["answer"] == found[0].splitlines()[0].split("\t")[1]


@pytest.mark.parametrize(("arguments", "says"), [
    (("answer", "vle", "what"), "Give a question with --image"),
    (("answer", "vle", "what", "--image", "0.png", "--questions", "questions.jsonl"), "Give a question with"),
    (("answer", "vle", " ", "--image", "0.png"), "question is empty"),
    (("answer", "vle", "what", "--image", "no.png"), "no.png"),
    (("answer", "vle", "what", "--image", "broken.png"), "broken.png"),
    (("answer", "nowhere", "what", "--image", "0.png"), "MODEL"),
    (("answer", "bare", "what", "--image", "0.png"), "an encoder alone"),
    (("answer", "0.png", "what", "--image", "0.png"), "MODEL"),
    (("answer", "vle", "what", "--image", "0.png", "--candidates", "no.txt"), "--candidates no.txt cannot be read"),
    (("answer", "vle", "what", "--image", "0.png", "--candidates", "blank.txt"), "holds no answers"),
    (("answer", "vle", "what", "--image", "0.png", "--candidates", "numbers.json"), "an answer is no text"),
    (("answer", "vle", "what", "--image", "0.png", "--candidates", "broken.png"), "broken.png cannot be read"),
    (("match", "vle", "a", "", "--image", "0.png"), "a text is empty"),
    (("match", "vle", "a", "b", "--image", "0.png", "--draw", "x.png"), "one text"),
    (("match", "vle", "a", "--image", "0.png", "--draw", "x.jpg"), "let the name end with .png"),
    (("match", "vle", "a", "--image", "0.png", "--draw", "no/where/0.png/x.png"), "cannot be written"),
])  # fmt: skip
def test_what_is_wrong_is_one_sentence(place, monkeypatch, arguments, says):
    monkeypatch.chdir(place)
    (place / "no").mkdir(exist_ok=True)
    (place / "no" / "where").write_text("a file")
    with pytest.raises(UserError, match=says) as raised:
        run(*arguments)
    assert "\n" not in str(raised.value)
