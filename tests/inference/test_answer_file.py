"""A file of questions: one line each, in order, whatever happens in between."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlm_sft import build_stack, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.batch.processor import VLMProcessor
from vlm_sft.inference import answer_file
from vlm_sft.inference.answer_file import generate
from vlm_sft.inference.settings import ignores_text
from vlm_sft.templates.template import load_template


@pytest.fixture
def tiny(recipe_file):
    torch.manual_seed(0)
    stack = build_stack(load_recipe(recipe_file(chat_template="ziya")))
    return stack.model.eval(), stack.processor


@pytest.fixture
def run(monkeypatch, tiny, tmp_path):
    """Answers rows with the tiny model into `answers.jsonl`; returns its lines."""
    monkeypatch.setattr(
        answer_file, "open_bundle", lambda bundle, options, trust: (*tiny, {"max_new_tokens": 6, **options})
    )

    def answer(source, batch_size=3, output=tmp_path / "answers.jsonl", **more) -> list[dict]:
        generate("bundle", str(source), str(output), batch_size, **more)
        return read(output)

    return answer


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def seven(tmp_path, photos):
    """Seven questions: with one image, two, none, a mark, messages, and numbers or texts as ids."""
    system = {"role": "system", "content": "Be short."}
    talk = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "a cat"},
            {"role": "user", "content": "什么颜色？"}]  # fmt: skip
    rows = [
        {"id": "a", "image": photos[0], "question": "这是什么？"},
        {"id": 7, "images": photos[1:3], "question": "What is the difference between these?"},
        {"question": "hi", "answer": "hello"},
        {"id": "d", "image": photos[3], "question": "Look at <image> and say what it is, please, in many words."},
        {"id": "e", "images": [photos[4]], "messages": talk, "error": "none"},
        {"id": "f", "image": photos[5], "messages": [system, *talk, {"role": "assistant", "content": "red"}]},
        {"id": "g", "image": photos[6], "question": "有几个？"},
    ]
    return write(tmp_path / "问题.jsonl", rows)


def test_every_row_becomes_a_line_in_order_with_its_columns(run, seven, capsys):
    lines = run(seven)
    assert [line["id"] for line in lines] == ["a", 7, 3, "d", "e", "f", "g"]
    assert all(line["answer"] for line in lines) and lines[0]["question"] == "这是什么？"
    assert lines[2]["reference"] == "hello", "the row's own answer"
    assert lines[4]["row_error"] == "none" and lines[4]["messages"][0]["content"] == "<image>What is it?"
    out, err = capsys.readouterr()
    assert out == "" and "7 rows are answered" in err and "7 rows are answered" in err


def test_batched_answers_are_those_of_each_row_alone(run, seven, tmp_path):
    together = run(seven, batch_size=7)
    assert run(seven, batch_size=1, output=tmp_path / "alone.jsonl") == together
    assert len({line["answer"] for line in together}) > 3, "a model that says one thing to everybody proves nothing"
    greedy = run(seven, batch_size=4, output=tmp_path / "short.jsonl", options={"max_new_tokens": 1, "temperature": 0})
    assert all(len(line["answer"]) <= 8 for line in greedy)


def test_other_files_and_folders(run, tmp_path, photos):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "图 片"
    folder.mkdir()
    data = Path(photos[0]).read_bytes()
    (folder / "猫.png").write_bytes(data)
    with open(tmp_path / "q.csv", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["id", "image", "question"], ["1", "猫.png", "这是什么？"], ["2", "", "hi"]])
    with_folder = run(tmp_path / "q.csv", output=tmp_path / "a.jsonl", images=str(folder))
    assert [line["id"] for line in with_folder] == ["1", "2"] and with_folder[0]["image"] == "猫.png"
    beside = run(write(folder / "q.json", [{"image": "猫.png", "question": "这是什么？"}]), output=tmp_path / "b.jsonl")
    image = [{"bytes": data, "path": None}]
    pq.write_table(pa.table({"image": image, "question": ["这是什么？"]}), tmp_path / "q.parquet")
    embedded = run(tmp_path / "q.parquet", output=tmp_path / "c.jsonl")
    assert embedded[0]["answer"] == beside[0]["answer"] == with_folder[0]["answer"]
    assert embedded[0]["image"]["bytes"] == f"<{len(data)} bytes>"
    assert run(tmp_path / "q.parquet", output=tmp_path / "c.jsonl") == embedded, "resumed with bytes in its rows"


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("cut", [0.5, 0.83, "the newline", 1.0])
def test_a_run_that_was_cut_goes_on(run, seven, tmp_path, monkeypatch, cut):
    whole = run(seven)
    target = tmp_path / "answers.jsonl"
    data = target.read_bytes()
    rest = data[:-1] if cut == "the newline" else data[: int(len(data) * cut)]
    target.write_bytes(rest)
    asked = []
    real = answer_file.answer_rows
    monkeypatch.setattr(
        answer_file, "answer_rows", lambda m, p, batch, *rest: asked.extend(batch) or real(m, p, batch, *rest)
    )
    assert run(seven) == whole
    assert target.read_bytes() == data
    assert len(asked) == 7 - rest.count(b"\n") - (cut == "the newline"), "nothing is asked twice"


def test_lines_that_were_removed_are_asked_again_in_their_place(run, seven, tmp_path):
    whole = run(seven)
    write(tmp_path / "answers.jsonl", whole[:2] + whole[4:])
    assert run(seven) == whole


def test_a_batch_that_fails_leaves_the_earlier_ones(run, seven, tmp_path, monkeypatch):
    real, calls = answer_file.answer_each, []

    def answer(model, processor, rows, **options):
        calls.append(rows)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return real(model, processor, rows, **options)

    monkeypatch.setattr(answer_file, "answer_each", answer)
    with pytest.raises(UserError, match="does not hold 3 rows at a time: run again with a smaller --batch-size"):
        run(seven)
    assert len(read(tmp_path / "answers.jsonl")) == 3
    assert len(run(seven)) == 7 and len(calls) == 4


@pytest.mark.parametrize("content", ["notes of mine", '{"id": 1}\n', '{"a": 1, "answer": "x"}\n', "猫\n\n"])
def test_a_foreign_file_is_never_changed(run, seven, tmp_path, content):
    target = tmp_path / "answers.jsonl"
    target.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="line 1 is not an answer of ours: give another file"):
        run(seven)
    assert target.read_text(encoding="utf-8") == content


def test_answers_to_other_questions_are_never_taken(run, seven, tmp_path):
    whole = run(seven)
    target = tmp_path / "answers.jsonl"
    write(target, [*whole, {"id": "z", "answer": "x"}])
    with pytest.raises(UserError, match=r'answers to other questions .*the id "z"'):
        run(seven)
    write(target, [{**whole[0], "question": "那是什么？"}])
    with pytest.raises(UserError, match=r'an answer to "a", but to another version of .*line 1: give another --output'):
        run(seven)
    write(target, [whole[0], whole[0]])
    with pytest.raises(UserError, match='line 2 has the id "a" again'):
        run(seven)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_bad_rows_get_an_error_and_the_others_an_answer(run, tmp_path, photos):
    (tmp_path / "坏.png").write_bytes(b"\x89PNG")
    rows = [
        {"image": photos[0], "question": "这是什么？"},
        {"image": "坏.png", "question": "?"},
        {"image": "nope.png", "question": "?"},
        {"image": photos[0], "question": ""},
        {"image": photos[0]},
        {"question": "<image> and <image>", "image": photos[0]},
        {"question": "很长" * 300},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "robot", "content": "x"}]},
        {"image": photos[0], "question": "这是什么？"},
    ]
    source = write(tmp_path / "q.jsonl", rows)
    target = tmp_path / "answers.jsonl"
    for _ in range(2):  # resumed, it says the same
        with pytest.raises(UserError) as error:
            run(source, batch_size=4)
        assert str(error.value).startswith('7 of 9 rows could not be answered, the first is "2" (')
        assert f"remove their lines from {target} and run again" in str(error.value)
        lines = read(target)
        assert [line["id"] for line in lines] == list(range(1, 10))
        assert lines[0]["answer"] == lines[8]["answer"] and ["error" in line for line in lines[1:8]] == [True] * 7
    wanted = ["truncated or damaged", "was not found", '"question" is empty', "is missing, and so are messages",
              "2 image marks .* but 1 image", "takes 1,8.. tokens", "robot"]  # fmt: skip
    for line, words in zip(lines[1:8], wanted, strict=True):
        with pytest.raises(UserError, match=words):
            raise UserError(line["error"])


class NoLines(VLMProcessor):
    """Raises what image processors raise, for pictures of one pixel's height alone, and before the whole batch."""

    def encode_images(self, images):
        if any(image.height == 1 for image in images):
            raise AssertionError("height must be at least 2")
        return super().encode_images(images)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_picture_that_is_refused_is_the_error_of_its_row_and_the_others_are_answered(
    run, tiny, tmp_path, photos, batch_size
):
    rows = [{"image": photos[n % 8], "question": "这是什么？"} for n in range(7)]
    whole = run(write(tmp_path / "q.jsonl", rows), output=tmp_path / "whole.jsonl")
    Image.new("RGB", (60, 1)).save(tmp_path / "线.png")
    rows[2]["image"] = rows[5]["image"] = "线.png"
    tiny[1].__class__ = NoLines
    source = write(tmp_path / "q.jsonl", rows)
    for _ in range(2):  # resumed, nothing is asked again and it says the same
        with pytest.raises(
            UserError, match=r'^2 of 7 rows could not be answered, the first is "3" \(row 3: an image of'
        ):
            run(source, batch_size)
        lines = read(tmp_path / "answers.jsonl")
        assert [line.get("answer") for n, line in enumerate(lines) if n not in (2, 5)] == [
            line["answer"] for n, line in enumerate(whole) if n not in (2, 5)
        ]
        for number in (2, 5):
            assert lines[number]["error"] == (
                f"row {number + 1}: an image of 60 x 1 pixels is refused by the model's image processor (height must "
                "be at least 2): give it another shape or format, or remove the row."
            )


