"""What both trainers are made of: parts at their own rates, whichever class of transformers is below."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer
from trl import SFTTrainer

from support.vle import save_vle
from vlm_sft import load_recipe
from vlm_sft.recipe.libraries import build_sft_config
from vlm_sft.stack.kinds import compose
from vlm_sft.training.build_trainer import build_collator, build_trainer
from vlm_sft.training.part_trainer import PartTrainer
from vlm_sft.training.run_rows import RunRows
from vlm_sft.training.trainer import EncoderTrainer


@pytest.fixture
def encoder_trainer(tmp_path, recipe_file, caption_file):
    """A trainer of a tiny VLE without dropout, on captions as answers to nothing but a word."""
    from vlm_sft.data.dataset import load_source

    folder = save_vle(tmp_path / "vle")
    text = (folder / "config.json").read_text(encoding="utf-8")
    quiet = '"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, '
    (folder / "config.json").write_text(text.replace('"model_type": "vle"', f'{quiet}"model_type": "vle"').replace(
        '"model_type": "deberta-v2"', f'{quiet}"model_type": "deberta-v2"'), encoding="utf-8")  # fmt: skip

    def make(**sft):
        source = {"path": caption_file, "format": "caption", "prompts": ["what?"]}
        rates = {"vision_tower": 1e-3, "text_encoder": 1e-3, "fusion": 2e-3, "head": 1e-2}
        recipe = load_recipe(recipe_file(stack=None, chat_template=None, encoder={"pretrained": str(folder)},
                                         train=rates, data={"train": [source]}),
                             [f"sft.{key}={value}" for key, value in sft.items()])  # fmt: skip
        args, composed = build_sft_config(recipe), compose(recipe)
        collator = build_collator(recipe, composed.processor, args)
        rows = load_source(recipe.data.train[0], seed=0)
        return build_trainer(recipe, args, collator, RunRows(rows, None, {}), composed, lambda said: None)

    return make


def test_an_encoder_has_transformers_own_trainer_and_the_same_parts(encoder_trainer):
    trainer = encoder_trainer()
    assert isinstance(trainer, EncoderTrainer) and not isinstance(trainer, SFTTrainer)
    assert EncoderTrainer.__mro__.index(PartTrainer) < EncoderTrainer.__mro__.index(Trainer)
    trainer.create_optimizer()
    rates = {group["part"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"vision_tower": 1e-3, "text_encoder": 1e-3, "fusion": 2e-3, "head": 1e-2}


def test_a_step_is_the_mean_over_its_rows_however_they_are_divided(encoder_trainer):
    found = []
    for size, times in ((4, 1), (2, 2), (3, 2)):
        trainer = encoder_trainer(per_device_train_batch_size=size, gradient_accumulation_steps=times, max_steps=1,
                                  train_sampling_strategy="sequential", learning_rate=0.1, optim="sgd")  # fmt: skip
        trainer.train()
        found.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    whole, halves, more = found
    assert all(torch.allclose(whole[name], halves[name], atol=1e-6) for name in whole)
    assert not torch.allclose(whole["vqa_classifier.3.bias"], more["vqa_classifier.3.bias"], atol=1e-6)
