"""A model in training answers, and neither its weights' modes nor what is drawn next tells that it did."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from vlm_sft.base.errors import RowError, UserError
from vlm_sft.during import in_training
from vlm_sft.during.in_training import InTraining
from vlm_sft.model.freeze import part_modules
from vlm_sft.model.sharding import compile_layers


def questions(photos):
    part = [{"type": "image"}, {"type": "text", "text": "这是什么?"}]
    return [
        {"messages": [{"role": "user", "content": part}], "images": [{"path": photo, "bytes": None}], "id": f"r/{n}"}
        for n, photo in enumerate(photos[:3])
    ]


def test_nothing_tells_that_it_was_asked(make_trainer, photos):
    trainer = make_trainer(
        train={"projector": 1e-2}, lora={"r": 2, "lora_dropout": 0.5}, chat_template="ziya",
        sft={"gradient_checkpointing": True},
    )  # fmt: skip
    trainer.train()
    trainer.model.train()
    modes = {name: module.training for name, module in trainer.model.named_modules()}
    assert set(modes.values()) == {True, False}, "frozen parts stay in evaluation mode"
    cached = trainer.model.config.use_cache
    for make in (random.seed, np.random.seed, torch.manual_seed):
        make(5)
    wanted = random.random(), np.random.rand(), torch.rand(1).item()
    for make in (random.seed, np.random.seed, torch.manual_seed):
        make(5)
    pupil = InTraining(trainer)
    drawn = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 4}
    first = pupil.answers(questions(photos), 2, drawn)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == wanted
    assert {name: module.training for name, module in trainer.model.named_modules()} == modes
    assert trainer.model.config.use_cache == cached
    assert pupil.answers(questions(photos), 2, drawn) == first, "what is drawn is the same each time"
    loss = trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert torch.isfinite(loss)


def test_layers_that_are_compiled_for_training_are_not_compiled_anew(make_trainer, photos):
    trainer = make_trainer(chat_template="ziya", lora={"r": 2})
    pupil = InTraining(trainer)
    wanted = pupil.answers(questions(photos), 2, {"max_new_tokens": 4})
    torch._dynamo.reset()
    counters.clear()
    compile_layers(part_modules(trainer.model)["language_model"][1], backend="eager")
    assert pupil.answers(questions(photos), 2, {"max_new_tokens": 4}) == wanted
    assert not counters["stats"].get("unique_graphs")
    trainer.train()
    assert counters["stats"]["unique_graphs"] > 0


def test_a_row_that_cannot_be_asked_has_its_error_in_place_of_an_answer(make_trainer, photos, tmp_path):
    (broken := tmp_path / "broken.png").write_bytes(b"none")
    pupil = InTraining(make_trainer(chat_template="ziya"))
    asked = questions([photos[0], str(broken), photos[1]])
    found = pupil.answers(asked, 3, {"max_new_tokens": 2})
    assert [isinstance(each, RowError) for each in found] == [False, True, False] and "broken.png" in str(found[1])


def test_a_memory_that_holds_no_more_is_one_sentence(make_trainer, photos, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(in_training, "answer_each", full)
    with pytest.raises(UserError, match=r"does not hold 3 questions .* lower `evaluation.batch_size`"):
        InTraining(make_trainer(chat_template="ziya")).answers(questions(photos), 3, {})


@pytest.mark.slow
def test_a_cache_stands_in_for_the_tower(recipe_file, caption_file, tmp_path):
    from vlm_sft import load_recipe
    from vlm_sft.bundle.run_folder import read_lines
    from vlm_sft.train import train

    source = {"path": caption_file, "format": "caption"}
    answers = []
    for name, more in (("plain", {}), ("cached", {"cache": {"path": str(tmp_path / "cache")}})):
        data = {"train": [source], "eval": [source]}
        recipe = recipe_file(name, chat_template="ziya", data=data, generation={"max_new_tokens": 4}, **more)
        folder = train(load_recipe(recipe, ["sft.eval_strategy=steps", "sft.eval_steps=1"]))
        answers.append([(row["step"], row["id"], row["answer"]) for row in read_lines(folder / "samples.jsonl")])
    assert answers[0] == answers[1] and len(answers[0]) == 12