def test_a_picture_that_the_model_itself_fails_on_is_the_error_of_its_row(run, tiny, tmp_path, photos, monkeypatch):
    Image.new("RGB", (60, 30), "white").save(tmp_path / "white.png")
    model, real = tiny[0].model, tiny[0].model.encode_images

    def encode(pixel_values, **instruction):
        if (pixel_values.amin((1, 2, 3)) > 1.5).any():
            raise RuntimeError("shape mismatch in the table of positions")
        return real(pixel_values, **instruction)

    monkeypatch.setattr(model, "encode_images", encode)
    rows = [{"image": photos[0], "question": "a"}, {"image": "white.png", "question": "b"}, {"question": "c"}]
    with pytest.raises(UserError, match=r'^1 of 3 rows could not be answered, the first is "2"'):
        run(write(tmp_path / "q.jsonl", rows))
    lines = read(tmp_path / "answers.jsonl")
    assert lines[1]["error"].startswith("row 2: an image of 60 x 30 pixels is refused by the model (shape mismatch ")
    assert "answer" in lines[0] and "answer" in lines[2]
    monkeypatch.setattr(model, "encode_images", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(write(tmp_path / "q2.jsonl", rows), output=tmp_path / "other.jsonl")


def test_a_row_that_was_mended_is_answered(run, tmp_path, photos):
    source = write(tmp_path / "q.jsonl", [{"image": "later.png", "question": "?"}, {"question": "hi"}])
    with pytest.raises(UserError):
        run(source)
    (tmp_path / "later.png").write_bytes(Path(photos[0]).read_bytes())
    write(tmp_path / "answers.jsonl", [line for line in read(tmp_path / "answers.jsonl") if "error" not in line])
    assert [("answer" in line, line["id"]) for line in run(source)] == [(True, 1), (True, 2)]


@pytest.mark.parametrize(
    ("rows", "more", "says"),
    [
        ([{"id": 2, "question": "a"}, {"question": "b"}], {}, r'line 2: the id "2" is that of .*line 1 too'),
        ([{"id": [1], "question": "a"}], {}, r"line 1: the id \[1\] is neither text nor a whole number"),
        ([{"question": "a"}], {"images": "nowhere"}, "--images nowhere is no folder"),
        ([{"question": "a"}], {"options": {"max_new_token": 3}}, 'did you mean "max_new_tokens"'),
        ([{"question": "a"}], {"output": "q.jsonl"}, "is the input itself"),
        ([{"question": "a"}], {"output": "."}, "cannot be read"),
        ([{"question": "a"}], {"output": "q.jsonl/x.jsonl"}, "--output .* cannot be"),
    ],
)
def test_what_is_wrong_with_the_command_is_an_error(run, tmp_path, monkeypatch, rows, more, says):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "q.jsonl", rows)
    with pytest.raises(UserError, match=says):
        run("q.jsonl", **more)


def test_a_missing_input_or_bundle_is_named(tmp_path, seven):
    with pytest.raises(UserError, match=r"no\.jsonl was not found"):
        generate("bundle", str(tmp_path / "no.jsonl"), str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match="'nowhere' is no bundle"):
        generate("nowhere", str(seven), str(tmp_path / "a.jsonl"))


def test_a_template_without_words_is_told_once(run, tiny, seven, capsys):
    assert not ignores_text(tiny[1])
    captions = copy.copy(tiny[1])
    captions.chat_template = load_template("plain")
    assert ignores_text(captions)
    tiny[1].chat_template = captions.chat_template
    run(seven)
    assert capsys.readouterr().err.count("what the questions say is ignored") == 1
