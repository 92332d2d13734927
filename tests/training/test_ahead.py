"""Batches that a thread makes are those that the trainer would make, and nothing else hangs on when it makes them."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from transformers.trainer_utils import IntervalStrategy

from support.bundles import snapshot
from vlm_sft import MultimodalCollator
from vlm_sft.base.errors import UserError
from vlm_sft.training import part_trainer
from vlm_sft.training.ahead import Ahead, draws_nothing

CPU = torch.device("cpu")
DROPOUT = {"train": {"projector": 1e-2}, "lora": {"r": 2, "lora_dropout": 0.3}, "chat_template": "ziya"}


def settled(made: list[int], count: int) -> bool:
    """Whether so many were made, and no more within a moment."""
    until = time.monotonic() + 10
    while len(made) < count and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    return len(made) == count


def test_so_many_as_there_is_room_for_are_made_before_they_are_asked_for_and_in_their_order():
    made: list[int] = []
    ahead = Ahead((made.append(n) or {"number": n} for n in range(7)), 2, CPU)
    assert settled(made, 2)
    assert next(ahead) == {"number": 0} and settled(made, 3)
    assert [batch["number"] for batch in ahead] == [1, 2, 3, 4, 5, 6]
    assert next(ahead, None) is None, "the end stays the end"
    ahead._thread.join(10)
    assert not ahead._thread.is_alive()


def test_an_error_comes_in_the_turn_of_its_batch():
    def batches():
        yield {"number": 0}
        raise UserError("row a/1 is broken")

    ahead = Ahead(batches(), 4, CPU)
    assert next(ahead) == {"number": 0}
    for _ in range(2):
        with pytest.raises(UserError, match="row a/1 is broken"):
            next(ahead)


def test_a_run_that_ends_early_leaves_no_thread():
    made: list[int] = []
    ahead = Ahead((made.append(n) or {"number": n} for n in range(1000)), 1, CPU)
    next(ahead)
    ahead.close()
    assert not ahead._thread.is_alive() and len(made) <= 3


@pytest.fixture
def threads(monkeypatch):
    """The names of the threads in which batches of training were made."""
    names: list[str] = []
    collate = MultimodalCollator.collate

    def noted(self, samples):
        names.append(threading.current_thread().name)
        return collate(self, samples)

    monkeypatch.setattr(MultimodalCollator, "collate", noted)
    return names


def test_weights_losses_and_random_state_are_those_of_batches_that_are_waited_for(make_trainer, monkeypatch, threads):
    """Evaluations in between use the same collator, dropout draws, and the run ends within an epoch."""
    sft = {"max_steps": 5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "logging_steps": 1,
           "dataloader_num_workers": 0}  # fmt: skip
    rows, found = list(make_trainer().train_dataset), []
    for may in (True, False):
        if not may:
            monkeypatch.setattr(part_trainer, "can_be_made_ahead", lambda loader, collator: False)
        threads.clear()
        torch.manual_seed(0)
        trainer = make_trainer(rows, rows[:2], sft, **DROPOUT)
        trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 1
        trainer.train()
        assert ("batches ahead" in threads) == may and "MainThread" in threads
        assert not [each for each in threading.enumerate() if each.name == "batches ahead"]
        logs = [{k: v for k, v in row.items() if "loss" in k or k == "grad_norm"} for row in trainer.state.log_history]
        found.append((snapshot(trainer.model), logs, torch.get_rng_state(), trainer.rows_met.seen))
    (ours, logs, state, seen), (theirs, *others) = found
    assert [logs, seen] == [others[0], others[2]] and torch.equal(state, others[1])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_collator_of_ones_own_works_where_random_numbers_are_drawn_in_turn(make_trainer, threads):
    class Augments(MultimodalCollator):
        """Draws."""

    trainer = make_trainer()
    own, ours = Augments(trainer.processing_class), trainer.data_collator
    assert draws_nothing(ours) and not draws_nothing(own) and not draws_nothing(lambda rows: {})
    ours.decode = lambda image, where: MultimodalCollator.decode(ours, image, where)
    assert not draws_nothing(ours), "a method that was put on it counts as its own"
    del ours.decode
    trainer.data_collator = own
    trainer.train()
    assert set(threads) == {"MainThread"}


def test_with_workers_there_is_no_thread(make_trainer, monkeypatch):
    monkeypatch.setattr(part_trainer, "Ahead", None)
    trainer = make_trainer(sft={"dataloader_num_workers": 1, "max_steps": 2})
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_row_that_fails_ends_the_run_with_its_sentence(make_trainer):
    rows = list(make_trainer().train_dataset)
    rows[2]["images"] = [{"path": "/nowhere/cat.png", "bytes": None}]
    sft = {"max_steps": 4, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(rows, sft=sft)
    with pytest.raises(UserError, match=r"cat\.png"):
        trainer.train()
    assert trainer.state.global_step < 3
    assert not [each for each in threading.enumerate() if each.name == "batches ahead"]
