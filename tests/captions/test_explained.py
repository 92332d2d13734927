"""VQA + LLM: what the encoder and the captioner see becomes one prompt, and the language model's answer the row's."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from support.chat_server import ChatServerDouble
from support.vle import save_vle
from vlm_sft.base.errors import UserError
from vlm_sft.captions.explained import letter_of, options_in, prompt_of
from vlm_sft.cli.main import app
from vlm_sft.encoders.encoder import ReadsQuestions
from vlm_sft.inference.encoder import answer_with

ANSWERS = [["two", 0.62], ["dogs", 0.3]]


@pytest.fixture(scope="module")
def vle(tmp_path_factory):
    return str(save_vle(tmp_path_factory.mktemp("vle") / "vle", "vqa_classifier"))


class Says(ReadsQuestions):
    """Stands for a captioner: says how wide a picture is, and counts how often it was asked."""

    prompts = {"en": "describe", "zh": "描述"}

    def __init__(self) -> None:
        self.reader, self.asked = self, []

    def image_inputs(self, images, instructions=()):
        return {}

    def captions(self, rows, prompt, count):
        self.asked.append(prompt)
        yield [f"{prompt} {row.images[0].width} wide" for row in rows]


@pytest.fixture
def captioner(monkeypatch):
    model = Says()
    monkeypatch.setattr("vlm_sft.captions.explained.load_captioner", lambda path, options: model)
    return model


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with two pictures, a broken one and a file of questions, in which commands run."""
    for number in range(2):
        Image.effect_noise((50 + number, 40), 60 + number).convert("RGB").save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(place, *rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (place / "questions.jsonl").write_text(text, encoding="utf-8")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(*arguments):
    result = CliRunner().invoke(app, ["answer", *map(str, arguments)])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_the_prompt_has_everything_in_both_languages():
    english = prompt_of("two dogs", "How many?", ANSWERS, {}, "sentence", "en")
    assert english.splitlines()[:3] == [
        "A picture shows: two dogs",
        "Question about the picture: How many?",
        "A model that sees the picture gives these answers, each with its confidence: two (62.0%), dogs (30.0%).",
    ]
    assert english.endswith("Answer the question in one sentence.")
    chinese = prompt_of("两只狗", "有几只？", ANSWERS, {"A": "一只", "B": "两只"}, "letter", "zh")
    assert "选项：A. 一只；B. 两只。\n" in chinese and chinese.endswith("请只回答正确选项的字母。")
    own = prompt_of("a", "Which? A. one B. two", ANSWERS, options_in("Which? A. one B. two"), "letter", "en")
    assert own.count("A. one") == 1, "options in the question are not said twice"
    assert "{x}" in prompt_of("{x}", "{answers}?", ANSWERS, {}, "sentence", "en"), "rows fill no names"


@pytest.mark.parametrize(("question", "found"), [
    ("Which? A. one B. two", {"A": "one", "B": "two"}),
    ("哪个？\nA、一只\nB、两只\nC、三只", {"A": "一只", "B": "两只", "C": "三只"}),
    ("Which?\n(A) a cat\n(B) a dog", {"A": "a cat", "B": "a dog"}),
    ("Is A. the first?", {}),
    ("Which? B. two C. three", {}),
    ("What is this?", {}),
])  # fmt: skip
def test_options_of_a_question_are_found(question, found):
    assert {letter: text.strip("(（ ") for letter, text in options_in(question).items()} == found


@pytest.mark.parametrize(("said", "letter"), [
    ("B", "B"), ("B.", "B"), ("The answer is B", "B"), ("(A)", "A"), ("two dogs", "B"), ("答案是B。", "B"),
    ("选A", "A"), ("A or B", None), ("A还是B都可以", None), ("no idea", None), ("C", None), ("", None),
])  # fmt: skip
def test_a_letter_is_named_or_nothing_is_guessed(said, letter):
    assert letter_of(said, {"A": "a cat", "B": "two dogs"}) == letter


def test_one_question_is_answered_in_a_sentence(vle, captioner, place):
    seen = answer_with(vle, "how many dogs", "0.png", 2).line["top_answers"]
    with ChatServerDouble(lambda prompt: "There are two dogs.\nYes.") as server:
        result = run(vle, "how many dogs", "--image", "0.png", "--top", 2, "--captioner", "c", "--llm", server.url,
                     "--llm-model", "m")  # fmt: skip
        (asked,) = server.asked
    assert result.stdout == "There are two dogs. Yes.\n"
    shares = ", ".join(f"{answer} ({share:.1%})" for answer, share in seen)
    assert f"confidence: {shares}." in asked["messages"][0]["content"]
    assert "A picture shows: describe 50 wide" in asked["messages"][0]["content"]
    assert "describe 50 wide" in result.stderr and all(answer in result.stderr for answer, _ in seen)
    assert asked["max_tokens"] == 256 and asked["temperature"] == 0


def test_a_file_is_answered_and_goes_on_without_paying_twice(vle, captioner, place):
    write(place, {"id": "a", "image": "0.png", "question": "how many dogs", "answer": "two", "picture_caption": "x"},
          {"id": "b", "image": "0.png", "question": "有几只狗"},
          {"id": "e", "image": "0.png", "question": "red"}, {"id": "c", "image": "broken.png", "question": "what"},
          {"id": "d", "image": "1.png", "question": "what"})  # fmt: skip
    out = place / "out.jsonl"
    with ChatServerDouble(lambda prompt: "两只。" if "问题" in prompt else "Two.") as server:
        command = (vle, "--questions", "questions.jsonl", "-o", out, "--captioner", "c", "--llm", server.url,
                   "--llm-model", "m", "--batch-size", 4)  # fmt: skip
        with pytest.raises(UserError, match=r"1 of 5 rows could not be answered, the first is \"c\""):
            run(*command)
        found = lines(out)
        assert [line.get("answer") for line in found] == ["Two.", "两只。", "Two.", None, "Two."]
        assert found[0]["picture_caption"] == "describe 50 wide" and found[0]["reference_picture_caption"] == "x"
        assert found[0]["reference"] == "two" and len(found[0]["top_answers"]) == 5
        # A picture of several questions is described once in each language.
        assert captioner.asked == ["describe", "描述", "describe"]
        # A kill lost the last lines; their replies are kept, and are not asked for again.
        out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found[:1]), encoding="utf-8")
        with pytest.raises(UserError, match="1 of 5 rows"):
            run(*command)
        assert lines(out) == found and len(server.asked) == 4


