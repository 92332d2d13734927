"""Questions, their right answers and the shares of right ones, against counting by hand."""

from __future__ import annotations

import json

import pytest

from support.conversations import make_processor, turn
from vlm_sft.base.errors import RowError, UserError
from vlm_sft.evaluation import scoring
from vlm_sft.evaluation.scoring import Question, collect, gather, merge, score
from vlm_sft.recipe.sections import Source
from vlm_sft.rows.messages import box_part


@pytest.fixture(scope="module")
def processor():
    return make_processor("ziya")


@pytest.fixture
def sources(tmp_path, photos):
    """Captions of four photos in two files and two languages, and two kinds of questions, one without images."""

    def write(file, rows, **source):
        path = tmp_path / f"{file}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return Source(path=str(path), **source)

    english, chinese = ["a red 3", "a cat", "two dogs", "a bus"], ["红色的3", "一只猫", "两只狗", "一辆车"]
    captions = [
        write(file, [{"image": p, "caption": c} for p, c in zip(photos, texts, strict=False)], format="caption")
        for file, texts in (("en", english), ("zh", chinese))
    ]
    colours = [{"image": photos[i], "question": "what colour?", "answer": c} for i, c in enumerate(["red", "blue"])]
    sums = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in [("1+1?", "2"), ("1+2?", "3")]
    ]
    return [
        *captions,
        write("colours", colours, format="vqa", name="colour"),
        write("sums", sums, format="messages", name="captions"),  # a name that must not be mixed up with captions
    ]


class Answers:
    """Stands in for the model: answers by the first image's name and the question; blank images are answered `red`."""

    def __init__(self, monkeypatch, known):
        self.asked = []
        self.known = known
        monkeypatch.setattr(scoring, "ask", self)

    def __call__(self, model, processor, questions, batch_size, options, tick, confidence=False):
        self.asked.append(questions)
        tick(len(questions))
        return [self.answer(question) for question in questions]

    def answer(self, question):
        text = "".join(part["text"] or "" for part in question.messages[0]["content"])
        if not question.images:
            return self.known[text]
        image = question.images[0]
        return "red" if not isinstance(image, dict) else self.known[text, image["path"]]


def test_shares_are_those_counted_by_hand(monkeypatch, processor, photos, sources):
    known = {("", photos[0]): "A red ３.", ("", photos[1]): "一只猫", ("", photos[2]): "two cats", ("", photos[3]): ""}
    known |= {("what colour?", photos[0]): "red", ("what colour?", photos[1]): "blue", "1+1?": "2", "1+2?": "12"}
    answers = Answers(monkeypatch, known)
    assert score(None, processor, collect(sources), 32, {}) == {
        "caption_exact_match": 0.5,  # one in English, one in Chinese, of four photos
        "answer_accuracy": 0.75,
        "answer_accuracy_blank_image": 0.5,  # `red` is right once; of the sums, one stays right
        "answer_accuracy_by_kind": {"colour": 1.0, "captions": 0.5},
        "answer_accuracy_blank_image_by_kind": {"colour": 0.5},
        "metrics_by_kind": {},
        "questions": {"captions": 4, "answers": {"colour": 2, "captions": 2}},
        "wrong": {
            "captions": [
                {"id": "en/3", "answer": "two cats", "right": ["two dogs", "两只狗"]},
                {"id": "en/4", "answer": "", "right": ["a bus", "一辆车"]},
            ],
            "answers": {"colour": [], "captions": [{"id": "captions/2", "answer": "12", "right": ["3"]}]},
        },
    }
    captions, colours, blank, sums, nothing = answers.asked
    assert (len(captions), len(colours), len(sums)) == (4, 2, 2)
    assert [len(question.images) for question in blank] == [1], "blanked, the two are one question"
    assert all(image.getextrema() == ((128, 128),) * 3 for question in blank for image in question.images)
    assert nothing == [], "sums have no image to blank, and are not asked twice"


@pytest.mark.parametrize(("options", "asked"), [({}, 2), ({"do_sample": True}, 4), ({"temperature": 0.5}, 4)])
def test_questions_that_differ_in_their_images_alone_are_asked_once_without_them(
    monkeypatch, processor, photos, options, asked
):
    """Two questions, the first of three photos; answers that are drawn are drawn for each."""
    texts = ["这是什么？", "这是什么？", "what is it?", "这是什么？"]
    questions = [
        Question(turn(text, "", images=1)[:1], [{"path": photo, "bytes": None}], ["猫"])
        for text, photo in zip(texts, photos, strict=False)
    ]
    blank, ticks = [], []

    def answer(model, processor, questions, batch_size, options, tick):
        blank.extend(questions)
        tick(len(questions))
        return ["猫" if "什么" in question.messages[0]["content"][-1]["text"] else "dog" for question in questions]

    monkeypatch.setattr(scoring, "ask", answer)
    found = scoring.ask_blindly(None, processor, questions, ["x"] * 4, 8, options, ticks.append)
    assert found == ["猫", "猫", "dog", "猫"]
    assert len(blank) == asked and sum(ticks) == 4


