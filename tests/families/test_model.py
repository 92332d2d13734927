"""The class put over an existing VLM: the same logits and loss, and a gradient for every trained parameter."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig
from trl import SFTConfig

from support.tiny_families import ALL, CHECKED, EVERY, processor_of, rows, tiny
from vlm_sft.base.errors import UserError
from vlm_sft.batch.by_length import PACK
from vlm_sft.batch.collator import MultimodalCollator
from vlm_sft.families.build_family import model_class
from vlm_sft.families.model import set_dtypes
from vlm_sft.families.table import FAMILIES
from vlm_sft.model.freeze import FreezePlan, part_modules, part_of
from vlm_sft.rows.merging import merged
from vlm_sft.training.trainer import VLMSFTTrainer

PARTS = ("vision_tower", "projector", "language_model")


def build(name: str):
    """(model, processor) of a family, everything trained."""
    config = AutoConfig.from_pretrained(tiny(name))
    model, processor = model_class(config).from_pretrained(tiny(name)), processor_of(name)
    model.blank = processor.image_inputs([Image.new("RGB", (64, 64))])
    FreezePlan(dict.fromkeys(PARTS, 1e-3)).apply(model)
    return model.train(), processor


@pytest.mark.parametrize("name", ALL)
def test_logits_and_loss_are_the_models_own(name):
    model, processor = build(name)
    native = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(model.config)].from_pretrained(tiny(name))
    batch = MultimodalCollator(processor)(rows((40, 30), None, (300, 60)))
    model.eval(), native.eval()
    with torch.no_grad():
        # Mllama's own class wants images row by row; `test_mllama` gives it those of its own processor.
        ours, theirs = model(**batch), native(**(model.complete(batch) if name == "mllama" else batch))
        scored = model(**batch, supervised_only=True)
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-6)
    assert torch.allclose(scored.loss, theirs.loss, atol=1e-5)
    assert scored.token_losses.numel() == (batch["labels"] != -100).sum()


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_of_text_alone_gives_every_parameter_the_gradient_that_it_had_and_images_move_it(name):
    model, processor = build(name)
    collator = MultimodalCollator(processor)
    model(**collator(rows((40, 30), None)), supervised_only=True).loss.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    moved = {part_of(n) for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == set(part_modules(model))
    model.zero_grad()
    model(**collator(rows(None, None)), supervised_only=True).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == reached
    image_path = [p for n, p in model.named_parameters() if part_of(n) != "language_model" and p.grad is not None]
    assert all(p.grad.abs().max() == 0 for p in image_path)


def calls(model, batch) -> list[str]:
    """The modules with weights of their own, as they are called and as the gradient comes back to them."""
    seen: list[str] = []
    hooks = []

    def watch(name: str, module: torch.nn.Module) -> None:
        def there(module, args, output):
            if torch.is_tensor(output) and output.requires_grad:
                output.register_hook(lambda gradient: seen.append(f"back to {name}"))

        hooks.append(module.register_forward_pre_hook(lambda *_: seen.append(name)))
        hooks.append(module.register_forward_hook(there))

    for name, module in model.named_modules():
        if name not in ("", "model") and next(module.parameters(recurse=False), None) is not None:
            watch(name, module)
    model(**batch, supervised_only=True).loss.backward()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", CHECKED)
def test_text_alone_calls_what_images_of_any_size_call_in_the_same_order(name):
    # Processes that share weights must ask for the same ones, one after the other: else they wait for ever.
    model, processor = build(name)
    FreezePlan({"projector": 1e-3}).apply(model)
    collator = MultimodalCollator(processor)
    wanted = calls(model, collator(rows((40, 30), None)))
    assert any(call.startswith("back to") for call in wanted)
    assert {part_of(call) for call in wanted if not call.startswith("back to")} == set(part_modules(model))
    for others in (((300, 60), (60, 200)), (None, None)):
        found = calls(model, collator(rows(*others)))
        assert (set(found) == set(wanted)) if FAMILIES[name].one_by_one else (found == wanted)


def test_where_processes_share_weights_a_projector_that_is_called_for_each_image_is_refused():
    model, processor = build("paddleocr_vl")
    batch = MultimodalCollator(processor)(rows((40, 30)))
    model(**batch, supervised_only=True)
    next(p for n, p in model.named_parameters() if part_of(n) == "projector").ds_id = 0  # as DeepSpeed marks a share
    with pytest.raises(UserError, match=r"weights of this model cannot be split .*; use DDP, or DeepSpeed's stage 2"):
        model(**batch, supervised_only=True)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "kosmos-2", "fuyu"])
def test_a_frozen_image_path_runs_for_text_alone_only_where_others_wait_for_its_share(name, monkeypatch):
    model, processor = build(name)
    FreezePlan({"language_model": 1e-3}).apply(model)
    batch = MultimodalCollator(processor)(rows(None))

    def image_path() -> set[str]:
        return {call for call in calls(model, batch) if "back to" not in call and part_of(call) != "language_model"}

    alone = image_path()
    monkeypatch.setattr("vlm_sft.model.sharding.is_sharded", lambda weights: True)
    model.eval()
    shared = image_path()
    # KOSMOS-2 takes no batch of text alone, so it always has a blank image.
    assert shared and alone == (shared if name == "kosmos-2" else set())


@pytest.mark.parametrize("name", CHECKED)
def test_parts_of_different_types_follow_each_other(name):
    model, processor = build(name)
    set_dtypes(model, ["projector"], torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if part_of(n) == "projector"} == {torch.float32}
    batch = MultimodalCollator(processor)(rows((40, 30), None))
    with torch.no_grad():
        assert model.eval()(**batch).logits.isfinite().all()


def make_trainer(name: str, folder, data: list[dict], **options) -> VLMSFTTrainer:
    """One step of plain descent with everything trained."""
    model, processor = build(name)
    args = SFTConfig(
        output_dir=str(folder), max_steps=1, optim="sgd", max_grad_norm=0, learning_rate=1e-3, save_strategy="no",
        report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, **options,
    )  # fmt: skip
    plan = FreezePlan(dict.fromkeys(PARTS, 1e-3))
    return VLMSFTTrainer(model, args, MultimodalCollator(processor), Dataset.from_list(data), processor, plan=plan)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_accumulated_micro_batches_weigh_every_token_alike(name, tmp_path):
    unequal, moved = rows((40, 30), None, (30, 40), None), []
    for number, row in enumerate(unequal):
        row["messages"][1]["content"][0]["text"] = "so " * (1 + 5 * number)
    for size, steps in ((4, 1), (1, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = make_trainer(name, tmp_path, unequal, **options)
        trainer.train()
        moved.append(trainer.model.get_output_embeddings().weight.detach().clone())
    torch.testing.assert_close(*moved, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", ["llava", "kosmos-2"])
def test_the_use_of_images_is_measured_where_each_takes_as_many_tokens(name, tmp_path):
    held_out = rows((40, 30), None, (30, 40))
    trainer = make_trainer(name, tmp_path, rows(None), per_device_eval_batch_size=3)
    found = trainer.evaluate(Dataset.from_list(held_out))
    assert found["eval_image_use"] != 0
    model, batch = trainer.model.eval(), trainer.data_collator(held_out)
    with torch.no_grad():
        losses = [model(**each, supervised_only=True).token_losses.split(_lengths(batch))
                  for each in (batch, {**batch, "pixel_values": batch["pixel_values"].flip(0)})]  # fmt: skip
    own, other = (torch.cat([row[0], row[2]]).mean() for row in losses)
    assert found["eval_image_use"] == pytest.approx(float(other - own), abs=1e-5)


def _lengths(batch: dict) -> list[int]:
    return (batch["labels"] != -100).sum(1).tolist()


def test_weight_decay_spares_norms_whatever_they_are_called(tmp_path):
    trainer = make_trainer("qwen2_5_vl", tmp_path, rows(None), weight_decay=0.1)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    assert not [name for name, p in trainer.model.named_parameters() if p.ndim < 2 and name in decayed]
    assert not [name for name, p in trainer.model.named_parameters() if p.ndim > 1 and name not in decayed]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_frozen_tower_stays_in_evaluation_mode_and_is_looked_for_once(name, monkeypatch):
    model, _ = build(name)
    parts = {part: module for part, (_, module) in part_modules(model).items()}
    tower = parts["vision_tower"]
    assert tower.training, "it is trained"
    # Qwen2.5-VL's projector lies within the tower.
    FreezePlan({"projector": 1e-3} if name == "llava" else {"language_model": 1e-3}).apply(model)
    monkeypatch.setattr("vlm_sft.families.model.part_modules", lambda model: 1 / 0)
    model.train()
    assert not any(module.training for module in tower.modules())
    assert all(module.training for module in parts["language_model"].modules())
    assert parts["projector"].training == (name == "llava")
    FreezePlan({"vision_tower": 1e-3}).apply(model)
    assert all(module.training for module in model.train().modules())
    assert not any(module.training for module in model.eval().modules())


@pytest.mark.parametrize("name", [name for name in EVERY if not FAMILIES[name].no_packing])
def test_packed_rows_give_the_loss_and_gradients_of_separate_ones(name):
    model, processor = build(name)
    model.eval()
    data = rows((40, 30), None, (60, 200), (30, 40), None)
    for number, row in enumerate(data):
        row["messages"][1]["content"][0]["text"] = "so " * (1 + 5 * number)
    collator, found = MultimodalCollator(processor), []
    for items in (data, [{PACK: [data[0], data[2], data[1]]}, {PACK: [data[4], data[3]]}]):
        model.zero_grad()
        model(**collator(items), supervised_only=True, use_cache=False, num_items_in_batch=40).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        scale = max(g.abs().max() for g in found[0].values())
    assert found[0].keys() == found[1].keys() and scale > 1e-3
    for parameter, gradient in found[0].items():
        assert float((found[1][parameter] - gradient).abs().max() / scale) < 2e-5, parameter


@pytest.mark.parametrize("name", [name for name in CHECKED if not FAMILIES[name].no_sharing])
def test_questions_that_share_a_picture_give_the_loss_and_gradients_of_separate_rows(name):
    model, processor = build(name)
    model.eval()
    if getattr(model.config.get_text_config(), "sliding_window", None):
        model.config.get_text_config().sliding_window = 4096  # shorter ones are refused, see `shared_mask`
    data = rows((40, 30), None, None, (60, 200), None, None)
    for number, row in enumerate(data):
        row["messages"][1]["content"][0]["text"] = "so " * (1 + 5 * number)
        row["messages"][0]["content"][-1]["text"] = "这是什么？ " * (1 + number % 3)
        if number not in (0, 3, 5):  # on the picture of the row before
            row["images"] = data[number - 1]["images"]
            row["messages"][0]["content"].insert(0, {"type": "image"})
    first, second = merged(data[:3], True), merged(data[3:5], True)
    collator, found = MultimodalCollator(processor), []
    for items in (data, [second, data[5], first], [{PACK: [first, data[5], second]}]):
        model.zero_grad()
        model(**collator(items), supervised_only=True, use_cache=False, num_items_in_batch=40).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        scale = max(g.abs().max() for g in found[0].values())
    assert found[0].keys() == found[1].keys() and scale > 1e-3
    for other in found[1:]:
        for parameter, gradient in found[0].items():
            assert float((other[parameter] - gradient).abs().max() / scale) < 2e-5, parameter
