"""A recipe's stack → model, processor and freeze plan.

The same code composes real weights for a run and empty tensors for a dry run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..base.errors import UserError
from ..batch.processor import VLMProcessor
from ..families.build_family import empty_family, load_family
from ..model.connectors import build_projector
from ..model.freeze import FreezePlan, part_modules
from ..model.modeling import VLMForConditionalGeneration
from ..model.parts import Parts
from ..pieces.fingerprints import pieces_of
from ..pieces.load_parts import (
    load_language_model,
    load_projector_weights,
    load_resampler,
    load_vision_tower,
)
from ..pieces.quantization import quantise_empty
from ..recipe.libraries import build_quantization_config
from .compose import compose
from .precision import dtype_of, precision_warning

if TYPE_CHECKING:
    from ..recipe.schema import Recipe


@dataclass
class Stack:
    """What a recipe composes.

    Attributes:
        model: The composed model (or the existing one), freeze plan applied.
        processor: Its processor.
        plan: The freeze plan.
        pieces: Part → where it came from: id, revision and fingerprint (none for a dry run).
    """

    model: Any
    processor: VLMProcessor
    plan: FreezePlan
    pieces: dict[str, dict[str, Any]]


def build_stack(
    recipe: Recipe,
    say: Callable[[str], None] = lambda message: None,
    composed: tuple[Any, VLMProcessor] | None = None,
) -> Stack:
    """Loads the pieces of a recipe and composes them.

    Args:
        recipe: A validated recipe.
        say: Receives one sentence for each thing that was done without being asked for.
        composed: What `compose` gave, where it was called before.

    Raises:
        UserError: A piece cannot be had, or two pieces do not fit.
    """
    if recipe.model is not None:
        return _build_family(recipe, composed)
    stack = recipe.parts
    config, processor = composed or compose(recipe)
    for token in processor.added_tokens:
        say(f"The tokenizer of {stack.language_model.pretrained} had no {token} token: it was added (no embedding is).")
    for part in ("vision_tower", "language_model"):
        if getattr(stack, part).trust_remote_code:
            say(f"stack.{part}.trust_remote_code is on: code from {getattr(stack, part).pretrained} is executed.")
    if warning := precision_warning(recipe, config):
        say(warning)
    unset_hf_deepspeed_config()  # ZeRO-3 cuts the weights when training starts; fingerprints are of whole ones
    tower = load_vision_tower(stack.vision_tower, dtype_of(recipe, "vision_tower"))
    resampler = load_resampler(stack.resampler) if stack.resampler else None
    projector = build_projector(config.projector_type, *config.projector_widths, **(config.projector_options or {}))
    if stack.projector.pretrained:
        load_projector_weights(projector, stack.projector.pretrained, stack.projector.revision)
    dtype = dtype_of(recipe, "language_model")
    options = {"quantization_config": build_quantization_config(recipe, str(dtype).removeprefix("torch."))}
    language_model = load_language_model(stack.language_model, dtype, **options)
    model = VLMForConditionalGeneration(config, Parts(tower, resampler, projector, language_model))
    plan = plan_of(recipe)
    plan.apply(model)
    return Stack(model, processor, plan, pieces_of(recipe, model))


def build_empty_stack(recipe: Recipe) -> Stack:
    """The same stack on the meta device: every size and name, no weight is read."""
    if recipe.model is not None:
        return _build_family(recipe, empty=True)
    config, processor = compose(recipe)
    with torch.device("meta"):
        model = VLMForConditionalGeneration(config)
    for part in ("vision_tower", "language_model"):
        getattr(model.model, part).to(dtype_of(recipe, part))
    model.lm_head.to(dtype_of(recipe, "language_model"))
    if (quantised := build_quantization_config(recipe)) is not None:
        quantise_empty(model.model.language_model, quantised, dtype_of(recipe, "language_model"))
    plan = plan_of(recipe)
    plan.apply(model)
    return Stack(model, processor, plan, {})


def _build_family(recipe: Recipe, composed: Any = None, empty: bool = False) -> Stack:
    config, processor = composed or compose(recipe)
    model = (empty_family if empty else load_family)(recipe, config, processor, dtype_of(recipe, "model"))
    plan = plan_of(recipe)
    check_parts(plan, model)
    plan.apply(model)
    return Stack(model, processor, plan, {} if empty else pieces_of(recipe, model))


def check_parts(plan: FreezePlan, model: nn.Module) -> None:
    """Checks that a model has the parts that are to be trained.

    Raises:
        UserError: It has not; the message names those there are.
    """
    there = part_modules(model)
    for part in plan.train:
        if part not in there:
            raise UserError(f"train.{part}: this model has no {part}; its parts are {', '.join(there)}.")


def plan_of(recipe: Recipe) -> FreezePlan:
    """The recipe's freeze plan: `train:` as it stands, adapters at `sft.learning_rate`."""
    rate = float(recipe.sft.get("learning_rate", 2e-5)) if recipe.lora is not None else None
    return FreezePlan(dict(recipe.train), rate)


@torch.no_grad()
def match_embeddings(
    model: VLMForConditionalGeneration, pixel_values: torch.Tensor, **instruction: torch.Tensor | None
) -> float:
    """Scales the projector so that its output has the root mean square of the language model's embeddings.

    A projector whose output starts far above that scale can ruin stage 1. The last linear layer is scaled.

    Args:
        model: The composed model.
        pixel_values: (N, 3, H, W) a few real images.
        **instruction: Their instructions as a batch holds them, for a resampler that reads those.

    Returns:
        The factor that was applied.
    """
    table = model.get_input_embeddings()
    rows = torch.arange(table.num_embeddings, device=table.weight.device)
    target = table(rows).float().pow(2).mean().sqrt()  # Gemma 3 scales what it reads from its table
    was_training = model.training
    model.eval()
    measured = model.get_image_features(pixel_values, **instruction).float().pow(2).mean().sqrt()
    model.train(was_training)
    factor = float(target / measured)
    last: nn.Linear = model.model.projector.last_linear
    last.weight.mul_(factor)
    if last.bias is not None:
        last.bias.mul_(factor)
    return factor
