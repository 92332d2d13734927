"""A bundle whose LoRA is merged: its language model (or the VLM it began with) as a checkpoint of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..base.names import RECIPE
from ..batch.processor import VLMProcessor
from ..bundle.card import write_card
from ..bundle.load import recipe_of
from ..bundle.manifest import Provenance, mark_taken, read_manifest
from ..bundle.parity import check_parity, probe_logits
from ..bundle.save import save_bundle
from ..families.model import cast_parts
from ..model.freeze import FreezePlan, is_adapter, part_of
from ..model.positions import cast
from ..pieces.fingerprints import pieces_of
from ..recipe.schema import Recipe
from ..recipe.yaml_file import YamlFile
from ..stack.precision import dtype_of
from .check import QUESTION, noise_picture
from .forms import FamilyForm
from .native_model import to_causal_lm

# The piece that a merged bundle brings along: what LoRA may have changed.
LANGUAGE_MODEL, MODEL = "language_model", "model"


def write_merged(bundle: Path, out: Path, model: Any, processor: VLMProcessor, dtype: torch.dtype) -> dict[str, Any]:
    """Writes OUT/language_model (a causal language model with its tokenizer) and a bundle that names it.

    Of an existing VLM it is OUT/model: the whole model with its own processor.

    Args:
        bundle: The bundle that the model is from.
        out: Folder to write.
        model: Its model in fp32, with or without an adapter; it is used up.
        processor: Its processor.
        dtype: Type of the language model's weights on disk.

    Returns:
        What the parity gate found: the unmerged model in fp32 against the merged bundle in a fresh process.
    """
    manifest, recipe = read_manifest(bundle), recipe_of(bundle, read_manifest(bundle))
    picture = noise_picture()
    batch = processor.batch([processor.encode_chat(QUESTION, sizes=[picture.size])])
    batch |= processor.image_inputs([picture], processor.instructions(QUESTION))
    before = probe_logits(model, batch)
    adapted = {part_of(name.split(".lora_")[0]) for name, _ in model.named_parameters() if is_adapter(name)}
    if isinstance(model, PeftModel):
        model = model.merge_and_unload(safe_merge=True)
    difference = float((probe_logits(model, batch) - before).abs().max())
    base = MODEL if recipe.model is not None else LANGUAGE_MODEL
    merged = _recipe(recipe, bundle, out / base, dtype)
    write = _write_model if base == MODEL else _write_language_model
    write(out / base, model, processor, merged)
    # What LoRA changed of a stack outside its language model is held; of an existing model all of it is in the base.
    held = {*manifest["held"], "projector", *(adapted if base == LANGUAGE_MODEL else ())} - {"language_model"}
    pieces = pieces_of(merged, model)
    mark_taken(pieces, held, str(bundle))  # the base is not like them any more
    plan = FreezePlan({part: rate for part, rate in merged.train.items() if part in held})
    save_bundle(out, model, processor, plan, Provenance(merged, pieces, {"merged_from": str(bundle)}))
    _cast(model, merged)
    result = {**check_parity(out, model, batch), "merge_difference": difference}
    write_card(out)
    return result


def _write_language_model(folder: Path, model: Any, processor: VLMProcessor, recipe: Recipe) -> None:
    dtype = dtype_of(recipe, LANGUAGE_MODEL)
    causal = to_causal_lm(model)
    cast(causal, dtype)
    causal.config.dtype = dtype
    causal.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)


def _write_model(folder: Path, model: Any, processor: VLMProcessor, recipe: Recipe) -> None:
    _cast(model, recipe)  # what is trained stays in fp32
    model.save_pretrained(folder)
    FamilyForm(model, processor, recipe).write_processor(folder)


def _cast(model: Any, recipe: Recipe) -> None:
    """Puts the parts into the types that the recipe loads them in."""
    if recipe.model is not None:
        cast_parts(model, recipe.train, dtype_of(recipe, MODEL))
        return
    for part in ("vision_tower", LANGUAGE_MODEL):
        cast(getattr(model.model, part), dtype_of(recipe, part))


def _recipe(recipe: Recipe, bundle: Path, folder: Path, dtype: torch.dtype) -> Recipe:
    """The bundle's recipe with the merged piece in place of its base, and without LoRA."""
    changes = {"pretrained": str(folder.resolve()), "revision": None, "dtype": str(dtype).removeprefix("torch.")}
    base: dict[str, Any]
    if recipe.model is not None:
        base = {"model": recipe.model.model_copy(update={**changes, "processor": {}})}
    else:
        language_model = recipe.parts.language_model.model_copy(update={**changes, "trust_remote_code": False})
        base = {"stack": recipe.parts.model_copy(update={"language_model": language_model})}
    rates = {part: rate for part, rate in recipe.train.items() if part != "language_model"}
    # The bundle's own template is read when it is loaded; its name is what people know it by.
    name = YamlFile.read(bundle / RECIPE).data["chat_template"]
    return recipe.model_copy(
        update={
            **base,
            "chat_template": name,
            "train": rates or {"projector": float(recipe.sft.get("learning_rate", 2e-5))},
            "lora": None,
            "quantization": None,
        }
    )
