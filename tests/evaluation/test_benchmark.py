"""`vlm-sft evaluate --benchmark` on a tiny bundle: every benchmark that ships, what is written, resumed and refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from support.benchmark_files import lines, own_task
from support.benchmarks import PUBLISHED
from support.chat_server import ChatServerDouble
from support.paths import ROOT, accelerate_config
from support.pictures import photo, saved_as_jpeg, write
from support.tiny_pieces import tiny_recipe
from vlm_sft import load_recipe
from vlm_sft.base.assets import list_tasks
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.load import load, recipe_of
from vlm_sft.bundle.manifest import Provenance, read_manifest
from vlm_sft.bundle.save import save_bundle
from vlm_sft.data import looks
from vlm_sft.evaluation import asking
from vlm_sft.evaluation.asking import How
from vlm_sft.evaluation.benchmark import read_benchmarks, run
from vlm_sft.evaluation.contamination import contamination
from vlm_sft.evaluation.records import answered
from vlm_sft.evaluation.tasks import load_task
from vlm_sft.inference.likelihood import likelihoods
from vlm_sft.judging.judge import Judge
from vlm_sft.metrics.measures import MEASURES
from vlm_sft.pages.records import read_records
from vlm_sft.stack.build_stack import build_stack

KEYS = {"id", "images", "question", "choices", "answers", "kind", "group", "answer", "answer_blank", "score",
        "score_blank", "confidence"}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, pieces, caption_file):
    """An untrained bundle whose training pictures are the photos."""
    folder = tmp_path_factory.mktemp("evaluated")
    path = folder / "recipe.yaml"
    recipe = tiny_recipe(pieces, caption_file, folder / "out", chat_template="ziya", generation={"max_new_tokens": 4})
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    stack = build_stack(made := load_recipe(path))
    save_bundle(folder / "bundle", stack.model, stack.processor, stack.plan, Provenance(made, stack.pieces))
    return folder / "bundle"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a folder of each benchmark."""
    root = tmp_path_factory.mktemp("published")
    for name, make in PUBLISHED.items():
        make(root / name)
    return root


@pytest.fixture
def judging():
    """A server that gives a reference 8 points and an answer 4, and what it shows second less or more."""
    with ChatServerDouble() as server:
        yield server


@pytest.fixture
def own(tmp_path):
    """Writes a task of one's own with rows beside it; see `own_task`."""
    return partial(own_task, tmp_path)


def test_every_benchmark_that_ships_is_asked_and_scored(bundle, published, judging, tmp_path, capsys):
    assert sorted(PUBLISHED) == list_tasks()
    judge = Judge(judging.url, "法官")
    found = run(str(bundle), list(PUBLISHED), data=str(published), output=str(tmp_path / "out"), compare=False,
                judge=judge, options={"max_new_tokens": 4})  # fmt: skip
    printed = capsys.readouterr().out
    for name, one in found.items():
        records = read_records(tmp_path / "out" / f"{name}.jsonl")
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text(encoding="utf-8")) == one
        assert 3 <= len(records) == one["questions"] <= 6 and name in printed
        keys = KEYS | ({"verdicts", "verdicts_blank"} if "judge" in one else set())
        assert [record.keys() for record in records] == [keys] * len(records)
        assert all(record["answer_blank"] is not None for record in records), name  # each has a picture
        assert one["scores"].keys() == one["scores_blank"].keys()
        assert all(total["low"] <= total["value"] <= total["high"] for total in one["scores"].values()), name
    assert not list((tmp_path / "out").glob("*.part-*"))


def test_right_answers_score_and_the_image_blanked_stands_beside(bundle, published, tmp_path, monkeypatch):
    asked = []

    def answer_each(model, processor, rows, **options):
        asked.append((len(rows), options))
        return ["Yes"] * len(rows)

    monkeypatch.setattr(asking, "answer_each", answer_each)
    found = run(str(bundle), ["pope", "mme"], data=str(published), output=str(tmp_path), compare=False)
    assert found["pope"]["scores"]["accuracy"]["value"] == found["pope"]["scores_blank"]["accuracy"]["value"] == 0.5
    assert found["pope"]["scores"]["recall"]["value"] == 1 and found["pope"]["scores"]["yes_share"]["value"] == 1
    assert found["pope"]["kinds"].keys() == {"random", "popular"}
    assert found["pope"]["kinds"]["random"]["scores"]["recall"]["value"] == 1
    assert found["mme"]["scores"]["perception"]["value"] == 50
    # The same two questions about six pictures are two questions without the pictures.
    assert [count for count, _ in asked] == [6, 2, 4, 2] and asked[0][1] == {"max_new_tokens": 16, "confidence": True}


