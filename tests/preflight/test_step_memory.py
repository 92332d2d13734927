"""What a step without weights counts, against real steps on a CPU; what is real in it and what is empty."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig

from support.tiny_families import CHECKED, processor_of, rows, tiny
from vlm_sft import MultimodalCollator, build_stack, load_recipe, lora_config
from vlm_sft.families.build_family import model_class
from vlm_sft.families.model import set_dtypes
from vlm_sft.model.freeze import FreezePlan
from vlm_sft.preflight.dry_run import FullStep
from vlm_sft.preflight.step_memory import Step, StorageCounter, count_step, without_weights
from vlm_sft.stack.build_stack import build_empty_stack
from vlm_sft.stack.lora import add_adapter

# Of the further families, those unlike the first: routers, tiles of another cut, visual words, norms between types.
OTHERS = ("qwen3_vl_moe", "llava_onevision", "ovis2", "deepseek_vl", "glm4v")
# Frozen or not, before and behind what learns, with LoRA, with checkpointing.
CASES = {
    "projector": ("clip", None, {"train": {"projector": 1e-3}}),
    "qformer and projector": ("blip2", "blip2", {"train": {"resampler": 1e-3, "projector": 1e-3}}),
    "tower": ("clip", None, {"train": {"vision_tower": 1e-3}}),
    "language model": ("clip", None, {"train": {"language_model": 1e-3}}),
    "lora": ("clip", None, {"train": {"projector": 1e-3}, "lora": {"r": 2, "lora_dropout": 0.1}}),
    "four bits": ("clip", None, {"lora": {"r": 2, "lora_dropout": 0.1}, "quantization": {"load_in_4bit": True}}),
}
FULL = FullStep(rows=3, length=60, size=(64, 64), any_size=True)


def prepared(recipe, build):
    stack = build(recipe)
    model = stack.model
    if (config := lora_config(recipe, model)) is not None:
        model = add_adapter(model, config)
        stack.plan.apply(model)
    return model.train(), stack.processor


def really(model, batch, autocast=torch.float32, checkpointing=None):
    """(kept, peak) of a step that is taken."""
    if checkpointing is not None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.activation_checkpointing_enable({"use_reentrant": False})
    with StorageCounter((*model.parameters(), *model.buffers(), *batch.values())) as counter:
        with torch.autocast("cpu", autocast, enabled=autocast != torch.float32):
            loss = model(**batch, supervised_only=True, use_cache=False).loss
        kept = counter.alive
        loss.backward()
    return kept, counter.peak


# Every case in one way each, and LoRA in four.
WAYS = [
    ("projector", torch.bfloat16, None),
    ("qformer and projector", torch.float32, {}),
    ("tower", torch.float32, None),
    ("language model", torch.bfloat16, {}),
    ("lora", torch.float32, None),
    ("lora", torch.bfloat16, {}),
    ("four bits", torch.float32, None),
]


@pytest.mark.parametrize(("case", "autocast", "checkpointing"), WAYS)
def test_a_real_step_holds_what_was_counted(case, autocast, checkpointing, stack_recipe):
    tower, resampler, changes = CASES[case]
    recipe = stack_recipe(tower, resampler=resampler, **changes)
    empty, processor = prepared(recipe, build_empty_stack)
    batch = FULL.batch(processor)
    counted = count_step(empty, Step(batch, autocast, checkpointing))
    kept, peak = really(prepared(recipe, build_stack)[0], batch, autocast, checkpointing)
    assert counted.kept == kept
    assert counted.peak == pytest.approx(peak, rel=0.01 if case == "four bits" else 0), "bitsandbytes has small tables"


@pytest.mark.parametrize("packed", [0, 3])
def test_questions_that_share_an_image_take_a_mask_of_all_pairs(packed, stack_recipe):
    step = replace(FULL, packed=packed, shared=True)
    empty, processor = prepared(stack_recipe("clip"), build_empty_stack)
    batch = step.batch(processor)
    assert batch["row_heads"].shape[1] == (packed or 60 - processor.num_image_tokens)
    counted = count_step(empty, Step(batch))
    assert (counted.kept, counted.peak) == really(prepared(stack_recipe("clip"), build_stack)[0], batch)
    without = replace(step, shared=False).batch(processor)
    assert counted.peak > really(prepared(stack_recipe("clip"), build_stack)[0], without)[1]


@pytest.mark.parametrize("name", [*CHECKED, *(name for name in OTHERS if name not in CHECKED)])
def test_a_step_of_an_existing_model_holds_what_was_counted(name):
    """Models that look at numbers: sizes of images, blank tiles, places of features."""
    config = AutoConfig.from_pretrained(tiny(name))
    own = model_class(config)
    with torch.device("meta"):
        empty = own._from_config(config)
    models = []
    for model in (empty, own.from_pretrained(tiny(name))):
        set_dtypes(model, ["projector"], torch.bfloat16)
        targets = r".*(language_model|text_model).*(q_proj|query_key_value)"
        model = add_adapter(model, LoraConfig(r=2, target_modules=targets))
        FreezePlan({"projector": 1e-3}, 1e-3).apply(model)
        models.append(model.train())
    batch = dict(MultimodalCollator(processor_of(name))(rows((40, 30), None, (300, 60))))
    for checkpointing in (None, {}):
        kept, peak = really(models[1], batch, torch.bfloat16, checkpointing)
        counted = count_step(models[0], Step(batch, torch.bfloat16, checkpointing))
        assert (counted.kept, counted.peak) == (kept, peak)
        for parameter in (p for model in models for p in model.parameters()):
            parameter.grad = None


@pytest.mark.parametrize("case", ["qformer and projector", "lora"])
def test_autograd_itself_says_the_same(case, stack_recipe):
    """A count of another kind: what autograd asks to keep."""
    tower, resampler, changes = CASES[case]
    recipe = stack_recipe(tower, resampler=resampler, **changes)
    model, processor = prepared(recipe, build_stack)
    batch = FULL.batch(processor)
    counted = count_step(prepared(recipe, build_empty_stack)[0], Step(batch))
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    there = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *batch.values())}
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch, supervised_only=True, use_cache=False).loss
    size = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in there)
    assert loss.requires_grad and counted.kept == pytest.approx(size, rel=0.05)


def test_gradients_that_are_there_already_are_not_made_again(stack_recipe):
    recipe = stack_recipe(**CASES["language model"][2])
    peaks = []
    for before in (False, True):
        model, processor = prepared(recipe, build_empty_stack)
        batch = FullStep(1, 20, (64, 64), any_size=True).batch(processor)
        peaks.append(count_step(model, Step(batch, accumulated=before)).peak)
    assert peaks[1] < peaks[0]


class Picky(nn.Module):
    """Looks at its batch as real models do: sizes, masks, counts, tables made on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50)
        self.tied = self.table
        self.register_buffer("scale", torch.ones(8))

    def forward(self, ids: torch.Tensor, grid: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        self.lengths = (grid[:, 0] * grid[:, 1]).tolist()
        self.steps = torch.linspace(0, 1, steps=3).mul(4).int().tolist()
        embeds = self.table(ids) * self.scale
        place = ids == 7
        if int(place.sum()) != sum(self.lengths):
            raise ValueError("image tokens and features differ")
        embeds = embeds.masked_scatter(place.unsqueeze(-1), features @ self.head.weight[:8])
        gathered = torch.zeros(sum(self.lengths), 8)
        gathered[:] = embeds[place]
        embeds[place] = gathered * 2
        self.seen = embeds[ids != 7]
        return self.head(self.seen).sum()


def picky_batch(images: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[7, 7, 1, 2, 3], [7, 7, 4, 5, 6]])
    return {"ids": ids, "grid": torch.tensor([[1, 2]] * images), "features": torch.randn(4, 8)}


