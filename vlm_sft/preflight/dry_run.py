"""`--dry-run`: the resolved recipe, the freeze plan, and what the run takes on each device; no weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from ..base.console import make_console, say
from ..base.errors import UserError
from ..base.names import Inputs, Json
from ..base.words import counted, gib, one_line
from .launch import Launch

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import nn
    from trl import SFTConfig

    from ..batch.encoding import EncodedChat
    from ..batch.processor import VLMProcessor
    from ..model.freeze import PartRow
    from ..recipe.schema import Recipe
    from ..stack.build_stack import Stack
    from ..templates.render import RenderedChat
    from .memory import Estimate

# What a row is taken to be long where `sft.max_length` sets no limit.
WITHOUT_LIMIT = 2048
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
# Images, in pixels, of which a full step has the first that fits into a row.
SIZES = ((1280, 960), (640, 480), (320, 240), (64, 64))


def dry_run(recipe: Recipe, launch: Launch, console: Console) -> Json:
    """Prints what a run of a recipe would be; reads configurations and tokenizers, but no weights.

    Returns:
        The same for a program: `recipe`, as it is resolved; `memory`, bytes of a step; `device_memory`, those of the
        GPU here, None without one.
    """
    from ..base.progress import waiting
    from ..bundle.handover import check_adapter, settle_adapter
    from ..recipe.libraries import validate_libraries
    from ..stack.kinds import compose
    from ..stack.precision import precision_warning
    from .memory import known_optimizer, too_large

    validate_libraries(recipe)
    recipe = settle_adapter(recipe, planned=True)
    if recipe.lora_from == "continue":
        check_adapter(recipe, compose(recipe))
    console.print(recipe.to_yaml(), markup=False, highlight=False)
    with waiting(make_console(), "Counting the memory of a step"):
        recipe, decided = settle_checkpointing(recipe, launch, memory_here())
        weighed = weigh(recipe, launch)
    if decided:
        say(console, decided)
    if warning := precision_warning(recipe, weighed.stack.model.config):
        say(console, warning)
    console.print(weighed.table)
    say(console, describe_image(weighed.stack.processor))
    console.print(weighed.estimate.table())
    if recipe.cache is not None:
        say(console, "This is without the cache: once it holds all pictures, frozen parts before it are not loaded.")
    if not known_optimizer(weighed.optimizer):
        say(console, f"What sft.optim={weighed.optimizer} keeps is not known here; it is counted as AdamW.")
    if room := memory_here():
        sentence = too_large(weighed.estimate.total, room)
        if sentence:
            say(console, sentence)
    say(console, f"{weighed.step}\nNo weight was read.")
    return {"recipe": recipe.resolved(), "memory": weighed.estimate.total, "device_memory": room}


def memory_here() -> int | None:
    """Bytes of the GPU here; None where there is none."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def settle_checkpointing(recipe: Recipe, launch: Launch, room: int | None) -> tuple[Recipe, str | None]:
    """The recipe with `sft.activation_checkpointing` said, and a sentence on it; as it is and None where it says it.

    TRL always computes activations once more in the backward pass, which takes about a fifth more time. Here they are
    kept where a step then fits.

    Args:
        recipe: A validated recipe.
        launch: The processes.
        room: Bytes of a device; None where it is not known yet.
    """
    from .memory import TIGHT

    if any(recipe.sft.get(name) is not None for name in CHECKPOINTING):
        return recipe, None
    kept, again = (recipe.model_copy(update={"sft": {**recipe.sft, CHECKPOINTING[0]: on}}) for on in (False, True))
    asked = "the recipe does not say sft.activation_checkpointing"
    if recipe.sft.get("max_length", WITHOUT_LIMIT) is None:
        return again, f"Activations are made again: {asked}, and without sft.max_length a row may be of any length."
    if room is None:
        return again, f"Counted with activations made again: {asked}, and a GPU with room for them keeps them."
    try:
        needs = weigh(kept, launch).estimate.total
    except Exception as error:  # a model may do what no count can follow; training is none of its business
        return again, f"Activations are made again: {asked}, and its memory cannot be counted ({one_line(error)})."
    fits = needs <= TIGHT * room
    numbers = f"with all kept a step takes {gib(needs)} of {gib(room)}"
    return (
        (kept, f"Activations are kept: {asked}, and {numbers}.")
        if fits
        else (again, f"Activations are made again in the backward pass: {asked}, and {numbers}.")
    )


