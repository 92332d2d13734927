"""VisualGLM from a checkpoint as it is published to an answer: the commands that a user types, at tiny size."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from support.shrink import shrink
from vlm_sft import answer, load, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.run_folder import checkpoints
from vlm_sft.cli.main import app
from vlm_sft.train import train


@pytest.fixture(scope="module")
def trained(shared_photos, tmp_path_factory):
    """Its overrides, and the folder of a run of three steps that saved each."""
    folder = tmp_path_factory.mktemp("visualglm")
    overrides = [*shrink("visualglm_lora", folder, {}, shared_photos), "sft.save_steps=1", "sft.save_total_limit=3"]
    questions = folder / "questions.jsonl"
    asked = [{"id": k, "image": shared_photos[k], "question": q, "answer": "a cat"}
             for k, q in enumerate(["这是什么？", "What is this?", "图中有几只狗？"])]  # fmt: skip
    questions.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked), encoding="utf-8")
    test = [
        {"path": str(questions), "format": "vqa", "image_folders": [str(folder), shared_photos[0].rpartition("/")[0]]}
    ]
    overrides.append(f"data.test={json.dumps(test)}")
    return overrides, train(load_recipe("visualglm_lora", overrides))


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_weights(trained, tmp_path):
    overrides, calm = trained
    first = checkpoints(calm)[0]
    again = train(load_recipe("visualglm_lora", [*overrides, f"sft.output_dir={tmp_path / 'again'}",
                                                 f"sft.resume_from_checkpoint={first}"]))  # fmt: skip
    wanted, found = (load_file(folder / "adapter_model.safetensors") for folder in (calm, again))
    assert {name.split("layers.")[1].split(".")[0] for name in wanted} == {"0", "14"}
    assert wanted.keys() == found.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.slow
def test_its_bundle_answers_one_by_one_as_in_a_batch(trained, shared_photos):
    model, processor = load(trained[1])
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
         "images": [{"path": photo, "bytes": None}]}
        for text, photo in zip(["这是什么？", "What is at the top left of it?"], shared_photos, strict=False)
    ]  # fmt: skip
    together = answer(model, processor, rows, max_new_tokens=5)
    assert together == [answer(model, processor, [row], max_new_tokens=5)[0] for row in rows] and all(together)


@pytest.mark.slow
def test_chat_evaluate_and_export(trained, shared_photos, tmp_path):
    bundle = trained[1]

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    asked = run("chat", bundle, "--image", shared_photos[0], "这是什么？", "--set", "max_new_tokens=4")
    assert asked.exit_code == 0 and asked.stdout.strip()
    assert run("evaluate", bundle).exit_code == 0
    assert json.loads((bundle / "eval.json").read_text(encoding="utf-8"))["questions"]["answers"]["questions"] == 3
    refused = run("export", bundle, tmp_path / "native").exception
    assert isinstance(refused, UserError)
    assert "its language model (chatglm) is none of transformers' own; use --to bundle-merged" in str(refused)


@pytest.mark.slow
def test_in_four_bits(trained, tmp_path):
    few = "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4}"
    recipe = load_recipe("visualglm_lora", [*trained[0], few, f"sft.output_dir={tmp_path / 'few'}"])
    bundle = train(recipe)
    assert json.loads((bundle / "bundle.json").read_text())["parity"]["equal"]
    model, _ = load(bundle)
    kinds = {n.rsplit(".", 1)[-1]: type(m).__name__ for n, m in model.named_modules() if hasattr(m, "in_features")}
    assert kinds["dense_h_to_4h"] == "Linear4bit" and kinds["lm_head"] == "Linear" and kinds["qkv"] == "Linear"
    moved = [t for n, t in load_file(bundle / "adapter_model.safetensors").items() if "lora_B" in n]
    assert len(moved) == 4 and all(t.abs().sum() > 0 for t in moved)
