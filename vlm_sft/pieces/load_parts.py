"""Loads one part by itself, from any checkpoint that contains it.

A vision tower, a Q-Former or a projector is often published inside something larger. The tensors of a part are found by
their names: the one prefix under which every tensor of the part stands, or a table of `layouts`. Only those are read.
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModel, GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.gguf import is_gguf_arch_supported

from ..base.errors import UserError, refused_by_library
from ..base.names import TRAINED
from ..base.words import one_line
from ..model.configuration import count_patches, image_size_of
from ..model.connectors import PROJECTORS, build_resampler
from ..model.encoder_decoder import auto_class, reads_by_encoder, untie
from ..model.losses import scales_as_its_class
from ..model.parts import VISION_MODELS, build_vision_tower, mark_initialised
from ..model.positions import INTERPOLATING
from ..recipe.safety import check_weights
from ..systems.position_tables import TABLES, fit_positions
from .beside import keep_plain_generation, refuse_adapter
from .checkpoints import WEIGHT_FILES, Checkpoint
from .expected import MODEL, laid_out, name_again
from .gguf_files import GgufFile, read_weights
from .layouts import Origin, detect
from .piece import Piece, Spec
from .quantization import HEADS, leave_out, settle

if TYPE_CHECKING:
    from ..recipe.sections import LanguageModel, Resampler, VisionTower

# What publishers (and our own bundles) call the layers of a projector → what ours are called. LLaVA counts the
# activations of its mlp as layers, so every second number is a linear layer.
PROJECTOR_NAMES = {
    "projector.linear": "linear",
    "language_projection": "linear",
    "mm_projector": "linear",
    "llama_proj": "linear",
    "opt_proj": "linear",
    "llm_proj": "linear",
    "t5_proj": "linear",
    "glm_proj": "linear",
    "projector.layout": "layout",
    "projector.norm": "norm",
    "multi_modal_projector.layer_norm": "norm",
    "multi_modal_projector.linear_1": "layers.0",
    "multi_modal_projector.linear_2": "layers.1",
    **{f"mm_projector.{2 * i}": f"layers.{i}" for i in range(8)},
    **{f"projector.layers.{i}": f"layers.{i}" for i in range(8)},
}
# Yi-VL's has a norm behind each linear layer, and three numbers a step.
NORMED_NAMES = {
    **{f"mm_projector.{3 * i}": f"layers.{i}" for i in range(8)},
    **{f"mm_projector.{3 * i + 1}": f"norms.{i}" for i in range(8)},
    **{f"projector.{part}.{i}": f"{part}.{i}" for part in ("layers", "norms") for i in range(8)},
}
# Files in which a projector is published alone, by LLaVA and by this package.
PROJECTOR_FILES = (*WEIGHT_FILES, "mm_projector.bin", TRAINED)
# What follows the features that are used here; checkpoints of encoders with another head lack it.
UNUSED = ("pooler.", "head.")


def load_vision_tower(piece: Piece[VisionTower], dtype: torch.dtype) -> PreTrainedModel:
    """Loads the vision tower of a checkpoint that is one, or contains one, as `find_vision_tower` found it."""
    spec, config = piece.spec, copy.deepcopy(piece.config)
    resized = spec.image_size is not None and config.model_type not in INTERPOLATING
    as_published = not piece.is_foreign and not spec.config and not resized
    if as_published and piece.whole.model_type == config.model_type and config.model_type not in VISION_MODELS:
        if not spec.trust_remote_code:  # a model of a class that only its own code knows runs that code anyway
            check_size(AutoModel.from_config, config, piece.checkpoint)
        return from_pretrained(AutoModel, piece, dtype=dtype)
    with torch.device("meta"):
        tower = build_vision_tower(config)
    patches = count_patches(config, *image_size_of(config)) if resized else None
    piece.origins = load_module(tower, piece.checkpoint, dtype, "vision_tower", patches)
    return tower


def load_resampler(piece: Piece[Resampler], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Loads a resampler, of a BLIP-2 checkpoint for instance its Q-Former and query tokens."""
    with torch.device("meta"):
        resampler = build_resampler(piece.spec.type, copy.deepcopy(piece.config), piece.num_query_tokens)
    piece.origins = load_module(resampler, piece.checkpoint, dtype, piece.spec.type)
    return resampler


