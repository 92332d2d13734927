"""A recipe that starts from an existing VLM: trained, saved, loaded, asked; and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from support.tiny_families import CHECKED, encoded, tiny
from vlm_sft import MultimodalCollator, VLMSFTTrainer, build_stack, load, load_mixture, load_recipe, lora_config
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.manifest import Provenance
from vlm_sft.bundle.parity import probe_logits
from vlm_sft.cli.main import app
from vlm_sft.inference.generation import answer
from vlm_sft.inference.streaming import stream_answer
from vlm_sft.model.freeze import FreezePlan, is_adapter, part_modules, part_of
from vlm_sft.preflight.dry_run import dry_run as show
from vlm_sft.preflight.launch import read_launch
from vlm_sft.preflight.memory import weight_bytes
from vlm_sft.recipe.libraries import build_sft_config
from vlm_sft.stack.build_stack import build_empty_stack
from vlm_sft.stack.kinds import compose
from vlm_sft.stack.lora import _is_linear
from vlm_sft.train import train

SIZES = [(40, 30), (64, 30), (300, 60), None, None, (30, 40)]
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
PLAIN = {"role": "user", "content": [{"type": "text", "text": "你好"}]}


def dry_run(recipe) -> None:
    show(recipe, read_launch(None), Console(width=120))


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> str:
    """Four rows with an image, of several sizes, and two without."""
    folder = tmp_path_factory.mktemp("rows")
    rows = []
    for number, size in enumerate(SIZES):
        if size:
            (folder / f"{number}.png").write_bytes(encoded(size))
        messages = [QUESTION if size else PLAIN, {"role": "assistant", "content": f"a red {number}"}]
        rows.append({"id": str(number), "messages": messages, "images": [f"{number}.png"] if size else []})
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(folder / "rows.jsonl")


@pytest.fixture
def model_recipe(recipe_file, rows_file):
    """A recipe by the family; other top-level keys by keyword."""

    def make(name: str, *overrides: str, **changes):
        plain = {"stack": None, "chat_template": None, "model": {"pretrained": str(tiny(name))}}
        data = {"train": [{"path": rows_file, "format": "messages"}]}
        path = recipe_file("existing", **{**plain, "data": data, "lora": {"r": 2}, **changes})
        return load_recipe(
            path, ["sft.max_steps=3", "sft.max_length=1024", "sft.per_device_train_batch_size=2", *overrides]
        )

    return make


@pytest.fixture
def seen(monkeypatch):
    """In place of the fresh process, which is tested for one family: what the trained model makes of the probe."""
    kept = {}

    def check(bundle, model, batch, *args):
        kept.update(batch=batch, logits=probe_logits(model, batch))
        return {"positions": 1, "max_difference": 0.0, "tolerance": 1e-4, "equal": True}

    monkeypatch.setattr("vlm_sft.bundle.parity.check_parity", check)
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKED)
def test_it_trains_reloads_and_answers(name, model_recipe, rows_file, seen):
    source = {"path": rows_file, "format": "messages"}
    recipe = model_recipe(name, data={"train": [source], "eval": [source]})
    folder = train(recipe)
    said = {key for row in json.loads((folder / "metrics.json").read_text()) for key in row}
    # Images can be exchanged where each takes as many tokens as any other.
    assert "eval_loss" in said and ("eval_image_use" in said) == bool(compose(recipe).processor.num_image_tokens)
    manifest = json.loads((folder / "bundle.json").read_text())
    assert manifest["held"] == manifest["trained"] == ["projector"] and set(manifest["pieces"]) == {"model"}
    adapter = load_file(folder / "adapter_model.safetensors")
    assert adapter and all(".language_model." in key or ".text_model." in key for key in adapter)
    assert not any("lm_head" in key for key in adapter)
    model, processor = load(folder)
    assert torch.allclose(probe_logits(model, seen["batch"]), seen["logits"], atol=1e-5)
    rows = [{"messages": [QUESTION], "images": [encoded((40, 30))]}, {"messages": [PLAIN], "images": []}]
    together = answer(model, processor, rows, max_new_tokens=4)
    assert together == [answer(model, processor, [row], max_new_tokens=4)[0] for row in rows]
    streamed = "".join(stream_answer(model, processor, [QUESTION], rows[0]["images"], max_new_tokens=4))
    assert streamed == together[0]


def test_what_an_earlier_stage_trained_stays_in_the_bundle(model_recipe, seen, tmp_path):
    one = train(model_recipe("llava", f"sft.output_dir={tmp_path}/one", lora=None, train={"projector": 1e-2}))
    two = train(model_recipe("llava", f"sft.output_dir={tmp_path}/two", f"init_from={one}", train={}))
    shutil.rmtree(one)
    manifest = json.loads((two / "bundle.json").read_text())
    assert manifest["held"] == ["projector"] and manifest["trained"] == [] and manifest["adapter"]
    model, _ = load(two)
    assert torch.allclose(probe_logits(model, seen["batch"]), seen["logits"], atol=1e-5)


@pytest.mark.slow
def test_image_use_is_measured_where_a_model_has_all_images_in_one_row(model_recipe, rows_file, seen):
    source = {"path": rows_file, "format": "messages"}
    model = {"pretrained": str(tiny("smolvlm")), "processor": {"do_image_splitting": False}}
    folder = train(model_recipe("smolvlm", model=model, data={"train": [source], "eval": [source]}))
    assert any("eval_image_use" in row for row in json.loads((folder / "metrics.json").read_text()))


@pytest.mark.slow
def test_the_parity_gate_runs_in_a_fresh_process(model_recipe):
    folder = train(model_recipe("idefics3", "sft.max_steps=1"))
    parity = json.loads((folder / "bundle.json").read_text())["parity"]
    assert parity["equal"] and parity["positions"] > 0


BITS = {"4": ({"load_in_4bit": True}, "Linear4bit"), "8": ({"load_in_8bit": True}, "Linear8bitLt")}
QUANTISED = [*((name, "4") for name in CHECKED), ("qwen2_5_vl", "8"), ("kosmos-2", "8")]


@pytest.mark.parametrize(("name", "bits"), QUANTISED)
def test_the_language_models_linears_alone_are_quantised_also_before_they_are_read(name, bits, model_recipe):
    option, kind = BITS[bits]
    recipe = model_recipe(name, model={"pretrained": str(tiny(name)), "dtype": "bfloat16"}, quantization=option)
    model, empty = build_stack(recipe).model, build_empty_stack(recipe).model
    inside = part_modules(model)["language_model"][1]
    found = {module for module in inside.modules() if type(module).__name__ == kind}
    head = model.get_output_embeddings()
    assert found == {module for module in inside.modules() if _is_linear(module)} - {head}
    assert type(head) is nn.Linear and len(found) >= 8
    for part, wanted in (("vision_tower", torch.bfloat16), ("projector", torch.float32)):
        assert {p.dtype for n, p in model.named_parameters() if part_of(n) == part} <= {wanted}
    sizes, expected = ({n: weight_bytes(p) for n, p in each.named_parameters()} for each in (model, empty))
    assert sizes == expected
    total = sum(p.numel() for p in build_empty_stack(model_recipe(name)).model.parameters())
    assert sum(row.total for row in FreezePlan({}).rows(model)) == total


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), QUANTISED)
def test_lora_learns_beside_a_quantised_language_model(name, bits, model_recipe, tmp_path):
    recipe = model_recipe(name, f"sft.gradient_checkpointing={bits == '8'}", quantization=BITS[bits][0])
    stack = build_stack(recipe)
    rows = load_mixture(recipe.data.train)
    trainer = VLMSFTTrainer(
        stack.model, build_sft_config(recipe), MultimodalCollator(stack.processor), rows, stack.processor,
        lora_config(recipe, stack.model), plan=stack.plan, provenance=Provenance(recipe, stack.pieces),
    )  # fmt: skip
    learns = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in learns.values()} == {torch.float32}, "TRL would cast them to bf16"
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= set(learns) and {is_adapter(n) for n in moved} == {True, False}
    trainer.save_model(str(tmp_path / "bundle"))
    assert "quantization_config" not in json.loads((tmp_path / "bundle" / "config.json").read_text())
    batch = trainer.data_collator(list(rows))
    wanted = probe_logits(trainer.model, batch)
    again, _ = load(tmp_path / "bundle")
    assert torch.allclose(probe_logits(again, batch), wanted, atol=1e-5)
    whole, _ = load(tmp_path / "bundle", unquantised=True)
    assert (probe_logits(whole, batch) - wanted).abs().max() > 1e-3


def test_a_dry_run_reads_no_weights(model_recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_sft.families.build_family.from_pretrained", lambda *args, **options: 1 / 0)
    dry_run(model_recipe("llava_next"))
    said = capsys.readouterr().out
    assert "LlavaNextMultiModalProjector" in said and "No weight was read." in said
    assert "How many tokens an image becomes depends on its size: " in said
    dry_run(model_recipe("llava"))
    assert "An image becomes 4 tokens." in capsys.readouterr().out
    dry_run(model_recipe("qwen2_5_vl", quantization={"load_in_4bit": True}))
    said = capsys.readouterr().out
    assert "nf4" in said and "peak of the passes" in said and "No weight was read." in said


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": None}, 'the key "stack" is missing: the parts of the model'),
        ({"stack": {"vision_tower": {"pretrained": "a"}, "projector": {"type": "linear"},
                    "language_model": {"pretrained": "b"}}}, "keep one of them"),
        ({"train": {"resampler": 1e-3}}, "no resampler; remove it"),
        ({"quantization": {"load_in_4bit": True}, "lora": None}, "`quantization` needs `lora`"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(model_recipe, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        model_recipe("llava", **changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train": {"vision_tower": 1e-3}}, "train.vision_tower: this model has no vision_tower; its parts are proj"),
        ({"model": {"pretrained": "no/such"}}, "model.pretrained: 'no/such' is no folder here and could not be had"),
        ({"lora": {"r": 2, "target_modules": ["qkv"]}}, "'qkv' matches no linear layer of the language model"),
    ],
)
def test_what_the_model_does_not_have_is_refused(model_recipe, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        dry_run(model_recipe("fuyu", **changes))


def test_another_models_bundle_is_refused(model_recipe, pieces):
    recipe = model_recipe("llava", model={"pretrained": pieces["llama"]})
    with pytest.raises(UserError, match=r"a 'llama' model .* is none of those that a recipe can start from"):
        dry_run(recipe)


@pytest.mark.slow
def test_the_command_line_takes_its_bundle(model_recipe, seen, tmp_path, capsys):
    folder = train(model_recipe("qwen3_vl", "sft.max_steps=1"))
    (tmp_path / "0.png").write_bytes(encoded((40, 30)))
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"id": "0", "image": "0.png", "question": "What?", "answer": "a 3"}) + "\n")
    command = [
        "generate",
        str(folder),
        str(questions),
        "-o",
        str(tmp_path / "answers.jsonl"),
        "--set",
        "max_new_tokens=3",
    ]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert json.loads((tmp_path / "answers.jsonl").read_text())["id"] == "0"
    model, processor = load(folder)
    row = {"messages": [QUESTION], "images": [encoded((40, 30))]}
    with pytest.raises(UserError, match="num_beams must be 1 with images in an existing model"):
        answer(model, processor, [row], num_beams=2)


def test_a_model_that_cannot_keep_packed_rows_apart_says_why(model_recipe):
    with pytest.raises(UserError, match=r"`sft.packing` is not for a kosmos-2 model: its own class counts positions"):
        build_stack(model_recipe("kosmos-2", "sft.packing=true"))
