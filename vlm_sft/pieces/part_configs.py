"""The configuration of a part: from its `config.json`, or from the shapes of its tensors where there is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..base.errors import UserError
from ..base.names import CONFIG
from ..base.words import one_line
from ..model.positions import INTERPOLATING
from ..recipe.safety import LIMITS, check_config, check_length
from .checkpoints import Checkpoint, fetch_file, unreachable
from .layouts import Shapes, at, detect


def load_config(pretrained: str, revision: str | None, key: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Reads the configuration of a checkpoint.

    Raises:
        UserError: There is none, or it cannot be had.
    """
    if Path(pretrained).exists() and not (Path(pretrained) / CONFIG).is_file():
        raise unreachable(pretrained, key)
    raw_config(pretrained, revision, key)
    try:
        return AutoConfig.from_pretrained(pretrained, revision=revision, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise unreachable(pretrained, key) from error
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{key}: transformers cannot read the config.json of {pretrained!r}: {one_line(error)}"
        ) from error


# LLaVA's own checkpoints are those of a language model with a projector beside it, under another model type.
LLAVA_MODEL_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
LLAVA_MARK = "mm_hidden_size"
# How larger checkpoints name a language model inside them → what its own class calls its tensors: BLIP-2, InstructBLIP
# and LLaVA as they are published, mPLUG-Owl; LAVIS and MiniGPT-4; and LLaVA as transformers 5 saves it.
LANGUAGE_MODEL_NAMES = {
    r"^(language_model|llm_model|llama_model|opt_model)\.": "",
    r"^model\.language_model\.": "model.",
}


def language_model_config(spec: Any) -> tuple[PreTrainedConfig, dict[str, str] | None]:
    """The configuration of the language model that a recipe's piece names, and how its tensors are named there.

    Args:
        spec: Has `pretrained`, `revision` and `trust_remote_code`.

    Returns:
        The configuration, and pairs (pattern of a name there, replacement) where the checkpoint is a larger one or is
        not of transformers; None where it is that of the language model itself.
    """
    key = "stack.language_model.pretrained"
    if raw := _llava_original(spec, key):
        kind = LLAVA_MODEL_TYPES[raw.pop("model_type")]
        return AutoConfig.for_model(kind, **{n: v for n, v in raw.items() if not n.startswith("mm_")}), {}
    raw = _raw_config(spec, key)
    if raw.get("model_type") in FOREIGN and "text_config" in raw:  # mPLUG-Owl
        return AutoConfig.for_model(**raw["text_config"]), LANGUAGE_MODEL_NAMES
    config = load_config(spec.pretrained, spec.revision, key, spec.trust_remote_code)
    text = config.get_text_config()
    if text is config or type(config) in AutoModelForCausalLM._model_mapping:
        return text, None
    if type(text) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{key}: a {text.model_type!r} checkpoint is no causal language model.")
    return text, LANGUAGE_MODEL_NAMES


def _llava_original(spec: Any, key: str) -> dict[str, Any] | None:
    """The `config.json` of a checkpoint that LLaVA's own code wrote; None for any other."""
    raw = _raw_config(spec, key)
    return raw if LLAVA_MARK in raw and raw.get("model_type") in LLAVA_MODEL_TYPES else None


def _raw_config(spec: Any, key: str) -> dict[str, Any]:
    """`config.json` as it stands; empty where there is none, or none that can be read."""
    return raw_config(spec.pretrained, spec.revision, key)


def raw_config(pretrained: str, revision: str | None, key: str) -> dict[str, Any]:
    """The same, after a look at its numbers: some classes fill the memory while they read them."""
    path = fetch_file(pretrained, CONFIG, revision, key, required=False)
    if not path:
        return {}
    check_length(path, LIMITS[CONFIG])
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    check_config(raw, f"{key}: {pretrained!r}")
    return raw


# Model types of checkpoints in a layout of `layouts`: transformers has no classes for them, the tensors tell the sizes.
FOREIGN = ("mplug-owl", "qwen")


def is_foreign(spec: Any, key: str) -> bool:
    """Whether a checkpoint is not of transformers: a bare weight file, or a folder of a type in `FOREIGN`."""
    return Path(spec.pretrained).is_file() or _raw_config(spec, key).get("model_type") in FOREIGN


def open_checkpoint(spec: Any, part: str) -> Checkpoint:
    """The checkpoint that a recipe's piece names, with the further files it names."""
    more = getattr(spec, "more", None) or ()
    key = "model.pretrained" if part == "model" else f"stack.{part}.pretrained"
    return Checkpoint(spec.pretrained, spec.revision, key, more=more)


