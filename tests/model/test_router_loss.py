"""The routers' auxiliary loss of a mixture of experts: what transformers' own class adds, in stacks and families."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from support.tiny_families import processor_of, rows, tiny
from support.tiny_pieces import make_tokenizer
from vlm_sft.batch.collator import MultimodalCollator
from vlm_sft.families.build_family import model_class
from vlm_sft.model.losses import router_factor, router_loss
from vlm_sft.stack.build_stack import build_stack

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 300, "num_key_value_heads": 2, "num_experts_per_tok": 2, "initializer_range": 0.3}  # fmt: skip
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 24}
MIXTURES = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, router_aux_loss_coef=0.3),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=24, router_aux_loss_coef=0.3),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=8, router_aux_loss_coef=0.3),
}


@pytest.fixture(params=MIXTURES)
def mixture(request, stack_recipe, tmp_path):
    """(stack, transformers' own language model)."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MIXTURES[request.param]).save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    stack = build_stack(stack_recipe("clip", str(tmp_path / "lm"), chat_template="plain"))
    stack.model.requires_grad_(True)
    return stack.model.train(), AutoModelForCausalLM.from_pretrained(tmp_path / "lm").train()


def texts(side):
    ids = torch.randint(3, 290, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 4, 7)):
        mask[row, slice(0, pads) if side == "left" else slice(12 - pads, None)] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}


def gates(model):
    routers = [pair for pair in model.named_parameters() if pair[0].endswith(".gate.weight")]
    return {name.split("layers.")[1]: gate for name, gate in routers}


@pytest.mark.parametrize("supervised_only", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_stack_adds_what_transformers_adds_and_leaves_padding_out(side, supervised_only, mixture):
    model, native = mixture
    batch = texts(side)
    found = model(**batch, supervised_only=supervised_only)
    own = native(**batch, output_router_logits=True)
    torch.testing.assert_close(found.loss, own.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.router_loss, own.aux_loss, rtol=0, atol=1e-5)
    plain = native(**batch).loss
    assert float(own.loss - plain) == pytest.approx(0.3 * float(own.aux_loss), abs=1e-5)
    found.loss.backward(), own.loss.backward()
    assert len(gates(model)) == 2
    for name, gate in gates(model).items():
        torch.testing.assert_close(gate.grad, gates(native)[name].grad, rtol=1e-4, atol=1e-5)


def test_checkpointing_gives_the_routers_the_same_gradient(mixture):
    model, _ = mixture
    batch = texts("right")
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        output = model(**batch, supervised_only=True)
        output.loss.backward()
        found.append((output.loss.detach(), {name: gate.grad.clone() for name, gate in gates(model).items()}))
    (loss, plain), (again, made_again) = found
    torch.testing.assert_close(loss, again)
    for name, gradient in plain.items():
        torch.testing.assert_close(made_again[name], gradient, rtol=1e-4, atol=1e-6)


def test_it_is_a_batchs_share_of_a_step_and_no_part_of_what_is_evaluated(mixture):
    model, _ = mixture
    batch = texts("right")
    count = int((batch["labels"][:, 1:] != -100).sum())
    whole, third = (model(**batch, supervised_only=True, num_items_in_batch=n) for n in (None, 3 * count))
    torch.testing.assert_close(third.loss * 3, whole.loss, rtol=0, atol=1e-5)
    model.eval()
    evaluated = model(**batch, supervised_only=True)
    assert evaluated.router_loss is None and float(evaluated.loss) == pytest.approx(
        float(evaluated.token_losses.mean())
    )


def test_rows_of_a_pack_are_told_from_the_padding_behind_them(mixture):
    model, native = mixture
    ids = texts("right")["input_ids"]
    labels = ids.clone()
    labels[:, 9:] = labels[:, :1] = labels[:, 4:5] = -100
    packed = model(input_ids=ids, labels=labels, row_lengths=torch.tensor([[4, 5]] * 3), supervised_only=True)
    alone = [native(input_ids=ids[:, a:b], output_router_logits=True).router_logits for a, b in ((0, 4), (4, 9))]
    both = tuple(torch.cat(layers) for layers in zip(*alone, strict=True))
    torch.testing.assert_close(packed.router_loss, router_loss(native.model, both, None), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_an_existing_vlm_adds_what_its_own_class_adds(name):
    config = AutoConfig.from_pretrained(tiny(name))
    config.get_text_config().router_aux_loss_coef = 0.3
    model = model_class(config).from_pretrained(tiny(name), config=config).train()
    native = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].from_pretrained(tiny(name), config=config).train()
    batch = MultimodalCollator(processor_of(name))(rows((40, 30), None, (60, 90)))
    assert not batch["attention_mask"].all()
    found, own = model(**batch, supervised_only=True), native(**batch, output_router_logits=True)
    torch.testing.assert_close(found.loss, own.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.router_loss, own.aux_loss, rtol=0, atol=1e-5)
    assert float(found.router_loss) > 0


def test_other_models_have_none(stack_recipe):
    assert router_factor(build_stack(stack_recipe("clip")).model.model.language_model) == 0


@pytest.mark.slow
def test_a_run_logs_it(mixture, recipe_file, stack_recipe, tmp_path):
    import json

    from vlm_sft.train import train

    recipe = stack_recipe("clip", str(tmp_path / "lm"), chat_template="plain", lora={"r": 2},
                          sft={"max_steps": 2, "logging_steps": 1, "report_to": "none",
                               "output_dir": str(tmp_path / "run")})  # fmt: skip
    history = json.loads((train(recipe) / "metrics.json").read_text())
    assert all(row["router_loss"] > 0 for row in history if "loss" in row)
