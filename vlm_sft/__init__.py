"""Instruction tuning for generative vision-language models, on top of TRL and PEFT.

Names are imported on first use, so that `import vlm_sft` and `vlm-sft --help` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from .base.errors import UserError
    from .batch.collator import MultimodalCollator, Sample
    from .batch.processor import VLMProcessor
    from .bundle.handover import hand_over
    from .bundle.load import load
    from .bundle.manifest import Provenance
    from .bundle.save import save_bundle
    from .data.dataset import ROW_FEATURES, load_mixture, load_source
    from .inference.generation import answer
    from .inference.streaming import stream_answer
    from .model.configuration import VLMConfig
    from .model.freeze import FreezePlan
    from .model.modeling import VLMForConditionalGeneration, VLMModel
    from .reading.images import load_image
    from .recipe.libraries import build_sft_config
    from .recipe.schema import Recipe, load_recipe
    from .recipe.sections import Source
    from .stack.build_stack import Stack, build_stack, match_embeddings
    from .stack.lora import lora_config
    from .templates.render import RenderedChat, render, render_chat
    from .templates.template import end_of_answer
    from .train import train as train_recipe
    from .training.trainer import VLMSFTTrainer

_HOMES = {
    "answer": "inference.generation",
    "build_sft_config": "recipe.libraries",
    "build_stack": "stack.build_stack",
    "end_of_answer": "templates.template",
    "FreezePlan": "model.freeze",
    "hand_over": "bundle.handover",
    "load": "bundle.load",
    "load_image": "reading.images",
    "load_mixture": "data.dataset",
    "load_recipe": "recipe.schema",
    "load_source": "data.dataset",
    "lora_config": "stack.lora",
    "match_embeddings": "stack.build_stack",
    "MultimodalCollator": "batch.collator",
    "Provenance": "bundle.manifest",
    "Recipe": "recipe.schema",
    "render": "templates.render",
    "render_chat": "templates.render",
    "RenderedChat": "templates.render",
    "ROW_FEATURES": "data.dataset",
    "Sample": "batch.collator",
    "save_bundle": "bundle.save",
    "Source": "recipe.sections",
    "Stack": "stack.build_stack",
    "stream_answer": "inference.streaming",
    "train_recipe": "train:train",  # at the top `vlm_sft.train` is the program
    "UserError": "base.errors",
    "VLMConfig": "model.configuration",
    "VLMForConditionalGeneration": "model.modeling",
    "VLMModel": "model.modeling",
    "VLMProcessor": "batch.processor",
    "VLMSFTTrainer": "training.trainer",
}

__all__ = [
    "ROW_FEATURES",
    "FreezePlan",
    "MultimodalCollator",
    "Provenance",
    "Recipe",
    "RenderedChat",
    "Sample",
    "Source",
    "Stack",
    "UserError",
    "VLMConfig",
    "VLMForConditionalGeneration",
    "VLMModel",
    "VLMProcessor",
    "VLMSFTTrainer",
    "answer",
    "build_sft_config",
    "build_stack",
    "end_of_answer",
    "hand_over",
    "load",
    "load_image",
    "load_mixture",
    "load_recipe",
    "load_source",
    "lora_config",
    "match_embeddings",
    "render",
    "render_chat",
    "save_bundle",
    "stream_answer",
    "train_recipe",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # asked for late: looking it up takes a third of the time of `vlm-sft --help`
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("vlm-sft")
        except PackageNotFoundError:  # a checkout that was never installed
            return "0+unknown"
    if name not in _HOMES:
        raise AttributeError(f"module 'vlm_sft' has no attribute {name!r}")
    module, _, there = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f".{module}", __name__), there or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