def test_a_judge_scores_answers_in_both_languages(bundle, published, judging, tmp_path, monkeypatch, capsys):
    def answer_each(model, processor, rows, **options):
        return ["answer"] * len(rows)

    monkeypatch.setattr(asking, "answer_each", answer_each)
    judging.says = lambda prompt: verdicts[prompt.count("reference 1")](prompt)
    verdicts = [lambda prompt: "8 4\n参考更好。" if prompt.index("reference") < prompt.index("answer") else "6 6",
                lambda prompt: "<script>alert(1)</script> nothing"]  # fmt: skip
    given = {"data": str(published), "output": str(tmp_path), "compare": False}
    names = ["llava_bench", "llava_bench_zh"]
    found = run(str(bundle), names, judge=Judge(judging.url, "法官", price=(1, 2)), **given)
    for one in found.values():
        scores = {name: score["value"] for name, score in one["scores"].items()}
        assert scores == {"relative_score": pytest.approx(71.428571), "relative_conv": pytest.approx(71.428571),
            "relative_detail": 0, "relative_complex": pytest.approx(71.428571), "answer_score": 5, "reference_score": 7,
            "relative_reference_first": 50, "relative_answer_first": 100,
            "gain_of_first": pytest.approx(0.4)}  # fmt: skip
        assert one["scores"]["relative_score"]["low"] == one["scores"]["relative_score"]["value"]
        assert (one["judge"]["verdicts"], one["judge"]["unparsable"], one["judge"]["model"]) == (12, 4, "法官")
        assert one["judge"]["cost"]["cost"] == pytest.approx(one["judge"]["cost"]["asked"] * 0.00012)
    records = read_records(tmp_path / "llava_bench_zh.jsonl")
    assert [record["score"] for record in records] == [
        pytest.approx(5 / 7, abs=1e-6),
        None,
        pytest.approx(5 / 7, abs=1e-6),
    ]
    assert records[0]["verdicts"][0] == {
        "order": "reference first",
        "reference": 8,
        "answer": 4,
        "text": "8 4\n参考更好。",
    }
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "relative score" in printed and "gain of first" in printed and "4 name no scores" in printed
    page = (tmp_path / "evaluation.html").read_text(encoding="utf-8")
    assert "参考更好。" in page and "&lt;script&gt;alert(1)" in page and "no score 无得分" in page
    assert "names no scores" in page and "<b>4</b> : 8" in page and "Judged by 法官" in page
    # The same again: no model, no question to the judge, and the same is found.
    count = len(judging.asked)
    monkeypatch.setattr(asking, "load", lambda *more, **options: pytest.fail("it is answered already"))
    again = run(str(bundle), names, judge=Judge(judging.url, "法官", price=(1, 2)), **given)
    assert len(judging.asked) == count and again["llava_bench"]["scores"] == found["llava_bench"]["scores"]
    assert again["llava_bench"]["judge"]["cost"]["paid"] == 0
    run(str(bundle), names, judge=Judge(judging.url, "another"), **given)  # asks another judge, and no model
    assert len(judging.asked) == 2 * count


def test_a_judge_that_stops_is_gone_on_with(bundle, own, judging, tmp_path, monkeypatch):
    rules = {"prompt": "{{ question }} {{ answer }}{{ row.answer }}", "compare": False, "scale": [1, 5]}
    path = own(metric="judge", judge=rules, count=4, answers=[])
    judging.says = lambda prompt: "4"
    judging.next = [(404, {}, b"")]
    given = {"output": str(tmp_path / "out"), "compare": False, "judge": Judge(judging.url, "m", requests=1)}
    with pytest.raises(UserError, match="answers 404: give the URL up to its /v1"):
        run(str(bundle), [path], **given)
    monkeypatch.setattr(asking, "answer_each", lambda *given, **options: pytest.fail("it is answered already"))
    found = run(str(bundle), [path], **given)["dogs"]
    assert found["scores"]["relative_score"]["value"] == 80 and found["scores"]["answer_score"]["value"] == 4
    assert all(record["answers"] == [] for record in read_records(tmp_path / "out" / "dogs.jsonl"))
    judging.next = [(400, {}, b'{"error": "forbidden"}')]
    given["judge"] = Judge(judging.url, "n", requests=1)
    with pytest.raises(UserError, match=r"\d of 8 verdicts on dogs could not be had and count nowhere; .*forbidden"):
        run(str(bundle), [path], **given)


