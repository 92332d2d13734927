"""COCO captions, VQAv2, GQA and CC-SBU-align as they are published, and documents that are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.source_files import refused, write
from vlm_sft.base.errors import RowError, UserError
from vlm_sft.data.dataset import load_source
from vlm_sft.data.source import source_rows
from vlm_sft.reading.published import PUBLISHED, check_pattern, image_file, read_published
from vlm_sft.recipe.sections import Source

COCO = {
    "info": {"year": 2017},
    "images": [{"id": 391895, "file_name": "000000391895.jpg", "height": 360}, {"id": 2, "file_name": "b.jpg"}],
    "annotations": [
        {"image_id": 391895, "id": 770337, "caption": "A man with a red helmet."},
        {"image_id": 391895, "id": 771687, "caption": "一个男人骑着摩托车。"},
        {"image_id": 2, "id": 1, "caption": "x"},
    ],
}
QUESTIONS = {
    "data_subtype": "train2014",
    "questions": [
        {"image_id": 458752, "question": "What is this photo taken looking through?", "question_id": 458752000}
    ],
}
ANSWERS = [{"answer": "net", "answer_confidence": "yes", "answer_id": i} for i in range(1, 9)]
ANNOTATIONS = {
    "annotations": [
        {
            "question_type": "what is this",
            "multiple_choice_answer": "net",
            "answers": [{"answer": "netting", "answer_id": 9}, *ANSWERS, {"answer": "mesh", "answer_id": 10}],
            "image_id": 458752,
            "question_id": 458752000,
        }
    ]
}
GQA = {
    "07333408": {
        "imageId": "2375429",
        "question": "What is on the white wall?",
        "answer": "pipe",
        "fullAnswer": "The pipe is on the wall.",
        "isBalanced": True,
    }
}
CC_SBU = {"annotations": [{"image_id": "2", "caption": "The image shows a man fishing."}]}


def document(path: Path, value) -> str:
    return write(path, json.dumps(value, ensure_ascii=False))


def turns(row: dict) -> list[str]:
    return ["".join(part["text"] or "<image>" for part in message["content"]) for message in row["messages"]]


def test_coco(tmp_path):
    source = Source(path=document(tmp_path / "captions_val2017.json", COCO), format="coco", max_rows=2)
    rows = load_source(source)
    assert rows["id"][:] == ["captions_val2017/770337", "captions_val2017/771687"]
    assert [image["path"] for images in rows["images"] for image in images] == [f"{tmp_path}/000000391895.jpg"] * 2
    assert turns(rows[1]) == ["<image>", "一个男人骑着摩托车。"]
    named = source.model_copy(update={"image_name": "COCO_val2014_{id:012}.jpg"})
    assert load_source(named)[0]["images"][0]["path"] == f"{tmp_path}/COCO_val2014_000000391895.jpg"


def test_vqav2_joins_questions_and_their_ten_answers(tmp_path):
    source = Source(
        path=document(tmp_path / "questions.json", QUESTIONS),
        annotations=document(tmp_path / "annotations.json", ANNOTATIONS),
        format="vqav2",
        prompts=["{question}\nAnswer with one word."],
    )
    (row,) = load_source(source)
    assert turns(row) == ["<image>What is this photo taken looking through?\nAnswer with one word.", "net"]
    assert row["images"][0]["path"] == f"{tmp_path}/COCO_train2014_000000458752.jpg"
    assert row["id"] == "questions/458752000"


def test_gqa_short_or_full_answers(tmp_path):
    source = Source(path=document(tmp_path / "train_balanced_questions.json", GQA), format="gqa", images=str(tmp_path))
    (row,) = load_source(source)
    assert turns(row) == ["<image>What is on the white wall?", "pipe"]
    assert (row["images"][0]["path"], row["id"]) == (f"{tmp_path}/2375429.jpg", "train_balanced_questions/07333408")
    full = source.model_copy(update={"columns": {"answer": "fullAnswer"}})
    assert turns(load_source(full)[0])[1] == "The pipe is on the wall."


def test_cc_sbu_align(tmp_path):
    (row,) = load_source(Source(path=document(tmp_path / "filter_cap.json", CC_SBU), format="cc_sbu_align"))
    assert row["images"][0]["path"] == f"{tmp_path}/image/2.jpg"
    assert turns(row) == ["<image>", "The image shows a man fishing."]


def test_documents_of_a_pattern_follow_each_other(tmp_path):
    for number in (1, 0):
        document(tmp_path / f"train_all_questions_{number}.json", {f"q{number}": GQA["07333408"]})
    source = Source(path=str(tmp_path / "train_all_questions_*.json"), name="gqa", format="gqa")
    assert load_source(source)["id"][:] == ["gqa/q0", "gqa/q1"]


@pytest.mark.parametrize(
    ("format_name", "value", "message"),
    [
        ("coco", {"images": []}, 'there is no list "annotations" (it holds "images"): name the file of COCO captions'),
        ("coco", [], 'there is no list "images" (it holds a list): name the file of COCO'),
        ("coco", {"images": [], "annotations": []}, "holds no rows"),
        (
            "coco",
            {"images": [], "annotations": [{"image_id": 1}]},
            'annotations 1: the image_id 1 is not among "images"',
        ),
        ("coco", {"images": [3], "annotations": [{"image_id": [1]}]}, "annotations 1: the image id is a list"),
        ("coco", {"images": [], "annotations": ["x"]}, "annotations 1: the entry is text, not an object"),
        ("coco", {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "x"}]}, '"image" is null'),
        ("gqa", [], "the top level is a list, not an object of question ids"),
        ("gqa", {"1": "x"}, "question 1: the entry is text, not an object"),
        ("gqa", {"1": {"question": "q"}}, "question 1: the image id is null"),
        ("gqa", {"1": {"imageId": "1", "question": "q"}}, 'question 1: the key "answer" is missing'),
        ("cc_sbu_align", {"annotations": [{"image_id": "1"}]}, 'annotations 1: the key "caption" is missing'),
    ],
)
def test_documents_refused(tmp_path, format_name, value, message):
    assert message in refused(Source(path=document(tmp_path / "a.json", value), format=format_name))


def test_vqav2_refused(tmp_path):
    path = document(tmp_path / "q.json", QUESTIONS)
    source = Source(path=path, format="vqav2")
    assert "format vqav2 has no `annotations`, which hold its answers: name their file" in refused(source)
    source = source.model_copy(update={"annotations": path})
    assert 'q.json: there is no list "annotations"' in refused(source)
    empty = source.model_copy(update={"annotations": document(tmp_path / "a.json", {"annotations": []})})
    assert "questions 1: the question_id 458752000 is not among the annotations" in refused(empty)
    document(tmp_path / "q.json", {"questions": QUESTIONS["questions"]})
    assert 'it has no "data_subtype", which names the images: set the source\'s `image_name`' in refused(empty)
    assert "has annotations: remove them" in refused(Source(path=path, format="vqa", annotations=path))
    assert "was not found" in refused(source.model_copy(update={"annotations": str(tmp_path / "none.json")}))


def test_one_wrong_entry_leaves_the_others(tmp_path):
    value = {"annotations": [{"image_id": 1.5, "caption": "x"}, 3, {"image_id": 1, "caption": "x"}]}
    rejected: list[RowError] = []
    source = Source(path=document(tmp_path / "a.json", value), format="cc_sbu_align")
    assert [row["id"] for row in source_rows(source, reject=rejected.append)] == ["a/1"]
    assert [error.reason for error in rejected] == ["wrong type", "wrong type"]


def test_image_names():
    assert image_file("COCO_train2014_{id:012}.jpg", 9, "") == "COCO_train2014_000000000009.jpg"
    assert image_file("{id:06d}/{id}.png", "12", "") == "000012/12.png"
    for pattern in ("x.jpg", "{image_id}.jpg", "{id.__class__}", "{id:999999999}"):
        with pytest.raises(UserError, match=r'The source "s" has image_name: .*: write {id} where'):
            check_pattern(pattern, "s")
    assert "its rows name their images: remove it" in refused(Source(path="x", format="vqa", image_name="{id}.jpg"))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["1", 1]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from("images annotations questions id image_id question_id file_name imageId caption".split()),
            inner,
        )
    ),
    max_leaves=15,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(PUBLISHED)), ANY, ANY)
def test_any_document_is_rows_or_a_sentence(tmp_path_factory, format_name, value, answers):
    folder = tmp_path_factory.getbasetemp()
    path, other = Path(document(folder / "fuzz.json", value)), Path(document(folder / "other.json", answers))
    try:
        rows, message = list(read_published(format_name, [path], None, [other])), ""
    except UserError as error:
        rows, message = [], str(error)
    assert "\n" not in message
    assert all(isinstance(row, dict | RowError) for _, _, row in rows)
