"""The bundle: everything needed to have a trained model again, except the frozen weights of others.

| file | what it holds |
|---|---|
| `bundle.json` | format, pieces with fingerprints, freeze plan, library versions, parity result |
| `recipe.yaml` | the resolved recipe |
| `trained.safetensors` | parameters of the parts that are not as their base is (LoRA's apart), under their full names |
| `adapter_config.json`, `adapter_model.safetensors` | LoRA, as PEFT writes it |
| `config.json`, tokenizer, image processor, `chat_template.jinja` | configuration and processor |
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from ..base.errors import UserError
from ..base.words import reason_of
from ..batch.processor import VLMProcessor
from ..model.freeze import FreezePlan, is_adapter, part_of
from ..recipe.libraries import settle_precision
from ..recipe.safety import check_folder, check_pieces, read_json
from ..recipe.schema import Recipe
from .run_folder import MANIFEST, find_manifest

FORMAT = 1
TRAINED, RECIPE, TEMPLATE = "trained.safetensors", "recipe.yaml", "chat_template.jinja"
LIBRARIES = ("vlm_sft", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers")
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass
class Provenance:
    """Where a bundle comes from.

    Args:
        recipe: The resolved recipe.
        pieces: Part → id, revision and fingerprint, as `Stack.pieces`.
        notes: Anything else worth keeping (rows used and rejected, for instance).
    """

    recipe: Recipe
    pieces: dict[str, dict[str, Any]]
    notes: dict[str, Any] = field(default_factory=dict)


def save_bundle(
    folder: str | Path,
    model: nn.Module,
    processor: VLMProcessor,
    plan: FreezePlan,
    provenance: Provenance | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes a bundle. One that stands in the folder already stays whole until the new one is.

    Args:
        folder: Where to; made if it is not there.
        model: The trained model, maybe wrapped by PEFT.
        processor: Its processor.
        plan: Says which parameters are trained.
        provenance: The recipe and its pieces; without it the bundle cannot name its base.
        state_dict: Gathered weights of a sharded model, in place of the model's own.

    Raises:
        UserError: The folder cannot be written.
    """
    folder = Path(folder)
    pieces = provenance.pieces if provenance else {}
    held = held_parts(plan, pieces)
    manifest = {
        "format": FORMAT,
        "pieces": pieces,
        "trained": sorted(plan.train),
        "held": sorted(held),
        "adapter": isinstance(model, PeftModel),
        "stages": stages_of(plan, provenance, isinstance(model, PeftModel)) if provenance else [],
        "versions": {name: _version(name) for name in LIBRARIES},
        **(provenance.notes if provenance else {}),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as beside:
            unfinished = Path(beside)
            save_file(held_tensors(model, held, state_dict), unfinished / TRAINED, metadata={"format": "pt"})
            if isinstance(model, PeftModel):
                _save_adapter(model, unfinished, provenance, state_dict)
            core = model.get_base_model() if isinstance(model, PeftModel) else model
            core.config.save_pretrained(unfinished)
            processor.save_pretrained(unfinished)
            if provenance is not None:
                recipe = settle_precision(provenance.recipe)
                (unfinished / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
            _write_json(unfinished / MANIFEST, manifest)
            # The manifest goes last: what it says is true of everything beside it.
            for path in sorted(unfinished.iterdir(), key=lambda path: path.name == MANIFEST):
                if (folder / path.name).is_dir():
                    shutil.rmtree(folder / path.name)
                os.replace(path, folder / path.name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"The bundle cannot be written to {str(folder)!r}: {reason_of(error)}.") from error


def stages_of(plan: FreezePlan, provenance: Provenance, adapter: bool) -> list[dict[str, Any]]:
    """What each stage up to this one trained, and on which sources; the earlier ones as their bundles say."""
    recipe = provenance.recipe
    earlier = Path(recipe.init_from or "") / MANIFEST
    told = json.loads(earlier.read_text(encoding="utf-8")).get("stages", []) if earlier.is_file() else []
    this = {
        "recipe": recipe.path.stem if recipe.path else None,
        "trained": sorted(plan.train),
        "adapter": adapter,
        "data": [source.name for source in recipe.data.train],
    }
    return [*told, this]


def held_parts(plan: FreezePlan, pieces: dict[str, dict[str, Any]]) -> set[str]:
    """The parts that a bundle must hold, because no base piece is like them.

    They are the trained ones, those that `init_from` brought from an earlier stage, and a stack's projector: it is in
    no base piece, also where only LoRA is trained.
    """
    new = () if "model" in pieces else ("projector",)
    brought = {part for part, piece in pieces.items() if "init_from" in piece} - {"model"}
    return {*plan.train, *new, *brought, *pieces.get("model", {}).get("held", ())}


def mark_taken(pieces: dict[str, dict[str, Any]], parts: Iterable[str], folder: str) -> None:
    """Notes in a stack's pieces which parts came from another bundle: theirs is not like them any more.

    Args:
        pieces: `Stack.pieces`; an existing VLM is one piece of several parts.
        parts: The parts.
        folder: The bundle.
    """
    if "model" in pieces:
        pieces["model"] |= {"init_from": folder, "held": sorted(parts)}
        return
    for part in set(parts) & set(pieces):
        pieces[part]["init_from"] = folder


def held_tensors(
    model: nn.Module, parts: set[str], state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Parameters of these parts that are not LoRA's, on the CPU, under the composed model's own names."""
    parameters = parameters_of(model, parts)
    # A state dict also has buffers, and tied weights twice.
    given = {plain_name(name): tensor for name, tensor in (state_dict or {}).items()}
    source = {name: given[name] for name in parameters} if given else parameters
    return {name: tensor.detach().cpu().contiguous() for name, tensor in source.items()}


def parameters_of(model: nn.Module, parts: set[str]) -> dict[str, nn.Parameter]:
    """Name in the composed model → parameter of these parts, LoRA's left out."""
    return {
        plain_name(name): parameter
        for name, parameter in model.named_parameters()
        if not is_adapter(name) and part_of(name) in parts
    }


def plain_name(name: str) -> str:
    """A parameter's name in the composed model, whatever PEFT or DDP put around it."""
    for wrapper in ("module.", "base_model.model."):
        name = name.removeprefix(wrapper)
    return name.replace(".base_layer.", ".")


def _save_adapter(
    model: PeftModel, folder: Path, provenance: Provenance | None, state_dict: dict[str, torch.Tensor] | None
) -> None:
    """PEFT's own files; the base they name is the language model (PEFT finds no name: the stack is composed)."""
    if provenance is not None:
        for config in model.peft_config.values():
            config.base_model_name_or_path = _base_of(provenance.recipe)
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card, which would replace the bundle's own


def _base_of(recipe: Recipe) -> str:
    """What LoRA was put into: the existing VLM, or the language model of a stack."""
    if recipe.model is not None:
        return recipe.model.pretrained
    return recipe.parts.language_model.pretrained


def update_manifest(folder: str | Path, entries: dict[str, Any]) -> None:
    """Adds to `bundle.json`."""
    _write_json(Path(folder) / MANIFEST, {**read_manifest(folder), **entries})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes beside and renames, so that a file is never half there."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Reads `bundle.json`.

    Raises:
        UserError: The folder is no bundle, or a bundle of a later format.
    """
    path = find_manifest(folder)
    check_folder(Path(folder))
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{str(path)!r} has the format {manifest.get('format')}, this version reads {FORMAT}; upgrade vlm_sft."
        )
    check_pieces(manifest.get("pieces"), str(path))
    return manifest


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
