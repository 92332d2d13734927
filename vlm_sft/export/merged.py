"""A bundle whose LoRA is merged: its language model (or the VLM it began with) as a checkpoint of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..base.names import RECIPE, Json
from ..batch.processor import VLMProcessor
from ..bundle.card import write_card
from ..bundle.load import recipe_of
from ..bundle.manifest import Provenance, read_manifest
from ..bundle.parity import check_parity, probe_logits
from ..bundle.save import save_bundle
from ..families.kind import VLM, Kind
from ..model.freeze import FreezePlan, is_adapter, part_of
from ..model.positions import cast
from ..pieces.fingerprints import entries_of
from ..pieces.part_configs import find_pieces
from ..recipe.schema import Recipe
from ..recipe.yaml_file import YamlFile
from ..stack.adapters import forget_merged
from ..stack.judge import measure
from ..stack.kinds import kind_of
from ..stack.precision import dtypes_of
from .check import QUESTION, noise_picture
from .forms import FamilyForm
from .merging import Comparison
from .native_model import to_causal_lm


def write_merged(bundle: Path, out: Path, model: nn.Module, processor: VLMProcessor, dtype: torch.dtype) -> Json:
    """Writes OUT/language_model (a causal language model with its tokenizer) and a bundle that names it.

    Of an existing VLM it is OUT/model: the whole model with its own processor.

    Args:
        bundle: The bundle that the model is from.
        out: Folder to write.
        model: Its model in fp32, with or without an adapter; it is used up.
        processor: Its processor.
        dtype: Type of the language model's weights on disk.

    Returns:
        What the parity gate found, and `max_difference` of a logit between the bundle, in fp32 and with LoRA unmerged,
        and the merged one in a fresh process, its type included: at most the sum of what the two steps change.
    """
    manifest = read_manifest(bundle)
    recipe, picture = recipe_of(bundle, manifest), noise_picture()
    batch = processor.batch([processor.encode_chat(QUESTION, sizes=[picture.size])])
    batch |= processor.image_inputs([picture], processor.instructions(QUESTION))
    comparison = Comparison(model, lambda model: probe_logits(model, batch))
    adapted = {part_of(name.split(".lora_")[0]) for name, _ in model.named_parameters() if is_adapter(name)}
    model = comparison.merge(model)
    adapted |= forget_merged(model)
    kind = kind_of(manifest["pieces"])
    merged = _merged_recipe(recipe, kind, bundle, out / kind.base, dtype)
    WRITERS[kind.base](out / kind.base, model, processor, merged)
    # What LoRA changed of a stack outside its language model is held; of an existing model all of it is in the base.
    held = {*manifest["held"], "projector", *(adapted - set(kind.covers))} - {"language_model"}
    pieces = entries_of(find_pieces(merged), model)
    kind.mark_taken(pieces, held, str(bundle))  # the base is another model than these pieces now
    plan = FreezePlan({part: rate for part, rate in merged.train.items() if part in held})
    save_bundle(out, model, processor, plan, Provenance(merged, pieces, {"merged_from": str(bundle)}))
    kind.cast(model, merged, dtypes_of(merged))
    logits = probe_logits(model, batch)
    comparison.accept(logits, dtype)
    result = {**check_parity(out, model, batch), "merge_difference": 0.0, **comparison.found}
    result["max_difference"] += measure(comparison.wanted, logits)["max_difference"]
    write_card(out)
    return result


def _write_language_model(folder: Path, model: VLM, processor: VLMProcessor, recipe: Recipe) -> None:
    dtype = dtypes_of(recipe)["language_model"]
    causal = to_causal_lm(model)
    cast(causal, dtype)
    causal.config.dtype = dtype
    causal.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)


def _write_model(folder: Path, model: VLM, processor: VLMProcessor, recipe: Recipe) -> None:
    kind_of(["model"]).cast(model, recipe, dtypes_of(recipe))  # what is trained stays in fp32
    model.save_pretrained(folder)
    FamilyForm(model, processor, recipe).write_processor(folder)


# By the piece that LoRA goes into (`Kind.base`): how it is written when LoRA is merged into it.
WRITERS = {"language_model": _write_language_model, "model": _write_model}


def _merged_recipe(recipe: Recipe, kind: Kind, bundle: Path, folder: Path, dtype: torch.dtype) -> Recipe:
    """The bundle's recipe with the merged piece in place of its base, and without LoRA."""
    changes: Json = {
        "pretrained": str(folder.resolve()),
        "revision": None,
        "dtype": str(dtype).removeprefix("torch."),
        "added_tokens": [],  # its tokenizer has these tokens
    }
    rates = {part: rate for part, rate in recipe.train.items() if part != "language_model"}
    # The bundle's own template is read when it is loaded; its name is what people know it by.
    name = YamlFile.read(bundle / RECIPE).data["chat_template"]
    rates = rates or {"projector": float(recipe.sft.get("learning_rate", 2e-5))}
    gone = dict.fromkeys(("lora", "lora_from", "quantization"))
    return kind.with_base(recipe, changes).model_copy(update={"chat_template": name, "train": rates, **gone})
