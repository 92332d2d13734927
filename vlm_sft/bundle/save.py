"""The bundle: everything needed to have a trained model again, except the frozen weights of others.

| file | what it holds |
|---|---|
| `bundle.json` | format, pieces with fingerprints, freeze plan, library versions, parity result |
| `recipe.yaml` | the resolved recipe |
| `trained.safetensors` | parameters of the parts that are not as their base is (LoRA's apart), under their full names |
| `adapter_config.json`, `adapter_model.safetensors` | LoRA, as PEFT writes it |
| `merged_1`, … | adapters of earlier stages that were merged, in their order, as PEFT writes them |
| `config.json`, tokenizer, image processor, `chat_template.jinja` | configuration and processor |
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from ..base.errors import UserError
from ..base.names import CARD, MANIFEST, RECIPE, TRAINED
from ..base.whole_files import UNFINISHED, write_json
from ..base.words import reason_of
from ..batch.processor import VLMProcessor
from ..model.freeze import FreezePlan, is_adapter, part_of
from ..pieces.piece import specs_of
from ..recipe.libraries import settle_precision
from ..stack.adapters import MERGED, merged_in, write_merged_adapters
from ..stack.kinds import kind_of
from .hub import refuse_tokens
from .manifest import Provenance, make_manifest


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
    merged = [adapter.source for adapter in merged_in(model)]
    manifest = make_manifest(plan, provenance, isinstance(model, PeftModel), merged)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as beside:
            unfinished = Path(beside)
            tensors = held_tensors(model, set(manifest["held"]), state_dict)
            save_file(tensors, unfinished / TRAINED, metadata={"format": "pt"})
            if isinstance(model, PeftModel):
                _save_adapter(model, unfinished, provenance, state_dict)
            write_merged_adapters(model, unfinished)
            core = model.get_base_model() if isinstance(model, PeftModel) else model
            core.config.save_pretrained(unfinished)
            processor.save_pretrained(unfinished)
            if provenance is not None:
                recipe = settle_precision(provenance.recipe)
                (unfinished / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
            write_json(unfinished / MANIFEST, manifest)
            refuse_tokens(unfinished, "save it")
            # The manifest goes last: what it says is true of everything beside it.
            for path in sorted(unfinished.iterdir(), key=lambda path: path.name == MANIFEST):
                if (folder / path.name).is_dir():
                    shutil.rmtree(folder / path.name)
                os.replace(path, folder / path.name)
            kept = {folder / MERGED.format(number) for number in range(1, len(merged) + 1)}
            for stale in set(folder.glob(MERGED.format("*"))) - kept:
                shutil.rmtree(stale)
    except (OSError, SafetensorError) as error:
        raise UserError(f"The bundle cannot be written to {str(folder)!r}: {reason_of(error)}.") from error


def check_savable(processor: VLMProcessor) -> None:
    """Saves a processor and looks at it as `save_bundle` will, so that a run is refused before it trains, not after.

    Raises:
        UserError: A file of its tokenizer, for instance, holds a token, password or key.
    """
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        refuse_tokens(Path(folder), "train with it")


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
    name = name.replace(".token_adapter.base_layer.", ".")
    while ".base_layer." in name:  # those of experts lie in each other
        name = name.replace(".base_layer.", ".")
    return name


def _save_adapter(
    model: PeftModel, folder: Path, provenance: Provenance | None, state_dict: dict[str, torch.Tensor] | None
) -> None:
    """PEFT's own files; the base they name is the language model (PEFT finds no name: the stack is composed)."""
    if provenance is not None:
        specs = specs_of(provenance.recipe)
        base = specs[kind_of(specs).base].pretrained
        for config in model.peft_config.values():
            config.base_model_name_or_path = base
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    (folder / CARD).unlink(missing_ok=True)  # PEFT's card, which would replace the bundle's own
