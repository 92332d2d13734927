"""lmms-eval itself, in its own environment, on tasks of our own: what it hears is what our command says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.asking import running
from support.bundles import trained
from support.forge import Forge
from support.paths import ROOT
from vlm_sft import load
from vlm_sft.inference.answer_file import generate
from vlm_sft.inference.likelihood import likelihoods
from vlm_sft.serving.bundles import load_bundles

PYTHON = ROOT / ".venv-lmms-eval" / "bin" / "python"
QUESTIONS = ["What is it?", "这是什么？", "Is it a cat? Answer yes or no.", "图中有什么？请回答。"]
CHOICES = ["a cat", "一只狗", "yes"]
UTILS = """
def doc_to_visual(doc):
    return [doc["image"]]

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def doc_to_round(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    return doc_to_visual(doc), f"You said: {previous_output[-1]}. Really?", round_idx == 2, previous_output, None

def rounds(doc, results):
    return {"rounds": len(results[0])}
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
"""
WRITTEN = """
output_type: generate_until
generation_kwargs: {max_new_tokens: 6, temperature: 0, top_p: 1.0, do_sample: false, image_aspect_ratio: pad, until: []}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = f"""
output_type: multiple_choice
doc_to_choice: {json.dumps(CHOICES, ensure_ascii=False)}
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
SEVERAL = """
output_type: generate_until_multi_round
doc_to_text: !function utils.doc_to_round
process_results: !function utils.rounds
generation_kwargs: {max_new_tokens: 4, until: "x"}
metric_list: [{metric: rounds, aggregation: mean, higher_is_better: true}]
"""
IMPORTS = ("accelerate.commands.launch", "lmms_eval.__main__")


@pytest.fixture(scope="module")
def harness() -> Iterator[Callable[..., str]]:
    """Runs lmms-eval, or two of it, as forks of one process, because it takes its time to be imported."""
    if not PYTHON.exists():
        pytest.fail("lmms-eval has no environment here: run `make .venv-lmms-eval/.setup-done` (`make test` does).")
    forge = Forge(python=str(PYTHON), imports=IMPORTS)

    def run(*arguments, code: int = 0) -> str:
        command = [str(PYTHON), "-m", *map(str, arguments)]
        done = forge.fork(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == code, done.stderr[-3000:]
        return done.stderr

    yield run
    forge.close()


@pytest.fixture
def bundle(bundle_recipe, tmp_path):
    trained(bundle_recipe(chat_template="ziya", lora={"r": 2}), tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def tasks(tmp_path, photos):
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"id": n, "image": photos[n % len(photos)], "question": q, "answer": "yes"} for n, q in enumerate(QUESTIONS)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")
    for name, more in (("own_written", WRITTEN), ("own_chosen", CHOSEN), ("own_rounds", SEVERAL)):
        task = TASK.format(name=name, rows=folder / "rows.jsonl") + more
        if name == "own_rounds":
            task = task.replace("doc_to_text: !function utils.doc_to_text\n", "")
        (folder / f"{name}.yaml").write_text(task, encoding="utf-8")
    return folder


def samples(folder: Path, task: str) -> list[dict]:
    """What lmms-eval wrote of each question, in order."""
    [file] = folder.rglob(f"*_samples_{task}.jsonl")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted(lines, key=lambda line: line["doc_id"])


@pytest.mark.slow
def test_both_models_say_what_our_own_command_says(harness, bundle, tasks, tmp_path, photos):
    source = tmp_path / "questions.jsonl"
    source.write_text(
        (tasks / "rows.jsonl").read_text(encoding="utf-8").replace('"answer"', '"right"'), encoding="utf-8"
    )
    generate(
        str(bundle), str(source), str(tmp_path / "answers.jsonl"), 3, options={"max_new_tokens": 6, "do_sample": False}
    )
    ours = [
        json.loads(line)["answer"] for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    ]

    given = ["lmms_eval", "--model", "vlm_sft", "--include_path", tasks, "--batch_size", 3]
    own = ["--log_samples", "--model_args", f"pretrained={bundle}"]
    simple = ["--force_simple", "--tasks", "own_written,own_chosen", "--output_path", tmp_path / "simple"]
    said = harness(*given, *own, *simple)
    one = ["--tasks", "own_written"]
    none = harness(*given, "--model_args", f"pretrained={tmp_path}/none", *one, code=2)
    other = harness(*given, "--model_args", f"pretrained={bundle},dtype=bf16", *one, code=2)
    with running(load_bundles([str(bundle)], {})) as caller:
        asked = f"model_version=bundle,base_url={caller.url},api_key=none,num_concurrent=4"
        over_http = ["--model", "openai", "--include_path", tasks, "--log_samples", "--model_args", asked]
        harness("lmms_eval", *over_http, *one, "--output_path", tmp_path / "http")
        assert 'status="200"} 4' in caller(None, "/metrics", "GET").told
    two = ["accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs/cpu_2.yaml", "-m"]
    harness(*two, *given, *own, "--tasks", "own_written,own_rounds", "--output_path", tmp_path / "chat")

    for folder in ("simple", "chat", "http"):
        assert [line["filtered_resps"] for line in samples(tmp_path / folder, "own_written")] == ours
    assert "image_aspect_ratio='pad' is none of `generate` and is left out" in said
    assert f"error: '{tmp_path}/none' is no bundle" in none
    assert "error: --model_args: there is no 'dtype'" in other

    model, processor = load(bundle)
    for number, line in enumerate(samples(tmp_path / "simple", "own_chosen")):
        asked = [{"type": "image"}, {"type": "text", "text": QUESTIONS[number]}]
        texts = [[{"type": "text", "text": text}] for text in CHOICES]
        turns = [[{"role": "user", "content": asked}, {"role": "assistant", "content": each}] for each in texts]
        rows = [
            {"messages": each, "images": [photos[number % len(photos)]], "id": str(n)} for n, each in enumerate(turns)
        ]
        expected = [-found.log for found in likelihoods(model, processor, rows)]
        assert [float(each[0]) for each in line["filtered_resps"]] == pytest.approx(expected, abs=1e-3)
    assert all(len(line["filtered_resps"]) == 2 for line in samples(tmp_path / "chat", "own_rounds"))
