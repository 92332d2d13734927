"""Packed rows are trained on as if each stood alone: losses, gradients, steps, what is counted, and going on."""

from __future__ import annotations

import pytest
import torch

from support.conversations import make_row, turn
from support.tiny_pieces import tiny_stack
from vlm_sft.base.names import ROW_LENGTHS
from vlm_sft.batch.by_length import PACK

# fp32, losses of about 6 and gradients of about 1: sums of the same numbers in another order.
SAME = {"atol": 2e-6, "rtol": 2e-5}


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


def gradients(trainer, batch) -> dict[str, torch.Tensor]:
    """The loss of a batch in evaluation mode, and the gradient of each trained tensor."""
    trainer.model.eval()  # dropout would be drawn for other shapes
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(50))
    loss.backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys() and any(g.abs().max() > 1e-3 for n, g in found.items() if n != "loss")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, **SAME, msg=lambda said, name=name: f"{name}: {said}")


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
    from vlm_sft.base.errors import UserError
    from vlm_sft.model import modeling
    from vlm_sft.model.positions import packed_positions

    blind = lambda config, embeds, lengths: (None, torch.arange(embeds.shape[1])[None])  # noqa: E731
    trainer = packed_trainer(make_trainer, rows)
    with monkeypatch.context() as patch:
        patch.setattr(modeling, "kept_apart", blind)
        with pytest.raises(UserError, match=r"in this model \(llama\) a row of a pack sees the one before it: .*s/"):
            trainer.train()
    # Positions alone are not enough for a model that makes its mask without them.
    restart = lambda config, embeds, lengths: (None, packed_positions(lengths, embeds.shape[1]))  # noqa: E731
    monkeypatch.setattr(modeling, "kept_apart", restart)
    trainer.check_packing()
    assert trainer.model.training
