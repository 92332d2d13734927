"""Inside a step the host asks the device for one thing, once: whether the step may change the weights."""

from __future__ import annotations

import pytest
from datasets import Dataset
from PIL import Image
from transformers import AutoConfig, TrainerCallback
from trl import SFTConfig

from support.tiny_families import processor_of, rows, tiny
from support.waits import Waits
from vlm_sft import FreezePlan, MultimodalCollator, VLMSFTTrainer
from vlm_sft.families.build_family import model_class

STEPS = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 100}


class Window(TrainerCallback):
    """Counts from the moment that the batches of a step are there until it is done."""

    def __init__(self, trainer: VLMSFTTrainer, waits: Waits) -> None:
        self.waits, self.fetch = waits, trainer.get_batch_samples
        trainer.get_batch_samples = self.get_batch_samples
        trainer.add_callback(self)
        waits.on = False

    def get_batch_samples(self, *args, **kwargs):
        batches = self.fetch(*args, **kwargs)
        self.waits.on = True
        return batches

    def on_step_end(self, *args, **kwargs) -> None:
        self.waits.on = False


def waits_of(trainer: VLMSFTTrainer) -> Waits:
    """Trains and counts."""
    waits = Waits()
    Window(trainer, waits)
    with waits:
        trainer.train()
    assert trainer.state.global_step == 3
    return waits


ONCE = {"watch._read: tolist": 3}


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["whole", "lora"])
def test_a_step_of_a_composed_model_waits_once(make_trainer, lora, clip):
    trainer = make_trainer(sft={**STEPS, "max_grad_norm": clip}, lora=lora, chat_template="ziya")
    waits = waits_of(trainer)
    assert waits.ours == ONCE
    assert [where for where in waits.theirs if where.startswith("trainer.")] == [], "nor for the log's filter"


def test_so_does_one_of_an_existing_model(tmp_path):
    model = model_class(AutoConfig.from_pretrained(tiny("llava"))).from_pretrained(tiny("llava"))
    processor, plan = processor_of("llava"), FreezePlan({"projector": 1e-3})
    model.blank = processor.image_inputs([Image.new("RGB", (64, 64))])
    plan.apply(model)
    args = SFTConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        save_strategy="no", learning_rate=1e-3, **STEPS,
    )  # fmt: skip
    data = Dataset.from_list(rows((40, 30), None, (30, 40), (20, 20)))
    trainer = VLMSFTTrainer(model, args, MultimodalCollator(processor), data, processor, plan=plan)
    assert waits_of(trainer).ours == ONCE


def test_a_batch_that_says_nothing_of_itself_is_counted_on_the_device(make_trainer):
    trainer = make_trainer()
    batch = trainer.data_collator(list(trainer.train_dataset)[:2])
    with Waits() as waits:
        trainer.compute_loss(trainer.model, dict(batch)).backward()
    asked = {"losses.supervised_positions: nonzero", "modeling.embed: _local_scalar_dense"}
    assert set(waits.ours) == asked


def test_the_count_finds_what_it_looks_for(make_trainer):
    """It fails where code of ours asks: here the meters are read after each micro-batch."""
    trainer = make_trainer(sft=STEPS)
    add = trainer.meters.add_batch
    trainer.meters.add_batch = lambda *args: (add(*args), trainer.meters.own("train"))
    assert waits_of(trainer).ours == {**ONCE, "meters.own: tolist": 6}