def test_a_question_that_cannot_be_asked_counts_as_wrong_and_is_counted(monkeypatch, processor, photos, sources):
    blind = []

    def answer_each(model, processor, rows, **options):
        blind.extend(row["id"] for row in rows if row["images"] and not isinstance(row["images"][0], dict))
        return [
            RowError(f"row {row['id']}: refused", where=row["id"])
            if any(isinstance(image, dict) and image["path"] == photos[1] for image in row["images"])
            else "red"
            for row in rows
        ]

    monkeypatch.setattr("vlm_sft.inference.generation.answer_each", answer_each)
    results = score(None, processor, collect(sources), 3, {})
    assert results["refused"]["questions"] == 2 and results["refused"]["first"].endswith(": refused")
    assert results["questions"] == {"captions": 4, "answers": {"colour": 2, "captions": 2}}
    assert results["answer_accuracy_by_kind"]["colour"] == 0.5
    assert blind == ["colour/1"], "its blanked image would be another question"


def test_what_was_not_measured_is_none(monkeypatch, processor, sources):
    Answers(monkeypatch, {"1+1?": "2", "1+2?": "3"})
    results = score(None, processor, collect([sources[-1]]), 32, {})
    assert results["answer_accuracy"] == 1 and results["answer_accuracy_blank_image"] is None
    assert results["caption_exact_match"] is None
    monkeypatch.setattr(scoring, "ask", lambda model, processor, questions, *more: ["x"] * len(questions))
    results = score(None, processor, collect(sources[:2]), 32, {})
    assert results["caption_exact_match"] == 0 and results["answer_accuracy"] is None
    assert results["answer_accuracy_by_kind"] == {}


def test_only_the_first_rows_of_each_source(sources):
    counts = {kind: len(questions) for kind, questions in collect(sources, max_rows=1).items()}
    assert counts == {None: 2, "colour": 1, "captions": 1}
    fewer = sources[0].model_copy(update={"max_rows": 2})
    assert len(collect([fewer], max_rows=3)[None]) == 2, "the source's own limit holds too"


def test_rows_that_ask_the_same_of_the_same_image_are_one_question(processor, photos):
    def question(text, answer, photo, data=None):
        return Question(turn(text, "", images=1)[:1], [{"path": photo, "bytes": data}], [answer], answer)

    merged = merge(
        [
            question("what?", "cat", photos[0]),
            question("what?", "猫", photos[0]),
            question("what?", "cat", photos[0]),
            question("what?", "dog", photos[1]),
            question("who?", "Tom", photos[0]),
            question("what?", "bus", None, b"one"),
            question("what?", "car", None, b"another"),
        ],
        processor,
    )
    assert [q.references for q in merged] == [["cat", "猫"], ["dog"], ["Tom"], ["bus"], ["car"]]
    assert merged[0].id == "cat", "the first row's"


def test_earlier_answers_are_part_of_the_question(photos):
    (question,) = gather([{"messages": turn("a?", "b") + turn("c?", "d"), "images": [], "id": "s/1"}])
    assert question.references == ["d"]
    assert [message["role"] for message in question.messages] == ["user", "assistant", "user"]


def test_a_row_without_an_answer_at_its_end_is_named():
    row = {"messages": turn("a?", "b")[:1], "images": [], "id": "s/7"}
    with pytest.raises(UserError, match=r"^row s/7: its last message is no answer to compare with; end it with one"):
        gather([row])


def test_boxes_of_an_answer_are_compared_as_the_model_writes_them(processor, photos):
    cat, box = {"type": "ref", "text": "猫"}, box_part([0.5, 0.5, 1, 1], "unit", 0, "objects.bbox[0]")
    row = {"messages": turn("在哪？", "x", images=1), "images": [{"path": photos[0], "bytes": None}], "id": "s/1"}
    row["messages"][1]["content"] = [cat, box]
    (question,) = merge(gather([row]), processor)
    assert question.references == ["猫[0.500,0.500,1.000,1.000]"]
    row["messages"] = [{"role": "user", "content": [*row["messages"][0]["content"], box]}, turn("", "yes")[1]]
    (question,) = merge(gather([row]), processor)
    assert question.messages[0]["content"][1]["text"] == "在哪？[0.500,0.500,1.000,1.000]"
    assert question.references == ["yes"]