def test_a_letter_is_answered_and_what_names_none_is_an_error(vle, captioner, place):
    write(place, {"image": "0.png", "question": "how many", "options": ["one", "two"]},
          {"image": "0.png", "question": "哪个？ A. 狗 B. 猫"}, {"image": "0.png", "question": "red or"},
          {"image": "1.png", "question": "how many dogs", "options": {"A": "one", "B": "two"}},
          {"image": "1.png", "question": "what", "options": "one"})  # fmt: skip
    out = place / "out.jsonl"

    def says(prompt):
        return "I cannot say." if "how many dogs" in prompt else "答案是B。" if "哪个" in prompt else "B. two"

    with ChatServerDouble(says) as server, pytest.raises(UserError, match="3 of 5 rows could not be answered"):
        run(vle, "--questions", "questions.jsonl", "-o", out, "--captioner", "c", "--llm", server.url, "--llm-model",
            "m", "--reply", "letter")  # fmt: skip
    found = lines(out)
    assert [line.get("answer") for line in found] == ["B", "B", None, None, None]
    assert "a letter is wanted, and there are no options" in found[2]["error"] and "line 3" in found[2]["error"]
    assert "names none of the letters A, B: 'I cannot say.'" in found[3]["error"]
    assert "there are no options" in found[4]["error"]
    prompts = [each["messages"][0]["content"] for each in server.asked]
    assert any("Options: A. one; B. two." in prompt for prompt in prompts)
    assert sum("选项：" in prompt for prompt in prompts) == 0


def test_a_language_model_of_this_machine_answers_and_a_real_captioner_sees(vle, blip, pieces, place):
    write(place, {"image": "0.png", "question": "how many dogs"}, {"image": "1.png", "question": "two"})
    out = place / "out.jsonl"
    run(vle, "--questions", "questions.jsonl", "-o", out, "--captioner", blip["captioner"], "--llm", pieces["llama"],
        "--llm-set", "max_new_tokens=8", "--top", 1)  # fmt: skip
    found = lines(out)
    assert all(isinstance(line["answer"], str) and line["picture_caption"] for line in found)
    before = out.read_bytes()
    run(vle, "--questions", "questions.jsonl", "-o", out, "--captioner", "gone", "--llm", "gone", "--top", 1)
    assert out.read_bytes() == before, "a file that is answered needs no model"


@pytest.mark.parametrize(("more", "says"), [
    (("--captioner", "c"), "--captioner belongs to --llm"),
    (("--reply", "letter"), "--reply belongs to --llm"),
    (("--llm", "http://localhost:1/v1"), "--llm sees no picture: .*--captioner"),
    (("--llm", "http://localhost:1/v1", "--captioner", "c"), "name the model there too, with --llm-model"),
    (("--llm", "llama", "--captioner", "c", "--llm-model", "m"), "--llm-model belongs to a server"),
    (("--llm", "llama", "--captioner", "c", "--llm-key", "K"), "--llm-key belongs to a server"),
    (("--llm", "http://localhost:1/v1", "--captioner", "c", "--llm-model", "m", "--reply", "word"), "--reply must be"),
    (("--llm", "http://localhost:1/v1", "--captioner", "c", "--llm-model", "m", "--language", "de"), "--language must"),
    (("--llm", "http://localhost:1/v1", "--captioner", "c", "--llm-model", "m", "--llm-key", "NONE_SUCH"), "--llm-key"),
    (("--llm", "http://localhost:1/v1", "--captioner", "c", "--llm-model", "m", "--llm-set", "n=2"), "not yours"),
    (("--llm", "nowhere", "--captioner", "c"), "--llm"),
])  # fmt: skip
def test_what_is_wrong_is_one_sentence(vle, captioner, place, more, says):
    with pytest.raises(UserError, match=says) as refused:
        run(vle, "what", "--image", "0.png", *more)
    assert "\n" not in str(refused.value)
