"""Which rows of one's own are asked, and by what their answers are measured."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from vlm_sft import load_recipe
from vlm_sft.base.errors import RowError, UserError
from vlm_sft.during.own_rows import OwnRows, draw, read_questions, wanted_metrics
from vlm_sft.inference.confidence import Said
from vlm_sft.metrics.measures import MEASURES, NEEDS_CHOICES, Answered
from vlm_sft.recipe.passed_on import AnswerMetric, answer_scores


@pytest.fixture
def recipe(recipe_file, caption_file):
    def make(*more, **evaluation):
        source = {"path": caption_file, "format": "caption"}
        return load_recipe(recipe_file(data={"train": [source], "eval": [source]}, evaluation=evaluation), more)

    return make


def test_every_metric_that_a_recipe_may_name_is_measured_without_options():
    metrics = get_args(AnswerMetric)
    assert set(metrics) <= set(MEASURES) - NEEDS_CHOICES
    scores = {metric: list(MEASURES[metric]([Answered("one", ["one"] * 4)]).totals)[1:] for metric in metrics}
    assert {f"{metric}_{score}" for metric in metrics for score in scores[metric]} == answer_scores().keys() - set(
        metrics
    )


def test_what_the_best_checkpoint_is_chosen_by_is_measured_too(recipe):
    assert wanted_metrics(recipe("sft.metric_for_best_model=contains", metrics=["gqa"])) == ["gqa", "contains"]
    assert wanted_metrics(recipe("sft.metric_for_best_model=eval_captions_characters_ROUGE-L")) == [
        "captions_characters"
    ]
    assert wanted_metrics(recipe("sft.metric_for_best_model=loss")) == []
    assert OwnRows(recipe(metrics=["captions"])).names[:2] == ["captions", "captions_ROUGE-L"]


def test_answers_are_measured_and_rows_that_cannot_be_asked_count_as_wrong(recipe):
    rows = OwnRows(recipe(metrics=["exact_match", "contains"], max_rows=4))
    asked = []

    class Pupil:
        class processor:  # noqa: N801
            """Renders nothing alike."""

        def answers(self, given, batch_size, settings):
            asked.extend(given)
            return [Said("a red 3"), Said("it is a blue 7, I think"), Said("左上角是红色的3。"), RowError("broken")]

    rows.questions = read_questions(rows_recipe := recipe(), rows_recipe.data.eval, 4)[None]
    assert rows.measure(Pupil()) == {"eval_exact_match": 0.5, "eval_contains": 0.75}
    assert len(asked) == 4


def test_vqa_needs_the_answers_of_several_people(recipe):
    with pytest.raises(UserError, match=r"`vqa` compares an answer with those of ten annotators.*have 1"):
        OwnRows(recipe(metrics=["vqa"]))


def test_the_same_rows_are_drawn_each_time_and_others_by_another_seed(recipe):
    drawn = [each.id for each in draw(recipe(samples=3))]
    assert drawn == [each.id for each in draw(recipe(samples=3))] and len(drawn) == 3
    others = {tuple(each.id for each in draw(recipe(f"sft.seed={seed}", samples=3))) for seed in range(5)}
    assert len(others) > 1
    assert len(draw(recipe(samples=99))) == 8 and draw(recipe(samples=0)) == []


def test_rows_of_another_file_can_be_taken(recipe, tmp_path, photos):
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"image": photos[0], "question": "几只狗?", "answer": "两只"}), encoding="utf-8")
    (one,) = draw(recipe(samples_from={"path": str(file), "format": "vqa"}))
    assert one.references == ["两只"] and "几只狗?" in one.messages[-1]["content"][-1]["text"]
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        draw(recipe(samples_from={"path": str(tmp_path / "gone.jsonl"), "format": "vqa"}))


def test_wrong_rows_are_left_out_where_the_run_leaves_them_out(recipe, tmp_path, photos):
    file = tmp_path / "own.jsonl"
    lines = [
        {"image": photos[0], "question": "q", "answer": "a"},
        {"image": str(tmp_path / "photos" / "gone.png"), "question": "q", "answer": "b"},
        {"image": photos[1], "question": "q"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    asked = {"samples_from": {"path": str(file), "format": "vqa"}}
    assert [each.references for each in draw(recipe("data.max_rejected=0.9", **asked))] == [["a"]]
    with pytest.raises(UserError, match="own"):
        draw(recipe(**asked))
