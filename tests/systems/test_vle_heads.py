"""Every head of VLE against values of its own code."""

from __future__ import annotations

import pytest
import torch

from support.golden import assert_close
from support.vle import GOLDEN, boxes, config
from vlm_sft.systems.vle_heads import TASKS

INPUTS, OUTPUTS = GOLDEN.inputs, GOLDEN.outputs
ASKED = {name: INPUTS[name] for name in ("input_ids", "pixel_values", "attention_mask")}
REAL = INPUTS["attention_mask"].bool()


def headed(task):
    model = TASKS[task].model(config()).eval()
    held = set(model.state_dict())
    model.load_state_dict({name: tensor for name, tensor in GOLDEN.tensors().items() if name in held})
    return model


@pytest.mark.parametrize("task", ["vqa", "itm", "pbc", "mlm"])
def test_what_a_head_says_is_upstreams(task):
    found, wanted = headed(task)(**ASKED).logits, OUTPUTS[f"{task}_logits"]
    assert_close(*((found[REAL], wanted[REAL]) if task == "mlm" else (found, wanted)))


def test_the_loss_of_answers_is_upstreams():
    labels = torch.zeros(2, 7)
    for row, (right, scores) in enumerate(zip(GOLDEN.config["vqa_labels"], GOLDEN.config["vqa_scores"], strict=True)):
        labels[row, right] = torch.tensor(scores)
    assert_close(headed("vqa")(labels=labels, **ASKED).loss, OUTPUTS["vqa_loss"])


@pytest.mark.parametrize("task", ["vcr_q2a", "vcr_qa2r"])
def test_choices_and_their_loss_are_upstreams(task):
    found = headed(task)(
        INPUTS["vcr_input_ids"].transpose(0, 1),
        torch.tensor(GOLDEN.config["vcr_labels"]),
        pixel_values=INPUTS["pixel_values"],
        attention_mask=INPUTS["vcr_attention_mask"].transpose(0, 1),
        boxes=boxes(10, times=4),
    )
    assert_close(found.logits, OUTPUTS[f"{task}_logits"])
    assert_close(found.loss, OUTPUTS[f"{task}_loss"])


@pytest.mark.parametrize(("task", "labels"), [
    ("itm", torch.tensor([1, 0])), ("pbc", torch.ones(2, 16, dtype=torch.long)),
    ("mlm", torch.where(REAL, INPUTS["input_ids"], -100)),
])  # fmt: skip
def test_every_head_learns(task, labels):
    model = headed(task)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = model(labels=labels, **ASKED).loss
        losses.append(loss.item())
        loss.backward()
        assert model.vle.text_model.get_input_embeddings().weight.grad.abs().sum() > 0
        assert model.vle.vision_model["vision_model"].embeddings.patch_embedding.weight.grad.abs().sum() > 0
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2


def test_patches_are_scored_without_boxes():
    model = headed("pbc")
    assert model(**ASKED, boxes=boxes(14)).logits.shape == (2, 16, 2)