def load_projector_weights(projector: nn.Module, pretrained: str, revision: str | None = None) -> None:
    """Fills a projector from a checkpoint that holds one under the name its publisher gave it."""
    key = "stack.projector.pretrained"
    checkpoint = Checkpoint(pretrained, revision, key, PROJECTOR_FILES)
    kind = next(kind for kind, made in PROJECTORS.items() if type(projector) is made)
    if detect(kind, checkpoint.files):
        load_module(projector, checkpoint, torch.float32, kind)
        return
    renamed: dict[str, str] = {}
    for name in checkpoint.files:
        stem, _, leaf = name.rpartition(".")
        for theirs, ours in (NORMED_NAMES if kind == "mlp_norm" else PROJECTOR_NAMES).items():
            if stem == theirs or stem.endswith("." + theirs):
                renamed[f"{ours}.{leaf}"] = name
        if leaf == "image_newline":  # LLaVA-1.6 has it beside the projector
            renamed["layout.newline"] = name
    wanted = projector.state_dict()
    if missing := sorted(set(wanted) - set(renamed)):
        raise UserError(f"{key}: {pretrained!r} holds no projector of this kind ({', '.join(missing)} not found).")
    tensors = checkpoint.read(renamed[name] for name in wanted)
    for name, tensor in wanted.items():
        check_shape(name, tensors[renamed[name]].shape, tensor.shape, f"{key}: {pretrained!r}")
        tensor.copy_(tensors[renamed[name]])  # into the parameter itself: a state dict shares its memory


