"""A bundle, a checkpoint and kept rows that were written before the modules moved into packages are read as before.

`goldens/b1a5cad` is what a tiny run left at that commit: its pieces, rows and recipe, the checkpoint of step 2 of 4,
the bundle of its end, the logits and the answer of that bundle then, and the file in which rows were kept.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

import vlm_sft
import vlm_sft.train
from support.paths import ROOT

FAKE_PARITY = {"positions": 1, "max_difference": 0.0, "tolerance": 1e-4, "equal": True}
TRAINED = ("trained.safetensors", "adapter_model.safetensors")
NEAR = 1e-4  # another CPU adds in another order; one step of training moves weights by a hundred times as much
KEPT = {"path": "kept.jsonl", "format": "caption", "allow_urls": True, "prompts": ["What is this?", "这是什么？"]}
LEFT_OUT = 'kept.jsonl, line 9: "caption" is empty: write a caption or remove the row.'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A copy of the run's folder, which one is in: all of its paths start there."""
    copy = tmp_path / "b1a5cad"
    shutil.copytree(ROOT / "tests" / "goldens" / "b1a5cad", copy)
    monkeypatch.chdir(copy)
    return copy


def test_an_older_bundle_gives_the_logits_and_the_answer_of_then():
    model, processor = vlm_sft.load("bundle", device="cpu")
    inputs = load_file("logits.safetensors")
    wanted = inputs.pop("logits")
    with torch.no_grad():
        got = model(**inputs).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=NEAR)
    told = json.loads(Path("answer.json").read_text(encoding="utf-8"))
    question = {"messages": told["messages"], "images": told["images"]}
    assert vlm_sft.answer(model, processor, [question], max_new_tokens=told["max_new_tokens"]) == [told["answer"]]


def test_an_older_checkpoint_goes_on_to_the_weights_of_its_run(monkeypatch, capsys):
    monkeypatch.setattr("vlm_sft.bundle.parity.check_parity", lambda *args: FAKE_PARITY)
    vlm_sft.train.main(["recipe.yaml", "--resume"])
    said = capsys.readouterr().err
    assert "Going on from run/checkpoint-2." in said and "The recipe has changed" not in said
    assert "step 3/4" in said and "step 2/4" not in said
    for name in TRAINED:
        got, wanted, early = (load_file(f"{at}/{name}") for at in ("run", "bundle", "run/checkpoint-2"))
        assert got.keys() == wanted.keys()
        for key in wanted:
            torch.testing.assert_close(got[key], wanted[key], rtol=0, atol=NEAR, msg=f"{name}: {key}")
        assert max((wanted[key] - early[key]).abs().max() for key in wanted) > 50 * NEAR, "the last steps moved it"
    logs = [json.loads(Path(at, "metrics.json").read_text(encoding="utf-8")) for at in ("run", "bundle")]
    losses = [[row["loss"] for row in log if "loss" in row] for log in logs]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], abs=NEAR)


def test_older_kept_rows_are_used_or_read_anew(folder, monkeypatch):
    """Their file is named by where the data lie, so it is put where this version looks for it."""
    monkeypatch.setattr("vlm_sft.data.row_cache.FEWEST", 3)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    (source,) = vlm_sft.load_recipe("recipe.yaml", [f"data.train=[{json.dumps(KEPT)}]"]).data.train

    def read() -> list[dict]:
        rejected: list[str] = []
        rows = vlm_sft.load_source(source, reject=lambda error: rejected.append(str(error)))
        assert rejected == [LEFT_OUT]
        return rows.to_list()

    then = datasets.Dataset.from_file("kept.arrow").to_list()
    assert len(then) == 8 and read() == then
    (kept,) = (folder / "cache" / "vlm_sft").iterdir()
    older, newer = Path("kept.arrow").read_bytes(), kept.read_bytes()
    kept.unlink()  # the rows just read are mapped from it
    kept.write_bytes(older)
    assert read() == then
    assert kept.read_bytes() in (older, newer), "used, or replaced as a whole"
    assert read() == then and list(kept.parent.iterdir()) == [kept]
