"""Loads a bundle: base pieces by their ids, then what was trained, key by key. Nothing in it is unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ..base.errors import UserError, refused_by_library
from ..base.names import ADAPTER, ADAPTER_CONFIG, RECIPE, TEMPLATE, TRAINED
from ..base.words import one_line
from ..batch.processor import VLMProcessor
from ..model.freeze import FreezePlan
from ..model.sharding import fill
from ..pieces.fingerprints import compare_pieces
from ..recipe.library_names import LORA, UNSAID
from ..recipe.passed_on import flaw, flaw_of_answers
from ..recipe.safety import pieces_in, read_json, refuse_code
from ..recipe.schema import Recipe, load_recipe
from ..recipe.yaml_file import YamlFile, texts_in
from ..stack.build_stack import build_stack
from ..stack.kinds import kind_of
from ..stack.lora import add_adapter, add_empty_adapter
from .hub import find_bundle, is_fetched, is_name
from .manifest import read_manifest
from .save import parameters_of

# Numbers in the mappings of an adapter's options (groups, samples, buffers), all of which stand for memory.
MOST_OF_AN_OPTION = 10_000


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    *,
    unquantised: bool = False,
    revision: str | None = None,
) -> tuple[nn.Module, VLMProcessor]:
    """Loads a bundle: base pieces by their ids, then what was trained.

    Args:
        path: Folder of the bundle, or `name/repository` on the Hub (`name/repository@revision`).
        device: Where to; default the first GPU if there is one, else the CPU.
        dtype: Type of all weights; default as in training.
        trust_remote_code: Lets base pieces run the Python code that they bring, where the bundle's recipe asks for
            it. A bundle may come from a stranger, so its own word is not enough.
        unquantised: Loads the language model of a QLoRA bundle in full; its logits differ by the error of the bits.
        revision: Branch, tag or commit of a repository on the Hub.

    Returns:
        The model in evaluation mode and its processor.

    Raises:
        UserError: No bundle, another base, or a missing, extra or misshapen tensor; the message names it.
    """
    folder = find_bundle(path, revision)
    manifest = read_manifest(folder)
    recipe = recipe_of(folder, manifest)
    if not trust_remote_code:
        refuse_code(recipe, str(folder))
    if unquantised:
        recipe = recipe.model_copy(update={"quantization": None})
    stack = build_stack(recipe)
    compare_pieces(manifest["pieces"], stack.pieces, str(folder))
    model: nn.Module = stack.model
    if manifest["adapter"]:
        model = _add_adapter(folder, model)
    load_trained(folder, model, stack.plan)
    model.requires_grad_(False)
    with refused_by_library(f"{str(folder)!r} is no whole bundle: its processor cannot be read"):
        processor = kind_of(stack.pieces).read_processor(folder, recipe, stack.model.config)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device) if dtype is None else model.to(device, dtype)
    for name, value in recipe.generation.items():
        setattr(stack.model.generation_config, name, value)
    if found := flaw_of_answers(vars(stack.model.generation_config), recipe.bounds):  # the base's own say some too
        raise UserError(f"{str(folder)!r}: {found[1]}")
    return model.eval(), processor


def recipe_of(folder: Path, manifest: dict[str, Any]) -> Recipe:
    """The recipe of a bundle, with what lies in the bundle put in place of what the recipe named.

    The template and the projector are the bundle's own, and a base piece that was given as a relative path is looked
    for where it was then.
    """
    if not (folder / RECIPE).is_file():
        raise UserError(f"{str(folder)!r} cannot be loaded: it was saved without its recipe ({RECIPE}).")
    settled = kind_of(manifest["pieces"]).settled
    overrides: dict[str, Any] = {"chat_template": str((folder / TEMPLATE).resolve()), **settled}
    for part, piece in manifest["pieces"].items():
        key = part if part == "model" else f"stack.{part}"
        if not Path(piece["pretrained"]).exists() and Path(piece.get("path", "")).is_absolute():
            overrides[f"{key}.pretrained"] = piece["path"]
        elif piece.get("commit") and not Path(piece["pretrained"]).exists():
            overrides[f"{key}.revision"] = piece["commit"]
        if "more" in piece:
            overrides[f"{key}.more"] = piece["more"]
    assignments = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    if any("${" in text for text in [*texts_in(YamlFile.read(folder / RECIPE).data), *assignments]):
        raise UserError(f"{str(folder)!r}: its recipe holds ${{…}}, which no saved recipe does; it is refused.")
    recipe = load_recipe(folder / RECIPE, assignments)
    if is_fetched(folder):
        _refuse_paths(recipe, str(folder))
    return recipe


def _refuse_paths(recipe: Recipe, where: str) -> None:
    """A repository names its pieces as the Hub does, or by a folder below this one; never another place."""
    for key, piece in pieces_in(recipe).items():
        given = [piece.pretrained, getattr(piece, "tokenizer", None)]
        named = [*filter(None, given), *(getattr(piece, "more", None) or [])]
        outside = (name for name in named if Path(name).is_absolute() or ".." in Path(name).parts)
        if wrong := [name for name in outside if not is_name(name)]:
            raise UserError(
                f"{where!r} names a folder of the machine that it was trained on ({wrong[0]!r}, {key}); fetch "
                f"it with `hf download` and write your path into its {RECIPE}."
            )


def _add_adapter(folder: Path, model: nn.Module) -> PeftModel:
    """Wraps the model as it was in training; weights come later, key by key."""
    for name in (ADAPTER_CONFIG, ADAPTER):
        if not (folder / name).is_file():
            raise UserError(f"{str(folder)!r} has no {name}, but its model has an adapter; it is no whole bundle.")
    _check_names(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        _check_ranks(config, folder)
        base, config.base_model_name_or_path = config.base_model_name_or_path, None  # PEFT warns of any but its own
        config.init_lora_weights = True
        wrapped = add_adapter(model, config) if config.use_dora else _add_filled_later(folder, model, config)
    except UserError:
        raise
    except Exception as error:  # whatever a word where a number should be makes PEFT raise
        where = repr(str(folder / ADAPTER_CONFIG))
        raise UserError(f"{where} is no adapter that PEFT can read: {one_line(error)}") from error
    config.base_model_name_or_path = base
    return wrapped


def _add_filled_later(folder: Path, model: nn.Module, config: PeftConfig) -> PeftModel:
    """Takes memory for an adapter when its tensors were compared with those of the file."""
    wrapped = add_empty_adapter(model, config)
    own = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    with safe_open(folder / ADAPTER, framework="pt") as file:
        shapes = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
    check_keys(shapes, own, folder / ADAPTER)
    for module in wrapped.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.zeros_like(parameter, device="cpu")
                module.register_parameter(name, nn.Parameter(empty, parameter.requires_grad))
    return wrapped


def _check_names(folder: Path) -> None:
    """Refuses what the file of an adapter can ask for beside LoRA, before PEFT reads it."""
    where, settings = repr(str(folder / ADAPTER_CONFIG)), read_json(folder / ADAPTER_CONFIG)
    if (kind := settings.get("peft_type")) != "LORA":
        raise UserError(f"{where} is no LoRA adapter but {kind}; it is refused.")
    for name, value in settings.items():
        if value not in UNSAID and (sentence := flaw(LORA, name, value)):
            raise UserError(f"{where} asks for `{name}`, which is refused: {sentence}")
        largest = (
            max((each for each in value.values() if isinstance(each, int)), default=0) if isinstance(value, dict) else 0
        )
        if LORA.mappings.get(name) and largest > MOST_OF_AN_OPTION:
            raise UserError(f"{where} says {largest:,} in `{name}`; more than {MOST_OF_AN_OPTION:,} are refused.")


def _check_ranks(config: PeftConfig, folder: Path) -> None:
    """Refuses ranks that an adapter's tensors do not have."""
    where = repr(str(folder / ADAPTER_CONFIG))
    try:
        with safe_open(folder / ADAPTER, framework="pt") as file:
            names = [name for name in file.keys() if "lora_A" in name or "lora_embedding_A" in name]  # noqa: SIM118
            held = {file.get_slice(name).get_shape()[0] for name in names}
    except (SafetensorError, OSError, IndexError) as error:
        raise UserError(f"{str(folder / ADAPTER)!r} is no whole safetensors file: {error}.") from error
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    if rank > max(held, default=0):
        raise UserError(f"{where} has the rank {rank:,}, but its tensors have the rank {max(held, default=0):,}.")


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
    wanted = parameters_of(model, held | set(plan.train))
    check_keys(saved, wanted, folder / TRAINED)
    for name, parameter in wanted.items():
        fill(parameter, saved[name])
    if isinstance(model, PeftModel):
        adapter = _read_tensors(folder / ADAPTER)
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        check_keys(adapter, own, folder / ADAPTER)
        for name, tensor in own.items():  # which shares its memory with the model's
            fill(tensor, adapter[name])


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