class Weighed(NamedTuple):
    """A model on the meta device and what it takes.

    Attributes:
        stack: The stack; its model was used up by counting a step.
        rows: The freeze plan, part by part, with adapters.
        table: The same for the terminal.
        estimate: Bytes on each device.
        step: The step that was counted.
        optimizer: As `sft.optim` names it.
        others: Bytes on each device for the other ways to launch it.
    """

    stack: Stack
    rows: list[PartRow]
    table: Table
    estimate: Estimate
    step: FullStep
    optimizer: str
    others: Sequence[Estimate] = ()


def weigh(recipe: Recipe, launch: Launch, *others: Launch) -> Weighed:
    """Builds a recipe's model without weights and estimates what a run of it takes on each device.

    Args:
        recipe: A validated recipe.
        launch: The processes.
        others: Further ways to launch it, estimated with the same count of a step.
    """
    import torch

    from ..recipe.libraries import build_sft_config, computes_in
    from ..stack.build_stack import build_empty_stack
    from ..stack.fit import check_texts
    from ..stack.lora import add_empty_adapter, lora_config
    from .memory import estimate
    from .step_memory import Step, count_step

    stack, args = build_empty_stack(recipe), build_sft_config(on_any_machine(recipe))
    check_texts(stack.model.config, stack.processor, args.max_length)
    model: nn.Module = stack.model
    if (config := lora_config(recipe, model)) is not None:
        model = add_empty_adapter(model, config)
        stack.plan.apply(model)
    computes = getattr(torch, computes_in(recipe))
    found = [estimate(model, None, each, args.optim.value, computes) for each in (launch, *others)]
    rows, table = stack.plan.rows(model), stack.plan.table(model)
    full = full_step(args, stack.processor, any(source.independent for source in recipe.data.train))
    step = Step(
        full.batch(stack.processor),
        computes,
        (args.activation_checkpointing_kwargs or {}) if args.activation_checkpointing else None,
        accumulated=args.gradient_accumulation_steps > 1,
        on_cpu=args.use_cpu,
    )
    counted_step = count_step(model, step)
    first, *more = (replace(each, step=counted_step) for each in found)
    return Weighed(stack, rows, table, first, full, args.optim.value, more)


def on_any_machine(recipe: Recipe) -> Recipe:
    """The recipe without the types that a machine without a GPU refuses, for what computes nothing."""
    return recipe.model_copy(update={"sft": {**recipe.sft, "bf16": False, "fp16": False, "tf32": None}})


def describe_image(processor: VLMProcessor) -> str:
    """One sentence on how many tokens an image becomes."""
    if processor.chooses:
        return "An image is read beside the question, and takes none of its tokens."
    if not processor.reads_sizes:
        return f"An image becomes {counted(processor.num_image_tokens, 'token')}."
    sizes = SIZES[1::-1]
    counts = " and ".join(f"{processor.count_image_tokens(size):,} for {size[0]}×{size[1]} pixels" for size in sizes)
    return f"How many tokens an image becomes depends on its size: {counts}."


