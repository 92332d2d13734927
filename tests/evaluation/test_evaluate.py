"""`vlm-sft evaluate` on a tiny bundle: what it writes, prints and refuses."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from support.paths import GOLDENS
from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.manifest import Provenance
from vlm_sft.bundle.save import save_bundle
from vlm_sft.cli import main as cli
from vlm_sft.evaluation import evaluate, scoring
from vlm_sft.evaluation.evaluate import run, sources_of, train_seconds
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


def test_questions_that_cannot_be_asked_are_counted_and_end_the_command_once_all_is_written(bundle, questions, command):
    rows = [json.loads(line) for line in Path(questions).read_text(encoding="utf-8").splitlines()]
    rows[1]["image"] = str(bundle / "broken.png")
    (bundle / "broken.png").write_bytes(b"\x89PNG no more")
    Path(questions).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = command("evaluate", bundle, "--batch-size", 4)
    assert said.startswith("error: 1 of 14 questions could not be asked and count as wrong; the first: row animal/2: ")
    results = json.loads((bundle / "eval.json").read_text(encoding="utf-8"))
    assert results["refused"]["questions"] == 1 and "truncated or damaged" in results["refused"]["first"]
    assert results["questions"] == {"captions": 8, "answers": {"animal": 6}}


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

    def ask(model, processor, questions, batch_size, options, tick, confidence=False):
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


def test_every_answer_is_written_and_shown(bundle, photos, capsys):
    run(str(bundle), batch_size=3)
    lines = (bundle / "evaluation" / "data.test.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 14 and len({record["id"] for record in records}) == 14
    captions, animals = records[:8], records[8:]
    assert {record["kind"] for record in captions} == {"captions"} and captions[0]["answer_blank"] is None
    assert animals[0]["images"] == [photos[0]] and animals[0]["question"] == "what is 0?"
    assert animals[0]["answers"] == ["一只猫"] and isinstance(animals[0]["answer_blank"], str)
    for record in records:
        assert "".join(piece for piece, _ in record["confidence"]) == record["answer"]
    page = (bundle / "evaluation" / "evaluation.html").read_text(encoding="utf-8")
    assert page.count("<article") == 14 and "data:image/jpeg;base64," in page and "一只猫" in page
    assert "Where it is wrong: " in capsys.readouterr().out


def test_two_bundles_are_compared_on_the_page(bundle, monkeypatch, tmp_path, command):
    first = tmp_path / "first.json"
    monkeypatch.setattr(scoring, "ask", lambda model, processor, questions, *more: ["x"] * len(questions))
    run(str(bundle), output=str(first))
    monkeypatch.setattr(scoring, "ask", lambda model, processor, questions, *more: ["一只猫"] * len(questions))
    run(str(bundle), against=str(tmp_path / "first.jsonl"))
    page = (bundle / "evaluation" / "evaluation.html").read_text(encoding="utf-8")
    assert "5 better" in page.replace(' <span lang="zh">', " ") or ">5 better" in page
    assert page.count("got better 变好") == 1 + 5 and "p = 0.062" in page and "McNemar, exact" in page
    with pytest.raises(UserError, match=r"has no answers to data.test: run `vlm-sft evaluate \S+` first"):
        run(str(bundle), against=str(tmp_path))


def test_a_bundle_that_was_never_asked_is_asked_the_same(bundle, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    before = {path.name: path.stat().st_mtime_ns for path in other.iterdir()}
    run(str(bundle), max_rows=2, against=str(other))
    page = (bundle / "evaluation" / "evaluation.html").read_text(encoding="utf-8")
    assert str(other) in page and "p = 1.000" in page and "got better 变好</span>" not in page
    assert {path.name: path.stat().st_mtime_ns for path in other.iterdir()} == before


def test_results_elsewhere_have_their_answers_and_page_beside_them(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "ask", lambda model, processor, questions, *more: ["x"] * len(questions))
    run(str(bundle), output=str(tmp_path / "new.json"))
    assert (tmp_path / "new.jsonl").is_file() and (tmp_path / "new.html").is_file()
    assert not (bundle / "evaluation").exists()


def cases_of(name):
    """Upstream cases that a row can have: its answer is not empty."""
    cases = json.loads((GOLDENS / "metrics" / f"{name}.json").read_text(encoding="utf-8"))
    cases = cases["cases"] if isinstance(cases, dict) else cases
    return [case for case in cases if "".join(case.get("human_answers") or case["answer"]).strip()]


@pytest.fixture
def benchmarks(recipe_file, caption_file, photos, tmp_path):
    """A recipe whose test rows are the upstream cases of VQAv2 and GQA as those are published, and what is answered."""
    vqa, gqa = cases_of("vqa_accuracy"), cases_of("gqa_exact_match")
    asked = [{"question_id": i, "image_id": i % 2, "question": f"问题 {i % 3}?"} for i in range(len(vqa))]
    given = [
        {
            "question_id": i,
            "answers": [{"answer": text, "answer_id": n} for n, text in enumerate(case["human_answers"])],
        }
        for i, case in enumerate(vqa)
    ]
    files = {
        "questions.json": {"questions": asked},
        "annotations.json": {"annotations": given},
        "gqa.json": {f"g{i}": {"imageId": 1, "question": "what?", "answer": c["answer"]} for i, c in enumerate(gqa)},
    }
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(Path(photos[number]).read_bytes())
    for name, document in files.items():
        (tmp_path / name).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    source = {"images": str(tmp_path), "image_name": "{id}.png"}
    test = [
        {"path": str(tmp_path / "questions.json"), "annotations": str(tmp_path / "annotations.json"),
         "format": "vqav2", "name": "vqa", **source},
        {"path": str(tmp_path / "gqa.json"), "format": "gqa", **source},
    ]  # fmt: skip
    recipe = recipe_file("benchmarks", data={"train": [{"path": caption_file, "format": "caption"}], "test": test})
    answers = {f"vqa/{i}": case["answer"] for i, case in enumerate(vqa)}
    return recipe, answers | {f"gqa/g{i}": case["prediction"] for i, case in enumerate(gqa)}


def test_vqav2_and_gqa_are_measured_as_their_authors_do(bundle, benchmarks, monkeypatch):
    recipe, answers = benchmarks
    counts = []

    def ask(model, processor, asked, *more):
        counts.append(len(asked))
        return [answers[question.id] for question in asked]

    monkeypatch.setattr(scoring, "ask", ask)
    result = CliRunner().invoke(cli.app, ["evaluate", str(bundle), "--recipe", str(recipe)])
    assert result.exit_code == 0, result.output
    found = json.loads((bundle / "eval.json").read_text(encoding="utf-8"))
    scores = [case["accuracy"] / 100 for case in cases_of("vqa_accuracy")]
    right = [case["exact_match"] for case in cases_of("gqa_exact_match")]
    vqa, gqa = (sum(shares) / len(shares) for shares in (scores, right))
    near = partial(pytest.approx, abs=1e-4)
    assert found["answer_accuracy_by_kind"] == {"vqa": near(vqa), "gqa": near(gqa)}
    assert found["metrics_by_kind"]["gqa"] == {"GQA_exact_match": near(gqa)}
    both = found["metrics_by_kind"]["vqa"]
    assert both["VQA_accuracy"] == near(vqa) and both["VQA_accuracy_EvalAI"] > both["VQA_accuracy"]
    assert found["questions"]["answers"] == {"vqa": len(scores), "gqa": len(right)}, "alike questions are not merged"
    assert counts == [len(scores), 3, len(right), 1], "without images, three and one that differ"
    assert set(found["answer_accuracy_blank_image_by_kind"]) == {"vqa", "gqa"}
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "Right on the test set" in lines and f"answers: vqa, VQA accuracy {vqa:.1%} {len(scores)}" in lines
    card = (bundle / "README.md").read_text(encoding="utf-8")
    assert f"| answers: gqa, GQA exact match | {gqa:.1%} |" in card and "| answers right |" in card


def test_vqa_accuracy_is_not_made_up_from_one_answer(bundle, benchmarks, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_sft.bundle.load.load", lambda *args: pytest.fail("weights were read"))
    path = tmp_path / "annotations.json"
    entries = json.loads(path.read_text(encoding="utf-8"))["annotations"]
    entries[3]["answers"] = entries[3]["answers"][:2]
    path.write_text(json.dumps({"annotations": entries}), encoding="utf-8")
    with pytest.raises(UserError, match=r"row vqa/3: VQA accuracy compares .* those of ten annotators, and here are 2"):
        run(str(bundle), recipe=str(benchmarks[0]))


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
        "metrics_by_kind": {},
        "questions": {"captions": 0, "answers": {"digit": 1600}},
    }
    evaluate._print(results, Path("outputs/eval.json"))
    lines = capsys.readouterr().out.splitlines()
    assert not any("captions" in line for line in lines)
    assert any(line.split() == ["answers:", "digit", "50.0%", "1,600"] for line in lines)
