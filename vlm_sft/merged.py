"""A bundle whose LoRA is merged: its language model as a checkpoint of its own, everything else as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from .bundle import RECIPE, Provenance, read_manifest, save_bundle
from .card import write_card
from .export_check import QUESTION, noise_picture
from .freeze import FreezePlan, part_of
from .loading import recipe_of
from .native import to_causal_lm
from .parity import check_parity, probe_logits
from .pieces import pieces_of
from .positions import cast
from .processor import VLMProcessor
from .recipe import Recipe
from .stack import dtype_of
from .yaml_file import YamlFile

LANGUAGE_MODEL = "language_model"


def write_merged(bundle: Path, out: Path, model: Any, processor: VLMProcessor, dtype: torch.dtype) -> dict[str, Any]:
    """Writes OUT/language_model (a causal language model with its tokenizer) and a bundle that names it.

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
    batch = processor.batch([processor.encode_chat(QUESTION)])
    batch["pixel_values"] = processor.encode_images([noise_picture()])
    before = probe_logits(model, batch)
    adapted = {part_of(name.split(".lora_")[0]) for name, _ in model.named_parameters() if ".lora_" in name}
    if isinstance(model, PeftModel):
        model = model.merge_and_unload(safe_merge=True)
    difference = float((probe_logits(model, batch) - before).abs().max())
    folder = out / LANGUAGE_MODEL
    causal = to_causal_lm(model)
    cast(causal, dtype)
    causal.config.dtype = dtype
    causal.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    held = {*manifest["held"], *adapted, "projector"} - {"language_model"}
    merged = _recipe(recipe, bundle, folder, dtype)
    pieces = pieces_of(merged, model)
    for part in held & set(pieces):  # the base is not like them any more
        pieces[part]["init_from"] = str(bundle)
    plan = FreezePlan({part: rate for part, rate in merged.train.items() if part in held})
    save_bundle(out, model, processor, plan, Provenance(merged, pieces, {"merged_from": str(bundle)}))
    for part in ("vision_tower", "language_model"):
        cast(getattr(model.model, part), dtype_of(merged, part))
    result = {**check_parity(out, model, batch), "merge_difference": difference}
    write_card(out)
    return result


def _recipe(recipe: Recipe, bundle: Path, folder: Path, dtype: torch.dtype) -> Recipe:
    """The bundle's recipe with the merged language model in place of its base, and without LoRA."""
    changes = {"pretrained": str(folder.resolve()), "revision": None, "trust_remote_code": False}
    changes["dtype"] = str(dtype).removeprefix("torch.")
    language_model = recipe.parts.language_model.model_copy(update=changes)
    rates = {part: rate for part, rate in recipe.train.items() if part != "language_model"}
    # The bundle's own template is read when it is loaded; its name is what people know it by.
    name = YamlFile.read(bundle / RECIPE).data["chat_template"]
    return recipe.model_copy(
        update={
            "stack": recipe.parts.model_copy(update={"language_model": language_model}),
            "chat_template": name,
            "train": rates or {"projector": float(recipe.sft.get("learning_rate", 2e-5))},
            "lora": None,
            "quantization": None,
        }
    )