@dataclass(frozen=True)
class FullStep:
    """A step with as much in it as a recipe lets there be.

    Attributes:
        rows: Rows of a batch, each with an image; packs of them, where the recipe packs.
        packed: Rows of a pack, each with an image; 0 where nothing is packed.
        length: Tokens of a row, those of its image included.
        size: (width, height) of each image in pixels.
        any_size: Whether an image of any size becomes the same.
        shared: Whether rows are questions behind their image, of which none sees another (`independent`).
    """

    rows: int
    length: int
    size: tuple[int, int]
    any_size: bool
    packed: int = 0
    shared: bool = False

    def __str__(self) -> str:
        image, larger = "an image", ""
        if not self.any_size:
            image, larger = f"an image of {self.size[0]}×{self.size[1]} pixels", "; larger images take more"
        if self.packed:
            packs = f"{self.rows} pack" if self.rows == 1 else f"{self.rows} packs"
            images = f"{self.packed} row" if self.packed == 1 else f"as many as {self.packed} rows"
            return f"A step: {packs} of {self.length} tokens, of {images} with {image} in each{larger}."
        less = "shorter rows and rows without an image take less"
        share = ", which all questions of a row share" if self.shared else ""
        return f"A step: {counted(self.rows, 'row')} of {self.length} tokens, {image} in each{share}; {less}{larger}."

    def batch(self, processor: VLMProcessor) -> Inputs:
        """What the collator makes of such rows: every token but the image's is scored, and the last row is shorter."""
        from PIL import Image

        from ..encoders.processor import EncoderProcessor

        (word, *_) = processor.tokenizer("a", add_special_tokens=False)["input_ids"]
        encoded = []
        for number in range(self.rows):
            row = processor.encode_rendered(_image_alone(processor), [self.size])
            shorter = self.rows > 1 and number == self.rows - 1
            prefix = len(row.input_ids)
            for _ in range(self.length - shorter - prefix):
                row.append(word, learned=True)
            if self.shared and not self.packed:  # questions of a token behind the image: the mask is as large for any
                row.lengths = [prefix, *[1] * (len(row.input_ids) - prefix)]
                row.heads = [0] * len(row.lengths)
            encoded.append(row)
        if self.packed:  # rows of an image and two tokens; the last one of a pack has what is left of it
            encoded = [self._pack(processor, word, len(row.input_ids)) for row in encoded]
        images = [Image.new("RGB", self.size)] * self.rows * max(self.packed, 1)
        instructions = ["a " * self.length] * len(images)
        learned = processor.fullest(self.rows, self.length) if isinstance(processor, EncoderProcessor) else {}
        return {**processor.batch(encoded), **learned, **processor.image_inputs(images, instructions)}

    def _pack(self, processor: VLMProcessor, word: int, length: int) -> EncodedChat:
        from ..batch.encoding import EncodedChat

        rows: list[EncodedChat] = []
        for number in range(self.packed):
            row = processor.encode_rendered(_image_alone(processor), [self.size])
            left = length - sum(len(each.input_ids) for each in rows)
            for _ in range(left - len(row.input_ids) if number == self.packed - 1 else 2):
                row.append(word, learned=True)
            rows.append(row)
        pack = EncodedChat.packed(rows)
        pack.heads = list(range(self.packed)) if self.shared else []
        return pack


def full_step(args: SFTConfig, processor: VLMProcessor, shared: bool = False) -> FullStep:
    """The fullest step of a recipe: batches of rows as long as `sft.max_length` lets them be.

    Args:
        args: Its `sft:`.
        processor: Makes the rows.
        shared: Whether rows are questions behind their image, of which none sees another.

    Raises:
        UserError: Not even a small image fits into `sft.max_length`.
    """
    length = min(args.max_length or WITHOUT_LIMIT, processor.longest or WITHOUT_LIMIT)
    tokens = 0
    for size in SIZES if processor.reads_sizes else SIZES[-1:]:
        # With a token of text behind it, and one more in all rows but the last.
        tokens = len(processor.encode_rendered(_image_alone(processor), [size]).input_ids)
        if tokens + 2 <= length:
            packed = (length - 1) // (tokens + 2) if args.packing else 0
            return FullStep(args.per_device_train_batch_size, length, size, not processor.reads_sizes, packed, shared)
    raise UserError(f"sft.max_length is {length}, but an image makes a row of {tokens} tokens; raise it.")


def _image_alone(processor: VLMProcessor) -> RenderedChat:
    from ..templates.render import RenderedChat

    return RenderedChat(processor.image_token, [], [(0, len(processor.image_token))])