def made_empty() -> Picky:
    with torch.device("meta"):
        return Picky()


def test_numbers_of_the_batch_are_real_and_what_weights_make_is_empty():
    model = made_empty()
    with without_weights(model):
        loss = model(**picky_batch())
        loss.backward()
    assert model.lengths == [2, 2] and model.steps == [0, 2, 4]
    assert isinstance(model.seen, FakeTensor) and model.seen.shape == (6, 8)
    assert model.table.weight.grad.shape == (50, 8) and model.tied.weight is model.table.weight


def test_a_model_that_refuses_its_batch_refuses_it_without_weights_too():
    with pytest.raises(ValueError, match="image tokens and features differ"), without_weights(made := made_empty()):
        made(**picky_batch(images=1))


def test_weights_take_no_memory():
    with torch.device("meta"):
        wide = nn.Linear(1 << 20, 1 << 16, bias=False)  # 256 GiB
    with without_weights(wide):
        assert wide(torch.ones(2, 1 << 20)).shape == (2, 1 << 16)


def test_every_storage_counts_once_until_it_is_dropped():
    given = torch.ones(100)
    with StorageCounter([given]) as counter:
        made = given + 1
        assert counter.alive == 400
        view, same = made.view(10, 10), given.view(50, 2)
        assert counter.alive == 400
        made.mul_(2)
        further = made * 2
        assert counter.alive == 800
        del made
        assert counter.alive == 800, "a view still holds it"
        del view, further
    assert counter.alive == 0 and counter.peak == 800 and same.numel() == 100


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_a_tower_of_which_nothing_is_trained_keeps_nothing(name, tmp_path) -> None:
    source = {"train": [{"path": "rows.jsonl", "format": "caption"}]}
    sft = {"output_dir": str(tmp_path / "out"), "max_length": 400}
    text = yaml.safe_dump({"model": {"pretrained": str(tiny(name))}, "lora": {"r": 2}, "data": source, "sft": sft})
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    model, processor = prepared(load_recipe(tmp_path / "recipe.yaml"), build_stack)
    base = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": False})
    seen: list[bool] = []
    tower = base.get_submodule(base._part("vision_tower"))
    for module in tower.modules():
        module.register_forward_hook(lambda module, args, output: seen.append(getattr(output, "requires_grad", False)))
    batch = FullStep(rows=2, length=400, size=(64, 64), any_size=True).batch(processor)
    model.train()
    model(**batch, supervised_only=True, use_cache=False).loss.backward()
    assert len(seen) > 3 and not any(seen)
    learned = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert learned and all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned)
