"""`vlm-sft evaluate` on a tiny bundle: what it writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.manifest import Provenance
from vlm_sft.bundle.save import save_bundle
from vlm_sft.cli import main as cli
from vlm_sft.inference import evaluate, scoring
from vlm_sft.inference.evaluate import run, sources_of, train_seconds
from vlm_sft.stack.build_stack import build_stack

KEYS = {"caption_exact_match", "answer_accuracy", "answer_accuracy_blank_image", "answer_accuracy_by_kind",
        "train_seconds"}  # fmt: skip


@pytest.fixture
def questions(tmp_path, photos):
    path = tmp_path / "questions.jsonl"
    rows = [{"image": photos[i % 4], "question": f"what is {i}?", "answer": "一只猫"} for i in range(5)]
    rows.append({"image": photos[0], "question": "1+1?", "answer": "2"})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def bundle(recipe_file, caption_file, questions, tmp_path):
    """An untrained bundle whose recipe has test rows, captions and questions, and no eval rows."""
    caption = {"path": caption_file, "format": "caption"}
    path = recipe_file(
        chat_template="ziya",
        data={"train": [caption], "test": [caption, {"path": questions, "format": "vqa", "name": "animal"}]},
        generation={"max_new_tokens": 4},
    )
    recipe = load_recipe(path)
    stack = build_stack(recipe)
    folder = tmp_path / "bundle"
    save_bundle(folder, stack.model, stack.processor, stack.plan, Provenance(recipe, stack.pieces))
    (folder / "metrics.json").write_text(json.dumps([{"loss": 1.0, "step": 1}, {"train_runtime": 12.34}]))
    return folder


def test_results_are_written_printed_and_put_on_the_card(bundle, capsys):
    results = run(str(bundle), batch_size=3)
    assert results.keys() >= KEYS
    assert json.loads((bundle / "eval.json").read_text(encoding="utf-8")) == results
    assert results["train_seconds"] == 12.3 and results["split"] == "test"
    assert results["questions"] == {"captions": 8, "answers": {"animal": 6}}
    assert 0 <= results["answer_accuracy"] <= 1 and set(results["answer_accuracy_by_kind"]) == {"animal"}
    printed = capsys.readouterr().out
    assert "Exactly right on the test set" in printed and "image blanked" in printed
    assert str(bundle / "eval.json") in printed.replace("\n", "")
    assert "| answers exactly right |" in (bundle / "README.md").read_text(encoding="utf-8")


def test_the_models_answers_are_what_is_compared(bundle, monkeypatch):
    monkeypatch.setattr(scoring, "ask", lambda model, processor, questions, *more: ["一只猫。"] * len(questions))
    results = run(str(bundle))
    assert results["caption_exact_match"] == 0  # the cat's caption is 这是一只猫
    assert results["answer_accuracy"] == results["answer_accuracy_blank_image"] == round(5 / 6, 4)


def test_a_recipe_that_samples_gets_the_same_answers_again(bundle):
    path = bundle / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["generation"] = {"max_new_tokens": 6, "do_sample": True, "temperature": 5.0}
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    first, second = run(str(bundle))["wrong"], run(str(bundle))["wrong"]
    assert first == second and first["answers"]["animal"]


def test_output_elsewhere_leaves_the_bundle_alone(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "ask", lambda model, processor, questions, *more: ["x"] * len(questions))
    run(str(bundle), output=str(tmp_path / "new" / "results.json"))
    assert (tmp_path / "new" / "results.json").is_file()
    assert not (bundle / "eval.json").exists() and not (bundle / "README.md").exists()


def test_another_recipe_names_the_data_and_the_bundle_keeps_its_settings(bundle, recipe_file, questions, monkeypatch):
    seen = {}

    def ask(model, processor, questions, batch_size, options, tick):
        seen.update(options, batch_size=batch_size)
        return ["2"] * len(questions)

    monkeypatch.setattr(scoring, "ask", ask)
    source = {"path": questions, "format": "vqa", "name": "other"}
    other = recipe_file("other", data={"train": [source], "eval": [source]}, generation={"max_new_tokens": 99})
    results = run(str(bundle), split="eval", recipe=str(other), max_rows=4, batch_size=7)
    assert results["questions"] == {"captions": 0, "answers": {"other": 4}} and results["split"] == "eval"
    assert seen == {"max_new_tokens": 4, "batch_size": 7}


def test_the_command_hands_everything_on(bundle, monkeypatch):
    monkeypatch.setattr(scoring, "ask", lambda model, processor, questions, *more: ["x"] * len(questions))
    result = CliRunner().invoke(cli.app, ["evaluate", str(bundle), "--split", "test", "--max-rows", "2"])
    assert result.exit_code == 0, result.output
    assert json.loads((bundle / "eval.json").read_text())["questions"] == {"captions": 2, "answers": {"animal": 2}}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"split": "train"}, "^--split must be test or eval, not 'train'"),
        ({"split": "eval"}, r"recipe\.yaml has no data\.eval; add sources there, or name another recipe with --recipe"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml does not exist"),
        ({"output": "."}, r"--output '\.' is a folder; name a file"),
    ],
)
def test_what_is_refused_before_weights_are_read(bundle, monkeypatch, options, sentence):
    monkeypatch.setattr("vlm_sft.bundle.load.load", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=sentence):
        run(str(bundle), **options)


def test_rows_are_read_before_weights(bundle, questions, monkeypatch):
    monkeypatch.setattr("vlm_sft.bundle.load.load", lambda *args: pytest.fail("weights were read"))
    with open(questions, "a", encoding="utf-8") as stream:
        stream.write('{"image": "x.png", "question": "what is this?", "answer": ""}\n')
    with pytest.raises(UserError, match=r"questions\.jsonl, line 7: .*answer"):
        run(str(bundle))


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(UserError, match=r"is no bundle: it has no bundle\.json"):
        run(str(tmp_path))


def test_seconds_of_training_are_none_where_nobody_wrote_them(tmp_path):
    assert train_seconds(tmp_path) is None
    (tmp_path / "metrics.json").write_text("[]")
    assert train_seconds(tmp_path) is None


def test_sources_of_a_split(recipe_file, caption_file):
    source = {"path": caption_file, "format": "caption"}
    recipe = load_recipe(recipe_file(data={"train": [source], "eval": [{**source, "name": "e"}], "test": [source]}))
    assert [s.name for s in sources_of(recipe, "eval")] == ["e"]
    assert [s.name for s in sources_of(recipe, "test")] == ["captions"]


def test_the_table_leaves_out_what_was_not_measured(capsys):
    results = {
        "split": "test",
        "caption_exact_match": None,
        "answer_accuracy": 0.5,
        "answer_accuracy_blank_image": 0.25,
        "answer_accuracy_by_kind": {"digit": 0.5},
        "questions": {"captions": 0, "answers": {"digit": 1600}},
    }
    evaluate._print(results, Path("outputs/eval.json"))
    lines = capsys.readouterr().out.splitlines()
    assert not any("captions" in line for line in lines)
    assert any(line.split() == ["answers:", "digit", "50.0%", "1,600"] for line in lines)
