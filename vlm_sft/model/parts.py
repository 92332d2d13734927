"""The four parts as modules with random weights, made from their configurations alone (also on the meta device)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionModel
from transformers.models.instructblip.modeling_instructblip import InstructBlipVisionModel

from ..base.errors import UserError
from ..base.progress import Steps
from ..base.words import one_line
from ..systems.mplug_owl import MPLUGOwlAbstractorConfig, MPLUGOwlVisionConfig, MPLUGOwlVisionModel
from ..systems.qwen_vl import QwenVLResamplerConfig, QwenVLVisionConfig, QwenVLVisionModel
from .configuration import VLMConfig
from .connectors import build_projector, build_resampler
from .encoder_decoder import made_of

# Encoders that transformers does not reach through AutoModel: some of its own, and ours.
VISION_MODELS: dict[str, type[PreTrainedModel]] = {
    "blip_vision_model": BlipVisionModel,
    "blip_2_vision_model": Blip2VisionModel,
    "instructblip_vision_model": InstructBlipVisionModel,
    MPLUGOwlVisionConfig.model_type: MPLUGOwlVisionModel,
    QwenVLVisionConfig.model_type: QwenVLVisionModel,
}


@dataclass
class Parts:
    """The four parts as modules; `causal_lm` still carries its head."""

    vision_tower: nn.Module
    resampler: nn.Module | None
    projector: nn.Module
    causal_lm: PreTrainedModel


class Cached(nn.Module):
    """Stands in the place of a frozen part whose features are given to the model: it has no weights.

    Args:
        empty: The part on the meta device, which says what it would be.
        shape: (T, W) of a picture's features behind the last part that is `Cached`.
    """

    def __init__(self, empty: nn.Module, shape: tuple[int, int]) -> None:
        super().__init__()
        self._empty, self.shape = (empty,), shape  # in a tuple, where torch does not count its weights as the model's

    @property
    def empty(self) -> nn.Module:
        """The part on the meta device."""
        return self._empty[0]

    @property
    def dtype(self) -> torch.dtype:
        """Type that the part would have."""
        return next(self.empty.parameters()).dtype


def build_vision_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Makes the encoder that a vision configuration describes, with random weights.

    Raises:
        UserError: A number or word of it is none that its class can work with.
    """
    model_class = VISION_MODELS.get(config.model_type)
    try:
        tower = model_class._from_config(config) if model_class else AutoModel.from_config(config)
    except (ArithmeticError, LookupError, TypeError) as error:
        kind = config.model_type
        raise UserError(f"no vision tower can be made of its configuration ({kind}): {one_line(error)}.") from error
    if eps := getattr(config, "post_layernorm_eps", None):  # LAVIS has another one than inside the tower
        tower.post_layernorm.eps = eps
    return tower


def parts_from_config(config: VLMConfig) -> Parts:
    """Makes all four parts with random weights, from configurations alone (also on the meta device)."""
    resampler = None
    if config.resampler_type:
        resampler = build_resampler(config.resampler_type, config.resampler_config, config.num_query_tokens)
    assert isinstance(config.text_config, PreTrainedConfig)
    tower = build_vision_tower(config.tower)
    return Parts(tower, resampler, projector_of(config), made_of(config.text_config))


def projector_of(config: VLMConfig) -> nn.Module:
    """Makes the projector of a configuration, with random weights; where tiles are laid out, with what does that."""
    options = config.projector_options or {}
    return build_projector(config.projector_type, *config.projector_widths, tiles=config.tiles, **options)


def empty_part(config: VLMConfig, part: str) -> nn.Module:
    """`vision_tower` or `resampler` of a configuration on the meta device."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        if part == "vision_tower":
            return build_vision_tower(config.tower)
        assert config.resampler_type is not None
        return build_resampler(config.resampler_type, config.resampler_config, config.num_query_tokens)


def mark_initialised(module: nn.Module | None) -> None:
    """Tells transformers' `post_init` that these weights are loaded and must not be drawn again."""
    for child in module.modules() if module is not None else ():
        child._is_hf_initialized = True
        for parameter in child.parameters(recurse=False):
            parameter._is_hf_initialized = True


for own in (MPLUGOwlVisionConfig, MPLUGOwlAbstractorConfig, QwenVLVisionConfig, QwenVLResamplerConfig):
    AutoConfig.register(own.model_type, own)


@contextmanager
def passes(model: nn.Module) -> Iterator[None]:
    """Within, the `waiting` around says how far one pass is: layers that have run, then weights with gradients."""
    left = {id(module) for module in model.modules() if not any(module.children())}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    with Steps("forward", len(left), "layers") as told, ExitStack() as hooks:

        def passed(module: nn.Module, given: object, made: object) -> None:
            if id(module) in left:
                left.remove(id(module))
                told.n += 1

        def moved(weight: torch.Tensor) -> None:
            done = told.n + 1 if told.desc == "backward" else 1
            told.tell("backward", done, len(trained), "weights")

        hooks.callback(register_module_forward_hook(passed).remove)
        for weight in trained:
            hooks.callback(weight.register_post_accumulate_grad_hook(moved).remove)
        yield
