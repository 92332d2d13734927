"""Steps that go wrong are stopped or skipped with their rows written down; a worker that dies names its rows."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import time

import pytest
import torch

from support.bundles import snapshot
from vlm_sft.base.errors import UserError
from vlm_sft.model.freeze import part_modules
from vlm_sft.training.watch import ROW_IDS, Losses, WatchedCollator, dead_worker, gone_workers

STEPS = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def spoil(trainer, step, factor=math.nan):
    """Multiplies the loss that the model gives for the second micro-batch of a step."""
    calls = [0]

    def spoiled(model, inputs, output):
        calls[0] += 1
        output.loss = output.loss * (factor if calls[0] == 2 * step else 1.0)

    trainer.model.register_forward_hook(spoiled)


def records(trainer):
    return [json.loads(line) for line in open(f"{trainer.args.output_dir}/watch.jsonl", encoding="utf-8")]


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(make_trainer):
    trainer = make_trainer(sft=STEPS)
    spoil(trainer, 2)
    with pytest.raises(UserError, match=r"Step 2: the loss is nan; its rows are captions/\d, captions/\d \(all "):
        trainer.train()
    (record,) = records(trainer)
    assert record["step"] == 2 and record["why"] == "nonfinite" and math.isnan(record["losses"][1])
    assert [len(ids) for ids in record["rows"]] == [2, 2] and all(
        p.isfinite().all() for p in trainer.model.parameters()
    )
    assert trainer.state.global_step == 1


def test_a_skipped_step_leaves_weights_and_moments_as_they_are(make_trainer, capsys):
    trainer = make_trainer(sft={**STEPS, "weight_decay": 0.1})
    trainer.watch.nonfinite = "skip"
    spoil(trainer, 3, math.inf)
    seen = []
    trainer.add_callback(_after_each_step(lambda: seen.append(snapshot(trainer.model))))
    trainer.train()
    name = next(n for n, p in trainer.model.named_parameters() if p.requires_grad)
    assert not torch.equal(seen[0][name], seen[1][name]) and torch.equal(seen[1][name], seen[2][name])
    assert not torch.equal(seen[2][name], seen[3][name]) and seen[3][name].isfinite().all()
    assert "step 3: the loss is inf: the step is skipped; rows captions/" in capsys.readouterr().err
    assert [record["step"] for record in records(trainer)] == [3]


def _after_each_step(act):
    from transformers import TrainerCallback

    class Spy(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            act()

    return Spy()


def test_a_jump_is_logged_with_its_rows_and_training_goes_on(make_trainer, capsys):
    trainer = make_trainer(sft={**STEPS, "learning_rate": 1e-8})
    trainer.watch.losses.recent.extend([5.0, 6.0] * 10)
    spoil(trainer, 2, 100.0)
    trainer.train()
    (record,) = records(trainer)
    assert record["why"] == "jump" and record["step"] == 2 and record["loss"] > 50
    assert "step 2: the loss jumps to " in capsys.readouterr().err


def test_the_limit_follows_the_rule():
    losses = Losses(10.0)
    losses.recent.extend([1.0] * 19)
    assert losses.limit() == math.inf, "too few to say"
    losses.recent.append(1.0)
    assert losses.limit() == pytest.approx(1.5), "a spread of at least a twentieth of the median"
    losses.recent.extend([0.8, 1.2] * 25)
    assert losses.limit() == pytest.approx(1.0 + 10 * 1.4826 * 0.2)
    losses.recent.extend([0.0001, 0.0002] * 25)
    assert losses.limit() == pytest.approx(0.1, abs=0.001), "of a model that knows its rows, no jump is worth a word"
    assert Losses(None).limit() == math.inf


def test_ids_travel_beside_the_tensors_of_any_collator():
    batch = WatchedCollator(lambda rows: {"x": torch.zeros(len(rows))})([{"id": "a/1"}, {"id": 2}])
    assert batch[ROW_IDS] == ["a/1", "2"] and batch["x"].shape == (2,)


def fail_on_b(rows):
    if any(row["id"] == "b" for row in rows):
        raise KeyError("colour")
    return {}


def test_a_collator_that_fails_names_the_row_and_its_image():
    rows = [{"id": "a"}, {"id": "b", "images": [{"path": "b.png", "bytes": None}]}]
    with pytest.raises(RuntimeError, match=r"^row b \(b\.png\): KeyError: 'colour'$"):
        WatchedCollator(fail_on_b)(rows)


def test_a_batch_that_fails_only_together_names_all_its_rows():
    def fail_on_two(rows):
        if len(rows) > 1:
            raise ValueError("too wide together")

    with pytest.raises(RuntimeError, match=r"^row a, row b: ValueError: too wide together"):
        WatchedCollator(fail_on_two)([{"id": "a"}, {"id": "b"}])


def test_torchs_words_about_a_dead_worker_become_a_sentence(tmp_path):
    (tmp_path / "12").write_text("row a/1 (cat.jpg)")
    for words in ("is killed by signal: Killed. ", "exited unexpectedly"):
        said = dead_worker(f"DataLoader worker (pid 12) {words}", tmp_path)
        assert said is not None and said.startswith("A data-loader worker died in a batch of row a/1 (cat.jpg); if")
    said = dead_worker("DataLoader worker (pid(s) 13, 14) exited unexpectedly", tmp_path)
    assert said is not None and "died before its first batch" in said
    assert dead_worker("CUDA out of memory", tmp_path) is None


def failing(trainer, fails):
    """Makes the vision tower raise where `fails` says so of its pixels, as a table of positions that is too short."""

    def check(module, args, options):
        if fails(args[0]):
            raise RuntimeError("The size of tensor a (9) must match\nthe size of tensor b (5)")

    part_modules(trainer.model)["vision_tower"][1].register_forward_pre_hook(check, with_kwargs=True)


def test_rows_whose_picture_the_model_fails_on_are_named(make_trainer):
    trainer = make_trainer(sft={"max_steps": 8, "per_device_train_batch_size": 1})
    failing(trainer, lambda pixels: (pixels[:, 0] < -1.7).all(-1).all(-1).any())  # the one photo without red
    said = r"^Step \d: the model fails on a picture of the rows captions/1 \(The size of tensor a \(9\) must match"
    with pytest.raises(UserError, match=said):
        trainer.train()


def test_a_mistake_in_the_tower_stays_one_and_a_note_names_the_rows(make_trainer):
    trainer = make_trainer(sft={"max_steps": 1, "per_device_train_batch_size": 2})
    failing(trainer, lambda pixels: True)
    with pytest.raises(RuntimeError, match="The size of tensor a") as error:
        trainer.train()
    assert not isinstance(error.value, UserError)
    assert any(note.startswith("in a batch of the rows captions/") for note in error.value.__notes__)


class Deadly:
    """A collator whose worker is killed at one row, as the system does that runs out of memory."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, rows):
        if any(row["id"] == "captions/5" for row in rows):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.collator(rows)


@pytest.mark.slow
def test_a_worker_that_is_killed_names_its_rows(make_trainer):
    trainer = make_trainer(sft={"dataloader_num_workers": 1, "per_device_train_batch_size": 1, "max_steps": 8})
    trainer.data_collator = Deadly(trainer.data_collator)
    with pytest.raises(UserError, match=r"died in a batch of row captions/5 \(.*4\.png\); if memory ran out"):
        trainer.train()


def test_a_worker_whose_death_was_said_to_nobody_is_found(tmp_path):
    assert gone_workers(tmp_path) == ""
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start()
    (tmp_path / str(child.pid)).write_text("row 图/5", encoding="utf-8")
    assert gone_workers(tmp_path) == ""
    child.kill()
    child.join()
    assert "row 图/5" in (dead_worker(gone_workers(tmp_path), tmp_path) or "")
