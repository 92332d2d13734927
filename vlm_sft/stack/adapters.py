"""LoRA in a bundle: read key by key, put into a model, and merged where a later stage was built on top of it.

A merged adapter stays in every bundle that stands on it, in a folder of its own (`merged_1`, `merged_2`, …) and in
PEFT's own files: the base pieces and these, merged in their order, give the same weights again when the earlier bundles
are long gone, and take a thousandth of the room that merged weights would.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from torch import nn

from ..base.errors import UserError, refused_by_library
from ..base.limits import limits
from ..base.names import ADAPTER, ADAPTER_CONFIG, Json
from ..base.whole_files import read_bytes
from ..base.words import one_line
from ..model.freeze import is_quantised, part_of
from ..model.sharding import fill
from ..recipe.library_names import LORA, UNSAID
from ..recipe.passed_on import flaw
from ..recipe.safety import read_json
from .lora import add_adapter, add_empty_adapter, add_further_adapter

MERGED = "merged_{}"
DORA = "lora_magnitude_vector"


class Merged(NamedTuple):
    """An adapter that was merged into a model, as its files are.

    Attributes:
        source: The bundle that it was taken from.
        config: PEFT's `adapter_config.json`.
        weights: PEFT's `adapter_model.safetensors`.
    """

    source: str
    config: bytes
    weights: bytes


def merged_in(model: nn.Module) -> list[Merged]:
    """The adapters that were merged into a model by `merge_adapter`, in their order; the list is the model's own."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    return vars(core).setdefault("merged_adapters", [])


def merge_adapter(folder: Path, model: nn.Module, source: str) -> None:
    """Merges the adapter in a folder into a model, which remembers it for its own bundle.

    Args:
        folder: Holds PEFT's two files.
        model: Without PEFT's wrapper; changed.
        source: The bundle that the adapter is from, as cards name it.

    Raises:
        UserError: The adapter does not fit, is not finite, or the language model has 4 or 8 bits.
    """
    if is_quantised(model):
        raise UserError(
            f"{str(folder)!r}: LoRA cannot be merged into a language model in 4 or 8 bits, which are too few to hold "
            f"it; remove `quantization`."
        )
    wrapped = open_adapter(folder, model)
    fill_adapter(folder, wrapped)
    try:
        wrapped.merge_and_unload(safe_merge=True)  # this changes the model in place
    except ValueError as error:
        raise UserError(f"{str(folder / ADAPTER)!r} cannot be merged: {error}") from error
    merged_in(model).append(Merged(source, *(read_bytes(folder / name) for name in (ADAPTER_CONFIG, ADAPTER))))


def merge_again(folder: Path, manifest: Json, model: nn.Module) -> None:
    """Merges the adapters on which a bundle stands.

    Args:
        folder: The bundle.
        manifest: What its `bundle.json` says.
        model: Its base pieces; changed.

    Raises:
        UserError: One is missing, or does not fit.
    """
    for number, source in enumerate(manifest.get("merged", ()), 1):
        merge_adapter(folder / MERGED.format(number), model, str(source))


def forget_merged(model: nn.Module) -> set[str]:
    """Lets a model be one whose base is written anew; returns the parts that merged adapters have changed."""
    names = (name for adapter in merged_in(model) for name in load_bytes(adapter.weights))
    changed = {part_of(name) for name in names}
    merged_in(model).clear()
    return changed


def write_merged_adapters(model: nn.Module, folder: Path) -> None:
    """Writes the adapters that were merged into a model into the folder of its bundle."""
    for number, adapter in enumerate(merged_in(model), 1):
        place = folder / MERGED.format(number)
        place.mkdir()
        (place / ADAPTER_CONFIG).write_bytes(adapter.config)
        (place / ADAPTER).write_bytes(adapter.weights)


def open_adapter(folder: Path, model: nn.Module) -> PeftModel:
    """Wraps a model as it was in training; weights come later, key by key.

    Raises:
        UserError: The folder holds no whole LoRA adapter, one of another kind, or one that does not fit the model.
    """
    try:
        config = read_config(folder)
        _check_ranks(config, folder)
        base, config.base_model_name_or_path = config.base_model_name_or_path, None  # PEFT warns of any but its own
        config.init_lora_weights = True
        wrapped = _add_compared(folder, model, config)
    except UserError:
        raise
    except Exception as error:  # a word where a number should be makes PEFT raise anything
        where = repr(str(folder / ADAPTER_CONFIG))
        raise UserError(f"{where} is no adapter that PEFT can read: {one_line(error)}") from error
    wrapped.peft_config["default"].base_model_name_or_path = base
    return wrapped


def read_config(folder: Path) -> LoraConfig:
    """The configuration of the adapter in a folder.

    Raises:
        UserError: There is no whole adapter, or one that asks for more than LoRA.
    """
    for name in (ADAPTER_CONFIG, ADAPTER):
        if not (folder / name).is_file():
            raise UserError(f"{str(folder)!r} has no {name}, but its model has an adapter; it is no whole bundle.")
    _check_names(folder)
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    return config


def _add_compared(folder: Path, model: nn.Module, config: LoraConfig) -> PeftModel:
    """Takes memory for an adapter when its tensors were compared with those of the file."""
    wrapped = add_empty_adapter(model, replace(config, use_dora=False))
    own = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    with safe_open(folder / ADAPTER, framework="pt") as file:
        names = [name for name in file.keys() if not (config.use_dora and DORA in name)]  # noqa: SIM118
        shapes = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
    check_keys(shapes, own, folder / ADAPTER)
    if config.use_dora:  # DoRA measures the weights while it is made, which takes memory of its own
        return add_adapter(wrapped.unload(), config)
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
        entries = value.values() if isinstance(value, dict) else ()
        # Groups, samples, buffers: all numbers in these mappings stand for memory.
        largest = max((each for each in entries if isinstance(each, int)), default=0)
        if LORA.mappings.get(name) and largest > (most := limits().adapter_numbers):
            raise UserError(
                f"{where} says {largest:,} in `{name}`; more than {most:,} (`limits.adapter_numbers`) are refused."
            )


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


def open_further_adapter(folder: Path, model: PeftModel, name: str) -> None:
    """Puts the adapter in a folder beside those of a model, under a name, with its weights.

    Raises:
        UserError: As `open_adapter` and `fill_adapter`.
    """
    config = read_config(folder)
    _check_ranks(config, folder)
    config.base_model_name_or_path, config.init_lora_weights = None, True
    with refused_by_library(f"{str(folder / ADAPTER_CONFIG)!r} is no adapter that PEFT can read"):
        add_further_adapter(model, config, name)
    fill_adapter(folder, model, name)


def fill_adapter(folder: Path, model: PeftModel, name: str = "default") -> None:
    """Puts the adapter in a folder into that of a model, key by key.

    Raises:
        UserError: A key is missing, too many, or of another shape.
    """
    adapter = read_tensors(folder / ADAPTER)
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    check_keys(adapter, own, folder / ADAPTER)
    for key, tensor in own.items():  # the state dict shares its memory with the model
        fill(tensor, adapter[key])


def check_keys(saved: dict[str, torch.Tensor], wanted: Json, path: Path) -> None:
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


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Safetensors alone: nothing in a bundle is ever unpickled.

    Raises:
        UserError: The file is missing or not whole.
    """
    if not path.is_file():
        raise UserError(f"{str(path.parent)!r} is no whole bundle: it has no {path.name}.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{str(path)!r} is no whole safetensors file: {error}.") from error