def load_language_model(piece: Piece[LanguageModel], dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Loads a language model with its head, also out of a checkpoint that contains one (LLaVA, BLIP-2).

    Args:
        piece: As `find_language_model` makes it.
        dtype: Type of the weights in memory.
        **options: Passed on to `from_pretrained` (for instance `quantization_config`).

    Raises:
        UserError: It cannot be had, or makes its logits in a way that the loss does not know.
    """
    if piece.renamed is not None:
        options["key_mapping"] = piece.renamed
    quantised = options.get("quantization_config")
    if quantised is not None and quantised.llm_int8_skip_modules is not None:
        leave_out(quantised, HEADS)  # transformers does it by itself only as long as nothing else is named
    options.update(dtype=dtype, attn_implementation=piece.spec.attn_implementation)
    if piece.is_gguf:
        model = _from_gguf(piece, **options)
    else:
        if not piece.spec.trust_remote_code:
            check_size(auto_class(piece.config).from_config, piece.config, piece.checkpoint)
        model = untie(from_pretrained(auto_class(piece.config), piece, **options))
    if not reads_by_encoder(piece.config) and not scales_as_its_class(model):
        raise UserError(
            f"{piece.key}: {piece.config.model_type} models change their logits after the head in a way that is not "
            f"known here, so the loss would be that of another model; use another language model."
        )
    if quantised is not None:
        settle(model)
    return model


def _from_gguf(piece: Piece[Spec], **options: Any) -> PreTrainedModel:
    """`from_pretrained` of a GGUF file, every tensor dequantised."""
    empty = check_size(auto_class(piece.config).from_config, piece.config, piece.checkpoint)
    file = GgufFile(piece.pretrained, piece.key)
    where = f"{piece.key}: the GGUF file {piece.pretrained!r} cannot be read as a {piece.config.model_type} model"
    if not is_gguf_arch_supported(file.architecture):
        with refused_by_library(where):
            options["state_dict"] = read_weights(file, empty, options["dtype"])
        return from_pretrained(type(empty), piece, **options)
    # What transformers' newer reader makes can be neither trained nor saved nor quantised, so it is made once more.
    unpacked = {"gguf_file": os.path.realpath(piece.pretrained), "quantization_config": GgufConfig(dequantize=True)}
    model = from_pretrained(type(empty), piece, **{**options, **unpacked})
    settle(model)
    return from_pretrained(type(empty), piece, state_dict=model.state_dict(), **options)


def check_size(
    make: Callable[[PreTrainedConfig], PreTrainedModel], config: PreTrainedConfig, checkpoint: Checkpoint
) -> PreTrainedModel | None:
    """transformers gives memory to what a checkpoint lacks or has in another shape, before it says so.

    Returns:
        The model on the meta device; None where there is no class for it, which `from_pretrained` says.

    Raises:
        UserError: The model is far larger than its files.
    """
    try:
        with torch.device("meta"):
            empty = make(copy.deepcopy(config))
    except ValueError:
        return None
    except UserError:
        raise
    except Exception as error:  # more bytes than can be counted, or a number that its class cannot work with
        sentence = f"{checkpoint.where}: no model can be made of its config.json ({one_line(error)})."
        raise UserError(sentence) from error
    _check_filled(empty, checkpoint)
    return empty


def make_empty(make: Callable[..., Any], config: PreTrainedConfig, checkpoint: Checkpoint) -> Any:
    """As `check_size`, where nobody makes the model anew: that its class cannot be made of the sizes is said here."""
    if (empty := check_size(make, config, checkpoint)) is None:
        raise UserError(
            f"{checkpoint.where}: the sizes in its config.json or of its tensors do not go together; fetch it again."
        )
    return empty


def _check_filled(empty: nn.Module, checkpoint: Checkpoint) -> None:
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in empty.buffers())
    check_weights(parameters, checkpoint.size, checkpoint.where, buffers)


def from_pretrained(auto_class: type[PreTrainedModel], piece: Piece[Spec], **options: Any) -> PreTrainedModel:
    """`from_pretrained`, but a tensor that the checkpoint lacks is an error: transformers would draw it at random."""
    # A class is chosen by the checkpoint's own configuration, unless the part is picked out of it under other names.
    config = piece.whole if piece.renamed is None else piece.config
    refuse_adapter(piece.place, piece.revision, piece.key)
    piece.checkpoint.check_shards()
    place, revision = piece.place, piece.revision
    if not piece.trusts_code or piece.is_gguf:
        place, revision = laid_out(place, revision, piece.key, MODEL, piece.checkpoint), None
    try:
        model, found = auto_class.from_pretrained(
            None if "state_dict" in options else place,
            config=copy.deepcopy(config),
            revision=revision,
            trust_remote_code=piece.trusts_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # what does not fit is named below, instead of in a log
            **options,
        )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{piece.key}: the weights of {piece.pretrained!r} hold more than weights, and reading them could run "
            f"code: they are refused; use a checkpoint in safetensors."
        ) from error
    except Exception as error:  # a value of another type makes a class raise anything
        if isinstance(error, AssertionError):
            raise
        said = one_line(error).replace(place, piece.pretrained)
        raise UserError(f"{piece.key}: transformers cannot load {piece.pretrained!r}: {said}") from error
    for name, got, wanted in found["mismatched_keys"]:
        check_shape(name, got, wanted, piece.where)
    if missing := sorted(name for name in found["missing_keys"] if not name.startswith(UNUSED)):
        raise UserError(
            f"{piece.where} lacks {len(missing)} tensors of this model, for instance {missing[0]!r}; is it the right "
            f"checkpoint, and whole?"
        )
    name_again(model, piece.pretrained)
    keep_plain_generation(model, piece.where)
    return model


def load_module(
    module: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, kind: str = "", patches: int | None = None
) -> dict[str, Origin]:
    """Fills a module made on the meta device with the tensors of a larger checkpoint, reading those alone.

    Args:
        module: The module.
        checkpoint: Where its tensors are.
        dtype: Type of the weights in memory.
        kind: `vision_tower` or the kind of a resampler, for checkpoints that are not in transformers' layout.
        patches: Resizes a tower's table of positions to this many patches.

    Returns:
        Where each tensor was found, as `find_tensors`.

    Raises:
        UserError: The checkpoint lacks a tensor of the module, or has one of another shape.
    """
    _check_filled(module, checkpoint)
    wanted = module.state_dict()
    origins = find_tensors(wanted, checkpoint, kind)
    tensors = checkpoint.read(sorted({name for origin in origins.values() for name in origin.names}))
    state = {}
    for name, empty in wanted.items():
        if (origin := origins.get(name)) is None:
            tensor = torch.zeros(empty.shape)  # it is one of UNUSED, and zeros do
        else:
            sources = [tensors[source] for source in origin.names]
            tensor = origin.make(*sources) if origin.make else sources[0]
            if patches and name.endswith(TABLES):
                tensor = fit_positions(tensor, empty.shape, patches)
            check_shape(origin.names[0], tensor.shape, empty.shape, checkpoint.where)
        state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    module.load_state_dict(state, strict=True, assign=True)
    _materialise_buffers(module)
    return origins


def find_tensors(wanted: Iterable[str], checkpoint: Checkpoint, kind: str = "") -> dict[str, Origin]:
    """Our name of each tensor of a module → where it is in a checkpoint; what no feature passes may be absent.

    Raises:
        UserError: A tensor is not there; the message names one.
    """
    wanted = list(wanted)
    if (found := detect(kind, checkpoint.files)) is None:
        prefix = find_prefix(wanted, checkpoint)
        return {name: Origin((prefix + name,)) for name in wanted if prefix + name in checkpoint.files}
    layout, prefix = found
    origins = {name: layout.origin(name, prefix, checkpoint.files) for name in wanted}
    _check_none_missing([n for o in origins.values() for n in o.names if n not in checkpoint.files], wanted, checkpoint)
    return origins


def find_prefix(wanted: Iterable[str], checkpoint: Checkpoint) -> str:
    """The prefix under which a checkpoint holds every tensor of a module (`""`, `vision_model.`, …).

    Raises:
        UserError: There is none; the message names the closest one and what it lacks.
    """
    wanted = list(wanted)
    probe = wanted[0]
    prefixes = [n[: -len(probe)] for n in checkpoint.files if n == probe or n.endswith("." + probe)]
    needed = [name for name in wanted if not name.startswith(UNUSED)]
    lacks = {p: [n for n in needed if p + n not in checkpoint.files] for p in sorted(prefixes, key=len)}
    for prefix, missing in lacks.items():
        if not missing:
            return prefix
    _check_none_missing(min(lacks.values(), key=len, default=needed), needed, checkpoint)
    raise AssertionError("a prefix that lacks nothing was returned")


def _check_none_missing(missing: Sequence[str], needed: Sequence[str], checkpoint: Checkpoint) -> None:
    if missing:
        raise UserError(
            f"{checkpoint.where} does not hold this part: {len(missing)} of {len(needed)} tensors are missing, for "
            f"instance {missing[0]!r}; is it the right checkpoint?"
        )


def check_shape(name: str, got: Sequence[int], wanted: Sequence[int], where: str) -> None:
    """Raises a UserError that names the tensor and both shapes when they differ."""
    if tuple(got) != tuple(wanted):
        raise UserError(
            f"{where}: tensor {name!r} has the shape {tuple(got)}, but {tuple(wanted)} is needed; name a checkpoint "
            f"that was made for this stack."
        )


def _materialise_buffers(module: nn.Module) -> None:
    """Buffers that no checkpoint stores (position ids) are made by the model's own initialisation."""
    mark_initialised(module)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            owner = module.get_submodule(name.rpartition(".")[0])
            owner.register_buffer(name.rpartition(".")[2], torch.empty_like(buffer, device="cpu"), persistent=False)
            makers = [m for n, m in module.named_modules() if isinstance(m, PreTrainedModel) and name.startswith(n)]
            assert makers, f"nobody knows how to make the buffer {name}"
            makers[-1]._init_weights(owner)
