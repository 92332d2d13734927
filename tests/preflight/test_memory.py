"""The estimate against what tiny runs really hold."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from vlm_sft import MultimodalCollator, VLMSFTTrainer, build_stack, lora_config
from vlm_sft.model.freeze import part_of
from vlm_sft.preflight.launch import Launch
from vlm_sft.preflight.memory import PartMemory, estimate, known_optimizer, optimizer_bytes, weight_bytes
from vlm_sft.preflight.step_memory import Counted
from vlm_sft.recipe.libraries import build_sft_config
from vlm_sft.stack.build_stack import build_empty_stack
from vlm_sft.stack.lora import add_adapter

FULL = {"train": {"projector": 1e-3, "language_model": 1e-3}}
LORA = {"lora": {"r": 2}, "chat_template": "ziya"}


def bytes_in(state):
    """Of the tensors that an optimizer keeps, without step counters and bitsandbytes' shared tables."""
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and tensor.dim() and not name.startswith("qmap")
    )


@pytest.mark.parametrize("changes", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_weights_gradients_and_optimizer_are_what_a_run_holds(changes, optimizer, stack_recipe, photos, tmp_path):
    recipe = stack_recipe(
        "blip2",
        resampler="blip2",
        **changes,
        sft={"optim": optimizer, "max_steps": 1, "output_dir": str(tmp_path / "out")},
    )
    stack = build_stack(recipe)
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
            ],
            "images": [{"path": photo, "bytes": None}],
            "source": "s",
            "id": photo,
        }
        for photo in photos[:4]
    ]
    trainer = VLMSFTTrainer(
        stack.model, build_sft_config(recipe), MultimodalCollator(stack.processor), Dataset.from_list(rows),
        stack.processor, lora_config(recipe, stack.model), plan=stack.plan,
    )  # fmt: skip
    trainer.train()
    held = {}
    for name, parameter in trainer.model.named_parameters():
        part = held.setdefault(part_of(name), PartMemory())
        size = parameter.numel() * parameter.element_size()
        part.weights += size
        part.gradients += size if parameter.requires_grad else 0  # freed by now, of the type of its weight
        part.optimizer += bytes_in(trainer.optimizer.state.get(parameter, {}))
    empty = build_empty_stack(recipe)
    model = empty.model
    if (config := lora_config(recipe, model)) is not None:
        model = add_adapter(model, config)
        empty.plan.apply(model)
    found = estimate(model, None, Launch(), optimizer)
    assert found.parts == held
    assert found.total == sum(part.weights + part.gradients + part.optimizer for part in held.values())


@pytest.mark.parametrize(
    "name",
    ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor", "adamw_8bit", "paged_adamw_32bit",
     "lion_8bit", "lion_32bit", "rmsprop_bnb"],
)  # fmt: skip
def test_optimizers_keep_what_is_said(name, tmp_path):
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((80, 64), (7, 9), (5,))]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), optim=name, use_cpu=True))
    optimizer = kind(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert known_optimizer(name)
    for parameter in parameters:
        assert optimizer_bytes(parameter, name, 4) == bytes_in(optimizer.state[parameter]), tuple(parameter.shape)


def test_embeddings_stay_in_32_bits():
    table = nn.Parameter(torch.empty(100, 64))
    assert optimizer_bytes(table, "adamw_8bit", 4) == 2 * (6400 + 4 * 25)
    assert optimizer_bytes(table, "adamw_8bit", 4, embedding=True) == 8 * 6400
    assert not known_optimizer("lomo")


@pytest.mark.parametrize("double", [False, True])
def test_weights_in_four_bits_and_their_scales(double, stack_recipe):
    quantization = {"load_in_4bit": True, "bnb_4bit_use_double_quant": double}
    recipe = stack_recipe(**LORA, quantization=quantization)
    for model in (build_stack(recipe).model, build_empty_stack(recipe).model):
        weight = model.get_submodule("model.language_model.layers.0.mlp.up_proj").weight
        assert type(weight).__name__ == "Params4bit"
        found = weight_bytes(weight)
        if not weight.is_meta:
            state = weight.quant_state
            scales = [state.absmax, state.state2.absmax] if double else [state.absmax]
            wanted = weight.numel() + sum(scale.numel() * scale.element_size() for scale in scales)
        assert found == wanted


def test_weights_in_eight_bits_and_their_scales(stack_recipe):
    recipe = stack_recipe(**LORA, quantization={"load_in_8bit": True})
    for model in (build_stack(recipe).model, build_empty_stack(recipe).model):
        weight = model.get_submodule("model.language_model.layers.0.mlp.up_proj").weight
        assert weight_bytes(weight) == 48 * 32 + 4 * 48


def test_processes_share_it_out(stack_recipe):
    model = build_empty_stack(stack_recipe(**FULL)).model
    step = Counted(kept=0, peak=1000)
    whole = {what: estimate(model, step, Launch()).sum_of(what) for what in ("weights", "gradients", "optimizer")}
    assert whole["optimizer"] == 2 * whole["gradients"] > 0

    def on_a_device(*launch, **options):
        found = estimate(model, step, Launch(*launch), **options)
        return [found.sum_of(what) for what in whole]

    near = lambda *sizes: pytest.approx(sizes, abs=100)  # noqa: E731 (rounded up for each tensor)
    assert on_a_device(4, "DDP") == [whole["weights"], 2 * whole["gradients"], whole["optimizer"]]
    two = [whole["weights"], whole["gradients"] / 4, whole["optimizer"] / 4]
    assert on_a_device(4, "DeepSpeed", 2) == near(*two)
    assert on_a_device(4, "FSDP", 3) == near(*(size / 4 for size in whole.values()))
    assert on_a_device(4, "DeepSpeed", 3, ("optimizer",))[2] == 0
    # DeepSpeed in bf16: weights and gradients of 2 bytes, and 12 bytes (fp32 copy, two moments) shared out.
    half = on_a_device(4, "DeepSpeed", 2, computes=torch.bfloat16)
    assert half == near(whole["weights"] / 2, whole["gradients"] / 8, whole["optimizer"] * 1.5 / 4)


def test_what_is_gathered_and_the_most_at_once(stack_recipe):
    model = build_empty_stack(stack_recipe(**FULL)).model
    layer = sum(p.numel() for p in model.model.language_model.layers[0].parameters())
    tower = sum(p.numel() for p in model.model.vision_tower.encoder.layers[0].parameters())
    found = estimate(model, Counted(0, 5000), Launch(4, "FSDP", 3))
    assert found.gathered == 2 * 4 * max(layer, tower)
    assert found.total == sum(map(found.sum_of, ("weights", "gradients", "optimizer"))) + found.gathered + 5000
    alone = estimate(model, Counted(0, 10**9), Launch())
    assert alone.gathered == 0 and alone.total == 10**9 + alone.sum_of("weights") + alone.sum_of("optimizer")
