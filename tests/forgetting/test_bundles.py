"""A bundle is compared with what it was: without its LoRA, by what its run noted, or by base weights."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from support.bundles import trained
from vlm_sft import load, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.manifest import update_manifest
from vlm_sft.cli import main as cli
from vlm_sft.forgetting import bundles
from vlm_sft.forgetting.bundles import BeforeAndAfter
from vlm_sft.forgetting.state import measure
from vlm_sft.forgetting.texts import Wish, read_texts
from vlm_sft.stack.build_stack import build_stack

TEXTS = '{"text": "a red bus stops"}\n{"text": "一只猫在跑"}\n{"question": "what is red?", "answers": ["bus"]}\n'


@pytest.fixture
def texts(tmp_path):
    (path := tmp_path / "texts.jsonl").write_text(TEXTS, encoding="utf-8")
    return str(path)


@pytest.fixture
def bundle(recipe_file, caption_file, tmp_path):
    """A bundle whose trained weights have moved, and its base model."""

    def make(**changes):
        source = {"path": caption_file, "format": "caption", "max_rows": 2}
        data = {"train": [source], "test": [source]}
        recipe = load_recipe(recipe_file(chat_template="ziya", data=data, generation={"max_new_tokens": 3}, **changes))
        trained(recipe, tmp_path / "bundle")
        return tmp_path / "bundle", build_stack(recipe)

    return make


@pytest.mark.parametrize("changes", [{"lora": {"r": 2}}, {"train": {"projector": 1e-3, "language_model": 1e-3}}])
def test_lora_is_taken_off_and_a_whole_model_is_compared_with_its_base(bundle, texts, changes):
    folder, stack = bundle(**changes)
    found = BeforeAndAfter(folder, Wish(True, texts), False, print).finish(lambda: load(folder, device="cpu"))
    base = measure(stack.model.eval(), stack.processor, read_texts(texts))
    assert found["perplexity"]["before"] == pytest.approx(base["perplexity"], rel=1e-6)
    assert found["perplexity"]["after"] != found["perplexity"]["before"]


def test_base_weights_are_read_only_where_that_is_asked_for(bundle, texts, monkeypatch):
    folder, stack = bundle(train={"language_model": 1e-3})
    monkeypatch.setattr(bundles, "build_stack", lambda recipe: pytest.fail("weights are read"))
    assert BeforeAndAfter(folder, Wish(None, texts), False, print).finish(lambda: pytest.fail("it is asked")) is None
    before = measure(stack.model.eval(), stack.processor, read_texts(texts))
    update_manifest(folder, {"forgetting": {"before": before}})
    found = BeforeAndAfter(folder, Wish(True, texts), False, print).finish(lambda: load(folder, device="cpu"))
    assert found["perplexity"]["before"] == before["perplexity"]
    # Numbers of other texts are none of these.
    (other := folder.parent / "other.jsonl").write_text('{"text": "two dogs"}\n')
    assert BeforeAndAfter(folder, Wish(None, str(other)), False, print).texts is None


def test_texts_of_another_machine_end_no_evaluation(bundle, texts):
    folder, _ = bundle(lora={"r": 2}, evaluation={"forgetting": True, "forgetting_texts": "elsewhere/t.jsonl"})
    said = []
    assert BeforeAndAfter(folder, Wish(None, None), False, said.append).texts is None
    assert len(said) == 1 and "elsewhere/t.jsonl" in said[0]
    assert BeforeAndAfter(folder, Wish(None, texts), False, said.append).texts.name == "texts"
    with pytest.raises(UserError, match="elsewhere"):
        BeforeAndAfter(folder, Wish(True, None), False, said.append)


def test_a_language_model_that_was_not_trained_forgets_nothing(bundle, texts):
    folder, _ = bundle()
    said = []
    assert BeforeAndAfter(folder, Wish(None, texts), False, said.append).finish(lambda: pytest.fail("asked")) is None
    assert said == []
    assert BeforeAndAfter(folder, Wish(True, texts), False, said.append).texts is None
    assert said == ["The language model was not trained, so it has forgotten nothing."]


def test_a_model_that_cannot_be_measured_ends_nothing_unless_it_was_asked_for(bundle, texts, monkeypatch):
    folder, _ = bundle(lora={"r": 2})
    monkeypatch.setattr(bundles, "measure", lambda *more: 1 / 0)
    said = []
    assert (
        BeforeAndAfter(folder, Wish(None, texts), False, said.append).finish(lambda: load(folder, device="cpu")) is None
    )
    assert said == ["What was forgotten is not measured: division by zero"]
    with pytest.raises(UserError, match="What was forgotten is not measured"):
        BeforeAndAfter(folder, Wish(True, texts), False, print).finish(lambda: load(folder, device="cpu"))


def test_every_evaluation_has_it_in_json_on_the_terminal_and_on_its_page(bundle, texts):
    folder, _ = bundle(lora={"r": 2})
    done = CliRunner().invoke(cli.app, ["evaluate", str(folder), "--forgetting-texts", texts])
    assert done.exit_code == 0, done.output
    assert "Forgetting: what was known before" in done.output and "perplexity, zh" in done.output
    found = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["forgetting"]
    assert found["texts"] == "texts" and set(found["perplexity"]["ratio"]) == {"en", "zh"}
    assert "perplexity, zh" in (folder / "evaluation" / "evaluation.html").read_text(encoding="utf-8")
    done = CliRunner().invoke(cli.app, ["evaluate", str(folder), "--no-forgetting"])
    assert done.exit_code == 0 and "Forgetting" not in done.output
    done = CliRunner().invoke(cli.app, ["evaluate", str(folder), "--forgetting-texts", "gone.jsonl"])
    assert done.exit_code != 0
