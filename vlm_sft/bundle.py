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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .adapters import add_adapter
from .configs import settle_precision
from .errors import UserError
from .freeze import PARTS, FreezePlan, is_adapter, part_of
from .pieces import compare_pieces
from .processor import VLMProcessor
from .recipe import Recipe, load_recipe
from .stack import build_stack

FORMAT = 1
MANIFEST, TRAINED, RECIPE, TEMPLATE = "bundle.json", "trained.safetensors", "recipe.yaml", "chat_template.jinja"
LIBRARIES = ("vlm_sft", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers")
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SECRETS = ("hub_token", "push_to_hub_token")


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
                recipe = _without_secrets(settle_precision(provenance.recipe))
                (unfinished / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
            _write_json(unfinished / MANIFEST, manifest)
            # The manifest goes last: what it says is true of everything beside it.
            for path in sorted(unfinished.iterdir(), key=lambda path: path.name == MANIFEST):
                if (folder / path.name).is_dir():
                    shutil.rmtree(folder / path.name)
                os.replace(path, folder / path.name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The bundle cannot be written to {str(folder)!r}: {reason}.") from error


def held_parts(plan: FreezePlan, pieces: dict[str, dict[str, Any]]) -> set[str]:
    """The parts that a bundle must hold, because no base piece is like them.

    They are the trained ones, those that `init_from` brought from an earlier stage, and always the projector: it is in
    no base piece, also where only LoRA is trained.
    """
    return {*plan.train, "projector", *(part for part, piece in pieces.items() if "init_from" in piece)}


def held_tensors(
    model: nn.Module, parts: set[str], state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Parameters of these parts that are not LoRA's, on the CPU, under the composed model's own names."""
    parameters = _parameters_of(model, parts)
    # A state dict also has buffers, and tied weights twice.
    given = {plain_name(name): tensor for name, tensor in (state_dict or {}).items()}
    source = {name: given[name] for name in parameters} if given else parameters
    return {name: tensor.detach().cpu().contiguous() for name, tensor in source.items()}


def _parameters_of(model: nn.Module, parts: set[str]) -> dict[str, nn.Parameter]:
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
            config.base_model_name_or_path = provenance.recipe.stack.language_model.pretrained
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card, which would replace the bundle's own


def _without_secrets(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"sft": {k: v for k, v in recipe.sft.items() if k not in SECRETS}})


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
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"{str(folder)!r} is no bundle: it has no {MANIFEST}; give the output_dir of a finished run.")
    manifest = _read_json(path)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{str(path)!r} has the format {manifest.get('format')}, this version reads {FORMAT}; upgrade vlm_sft."
        )
    return manifest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}; the bundle is not whole.") from error
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} holds no mapping; the bundle is not whole.")
    return content


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    *,
    unquantised: bool = False,
) -> tuple[nn.Module, VLMProcessor]:
    """Loads a bundle: base pieces by their ids, then what was trained.

    Args:
        path: Folder of the bundle.
        device: Where to; default the first GPU if there is one, else the CPU.
        dtype: Type of all weights; default as in training.
        trust_remote_code: Lets base pieces run the Python code that they bring, where the bundle's recipe asks for
            it. A bundle may come from a stranger, so its own word is not enough.
        unquantised: Loads the language model of a QLoRA bundle in full; its logits differ by the error of the bits.

    Returns:
        The model in evaluation mode and its processor.

    Raises:
        UserError: No bundle, another base, or a missing, extra or misshapen tensor; the message names it.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    recipe = recipe_of(folder, manifest)
    if not trust_remote_code:
        refuse_remote_code(recipe, str(folder))
    if unquantised:
        recipe = recipe.model_copy(update={"quantization": None})
    stack = build_stack(recipe)
    compare_pieces(manifest["pieces"], stack.pieces, str(folder))
    model: nn.Module = stack.model
    if manifest["adapter"]:
        model = _add_adapter(folder, model)
    load_trained(folder, model, stack.plan)
    model.requires_grad_(False)
    try:
        processor = VLMProcessor.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(folder)!r} is no whole bundle: its processor cannot be read ({error}).") from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device) if dtype is None else model.to(device, dtype)
    for name, value in recipe.generation.items():
        setattr(stack.model.generation_config, name, value)
    return model.eval(), processor


def recipe_of(folder: Path, manifest: dict[str, Any]) -> Recipe:
    """The recipe of a bundle, with what lies in the bundle put in place of what the recipe named.

    The template and the projector are the bundle's own, and a base piece that was given as a relative path is looked
    for where it was then.
    """
    if not (folder / RECIPE).is_file():
        raise UserError(f"{str(folder)!r} cannot be loaded: it was saved without its recipe ({RECIPE}).")
    overrides: dict[str, Any] = {
        "chat_template": str((folder / TEMPLATE).resolve()),
        "stack.projector.pretrained": None,
        "stack.projector.init": "default",
    }
    for part, piece in manifest["pieces"].items():
        if not Path(piece["pretrained"]).exists() and Path(piece.get("path", "")).is_absolute():
            overrides[f"stack.{part}.pretrained"] = piece["path"]
        if "more" in piece:
            overrides[f"stack.{part}.more"] = piece["more"]
    return load_recipe(folder / RECIPE, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])


def refuse_remote_code(recipe: Recipe, where: str) -> None:
    """Raises a UserError when a recipe asks to run code of a base piece."""
    for part in PARTS:
        piece = getattr(recipe.stack, part)
        if piece is not None and piece.trust_remote_code:
            raise UserError(
                f"{where!r} wants to run Python code that {piece.pretrained!r} brings along (stack.{part}."
                f"trust_remote_code); read that code, then allow it with --trust-remote-code (trust_remote_code=True)."
            )


def _add_adapter(folder: Path, model: nn.Module) -> PeftModel:
    """Wraps the model as it was in training; weights come later, key by key."""
    for name in (ADAPTER_CONFIG, ADAPTER):
        if not (folder / name).is_file():
            raise UserError(f"{str(folder)!r} has no {name}, but its model has an adapter; it is no whole bundle.")
    config = PeftConfig.from_pretrained(str(folder))
    base, config.base_model_name_or_path = config.base_model_name_or_path, None  # PEFT warns of any name but its own
    config.init_lora_weights = True
    wrapped = add_adapter(model, config)
    config.base_model_name_or_path = base
    return wrapped


def load_trained(folder: Path, model: nn.Module, plan: FreezePlan) -> None:
    """Puts what a bundle holds (and its adapter, where the model has one) into a model, key by key.

    Args:
        folder: The bundle.
        model: The model to fill.
        plan: What this run trains; the bundle must hold it.

    Raises:
        UserError: A key is missing, too many, or of another shape.
    """
    held = set(read_manifest(folder).get("held", ()))
    saved = _read_tensors(folder / TRAINED)
    wanted = _parameters_of(model, held | set(plan.train))
    check_keys(saved, wanted, folder / TRAINED)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])
    if isinstance(model, PeftModel):
        adapter = _read_tensors(folder / ADAPTER)
        check_keys(adapter, get_peft_model_state_dict(model, save_embedding_layers=False), folder / ADAPTER)
        set_peft_model_state_dict(model, adapter)


def check_keys(saved: dict[str, torch.Tensor], wanted: dict[str, Any], path: Path) -> None:
    """Compares names and shapes of tensors in a file with those a model needs.

    Raises:
        UserError: One is missing, too many, or of another shape; the message names it.
    """
    if missing := sorted(set(wanted) - set(saved)):
        raise UserError(f"{str(path)!r} lacks {len(missing)} trained tensors, for instance {missing[0]!r}.")
    if extra := sorted(set(saved) - set(wanted)):
        raise UserError(f"{str(path)!r} holds {len(extra)} tensors that this model has not, for instance {extra[0]!r}.")
    for name, tensor in wanted.items():
        if saved[name].shape != tensor.shape:
            raise UserError(
                f"{str(path)!r}: tensor {name!r} has the shape {tuple(saved[name].shape)}, but this model needs "
                f"{tuple(tensor.shape)}."
            )


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Safetensors alone: nothing in a bundle is ever unpickled."""
    if not path.is_file():
        raise UserError(f"{str(path.parent)!r} is no whole bundle: it has no {path.name}.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{str(path)!r} is no whole safetensors file: {error}.") from error


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
