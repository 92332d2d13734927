"""The trainer: who moves and how fast, what is measured, and that the loss is TRL's."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig, SFTTrainer

from support.bundles import snapshot
from support.conversations import make_row, turn
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.manifest import Provenance
from vlm_sft.data.ledger import Ledger, SourceLedger
from vlm_sft.model.freeze import is_adapter, part_of


def test_each_trained_tensor_moves_and_each_frozen_one_is_bit_identical(make_trainer):
    trainer = make_trainer(train={"projector": 1e-2, "resampler": 1e-3}, lora={"r": 2}, chat_template="ziya")
    before = snapshot(trainer.model)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        planned = is_adapter(name) or part_of(name) in ("projector", "resampler")
        # Attention softmax is blind to a bias added to every key.
        blind = name.endswith(("key.bias", "k_proj.bias"))
        assert moved == planned or (planned and blind), name


def test_learning_rates_stand_in_the_optimizer_and_follow_the_schedule(make_trainer):
    trainer = make_trainer(
        train={"projector": 1e-2}, lora={"r": 2}, chat_template="ziya", sft={"lr_scheduler_type": "linear"}
    )
    trainer.train()
    rates = {group["part"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"projector": 1e-2, "lora": 1e-3}
    assert all(group["lr"] == 0 for group in trainer.optimizer.param_groups), "linear decay ended at zero"


def test_weight_decay_spares_biases_and_norms_in_every_part(make_trainer):
    trainer = make_trainer(train={"projector": 1e-2, "resampler": 1e-3}, sft={"weight_decay": 0.1})
    trainer.create_optimizer()
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert (group["weight_decay"] == 0) == (name.endswith("bias") or "norm" in name.lower()), name


def test_the_loss_is_trls_loss_on_the_same_batch(make_trainer):
    trainer = make_trainer()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    with torch.no_grad():
        ours = trainer.compute_loss(trainer.model, dict(batch))
        trls = SFTTrainer.compute_loss(trainer, trainer.model, dict(batch))
    torch.testing.assert_close(ours, trls, atol=1e-6, rtol=0)


def test_no_tensor_of_rows_by_vocabulary_is_made(make_trainer, monkeypatch):
    trainer = make_trainer()
    batch = next(iter(trainer.get_train_dataloader()))
    supervised, scored = int((batch["labels"][:, 1:] != -100).sum()), []
    head = trainer.model.lm_head.register_forward_hook(lambda module, given, out: scored.append(out.shape[0]))
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    head.remove()
    assert set(scored) == {supervised} and supervised < batch["labels"].numel()


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch(make_trainer):
    weights = []
    for size, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)  # the projector is drawn anew
        trainer = make_trainer(
            sft={"max_steps": 1, "per_device_train_batch_size": size, "gradient_accumulation_steps": steps,
                 "optim": "sgd", "seed": 3, "max_grad_norm": 0}
        )  # fmt: skip
        trainer.train()
        weights.append(trainer.model.model.projector.linear.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=0)


def test_a_text_only_batch_trains_beside_a_visual_one(make_trainer, photos):
    rows = [make_row(turn("hi", "there"), photos, i) for i in range(4)]
    trainer = make_trainer(rows=rows, chat_template="ziya", lora={"r": 2})
    before = snapshot(trainer.model)
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(is_adapter(n) for n in moved), "a zero gradient moves no projector"
    assert all(math.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)


def test_metrics_are_logged(make_trainer, photos):
    rows = [make_row(turn("what?", f"photo {i}", images=1), photos[i:] + photos[:i], i) for i in range(6)]
    trainer = make_trainer(rows=rows, eval_rows=rows)
    trainer.args.eval_strategy, trainer.state.eval_steps = IntervalStrategy.STEPS, 1
    trainer.args.eval_steps = 1
    trainer.train()
    train_log = next(row for row in trainer.state.log_history if "loss" in row)
    assert 0 <= train_log["token_accuracy"] <= 1 and 0 <= train_log["data_wait_share"] < 1
    assert train_log["tokens_per_second"] > train_log["samples_per_second"] > 0
    eval_log = next(row for row in trainer.state.log_history if "eval_loss" in row)
    assert eval_log["eval_image_use"] == pytest.approx(
        eval_log["eval_loss_other_image"] - eval_log["eval_loss_own_image"]
    )
    assert "eval_token_accuracy" in eval_log


def test_the_evaluation_loss_weighs_every_token_alike_whatever_the_batch_size(make_trainer, photos):
    rows = [make_row(turn("what?", "so " * (1 + 6 * i), images=1), photos[i:] + photos[:i], i) for i in range(5)]
    trainer, found = make_trainer(rows=rows, eval_rows=rows), []
    for size in (1, 2, 5):
        trainer.args.per_device_eval_batch_size = size
        found.append(trainer.evaluate()["eval_loss"])
    with torch.no_grad():
        whole = trainer.model(**trainer.data_collator(rows)).loss
    assert found == pytest.approx([float(whole)] * 3, abs=1e-5)
    assert trainer.state.log_history[-1]["eval_loss"] == found[-1]


def test_image_use_is_zero_for_a_model_that_does_not_look(make_trainer, photos):
    rows = [make_row(turn("what?", f"photo {i}", images=1), photos[i:] + photos[:i], i) for i in range(6)]
    trainer = make_trainer(rows=rows, eval_rows=rows)
    with torch.no_grad():
        trainer.model.model.projector.linear.weight.zero_()
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.state.log_history[-1]["eval_image_use"] == pytest.approx(0, abs=1e-6)


def test_the_users_own_sft_settings_are_kept(make_trainer):
    trainer = make_trainer(sft={"adam_beta2": 0.95, "label_names": "[labels]"})
    assert isinstance(trainer.args, SFTConfig) and trainer.args.adam_beta2 == 0.95
    assert trainer.args.remove_unused_columns is False and trainer.args.ddp_find_unused_parameters is False


def test_what_a_gpu_and_other_processes_would_wait_for_is_set(make_trainer):
    trainer = make_trainer(sft={"ddp_bucket_cap_mb": 7})
    handler = trainer.accelerator.ddp_handler
    assert handler.gradient_as_bucket_view and handler.bucket_cap_mb == 7
    # A batch without images has another graph than one with them.
    assert not handler.static_graph and not handler.find_unused_parameters
    assert trainer.args.accelerator_config.non_blocking is trainer.args.dataloader_pin_memory
    assert trainer.create_optimizer().defaults["fused"] is True


def test_a_trainer_that_is_done_gives_back_all_but_its_weights(make_trainer):
    trainer = make_trainer(train={"projector": 1e-2, "resampler": 1e-3})
    trainer.train()
    sum(p.sum() for p in trainer.model.parameters() if p.requires_grad).backward()
    state = weakref.ref(next(iter(trainer.optimizer.state.values()))["exp_avg"])
    gradient = weakref.ref(next(p.grad for p in trainer.model.parameters() if p.grad is not None))
    weights = snapshot(trainer.model)
    trainer.release()
    assert state() is None and gradient() is None and trainer.optimizer is None
    assert all(torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())


# ------------------------------------------------------------------------------------------- rows met while training


@pytest.fixture
def trainer_with_a_gap(make_trainer, photos, tmp_path):
    """Eight rows, two of them broken deep inside, in two batches; the share of them that is allowed."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(photos[0]).read_bytes()[:60])
    rows = [make_row(turn("q", "b", images=1), photos, i) for i in range(8)]
    for i in (2, 5):
        rows[i]["images"] = [{"path": str(broken), "bytes": None}]

    def make(share):
        trainer = make_trainer(rows=rows, eval_rows=rows, sft={"num_train_epochs": 2, "max_steps": 4})
        ledgers = {name: Ledger(share, {"s": SourceLedger(read=8)}) for name in ("train", "eval")}
        notes = {"ledger": {name: ledger.as_dict() for name, ledger in ledgers.items()}}
        trainer.provenance, trainer.ledgers = Provenance(None, {}, notes), ledgers
        trainer.data_collator.drop_rejected = share > 0
        return trainer

    return make


def test_rows_that_break_while_training_are_left_out_and_entered_once(trainer_with_a_gap):
    trainer = trainer_with_a_gap(0.25)
    trainer.train()
    trainer.evaluate()
    for name in ("train", "eval"):
        entry = trainer.provenance.notes["ledger"][name]["sources"]["s"]
        assert sorted(entry["met"]) == ["s/2", "s/5"] and entry["rejected"] == {"image damaged": 2}
        assert len(entry["examples"]["image damaged"]) == 2
    assert trainer.state.global_step == 4
    saved = json.loads(json.dumps(trainer.counters()))
    before, trainer.ledgers = trainer.ledgers, {name: Ledger(0.25) for name in trainer.ledgers}
    trainer.set_counters(saved)
    assert trainer.ledgers == before, "a run that goes on knows what it met before"


def test_too_many_of_them_stop_the_run_with_the_table(trainer_with_a_gap, capsys):
    trainer = trainer_with_a_gap(0.2)
    with pytest.raises(UserError, match=r'2 of 8 rows of the source "s" cannot be used, more than data\.max_rejected'):
        trainer.train()
    assert "s: 2 × image damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"row s/\d: the image .*broken\.png is truncated or damaged"):
        trainer_with_a_gap(0.0).train()
