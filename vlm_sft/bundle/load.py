"""Loads a bundle: base pieces by their ids, then what was trained, key by key. Nothing in it is unpickled."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig

from ..base.errors import UserError, refused_by_library
from ..base.names import RECIPE, TRAINED, Json
from ..batch.processor import VLMProcessor
from ..model.freeze import FreezePlan
from ..model.sharding import fill
from ..pieces.fingerprints import compare_pieces
from ..pieces.piece import section_of
from ..recipe.safety import pieces_in, refuse_code
from ..recipe.schema import Recipe, load_recipe
from ..recipe.yaml_file import YamlFile, texts_in
from ..stack.adapters import (
    check_keys,
    fill_adapter,
    merge_again,
    open_adapter,
    open_further_adapter,
    read_tensors,
)
from ..stack.build_stack import build_stack
from ..stack.kinds import kind_of
from .hub import find_bundle, is_fetched, is_name
from .manifest import read_manifest
from .save import parameters_of


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
    merge_again(folder, manifest, model)
    if manifest["adapter"]:
        model = open_adapter(folder, model)
    load_trained(folder, model, stack.plan)
    model.requires_grad_(False)
    with refused_by_library(f"{str(folder)!r} is no whole bundle: its processor cannot be read"):
        processor = kind_of(stack.pieces).read_processor(folder, recipe, stack.model.config)
    processor.words = stack.processor.words
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device) if dtype is None else model.to(device, dtype)
    if recipe.generation:  # there is none for a model that writes nothing
        _set_answers(stack.model.generation_config, recipe)
    return model.eval(), processor


class Beside(NamedTuple):
    """What a further bundle on the base of a loaded model has of its own.

    Attributes:
        tensors: To put in place of those of the same names in the model, by `parameters_of`.
        processor: Its processor.
        answers: What its recipe and its base say of answers.
    """

    tensors: dict[str, torch.Tensor]
    processor: VLMProcessor
    answers: GenerationConfig


def load_beside(folder: Path, model: nn.Module, adapter: str) -> Beside:
    """Loads a further bundle on the base of a loaded model; its LoRA is put beside that of the model.

    Args:
        folder: The bundle, of whose base `differs_in` finds nothing to be another.
        model: What `load` gave of the first; its device and types are kept.
        adapter: A name for its LoRA.

    Raises:
        UserError: As `load`.
    """
    manifest = read_manifest(folder)
    recipe = recipe_of(folder, manifest)
    saved = read_tensors(folder / TRAINED)
    wanted = parameters_of(model, {*manifest.get("held", ()), *manifest["trained"]})
    check_keys(saved, wanted, folder / TRAINED)
    if manifest["adapter"]:
        assert isinstance(model, PeftModel)
        open_further_adapter(folder, model, adapter)
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    with refused_by_library(f"{str(folder)!r} is no whole bundle: its processor cannot be read"):
        processor = kind_of(manifest["pieces"]).read_processor(folder, recipe, core.config)
    answers = copy.deepcopy(core.generation_config)
    _set_answers(answers, recipe)
    return Beside({name: saved[name].to(parameter) for name, parameter in wanted.items()}, processor, answers)


def _set_answers(answers: GenerationConfig, recipe: Recipe) -> None:
    """Puts what a recipe says of answers over what the base says; both were judged when they were read."""
    for name, value in recipe.generation.items():
        setattr(answers, name, value)


def differs_in(first: Path, other: Path) -> str | None:
    """In what two bundles do not stand on one base, so that a model in memory cannot be both; None: they do."""
    told = [read_manifest(folder) for folder in (first, other)]
    recipes = [recipe_of(folder, manifest) for folder, manifest in zip((first, other), told, strict=True)]
    try:
        compare_pieces(told[0]["pieces"], told[1]["pieces"], "")
    except UserError:
        return "the weights of their base"
    if any(manifest.get("merged") for manifest in told):
        return "the LoRA that was merged into their base"
    if any(recipe.words for recipe in recipes):
        return "their words"
    if set(told[0].get("held", ())) | set(told[0]["trained"]) != set(told[1].get("held", ())) | set(told[1]["trained"]):
        return "the parts that they hold"
    for key in ("stack", "model", "quantization"):
        if _without_places(getattr(recipes[0], key)) != _without_places(getattr(recipes[1], key)):
            return f"`{key}`"
    # The first has set these of the base's own, which is not there any more.
    left = set(recipes[0].generation) - set(recipes[1].generation) - {*SAID_ANYWAY}
    return f"`generation.{min(left)}`" if left else None


SAID_ANYWAY = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "num_beams")
"""Settings of an answer that a server says of every one."""


def _without_places(section: object) -> Any:
    """A section of a recipe without where its pieces lie: that is what fingerprints are for."""
    told = section.model_dump() if hasattr(section, "model_dump") else section
    if not isinstance(told, dict):
        return told
    return {key: _without_places(value) for key, value in told.items() if key not in ("pretrained", "revision")}


def recipe_of(folder: Path, manifest: Json) -> Recipe:
    """The recipe of a bundle, with what lies in the bundle put in place of what the recipe named.

    The template and the projector are the bundle's own, and a base piece that was given as a relative path is looked
    for where it was then.
    """
    if not (folder / RECIPE).is_file():
        raise UserError(f"{str(folder)!r} cannot be loaded: it was saved without its recipe ({RECIPE}).")
    kind = kind_of(manifest["pieces"])
    overrides: Json = {**kind.own_files(folder), **kind.settled}
    for part, piece in manifest["pieces"].items():
        key = section_of(part)
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


def load_trained(folder: Path, model: nn.Module, plan: FreezePlan, new: Collection[str] = ()) -> None:
    """Puts what a bundle holds (and its adapter, where the model has one) into a model, key by key.

    Args:
        folder: The bundle.
        model: The model to fill.
        plan: What this run trains; the bundle must hold it.
        new: Names of parameters that stay as they are, because the bundle has none of them.

    Raises:
        UserError: A key is missing, too many, or of another shape.
    """
    held = set(read_manifest(folder).get("held", ()))
    saved = read_tensors(folder / TRAINED)
    wanted = {n: p for n, p in parameters_of(model, held | set(plan.train)).items() if n not in new}
    _lengthen(saved, model, wanted)
    check_keys(saved, wanted, folder / TRAINED)
    for name, parameter in wanted.items():
        fill(parameter, saved[name])
    if isinstance(model, PeftModel):
        fill_adapter(folder, model)


def _lengthen(saved: dict[str, torch.Tensor], model: nn.Module, wanted: dict[str, nn.Parameter]) -> None:
    """Gives tables that were trained whole before new words came the rows of those words, as the model has them."""
    core = model
    if isinstance(core, PeftModel):  # the words of an adapter were learned, and saved with the rest
        return
    found = (core.get_input_embeddings(), core.get_output_embeddings())
    tables = {id(table.weight) for table in found if table is not None}
    for name, parameter in wanted.items():
        if id(parameter) in tables and name in saved and len(saved[name]) < len(parameter):
            saved[name] = torch.cat([saved[name], parameter[len(saved[name]) :].detach().to(saved[name])])
