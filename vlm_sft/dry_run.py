"""`--dry-run`: the resolved recipe, the freeze plan, and what the run takes on each device; no weight is read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import UserError
from .launch import Launch

if TYPE_CHECKING:
    from rich.console import Console

    from .activations import Step
    from .memory import Estimate
    from .processor import VLMProcessor
    from .recipe import Recipe
    from .stack import Stack

# What a row is taken to be long where `sft.max_length` sets no limit.
WITHOUT_LIMIT = 2048


def dry_run(recipe: Recipe, launch: Launch, console: Console) -> None:
    """Prints what a run of a recipe would be; reads configurations and tokenizers, but no weights.

    Args:
        recipe: A validated recipe.
        launch: The processes that would train it.
        console: Where to.
    """
    from .memory import known_optimizer
    from .recipe import validate_libraries
    from .stack import precision_warning

    def say(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=not console.is_terminal)

    validate_libraries(recipe)
    console.print(recipe.to_yaml(), markup=False, highlight=False)
    weighed = weigh(recipe, launch)
    if warning := precision_warning(recipe, weighed.stack.model.config):
        say(warning)
    console.print(weighed.stack.plan.table(weighed.model))
    say(describe_image(weighed.stack.processor))
    console.print(weighed.estimate.table())
    if not known_optimizer(weighed.optimizer):
        say(f"What sft.optim={weighed.optimizer} keeps is not known here; it is counted as AdamW.")
    if weighed.step is None:
        say("What a step of an existing model takes is not counted: activations come on top.\nNo weight was read.")
        return
    say(
        f"A step: {weighed.step.rows} rows of {weighed.step.length} tokens, an image in each; shorter rows and rows "
        f"without an image take less.\nNo weight was read."
    )


class Weighed(NamedTuple):
    """A model on the meta device and what it takes.

    Attributes:
        stack: The stack, without weights.
        model: Its model with adapters, freeze plan applied.
        estimate: Bytes on each device.
        step: The shapes of a step that were counted; None for an existing model, of which none is.
        optimizer: As `sft.optim` names it.
    """

    stack: Stack
    model: Any
    estimate: Estimate
    step: Step | None
    optimizer: str


def weigh(recipe: Recipe, launch: Launch) -> Weighed:
    """Builds a recipe's model without weights and estimates what a run of it takes on each device.

    Args:
        recipe: A validated recipe.
        launch: The processes that would train it.
    """
    import torch

    from .activations import count_step
    from .adapters import add_adapter, lora_config
    from .configs import computes_in
    from .memory import estimate
    from .recipe import build_sft_config
    from .stack import build_empty_stack

    stack = build_empty_stack(recipe)
    model: Any = stack.model
    if (config := lora_config(recipe, model)) is not None:
        model = add_adapter(model, config)
        stack.plan.apply(model)
    args = build_sft_config(on_any_machine(recipe))
    computes = getattr(torch, computes_in(recipe))
    found = estimate(model, None, launch, args.optim.value, computes)
    step = step_of(recipe, stack, args) if recipe.stack else None
    if step is not None:
        found = replace(found, step=count_step(model, step))
    return Weighed(stack, model, found, step, args.optim.value)


def on_any_machine(recipe: Recipe) -> Recipe:
    """The recipe without the types that a machine without a GPU refuses, for what computes nothing."""
    return recipe.model_copy(update={"sft": {**recipe.sft, "bf16": False, "fp16": False, "tf32": None}})


def describe_image(processor: VLMProcessor) -> str:
    """One sentence on how many tokens an image becomes."""
    if not processor.reads_sizes:
        tokens = processor.num_image_tokens
        return f"An image becomes {tokens} {'token' if tokens == 1 else 'tokens'}."
    sizes = ((640, 480), (1280, 960))
    counts = " and ".join(f"{processor.count_image_tokens(size):,} for {size[0]}×{size[1]} pixels" for size in sizes)
    return f"How many tokens an image becomes depends on its size: {counts}."


def step_of(recipe: Recipe, stack: Stack, args: Any) -> Step:
    """The shapes of a step of a recipe: full batches of rows as long as `sft.max_length` lets them be.

    Raises:
        UserError: An image does not fit into `sft.max_length`.
    """
    import torch
    from PIL import Image

    from .activations import Step
    from .configs import computes_in

    length = args.max_length or WITHOUT_LIMIT
    tokens = stack.processor.num_image_tokens
    if length <= tokens:
        raise UserError(f"sft.max_length is {length}, but an image alone takes {tokens} tokens; raise it.")
    pixels = stack.processor.encode_images([Image.new("RGB", (64, 64))])
    assert pixels is not None
    return Step(
        rows=args.per_device_train_batch_size,
        length=length,
        image=(pixels.shape[-2], pixels.shape[-1]),
        autocast=getattr(torch, computes_in(recipe)),
        checkpointing=(args.activation_checkpointing_kwargs or {}) if args.activation_checkpointing else None,
        accumulated=args.gradient_accumulation_steps > 1,
    )
