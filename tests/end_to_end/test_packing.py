"""Packed rows are trained on as if each stood alone: losses, gradients, steps, what is counted, and going on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations import flex_attention as flex

from support.conversations import make_row, turn
from support.gradients import assert_same, gradients, math_of_flex
from support.tiny_pieces import tiny_stack
from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.base.names import ROW_LENGTHS
from vlm_sft.batch.by_length import PACK
from vlm_sft.batch.collator import REJECTED, SEEN
from vlm_sft.batch.counts import owners_of
from vlm_sft.batch.image_swap import with_other_images
from vlm_sft.model import modeling
from vlm_sft.model.losses import supervised_positions
from vlm_sft.model.positions import packed_positions
from vlm_sft.train import train


@pytest.fixture
def rows(photos):
    """Ten rows of many lengths: with one image, two and none, of one turn and two, in English and Chinese."""
    said = ["a cat", "两只狗在草地上", "so " * 30, "红色", "a bus and " * 12]
    return [
        make_row(
            turn("what is it?" if k % 2 else "这是什么？", said[k % 5], images=k % 3) + turn("and", "b") * (k % 2),
            photos[k % 5 :],
            k,
        )
        for k in range(10)
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("language", ["llama", "opt"])
def test_a_composed_stack_gives_what_separate_rows_give(make_trainer, pieces, rows, attention, language):
    stack = tiny_stack(pieces, lm=language, language={"attn_implementation": attention})
    trainer = make_trainer(stack=stack, lora={"r": 4}, train={"projector": 1e-2, "resampler": 1e-3})
    collate = trainer.data_collator
    alone = gradients(trainer, collate(rows))
    packs = [[rows[k] for k in numbers] for numbers in ([0, 7, 2, 3], [4, 1], [6], [8, 5, 9])]
    batch = collate([{PACK: pack} for pack in packs])
    assert "attention_mask" not in batch and (batch[ROW_LENGTHS] > 0).sum() == 10
    assert_same(gradients(trainer, batch), alone)


def test_flex_attention_keeps_rows_apart_in_a_mask_of_blocks(make_trainer, pieces, rows, monkeypatch):
    monkeypatch.setattr(flex, "compile_friendly_flex_attention", math_of_flex)
    stack = tiny_stack(pieces, language={"attn_implementation": "flex_attention"})
    trainer = make_trainer(stack=stack, lora={"r": 4})
    collate = trainer.data_collator
    with torch._dynamo.config.patch(disable=True):
        packed = gradients(trainer, collate([{PACK: rows[:4]}, {PACK: rows[4:]}]))
    trainer.model.base_model.model.model.language_model.set_attn_implementation("sdpa")
    assert_same(packed, gradients(trainer, collate(rows)))


def test_torchs_own_flex_attention_gives_the_losses_of_rows(make_trainer, pieces, rows, monkeypatch):
    """Forward alone: on a CPU torch has no gradient of it, and transformers would compile it for minutes."""
    monkeypatch.setattr(flex.WrappedFlexAttention, "__call__", lambda self: flex.flex_attention)
    stack = tiny_stack(pieces, language={"attn_implementation": "flex_attention"})
    trainer = make_trainer(stack=stack)
    collate, model = trainer.data_collator, trainer.model.eval()

    def loss(rows):
        with torch.no_grad():
            return trainer.compute_loss(model, dict(collate(rows)), num_items_in_batch=torch.tensor(50))

    packed = loss([{PACK: rows[:4]}, {PACK: rows[4:]}])
    model.model.language_model.set_attn_implementation("sdpa")
    torch.testing.assert_close(packed, loss(rows), atol=2e-6, rtol=1e-6)


def test_a_resampler_that_reads_the_instruction_reads_that_of_each_images_own_row(make_trainer, instructblip, rows):
    piece = {"pretrained": instructblip}
    stack = {"vision_tower": piece, "resampler": {"type": "instruct_qformer", **piece},
             "projector": {"type": "linear", **piece}, "language_model": piece}  # fmt: skip
    trainer = make_trainer(stack=stack, train={"projector": 1e-3, "resampler": 1e-4})
    alone = gradients(trainer, trainer.data_collator(rows))
    packs = [{PACK: [rows[5], rows[1], rows[4], rows[8]]}, {PACK: [rows[k] for k in (0, 2, 3, 6, 7, 9)]}]
    assert_same(gradients(trainer, trainer.data_collator(packs)), alone)


def test_a_bad_row_leaves_its_pack_alone_and_is_named(make_trainer, rows):
    trainer = make_trainer()
    collate = trainer.data_collator
    broken = {**rows[1], "id": "s/broken", "images": [{"path": "nowhere.png", "bytes": None}]}
    with pytest.raises(UserError, match=r"s/broken.*nowhere\.png"):
        collate([{PACK: [rows[0], broken, rows[2]]}])
    collate.drop_rejected = collate.count_rows = True
    batch = collate([{PACK: [rows[0], broken, rows[2]]}, {PACK: [broken]}, {PACK: [rows[3]]}])
    assert [(source, name) for source, name, *_ in batch.pop(REJECTED)] == [("s", "s/broken")] * 2
    assert batch.pop(SEEN) == {"s": 5}, "the ledger counts rows, not packs"
    whole = collate([{PACK: [rows[0], rows[2]]}, {PACK: [rows[3]]}])
    assert all(torch.equal(batch[name], whole[name]) for name in batch)


def test_images_are_exchanged_between_the_rows_of_a_pack(make_trainer, rows):
    trainer = make_trainer()
    token, each = trainer.processing_class.image_token_id, trainer.processing_class.ids_per_image
    found = []
    for items in (rows, [{PACK: rows[:6]}, {PACK: rows[6:]}]):
        batch = trainer.data_collator(items)
        swapped, complete = with_other_images(batch, token, each, None)
        owners = owners_of(batch)[0].flatten()[supervised_positions(batch["labels"])]
        found.append((swapped["pixel_values"], complete[owners]))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True)) and found[0][1].any()


def packed_trainer(make_trainer, rows, **sft):
    trainer = make_trainer(
        rows=rows, eval_rows=rows,
        sft={"packing": "true", "max_length": 120, "per_device_train_batch_size": 2, "max_steps": 3, **sft},
    )  # fmt: skip
    trainer.data_collator.max_length = 120
    return trainer


def test_a_run_packs_every_row_of_an_epoch_and_counts_rows_and_padding(make_trainer, rows):
    trainer = packed_trainer(make_trainer, rows, num_train_epochs=1, max_steps=-1)
    assert trainer.args.packing is False and trainer.packing and trainer.eval_packing, "TRL packs nothing"
    loader = trainer.get_train_dataloader()
    batches = list(loader)
    lengths = torch.cat([batch[ROW_LENGTHS][batch[ROW_LENGTHS] > 0] for batch in batches]).tolist()
    assert sorted(lengths) == sorted(trainer.lengths)
    assert all(batch["input_ids"].shape[1] <= 120 for batch in batches)
    assert trainer.num_examples(loader) == 10 and sum(len(b["input_ids"]) for b in batches) < 10
    packs = sum(len(batch["input_ids"]) for batch in batches)
    said = trainer.describe_packing()
    share = 1 - sum(lengths) / sum(batch["input_ids"].numel() for batch in batches)
    assert said.startswith(f"Packed: 10 rows make {packs} packs of at most 120 tokens, of which ")
    assert "without packing" in said and share < 0.3
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == len(batches) and all(0 <= log["padding_share"] < 0.5 for log in logs)


def test_accumulated_packs_give_the_step_of_all_rows(make_trainer, rows):
    weights = []
    for sft in (
        {"packing": "false", "per_device_train_batch_size": 10},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 32},
    ):
        torch.manual_seed(0)  # the projector is drawn anew
        trainer = packed_trainer(make_trainer, rows, max_steps=1, optim="sgd", seed=3, max_grad_norm=0, **sft)
        before = trainer.model.model.projector.linear.weight.detach().clone()
        trainer.train()
        weights.append(trainer.model.model.projector.linear.weight.detach() - before)
    assert weights[0].abs().max() > 1e-5
    torch.testing.assert_close(weights[1], weights[0], atol=1e-7, rtol=1e-3)


def test_an_evaluation_of_packs_is_that_of_rows(make_trainer, rows):
    trainer = packed_trainer(make_trainer, rows)
    trainer.model.eval()
    packed = trainer.evaluate()
    trainer.eval_packing = False
    trainer.args.per_device_eval_batch_size = 10
    alone = trainer.evaluate()
    for name in ("eval_loss", "eval_token_accuracy"):
        assert packed[name] == pytest.approx(alone[name], abs=1e-5), name


def test_a_model_whose_rows_see_each_other_is_refused_before_the_first_step(make_trainer, rows, monkeypatch):
    blind = lambda lm, embeds, lengths, own, heads: (None, torch.arange(embeds.shape[1])[None])  # noqa: E731
    trainer = packed_trainer(make_trainer, rows)
    with monkeypatch.context() as patch:
        patch.setattr(modeling, "kept_apart", blind)
        with pytest.raises(UserError, match=r"in this model \(llama\) a row of a pack sees the one before it: .*s/"):
            trainer.train()
    # Positions alone are not enough for a model that makes its mask without them.
    restart = lambda lm, embeds, lengths, own, heads: (None, packed_positions(lengths, embeds.shape[1]))  # noqa: E731
    monkeypatch.setattr(modeling, "kept_apart", restart)
    trainer.check_packing()
    assert trainer.model.training


@pytest.mark.parametrize(("loss", "off", "refused"), [(7.0, 0.06, False), (1.0, 0.06, True), (7.0, 0.3, True)])
def test_in_half_precision_a_large_loss_may_be_rounded_more(make_trainer, rows, monkeypatch, loss, off, refused):
    trainer = packed_trainer(make_trainer, rows)
    trainer.args.bf16 = True
    found = iter([torch.full((6,), loss), torch.full((6,), loss + off)])
    monkeypatch.setattr(trainer, "_losses_of", lambda items: next(found))
    if refused:
        with pytest.raises(UserError, match="a row of a pack sees the one before it"):
            trainer.check_packing()
    else:
        trainer.check_packing()


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True], ids=["set", "stream"])
def test_a_run_of_packs_goes_on_to_the_same_weights_losses_and_ledger(
    recipe_file, tmp_path, photos, monkeypatch, streaming
):
    monkeypatch.setattr("vlm_sft.bundle.parity.check_parity", lambda *args: {"positions": 0, "max_difference": 0.0})
    lines = [{"image": photos[k % 8], "caption": "so " * (1 + k * 7 % 24) + "猫", "id": str(k)} for k in range(40)]
    lines[5]["image"] = "nowhere.png"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    data = {"train": [{"path": str(tmp_path / "rows.jsonl"), "format": "caption"}], "max_rejected": 0.3}
    data |= {"streaming": True, "shuffle_buffer": 4} if streaming else {}

    def run(name: str, resume: str | None = None) -> Path:
        sft = {"output_dir": str(tmp_path / name), "packing": True, "max_length": 100, "max_steps": 6,
               "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "bf16": False,
               "report_to": "none", "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "use_cpu": True,
               "dataloader_num_workers": 0, "resume_from_checkpoint": resume}  # fmt: skip
        return train(load_recipe(recipe_file(name, sft=sft, data=data)))

    whole = run("whole")
    gone_on = run("on", str(whole / "checkpoint-2"))
    trained, again = (load_file(folder / "trained.safetensors") for folder in (whole, gone_on))
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    logs, ledgers = [], []
    for folder in (whole, gone_on):
        steps = [row for row in json.loads((folder / "metrics.json").read_text()) if "loss" in row]
        logs.append([(row["loss"], row["padding_share"]) for row in steps])
        ledgers.append(json.loads((folder / "bundle.json").read_text())["ledger"]["train"])
    assert logs[0] == logs[1] and len(logs[0]) == 6 and ledgers[0] == ledgers[1]
    assert max(share for _, share in logs[0]) < 0.3
    (source,) = ledgers[0]["sources"].values()
    assert source["rejected"] == {"image missing": 1} and source["used"] >= 39
