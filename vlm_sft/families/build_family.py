"""An existing VLM that a recipe starts from (`model:`) → configuration, processor and model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, PreTrainedConfig

from ..base.errors import UserError
from ..base.words import one_line
from ..pieces.checkpoints import Checkpoint, unreachable
from ..pieces.load_parts import check_size, from_pretrained
from ..pieces.part_configs import raw_config
from ..pieces.quantization import leave_out, outside_language_model, quantise_empty, settle
from ..recipe.libraries import build_quantization_config
from ..templates.template import load_template
from .fuyu import FuyuProcessor
from .kosmos2 import Kosmos2Processor
from .model import FamilyModel, model_class, set_dtypes
from .processor import FamilyProcessor, without_videos
from .table import default_template, family_of

if TYPE_CHECKING:
    from ..recipe.schema import Recipe

KEY = "model.pretrained"
PROCESSORS: dict[str, type[FamilyProcessor]] = {"kosmos-2": Kosmos2Processor, "fuyu": FuyuProcessor}


def compose_family(recipe: Recipe) -> tuple[PreTrainedConfig, FamilyProcessor]:
    """Configuration and processor of the model that a recipe starts from, from small files alone.

    Raises:
        UserError: It cannot be had, or is none that a recipe can start from.
    """
    spec: Any = recipe.model
    try:
        raw_config(spec.pretrained, spec.revision, KEY)  # its numbers are looked at
        config = AutoConfig.from_pretrained(spec.pretrained, revision=spec.revision, trust_remote_code=False)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise unreachable(spec.pretrained, KEY) from error
    template = recipe.chat_template or default_template(config, spec.pretrained)
    return config, load_processor(spec, config, load_template(template), recipe.system)


def load_processor(spec: Any, config: PreTrainedConfig, template: str, system: str | None) -> FamilyProcessor:
    """The model's own processor behind our interface.

    Args:
        spec: Has `pretrained`, `revision` and `processor`.
        config: The model's configuration.
        template: Jinja source.
        system: See `FamilyProcessor`.

    Raises:
        UserError: The processor cannot be read, or refuses an option.
    """
    family = family_of(config.model_type, spec.pretrained)
    try:
        # The PIL backend everywhere, as for a tower: the same pixels on every machine.
        kind = without_videos(getattr(transformers, family.processor))
        options = {"revision": spec.revision, "backend": "pil", "trust_remote_code": False}
        native = kind.from_pretrained(spec.pretrained, **options, **spec.processor)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise UserError(f"{KEY}: the processor of {spec.pretrained!r} cannot be read: {one_line(error)}") from error
    place = getattr(config, "image_token_id", None)
    if place is None:  # KOSMOS-2: the frame's token, which no answer may write either
        place = native.tokenizer.convert_tokens_to_ids(native.boi_token)
    ours = PROCESSORS.get(config.model_type, FamilyProcessor)
    return ours(native.image_processor, native.tokenizer, template, native, family, place, system)


def load_family(
    recipe: Recipe, config: PreTrainedConfig, processor: FamilyProcessor, dtype: torch.dtype
) -> FamilyModel:
    """The model with its weights.

    Args:
        recipe: A validated recipe with `model`.
        config: Its configuration.
        processor: Its processor.
        dtype: Type of the weights that are not trained; those that are stay in fp32, because bf16 loses small updates.

    Raises:
        UserError: The weights cannot be had, or lack a tensor.
    """
    spec: Any = recipe.model
    wanted = "auto" if recipe.train else dtype  # what is trained must not be rounded on its way to fp32
    options = {"dtype": wanted, "attn_implementation": spec.attn_implementation}
    empty = check_size(model_class(config)._from_config, config, Checkpoint(spec.pretrained, spec.revision, KEY))
    quantised = build_quantization_config(recipe, str(dtype).removeprefix("torch."))
    if quantised is not None:
        options["quantization_config"] = leave_out(quantised, outside_language_model(empty))
    model = from_pretrained(model_class(config), spec, KEY, **options)
    if quantised is not None:
        settle(model)
    return _prepare(model, recipe, processor, dtype)


def empty_family(
    recipe: Recipe, config: PreTrainedConfig, processor: FamilyProcessor, dtype: torch.dtype
) -> FamilyModel:
    """The same model on the meta device: every size and name, no weight is read."""
    with torch.device("meta"):
        model = model_class(config)._from_config(config)
    if (quantised := build_quantization_config(recipe)) is not None:
        quantise_empty(model, leave_out(quantised, outside_language_model(model)), dtype)
    return _prepare(model, recipe, processor, dtype)


def _prepare(model: FamilyModel, recipe: Recipe, processor: FamilyProcessor, dtype: torch.dtype) -> FamilyModel:
    set_dtypes(model, recipe.train, dtype)
    model.blank = processor.image_inputs([Image.new("RGB", (64, 64))])
    if not any(hasattr(model, name) for name in ("model", "language_model")):
        model.base_model_prefix = "text_model"  # KOSMOS-2 names none, and TRL looks for what is under the head
    return model
