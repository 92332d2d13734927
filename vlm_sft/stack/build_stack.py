"""A recipe → model, processor and freeze plan.

The same code composes real weights for a run and empty tensors for a dry run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..base.errors import UserError
from ..base.names import Json
from ..batch.processor import VLMProcessor
from ..families.kind import VLM, Composed
from ..model.freeze import FreezePlan, part_modules
from ..model.modeling import VLMForConditionalGeneration
from ..pieces.fingerprints import entries_of
from .kinds import compose, kind_of
from .precision import dtypes_of
from .vocabulary import make_room, start_words

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

    model: VLM
    processor: VLMProcessor
    plan: FreezePlan
    pieces: dict[str, Json]


def build_stack(
    recipe: Recipe, say: Callable[[str], None] = lambda message: None, composed: Composed | None = None
) -> Stack:
    """Loads the pieces of a recipe and composes them.

    Args:
        recipe: A validated recipe.
        say: Receives one sentence for each thing that was done without being asked for.
        composed: What `compose` gave, where it was called before.

    Raises:
        UserError: A piece cannot be had, or two pieces do not fit.
    """
    composed = composed or compose(recipe)
    kind = kind_of(composed.pieces)
    for remark in kind.remarks(recipe, composed):
        say(remark)
    if composed.processor.reads_sizes and recipe.data.eval:
        say(
            "eval_image_use is not measured: how many tokens an image becomes depends on its size here, so that none "
            "can stand for another; `vlm-sft evaluate` asks with blanked images."
        )
    model = kind.load(recipe, composed, dtypes_of(recipe))
    make_room(model, composed.processor.words)
    start_words(model, composed.processor.words)
    plan = _apply_plan(recipe, model)
    return Stack(model, composed.processor, plan, entries_of(composed.pieces, model))


def build_empty_stack(recipe: Recipe, composed: Composed | None = None) -> Stack:
    """The same stack on the meta device: every size and name, no weight is read.

    Args:
        recipe: A validated recipe.
        composed: What `compose` gave, where it was called before; it is left as it is.
    """
    composed = composed or compose(recipe)
    composed = composed._replace(config=copy.deepcopy(composed.config))
    model = kind_of(composed.pieces).empty(recipe, composed, dtypes_of(recipe))
    make_room(model, composed.processor.words)
    return Stack(model, composed.processor, _apply_plan(recipe, model), {})


def _apply_plan(recipe: Recipe, model: VLM) -> FreezePlan:
    plan = plan_of(recipe)
    check_parts(plan, model)
    plan.apply(model)
    return plan


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
    model: VLMForConditionalGeneration, pixel_values: torch.Tensor | None = None, **images: torch.Tensor | None
) -> float:
    """Scales the projector so that its output has the root mean square of the language model's embeddings.

    A projector whose output starts far above that scale can ruin stage 1. The last linear layer is scaled.

    Args:
        model: The composed model.
        pixel_values: (N, 3, H, W) a few real images; None where features of them are given.
        **images: Their features as a cache gives them, and their instructions for a resampler that reads those.

    Returns:
        The factor that was applied.
    """
    table = model.get_input_embeddings()
    rows = torch.arange(table.num_embeddings, device=table.weight.device)
    target = table(rows).float().pow(2).mean().sqrt()  # Gemma 3 scales what it reads from its table
    was_training = model.training
    model.eval()
    measured = model.get_image_features(pixel_values, **images).float().pow(2).mean().sqrt()
    model.train(was_training)
    factor = float(target / measured)
    last: nn.Linear = model.model.projector.last_linear
    last.weight.mul_(factor)
    if last.bias is not None:
        last.bias.mul_(factor)
    return factor