def vision_tower_config(spec: Any) -> PreTrainedConfig:
    """The configuration of the vision tower that a recipe's piece names.

    Args:
        spec: Has `pretrained`, `revision`, `trust_remote_code`, `config` and maybe `image_size`.

    Raises:
        UserError: There is no vision tower in the checkpoint, or its sizes cannot be told.
    """
    key = "stack.vision_tower"
    if is_foreign(spec, f"{key}.pretrained"):
        vision = _from_shapes(spec, "vision_tower", "vision_tower")[0]
    else:
        config = load_config(spec.pretrained, spec.revision, f"{key}.pretrained", spec.trust_remote_code)
        vision = state(vision_config_of(config, f"{key}.pretrained"), spec.config, key)
    return _at_image_size(vision, getattr(spec, "image_size", None), key)


def _at_image_size(config: PreTrainedConfig, size: int | None, key: str) -> PreTrainedConfig:
    if size is None or config.model_type in INTERPOLATING:
        return config
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    if size % patch:
        raise UserError(
            f"{key}.image_size is {size}, but the tower cuts images into patches of {patch} pixels: use a multiple, "
            f"like {max(size // patch, 1) * patch}."
        )
    config.image_size = size
    return config


QFORMER_KINDS = {"blip_2_qformer": "qformer", "instructblip_qformer": "instruct_qformer"}


def resampler_config(spec: Any) -> tuple[PreTrainedConfig, int]:
    """The configuration of the resampler that a recipe's piece names, and its number of query tokens.

    Raises:
        UserError: There is no Q-Former in the checkpoint, or its sizes cannot be told.
    """
    key = "stack.resampler"
    if is_foreign(spec, f"{key}.pretrained"):
        return _from_shapes(spec, "resampler", spec.type)
    config = load_config(spec.pretrained, spec.revision, f"{key}.pretrained", spec.trust_remote_code)
    qformer = getattr(config, "qformer_config", None)
    if qformer is None:
        raise UserError(
            f"{key}.pretrained: a {config.model_type!r} checkpoint holds no Q-Former; name a BLIP-2 checkpoint."
        )
    if (kind := QFORMER_KINDS.get(qformer.model_type)) != spec.type:
        raise UserError(
            f"{key}.type: the checkpoint {spec.pretrained!r} holds a resampler of the type {kind}, not {spec.type}."
        )
    return state(qformer, spec.config, key), config.num_query_tokens


def vision_config_of(config: PreTrainedConfig, key: str) -> PreTrainedConfig:
    """The configuration of the vision tower inside `config`, which may be that of a larger model.

    Raises:
        UserError: There is no vision tower in it.
    """
    vision = getattr(config, "vision_config", None) or config
    if isinstance(vision, dict):  # a configuration that is not of transformers
        raise UserError(f"{key}: transformers has no class for the vision tower of a {config.model_type!r} checkpoint.")
    if not hasattr(vision, "image_size") or not hasattr(vision, "patch_size"):
        raise UserError(f"{key}: a {config.model_type!r} checkpoint holds no vision tower; name a ViT, CLIP, SigLIP, …")
    return vision


def state(config: PreTrainedConfig, stated: Mapping[str, Any], key: str) -> PreTrainedConfig:
    """Puts what the recipe states under `config` in place of what the checkpoint says.

    Raises:
        UserError: The configuration has no such setting.
    """
    for name, value in stated.items():
        if not hasattr(config, name):
            raise UserError(f"{key}.config: a {type(config).__name__} has no setting {name!r}.")
        setattr(config, name, value)
    return config


def _from_shapes(spec: Any, part: str, kind: str) -> tuple[PreTrainedConfig, int]:
    """Sizes of a part in a bare weight file, and (of a resampler) its number of query tokens."""
    checkpoint = open_checkpoint(spec, part)
    found = detect(kind, checkpoint.files)
    if found is None:
        raise UserError(
            f"{checkpoint.key}: the file {spec.pretrained!r} holds no {kind} in a layout that is known here, so its "
            f"sizes cannot be told; name a folder with config.json, or a LAVIS or MiniGPT-4 file."
        )
    layout, prefix = found
    assert layout.configure is not None, f"{kind} has no sizes of its own"
    rows = at(layout.rows, prefix)
    found_shapes = checkpoint.shapes(name for name in checkpoint.files if name.startswith(prefix) or name == rows)
    shapes: Shapes = {name.removeprefix(prefix): s for name, s in found_shapes.items()}
    try:
        config = layout.configure(shapes, spec.config)
        return state(config, spec.config, f"stack.{part}"), found_shapes[rows][-2] if layout.rows else 0
    except KeyError as error:
        raise UserError(
            f"{checkpoint.key}: the file {spec.pretrained!r} holds a {part} without its tensor {error.args[0]!r}, so "
            f"its sizes cannot be told; is it whole?"
        ) from error