def test_a_task_of_ones_own_and_what_is_asked_again(bundle, own, tmp_path, monkeypatch, capsys):
    path = own(prompt="{{ question }} {{ row.answer | length }}", kind="image", generation={"max_new_tokens": 2})
    first = run(str(bundle), [path], how=How(batch_size=2), compare=False)["dogs"]
    records = read_records(bundle / "evaluation" / "dogs.jsonl")
    assert [record["id"] for record in records] == ["q0", "q1", "q2"] and records[0]["question"] == "有几只狗 0? 1"
    assert records[0]["images"] == [str(tmp_path / "0.png")] and first["kinds"].keys() == {"0.png", "1.png"}
    monkeypatch.setattr(asking, "load", lambda *more, **options: pytest.fail("it is answered already"))
    assert run(str(bundle), [path], how=How(batch_size=3), compare=False)["dogs"] == first
    # Scores that somebody wrote beside the answers are not believed: they are made of the answers.
    summary = bundle / "evaluation" / "dogs.json"
    summary.write_text(json.dumps({**first, "scores": {"\x1b]52;c;aGk=\x07": 10**400}, "kinds": [], "questions": None}))
    assert run(str(bundle), [path], how=How(batch_size=3), compare=False)["dogs"] == first
    assert json.loads(summary.read_text(encoding="utf-8")) == first
    with pytest.raises(pytest.fail.Exception):  # another setting is another evaluation
        run(str(bundle), [path], options={"max_new_tokens": 3}, compare=False)


def test_it_goes_on_where_it_was_killed(bundle, own, tmp_path, monkeypatch, capsys):
    path, out = own(count=5), tmp_path / "out"
    whole = run(str(bundle), [path], output=str(tmp_path / "whole"), how=How(batch_size=2), compare=False)["dogs"]
    real, calls = asking.Asker._records, []

    def dies(self, batch):
        calls.append(len(batch))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(asking.Asker, "_records", dies)
    with pytest.raises(KeyboardInterrupt):
        run(str(bundle), [path], output=str(out), how=How(batch_size=2), compare=False)
    (part,) = out.glob("dogs.*.part-0.jsonl")
    with part.open("ab") as stream:
        stream.write('{"id": "q4", "images": ["半'.encode()[:-1])  # the half of a record
    capsys.readouterr()
    calls.clear()
    calls.append(0)
    monkeypatch.setattr(asking.Asker, "_records", lambda self, batch: calls.append(len(batch)) or real(self, batch))
    again = run(str(bundle), [path], output=str(out), how=How(batch_size=2), compare=False)["dogs"]
    assert sum(calls) == 3 and "2 of 5 questions of dogs are answered already" in capsys.readouterr().err
    assert again["scores"] == whole["scores"]
    assert (out / "dogs.jsonl").read_bytes() == (tmp_path / "whole" / "dogs.jsonl").read_bytes()
    assert [file.name for file in sorted(out.iterdir())] == ["dogs.json", "dogs.jsonl", "evaluation.html"]


def test_the_page_shows_every_error_and_what_another_bundle_said(bundle, published, tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "answer_each", lambda model, processor, rows, **options: ["No"] * len(rows))
    run(str(bundle), ["pope"], data=str(published), output=str(tmp_path / "no"), compare=False)
    monkeypatch.setattr(asking, "answer_each", lambda model, processor, rows, **options: ["Yes"] * len(rows))
    found = run(str(bundle), ["pope"], data=str(published), output=str(tmp_path / "yes"), compare=False,
                against=str(tmp_path / "no"))  # fmt: skip
    page = (tmp_path / "yes" / "evaluation.html").read_text(encoding="utf-8")
    assert page.count("<article") == found["pope"]["questions"] == 6
    assert page.count("got better 变好</span>") == page.count("got worse 变差</span>") == 3 and "p = 1.000" in page
    assert "data:image/jpeg;base64," in page and "McNemar, exact" in page
    with pytest.raises(UserError, match=r"has no answers to mme: run `vlm-sft evaluate \S+ --benchmark mme` first"):
        run(str(bundle), ["mme"], data=str(published), output=str(tmp_path / "x"), against=str(tmp_path / "no"))


