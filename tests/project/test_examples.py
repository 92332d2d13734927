"""The examples do what they say: two collators trained with through a recipe, the Python flow, the demo's commands."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from support.paths import ROOT
from vlm_sft import Sample, UserError, VLMProcessor, load_recipe
from vlm_sft.cli import main as cli
from vlm_sft.recipe.libraries import build_sft_config
from vlm_sft.stack.kinds import compose
from vlm_sft.train import main as train_main
from vlm_sft.train import train
from vlm_sft.training.build_trainer import build_collator


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    """Where a user stands who names `examples.custom_collator:…` in a recipe."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


def answer_row(photos, *turns: tuple[str, str]) -> dict:
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages[0]["content"].insert(0, {"type": "image", "text": None})
    return {"messages": messages, "images": [{"path": photos[0], "bytes": None}], "source": "s", "id": "s/1"}


@pytest.fixture
def make_collator(recipe_file):
    """The collator that a recipe names, made as training makes it."""

    def make(name: str, template: str = "vicuna_v1", **arguments):
        path = recipe_file(chat_template=template, collator=f"examples.custom_collator:{name}", collator_args=arguments)
        recipe = load_recipe(path, ["sft.max_length=1024"])
        return build_collator(recipe, compose(recipe).processor, build_sft_config(recipe))

    return make


def learned_text(processor: VLMProcessor, labels) -> str:
    return processor.tokenizer.decode([label for label in labels if label != -100])


def weights_of_answers(sample: Sample) -> list[set[float]]:
    runs, last = [], None
    for label, weight in zip(sample.chat.labels, sample.loss_weights, strict=True):
        if label != -100:
            if last in (None, -100):
                runs.append(set())
            runs[-1].add(weight)
        last = label
    return runs


def test_every_answer_counts_alike_within_the_bounds(make_collator, photos):
    collator = make_collator("ShortAnswerCollator", typical=8, most=100.0)
    sample = collator.encode(answer_row(photos, ("这是什么？", "一只猫"), ("describe", "two dogs " * 6)))
    counts = [0, 0]
    for run, (start, end) in enumerate(importlib.import_module("examples.custom_collator").answers(sample.chat.labels)):
        counts[run] = end - start
        assert sum(sample.loss_weights[start:end]) == pytest.approx(8), "tokens times weight is `typical`"
    assert counts[0] < counts[1]
    assert all(w == 1 for w, label in zip(sample.loss_weights, sample.chat.labels, strict=True) if label == -100)

    bounded = make_collator("ShortAnswerCollator", typical=8, most=1.5)
    sample = bounded.encode(answer_row(photos, ("a", "7"), ("b", "two dogs " * 20)))
    assert weights_of_answers(sample) == [{1.5}, {1 / 1.5}]


def test_an_answer_of_one_token_counts(make_collator):
    answers = importlib.import_module("examples.custom_collator").answers
    assert answers([-100, 5, -100, 6, 7]) == [(1, 2), (3, 5)]
    assert answers([5]) == [(0, 1)]
    assert answers([-100, -100]) == answers([]) == []


def test_weights_reach_the_batch_and_padding_has_none(make_collator, photos):
    collator = make_collator("ShortAnswerCollator", typical=8)
    rows = [answer_row(photos, ("a", "7")), answer_row(photos, ("a long question", "左上角是红色的3 " * 4))]
    batch = collator(rows)
    assert batch["loss_weights"].shape == batch["labels"].shape
    assert (batch["loss_weights"][batch["attention_mask"] == 0] == 0).all()
    learned = batch["labels"] != -100
    assert batch["loss_weights"][0][learned[0]].min() > batch["loss_weights"][1][learned[1]].max()


@pytest.mark.parametrize("arguments", [{"typical": 0}, {"most": 0.5}])
def test_arguments_out_of_range_are_said(make_collator, arguments):
    with pytest.raises(UserError, match=r"collator_args: typical must be above 0 and most at least 1"):
        make_collator("ShortAnswerCollator", **arguments)


def test_reasoning_is_read_but_not_learned(make_collator, photos):
    collator = make_collator("ReasoningMaskCollator")
    row = answer_row(
        photos,
        ("q", "<think>Two ears.\nA tail.</think>\nA cat."),
        ("问", "想一想<think>尾巴</think>是猫<think>胡须</think>。"),
        ("r", "No reasoning here."),
    )
    sample = collator.encode(row)
    processor = collator.processor
    assert learned_text(processor, sample.chat.labels) == "A cat.</s> 想一想是猫。</s> No reasoning here.</s>"
    whole = processor.tokenizer.decode(sample.chat.input_ids)
    assert "Two ears." in whole and "胡须" in whole, "it stays in the context"


