"""The collator and the trainer of a recipe: weights read, an earlier stage taken over, plan and rows handed to it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import set_seed

from ..base.errors import UserError
from ..base.names import ADAPTER, INSTRUCTION, Json
from ..batch.collator import MultimodalCollator
from ..bundle.handover import hand_over
from ..bundle.manifest import Provenance, read_manifest, stages_so_far
from ..cache.prefix import FEATURES, PIXELS, Prefix, find_prefix
from ..model.freeze import part_modules, part_of
from ..model.sharding import compile_layers
from ..pieces.fingerprints import compare_pieces
from ..pieces.piece import specs_of
from ..reading.fetch import Fetcher
from ..recipe.safety import refuse_strange_collator
from ..stack.adapters import fill_adapter, read_tensors
from ..stack.build_stack import build_stack, match_embeddings
from ..stack.kinds import kind_of
from ..stack.lora import lora_config
from .part_trainer import PartTrainer
from .trainer import EncoderTrainer, VLMSFTTrainer

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel
    from trl import SFTConfig

    from ..batch.processor import VLMProcessor
    from ..families.kind import Composed
    from ..recipe.schema import Recipe
    from ..stack.build_stack import Stack
    from .run_rows import RunRows


def build_collator(recipe: Recipe, processor: VLMProcessor, args: SFTConfig) -> MultimodalCollator:
    """The recipe's collator, or ours, with the recipe's arguments.

    Raises:
        UserError: The class cannot be found or does not take these arguments.
    """
    kind: type[MultimodalCollator] = kind_of(specs_of(recipe)).collator
    if recipe.collator:
        refuse_strange_collator(recipe)
        # `python -m` looks in the current folder, a console command does not; the user's module lies there.
        sys.path.insert(0, os.getcwd()) if os.getcwd() not in sys.path else None
        kind = load_collator_class(recipe.collator, kind)
    multiple = args.pad_to_multiple_of if isinstance(args.pad_to_multiple_of, int) else None
    try:
        collator = kind(processor, max_length=args.max_length, pad_to_multiple_of=multiple, **recipe.collator_args)
    except TypeError as error:
        raise UserError(f"collator_args: {kind.__name__} does not take them: {error}.") from error
    if any(source.allow_urls for source in (*recipe.data.train, *recipe.data.eval)):
        collator.fetch = Fetcher(recipe.data.url_cache)
    collator.drop_rejected = recipe.data.max_rejected > 0
    collator.count_rows = recipe.data.streaming
    return collator


def load_collator_class(path: str, base: type[MultimodalCollator] = MultimodalCollator) -> type[MultimodalCollator]:
    """Finds a user's own collator by `package.module:Class`.

    Raises:
        UserError: The module or the class is not there, or is none of the kind `base`.
    """
    module_name, _, class_name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise UserError(
            f"collator: the module of {path!r} cannot be imported ({error}); is it installed, or in the "
            f"folder you start from?"
        ) from error
    except AttributeError as error:
        raise UserError(f"collator: the module {module_name!r} has no {class_name!r}.") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        name = "vlm_sft.MultimodalCollator" if base is MultimodalCollator else f"{base.__module__}.{base.__name__}"
        raise UserError(f"collator: {path!r} is not a subclass of {name}.")
    return found


def build_trainer(
    recipe: Recipe,
    args: SFTConfig,
    collator: MultimodalCollator,
    rows: RunRows,
    composed: Composed,
    say: Callable[[str], None],
) -> PartTrainer:
    """Reads the weights and puts a trainer around them.

    Args:
        recipe: A validated recipe.
        args: Its `sft:`.
        collator: Makes the batches.
        rows: What `load_rows` returned.
        composed: What `compose` returned.
        say: Told what is taken over, scaled or odd.

    Raises:
        UserError: A piece or the earlier stage does not fit.
    """
    train_rows, eval_rows, notes, *lengths = rows
    prefix = open_prefix(recipe, composed, collator, args.resume_from_checkpoint, say)
    if prefix is not None:
        composed = composed._replace(cached=prefix.parts, features=prefix.shape)
        collator.kept = prefix.kept
    set_seed(args.seed)
    stack = build_stack(recipe, say, composed)
    use_liger_kernels(stack.model, args, say)
    compile_language_model(stack.model, args, say)
    if args.resume_from_checkpoint:
        begun = read_manifest(args.resume_from_checkpoint)["pieces"]
        compare_pieces(begun, stack.pieces, str(args.resume_from_checkpoint))
    earlier = None
    if recipe.init_from:
        earlier = _take_over(recipe, stack, args.resume_from_checkpoint, say)
    elif recipe.stack and recipe.stack.projector.init == "match_embeddings":
        factor = _match_embeddings(stack, collator, train_rows, prefix)
        say(f"Projector scaled by {factor:.3g} to the size of the language model's embeddings.")
    given = {"plan": stack.plan, "eval_dataset": eval_rows, **recipe.watch.model_dump()}
    given["provenance"] = Provenance(recipe, stack.pieces, notes, earlier)
    trainer: PartTrainer
    if stack.processor.chooses:
        trainer = EncoderTrainer(stack.model, args, collator, train_rows, stack.processor, **given)
    else:
        lora = lora_config(recipe, stack.model)
        trainer = VLMSFTTrainer(stack.model, args, collator, train_rows, stack.processor, lora, **given)
    trainer.lengths, trainer.eval_lengths = lengths
    trainer.mean_length = notes.get("train_rows", {}).get("mean_length") or trainer.mean_length
    if packed := trainer.describe_packing():
        say(packed)
    trainer.prefix = prefix
    if recipe.lora_from == "continue" and not args.resume_from_checkpoint:
        fill_adapter(Path(str(recipe.init_from)), trainer.accelerator.unwrap_model(trainer.model))
    return trainer


def use_liger_kernels(model: PreTrainedModel, args: SFTConfig, say: Callable[[str], None]) -> None:
    """Gives the inner language model Liger's kernels where a run wants them; transformers looks at the outer one alone.

    The head keeps ours: it makes no full logits either, and knows caps, scales, weights and hits.

    Raises:
        UserError: The run is on a CPU, which has none of them.
    """
    if not args.use_liger_kernel:
        return
    if args.device.type == "cpu":
        raise UserError("sft.use_liger_kernel: its kernels are for a GPU, and this run is on a CPU; leave it out.")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN
    from transformers.integrations.liger import apply_liger_kernel

    inner = part_modules(model)["language_model"][1]
    if (kind := inner.config.model_type) not in KNOWN:
        say(f"sft.use_liger_kernel: Liger has no kernels for a {kind} language model, which keeps its own.")
        return
    own = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    apply_liger_kernel(inner, {**(args.liger_kernel_config or {}), **own})


def compile_language_model(model: PreTrainedModel, args: SFTConfig, say: Callable[[str], None]) -> None:
    """Has the layers of the language model compiled where a run wants it, in place of the whole model.

    accelerate would compile the model as one, anew for each number of images and for many lengths.

    Raises:
        UserError: There is nothing to compile with.
    """
    if not args.torch_compile:
        return
    options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
    if args.torch_compile_backend == "inductor" and (missing := _missing_compiler(args.device)):
        raise UserError(
            f"sft.torch_compile: torch compiles with {missing}, which is not here; install it, or leave it out."
        )
    layers = part_modules(model)["language_model"][1]
    kinds = compile_layers(layers, **{name: value for name, value in options.items() if value is not None})
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
    what = f"{', '.join(kinds)} compiled when first used, for every length at once" if kinds else "no layers were found"
    say(f"sft.torch_compile: {what}.")


def _missing_compiler(device: torch.device) -> str | None:
    """What inductor needs on a device and does not find."""
    if device.type != "cpu":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler (g++)"
    return None


def _take_over(recipe: Recipe, stack: Stack, begun: str | None, say: Callable[[str], None]) -> list[Json]:
    """Puts what the earlier stage trained into the stack, from its bundle or from a checkpoint of this run.

    Returns:
        The stages so far. What has begun needs its first bundle no more: a checkpoint has all of it.
    """
    first = str(recipe.init_from)
    if begun:
        hand_over(stack, begun, "continue")  # what was merged before is in the checkpoint
        for part, entry in read_manifest(begun)["pieces"].items():
            stack.pieces[part] |= {key: entry[key] for key in ("init_from", "held") if key in entry}
        return stages_so_far(begun)[:-1]
    parts = ", ".join(hand_over(stack, first, recipe.lora_from))
    lora = {"merge": "; its LoRA is merged", "continue": "; its LoRA is trained on", None: ""}[recipe.lora_from]
    say(f"Starting from {first}: {parts or 'nothing'} taken over{lora}; the frozen pieces are the same.")
    return stages_so_far(first)


def open_prefix(
    recipe: Recipe, composed: Composed, collator: MultimodalCollator, begun: str | None, say: Callable[[str], None]
) -> Prefix | None:
    """The frozen prefix of a recipe with a `cache`; None without one, or where it would be wrong, which is said.

    Args:
        recipe: A validated recipe.
        composed: What `compose` returned.
        collator: Makes the batches.
        begun: Checkpoint from which the run goes on, or None.
        say: Told what is kept, or why nothing is.

    Raises:
        UserError: The cache's path is no folder, or what lies there is none of this stack.
    """
    if recipe.cache is None:
        return None
    root = Path(recipe.cache.path)
    if (
        file := next((each for each in (root, *root.parents) if each.exists() and not each.is_dir()), None)
    ) is not None:
        raise UserError(f"{recipe.where(('cache', 'path'))}: {str(file)!r} is a file; name a folder, or a new one.")
    earlier = begun or recipe.init_from
    parts, why = find_prefix(recipe, composed, collator, _other_weights(Path(earlier)) if earlier else ())
    if why:
        say(why)
    if not parts:
        return None
    prefix = Prefix(recipe, composed, collator, parts, say)
    say(f"cache: {recipe.cache.path} holds what {' and '.join(parts)} give for {len(prefix.store):,} pictures.")
    return prefix


def _other_weights(folder: Path) -> set[str]:
    """Parts of the image path that an earlier stage trained or adapted: a bundle holds them, no piece does."""
    parts = {*read_manifest(folder).get("held", ())}
    for adapter in (folder / ADAPTER, *folder.glob(f"merged_*/{ADAPTER}")):
        parts |= {part_of(name) for name in read_tensors(adapter)} if adapter.is_file() else set()
    return parts


def _match_embeddings(stack: Stack, collator: MultimodalCollator, rows: Dataset, prefix: Prefix | None) -> float:
    """Scales the projector by the first rows that have images."""
    # A stream has no end, and so many rows show what is asked.
    left = iter(islice(rows, None if hasattr(rows, "__len__") else 4096))
    while some := list(islice(left, 8)):
        batch = collator(some) if prefix is None else prefix.complete(collator(some))
        if images := {name: batch[name] for name in (PIXELS, FEATURES) if name in batch}:
            images |= {name: batch[name] for name in INSTRUCTION if name in batch}
            return match_embeddings(stack.model, **images)
    raise UserError("stack.projector.init is match_embeddings, but no row of data.train has an image.")
