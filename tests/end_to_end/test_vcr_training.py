"""A VLE learns VCR: which answer is right, and which reason, of things in pictures whose boxes lie beside them."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from support.shrink import shrink
from support.vle import save_vle
from vlm_sft import load_recipe
from vlm_sft.cli.main import app
from vlm_sft.train import train

COLOURS = {"red": "#e02010", "dog": "#10c020", "two": "#1020e0", "猫": "#f0f0f0"}


@pytest.mark.slow
def test_it_learns_answers_and_reasons(tmp_path):
    rows, words = [], list(COLOURS)
    for number, colour in enumerate(COLOURS.values()):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{number}.png")
        held = {"boxes": [[0, 0, 20, 15, 0.9]], "width": 40, "height": 30}
        (tmp_path / f"{number}.json").write_text(json.dumps(held))
        rows.append({"annot_id": f"val-{number}", "img_fn": f"{number}.png", "objects": ["dog"], "question": ["how"],
                     "answer_choices": [[word] for word in words], "answer_label": number,
                     "rationale_choices": [[[0], word] for word in reversed(words)],
                     "rationale_label": 3 - number})  # fmt: skip
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = json.dumps({"path": str(tmp_path / "val.jsonl"), "format": "vcr", "images": str(tmp_path)})
    rates = {"vision_tower": 3e-3, "text_encoder": 1e-3, "fusion": 3e-3, "head": 1e-2}
    small = shrink("vle_vcr", tmp_path / "small", {}, [str(tmp_path / "0.png")] * 8)
    calm = json.loads((save_vle(tmp_path / "vle") / "config.json").read_text(encoding="utf-8"))
    for sizes in (calm, calm["text_config"]):
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "vle" / "config.json").write_text(json.dumps(calm), encoding="utf-8")
    bundle = train(load_recipe("vle_vcr", [
        *(each for each in small if not each.startswith(("data.", "sft.max_steps"))), f"data.train=[{source}]",
        f"data.eval=[{source}]", f"data.test=[{source}]", f"train={json.dumps(rates)}", "sft.max_steps=40",
        f"encoder.pretrained={tmp_path / 'vle'}", "evaluation.samples=0",
        "sft.per_device_train_batch_size=8", "sft.gradient_accumulation_steps=1", "sft.eval_strategy=no",
        "sft.save_strategy=no", "sft.logging_steps=10",
    ]))  # fmt: skip
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    assert manifest["parity"]["equal"] and manifest["ledger"]["train"]["sources"]["val"]["used"] == 8
    measured = CliRunner().invoke(app, ["evaluate", str(bundle)])
    assert measured.exit_code == 0, measured.output
    found = json.loads((bundle / "eval.json").read_text(encoding="utf-8"))
    assert found["metrics_by_kind"]["val"] == {"VCR_accuracy": 1.0, "Q2A": 1.0, "QA2R": 1.0, "Q2AR": 1.0}
    assert found["answer_accuracy_blank_image"] <= 5 / 8, (
        "of grey pictures one answer of four, and what follows from it"
    )
    asked = CliRunner().invoke(app, ["answer", str(bundle), "how", "--image", str(tmp_path / "0.png")])
    assert asked.exit_code == 1 and "measure it with `vlm-sft evaluate`" in str(asked.exception)