def test_the_end_of_an_answer_is_learned_also_behind_reasoning(make_collator, photos):
    collator = make_collator("ReasoningMaskCollator", template="plain")
    row = answer_row(photos, ("q", "A cat.\n<think>Two ears.</think>"))
    assert learned_text(collator.processor, collator.encode(row).chat.labels) == "A cat.\n\n"


def test_reasoning_that_is_never_closed_reaches_to_the_end_of_its_answer(make_collator, photos):
    collator = make_collator("ReasoningMaskCollator", tag="想")
    row = answer_row(photos, ("q", "好。<想>尾巴"), ("r", "</想>A cat."))
    labels = collator.encode(row).chat.labels
    assert learned_text(collator.processor, labels) == " 好。 </想>A cat.</s>"
    with pytest.raises(UserError, match=r"row s/1: no token would be in the loss"):
        collator.encode(answer_row(photos, ("q", "<想>尾巴")), with_images=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ShortAnswerCollator", "ReasoningMaskCollator"])
def test_training_runs_with_it(recipe_file, name):
    recipe = load_recipe(recipe_file(collator=f"examples.custom_collator:{name}"))
    folder = train(recipe)
    losses = [entry["loss"] for entry in json.loads((folder / "metrics.json").read_text()) if "loss" in entry]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)


def test_weights_change_the_loss_that_is_trained(recipe_file, make_collator):
    from vlm_sft import VLMSFTTrainer, build_stack, load_mixture

    recipe = load_recipe(recipe_file())
    stack, rows = build_stack(recipe), load_mixture(recipe.data.train)
    losses = []
    for typical in (4, 8):  # twice as typical is twice the weight, where no bound is reached
        collator = make_collator("ShortAnswerCollator", template="plain", typical=typical, most=1000.0)
        trainer = VLMSFTTrainer(stack.model, build_sft_config(recipe), collator, rows, stack.processor, plan=stack.plan)
        with torch.no_grad():
            losses.append(float(trainer.compute_loss(trainer.model, collator(rows.to_list()))))
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)


@pytest.mark.slow
def test_the_python_flow_trains_saves_loads_and_answers(tmp_path):
    example = importlib.import_module("examples.python_api")
    caption = example.main(max_steps=3, batch_size=8, scenes=24, data=tmp_path / "data", output=tmp_path / "out")
    assert caption
    assert (tmp_path / "out" / "trained.safetensors").is_file()
    manifest = json.loads((tmp_path / "out" / "bundle.json").read_text())
    assert manifest["trained"] == ["projector"] and set(manifest["pieces"]) == {
        "vision_tower", "resampler", "language_model",
    }  # fmt: skip


@pytest.mark.slow
def test_the_page_of_the_first_run_is_enough(pieces, photos, tmp_path, monkeypatch, capsys):
    """A folder of photos, the page's recipe and its commands, with tiny pieces under the names of large ones."""
    text = (ROOT / "docs" / "first_run.md").read_text(encoding="utf-8")
    own = text[text.index('{"image"') :]
    recipe, commands = own.split("```yaml\n")[1].split("```")[0], own.split("```\n")[3].split("```")[0].splitlines()
    for large, tiny in {
        "openai/clip-vit-large-patch14-336": pieces["clip"],
        "lmsys/vicuna-7b-v1.5": pieces["llama"],
        "liuhaotian/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5": str(tmp_path / "mm_projector.bin"),
    }.items():
        assert recipe.count(large) == 1
        recipe = recipe.replace(large, tiny)
    sizes = {"0.weight": (32, 24), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    projector = {f"model.mm_projector.{name}": torch.randn(size) * 0.1 for name, size in sizes.items()}
    torch.save(projector, tmp_path / "mm_projector.bin")
    monkeypatch.chdir(tmp_path)
    Path("my_photos.yaml").write_text(recipe, encoding="utf-8")
    Path("my_photos").mkdir()
    lines = []
    for number, photo in enumerate(photos, 1):
        Image.open(photo).save(f"my_photos/{number:04}.jpg")
        lines.append(json.dumps({"image": f"{number:04}.jpg", "caption": f"照片{number}: a cat"}, ensure_ascii=False))
    Path("my_photos/captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    assert [shlex.split(line)[:2] for line in commands] == [
        ["vlm-sft", "train"], ["vlm-sft", "preflight"], ["accelerate", "launch"], ["vlm-sft", "chat"],
    ]  # fmt: skip
    for line in commands:
        words = [word for word in shlex.split(line, comments=True) if word not in ("accelerate", "launch", "-m")]
        if words[0] == "vlm_sft.train":
            train_main(words[1:])
            continue
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, capsys.readouterr()
    assert Path("preflight.html").is_file() and Path("outputs/my_photos/bundle.json").is_file()
    assert "Parity: reloaded in a fresh process" in capsys.readouterr().err


DEMO = ROOT / "examples" / "demo.sh"


def test_the_demo_is_a_script_that_stops_at_the_first_error():
    assert DEMO.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(DEMO)], check=True)
    assert "set -euo pipefail" in DEMO.read_text(encoding="utf-8")
    assert "examples/demo.sh" in (ROOT / "Makefile").read_text(encoding="utf-8")