def test_a_bundle_that_has_no_answers_yet_is_asked_the_same(bundle, own, published, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(bundle, other, ignore=shutil.ignore_patterns("evaluation"))
    task = own(metric="exact_match", count=4)
    before = sorted(path.name for path in other.iterdir())
    given = {"data": None, "output": str(tmp_path / "out"), "compare": False, "max_rows": 3, "against": str(other)}
    run(str(bundle), [task], prompt="问：{{ question }}", **given)
    page = (tmp_path / "out" / "evaluation.html").read_text(encoding="utf-8")
    assert page.count("<article") == 3 and "McNemar" in page and str(other) in page
    (theirs,) = (tmp_path / "out" / "against").glob("*.jsonl")
    asked = [record["question"] for record in read_records(theirs)]
    assert asked == [record["question"] for record in read_records(tmp_path / "out" / "dogs.jsonl")]
    assert asked[0] == "问：有几只狗 0?" and sorted(path.name for path in other.iterdir()) == before
    monkeypatch.setattr(asking, "load", lambda *more, **options: pytest.fail("both are answered already"))
    run(str(bundle), [task], prompt="问：{{ question }}", **given)
    with pytest.raises(UserError, match=r"--prompt: the prompt is no jinja"):
        run(str(bundle), [task], prompt="{{ question", **given)


def test_options_are_compared_by_likelihood(bundle, published, tmp_path):
    how = How(likelihood=True, confidence=True)
    found = run(str(bundle), ["mmbench_cn", "pope"], data=str(published), output=str(tmp_path), how=how, compare=False)
    for name, options in (("mmbench_cn", {"A", "B", "C"}), ("pope", {"Yes", "No"})):
        records = read_records(tmp_path / f"{name}.jsonl")
        assert {record["answer"] for record in records} | {record["answer_blank"] for record in records} <= options
        assert all(0 < share <= 1 for record in records for _, share in record["confidence"])
        assert "".join(token for token, _ in records[0]["confidence"]).strip() == records[0]["answer"]
        assert found[name]["likelihood"] is True


def test_whole_options_are_compared_raw_by_token_and_by_character(bundle, published, tmp_path):
    given = {"data": str(published), "output": str(tmp_path), "compare": False, "options": {"max_new_tokens": 2}}
    found = run(str(bundle), ["mmbench_cn", "mmmu", "pope"], how=How(likelihood="texts"), **given)
    task, records = load_task("mmbench_cn")[1], read_records(tmp_path / "mmbench_cn.jsonl")
    for record in records:
        assert record["options"].keys() == record["options_blank"].keys() == record["choices"].keys()
        assert record["answer"] == max(record["options"], key=lambda letter: record["options"][letter][0])
        assert "".join(token for token, _ in record["confidence"]).strip() == record["choices"][record["answer"]]
    for name, scores in (("", found["mmbench_cn"]["scores"]), ("_blank", found["mmbench_cn"]["scores_blank"])):
        assert scores.keys() == {f"{metric}{rule}" for metric in ("circular_accuracy", "accuracy")
                                 for rule in ("", "_per_token", "_per_character")}  # fmt: skip
        for rule, least in (("_per_token", lambda r, o: -o[1][0] / o[1][1]),
                            ("_per_character", lambda r, o: -o[1][0] / len(r["choices"][o[0]]))):  # fmt: skip
            said = [min(r[f"options{name}"].items(), key=lambda o: least(r, o))[0] for r in records]
            again = MEASURES[task.metric]([answered(r, each) for r, each in zip(records, said, strict=True)])
            assert scores[f"circular_accuracy{rule}"]["value"] == again.totals["circular_accuracy"].score()
    # As the model finds them by itself, without the mark that ends an answer.
    model, processor = load(bundle)
    one = records[0]
    read = read_benchmarks(["mmbench_cn"], str(published))[0]
    picture = read.pictures.whole(read.asked[0].images[0])
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": one["question"]}]}
    for letter, text in one["choices"].items():
        messages = [question, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        (alone,) = likelihoods(model, processor, [{"messages": messages, "images": [picture], "id": "x"}])
        assert one["options"][letter] == [pytest.approx(sum(alone.logs[:-1]), abs=1e-3), len(alone.logs) - 1]
    # A question without options is written, also in a batch with others; Yes and No are what they are.
    open_ones = [record for record in read_records(tmp_path / "mmmu.jsonl") if not record["choices"]]
    assert open_ones and not any("options" in record for record in open_ones)
    assert {record["answer"] for record in read_records(tmp_path / "pope.jsonl")} <= {"Yes", "No"}


def test_pictures_of_the_training_sources_are_named(bundle, own, caption_file, tmp_path, capsys):
    photos = Path(caption_file).parent / "photos"
    path = own(count=4)
    # The first picture is one of the training data, byte for byte.
    (tmp_path / "0.png").write_bytes((photos / "3.png").read_bytes())
    seen = run(str(bundle), [path], output=str(tmp_path / "out"))["dogs"]["contamination"]
    assert (seen["pictures"], seen["same"], seen["alike"], seen["questions"]) == (2, 1, 0, 2)
    assert "1 of its 2 pictures are among those of the training sources" in capsys.readouterr().out.replace("\n", " ")


def test_pictures_that_only_look_like_those_of_training_are_named_each_by_itself(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(looks.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("evaluation"))
    rows = [{"image": write(photo(n), tmp_path / "train" / f"{n}.png"), "caption": "a cat"} for n in range(4)]
    lines(tmp_path / "train" / "rows.jsonl", rows)
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["data"]["train"][0]["path"] = str(tmp_path / "train" / "rows.jsonl")
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    # Two on which a question asks, of which the second was trained on, resized; another was trained on byte for byte.
    path = own_task(tmp_path, images=["image", "{more}"])
    for name, picture in (("new", photo(9)), ("again", saved_as_jpeg(photo(2).resize((120, 90))))):
        write(picture, tmp_path / f"{name}.png")
    (tmp_path / "same.png").write_bytes((tmp_path / "train" / "1.png").read_bytes())
    asked = [("new", "again"), ("new", "new"), ("same", "new")]
    lines(tmp_path / "rows.jsonl", [
        {"id": f"q{n}", "image": f"{one}.png", "more": f"{two}.png", "question": "有几只狗?", "answer": "1"}
        for n, (one, two) in enumerate(asked)
    ])  # fmt: skip
    seen = contamination(recipe_of(copy, read_manifest(copy)), *read_benchmarks([path], None)[0][2:])
    assert (seen["pictures"], seen["same"], seen["alike"], seen["questions"]) == (3, 1, 1, 2)
    assert "q2" in seen["examples"][0] and "q0, picture 2" in seen["examples"][1]


def test_training_sources_that_are_not_here_are_said(bundle, own, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in bundle.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["data"]["train"][0]["path"] = str(tmp_path / "gone.jsonl")
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    seen = run(str(copy), [own()])["dogs"]["contamination"]
    assert "gone.jsonl was not found" in seen["unchecked"]


def test_what_cannot_be_asked_is_counted_and_ends_the_command_once_all_is_written(bundle, own, tmp_path):
    path = own(count=4)
    (tmp_path / "1.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(
        UserError, match=r"2 of 4 questions of dogs could not be asked and count as wrong; the first: row q1"
    ):
        run(str(bundle), [path], output=str(tmp_path / "out"), compare=False)
    records = read_records(tmp_path / "out" / "dogs.jsonl")
    assert ["error" in record for record in records] == [False, True, False, True]
    assert records[1]["score"] == 0 and records[1]["answer"] == "" and records[1]["answer_blank"] is None


def test_a_question_longer_than_the_model_reads_is_counted_too(bundle, own, tmp_path):
    with pytest.raises(UserError, match=r"3 of 3 questions of dogs could not be asked .* reads at most 512"):
        run(str(bundle), [own(prompt="{{ question * 200 }}")], output=str(tmp_path / "out"), compare=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--benchmark", "gqq"], 'there is no benchmark "gqq"; the closest that ships is "gqa"'),
        (["--benchmark", "pope,pope"], '--benchmark names "pope" twice'),
        (["--benchmark", "pope"], "lmms-lab/POPE.*--benchmark-data"),
        (["--benchmark", "pope", "--benchmark-data", "/gone"], "there is no folder or file /gone"),
        (["--benchmark", "none/of.yaml"], 'the file "none/of.yaml" does not exist'),
        (["--benchmark", "pope", "--recipe", "x.yaml"], "--recipe belongs to the recipe's own data"),
        (["--benchmark", ","], "names no benchmark"),
        (["--likelihood"], "--likelihood belongs to --benchmark"),
        (["--benchmark", "pope", "--option-texts"], "--option-texts belongs to --likelihood"),
        (["--no-blank"], "--no-blank belongs to --benchmark"),
        (["--prompt", "{{ question }}"], "--prompt belongs to --benchmark"),
        (["--benchmark", "gqa", "--prompt", "{{ question"], "--prompt.*is no jinja"),
        (["--judge", "http://localhost/v1"], "--judge belongs to --benchmark"),
        (["--benchmark", "pope", "--judge", "http://localhost/v1"], "name the model there too, with --judge-model"),
        (["--benchmark", "pope", "--judge-model", "m"], "--judge-model belongs to --judge"),
        (["--benchmark", "llava_bench", "--judge", "nowhere", "--judge-model", "m"], "--judge is no URL of a server"),
        (
            ["--benchmark", "x", "--judge", "http://a/v1", "--judge-model", "m", "--judge-price", "1"],
            "two prices, like 2.5,10",
        ),
        (["--benchmark", "x", "--judge", "http://a/v1", "--judge-model", "m", "--judge-price", "nan,1"], "two prices"),
        (
            ["--benchmark", "x", "--judge", "http://a/v1", "--judge-model", "m", "--judge-set", "n=2"],
            "n is not yours to set",
        ),
        (
            ["--benchmark", "x", "--judge", "http://a/v1", "--judge-model", "m", "--judge-set", "n"],
            "--judge-set n is not",
        ),
    ],
)
def test_the_command_refuses_in_one_sentence(bundle, command, arguments, said):
    assert re.search(said, command("evaluate", bundle, *arguments))


def test_a_judge_is_named_where_one_is_wanted_and_there_alone(bundle, published):
    with pytest.raises(UserError, match=r"A judge scores one of the benchmarks: .*--judge URL --judge-model NAME"):
        run(str(bundle), ["pope", "llava_bench"], data=str(published))
    with pytest.raises(UserError, match="--judge belongs to benchmarks that a judge scores, as llava_bench"):
        run(str(bundle), ["pope"], data=str(published), judge=Judge("http://localhost/v1", "m"))


KINDS = ["gqa", "mmbench_cn", "pope", "coco_caption", "llava_bench_zh"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [How(batch_size=2), How(batch_size=2, likelihood=True)], ids=["written", "likelihood"])
def test_two_processes_go_on_with_what_one_began_and_find_what_one_finds(
    bundle, published, judging, tmp_path, monkeypatch, how
):
    """A launch of two gives the records, intervals, blanks and contamination of one process alone, of every kind."""
    data = tmp_path / "data"
    shutil.copytree(published, data)
    files = {"data": str(data), "how": how}
    judge = Judge(judging.url, "m")
    run(str(bundle), KINDS, output=str(tmp_path / "one"), judge=judge, **files)
    real, calls = asking.Asker._records, []

    def dies(self, batch):
        calls.append(len(batch))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(asking.Asker, "_records", dies)
    for name in KINDS:
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            run(str(bundle), [name], output=str(tmp_path / "two"), judge=judge if "bench_zh" in name else None, **files)
    assert sum(1 for _ in (tmp_path / "two").glob("*.part-0.jsonl")) == len(KINDS)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate_config("cpu_2")),
               "-m", "vlm_sft.evaluate", str(bundle), "--benchmark", ",".join(KINDS), "--benchmark-data", str(data),
               "--output", str(tmp_path / "two"), "--batch-size", "2", "--judge", judging.url, "--judge-model", "m",
               *(["--likelihood"] if how.likelihood else [])]  # fmt: skip
    launched = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert launched.returncode == 0, launched.stderr
    for name in KINDS:
        two, one = (json.loads((tmp_path / k / f"{name}.json").read_text(encoding="utf-8")) for k in ("two", "one"))
        assert {**two, "seconds": 0} == {**one, "seconds": 0}
        assert one["scores"].keys() == one["scores_blank"].keys() and one["contamination"]["pictures"]
        assert (tmp_path / "two" / f"{name}.jsonl").read_bytes() == (tmp_path / "one" / f"{name}.jsonl").read_bytes()
        assert f"questions of {name} are answered already" in launched.stderr
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == sorted(
        ["evaluation.html", "verdicts.jsonl", *(f"{name}.{kind}" for name in KINDS for kind in ("json", "jsonl"))]
    )