# Stands in for python, accelerate and vlm-sft: notes how it was called, and answers as the real ones would.
STAND_IN = """#!/usr/bin/env bash
name=$(basename "$0")
echo "$name $*" >> "$LOG"
case "$name $1" in
    "$FAIL "*) exit 3 ;;
    "python -") exec "$PYTHON" "$@" ;;
    "vlm-sft chat") echo "${ANSWER-yes}" ;;
esac
"""


@pytest.fixture
def demo(tmp_path):
    """Runs the demo in a folder of its own, where nothing is trained; returns its result and the commands it gave."""
    import os
    import sys

    copy = tmp_path / "checkout"
    data = copy / "data" / "digitscenes"
    (copy / "examples").mkdir(parents=True)
    (copy / "examples" / "demo.sh").write_bytes(DEMO.read_bytes())
    data.mkdir(parents=True)
    rows = {
        "questions_test.jsonl": [
            {"image": "images/test/0.png", "question": "Which digit is at the top right?", "answer": "4"},
            {"image": "images/test/0.png", "question": "左下角是什么颜色？", "answer": "黄色"},
            {"image": "images/test/1.png", "question": "另一张图？", "answer": "不"},
        ],
        "captions_test.jsonl": [
            {"image": "images/test/0.png", "caption": "a pink 4 at the top right"},
            {"image": "images/test/0.png", "caption": "右上角是粉色的4"},
        ],
    }
    for name, lines in rows.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (data / name).write_text(text, encoding="utf-8")
    for left in ("outputs/quickstart_stage1", "outputs/quickstart_stage2", "outputs/my_own"):
        (copy / left).mkdir(parents=True)
        (copy / left / "left.txt").touch()
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python", "accelerate", "vlm-sft"):
        (programs / name).write_text(STAND_IN, encoding="utf-8")
        (programs / name).chmod(0o755)

    def run(**more: str) -> tuple[subprocess.CompletedProcess[str], list[str], Path]:
        log = tmp_path / "log"
        log.touch()
        environment = {**os.environ, "PATH": f"{programs}:/usr/bin:/bin", "LOG": str(log), "PYTHON": sys.executable}
        command = ["bash", str(copy / "examples" / "demo.sh")]
        done = subprocess.run(
            command, env={**environment, "FAIL": "nothing", **more}, cwd=tmp_path, capture_output=True, text=True
        )
        return done, log.read_text(encoding="utf-8").splitlines(), copy

    return run


def test_the_demo_gives_the_commands_that_a_user_types(demo):
    done, commands, copy = demo()
    assert done.returncode == 0, done.stderr
    launch = "accelerate launch --quiet --config_file accelerate_configs/cpu.yaml -m vlm_sft.train recipes"
    ask = "vlm-sft chat outputs/quickstart_stage2"
    image = "--image data/digitscenes/images/test/0.png"
    assert commands == [
        "python examples/digitscenes/digitscenes.py --out data/digitscenes --seed 0",
        f"{launch}/quickstart_stage1.yaml",
        "vlm-sft evaluate outputs/quickstart_stage1",
        f"{launch}/quickstart_stage2.yaml",
        "vlm-sft evaluate outputs/quickstart_stage2",
        "python - data/digitscenes",
        f"{ask} Which digit is at the top right? {image}",
        f"{ask} 左下角是什么颜色？ {image}",
    ]
    for shown in ("(right: 4)", "（正确答案：黄色）", "右上角是粉色的4", "a pink 4", "curves.png", "eval.json"):
        assert shown in done.stdout
    assert "另一张图" not in done.stdout, "both questions are about one image"
    assert not (copy / "outputs/quickstart_stage1").exists() and not (copy / "outputs/quickstart_stage2").exists()
    assert (copy / "outputs/my_own/left.txt").exists(), "it removes what is its own and nothing else"


@pytest.mark.parametrize("program", ["accelerate", "vlm-sft"])
def test_the_demo_fails_where_a_step_fails(demo, program):
    done, commands, _ = demo(FAIL=program)
    assert done.returncode == 3
    assert commands[-1].startswith(program) and "Done" not in done.stdout


def test_the_demo_fails_where_the_model_says_nothing(demo):
    done, _, _ = demo(ANSWER="")
    assert done.returncode == 1 and "The model gave no answer to: Which digit" in done.stderr
