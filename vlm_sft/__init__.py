"""Instruction tuning for generative vision-language models, on top of TRL and PEFT.

Names are imported on first use, so that `import vlm_sft` and `vlm-sft --help` stay quick.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import lora_config
    from .bundle import save_bundle
    from .chat_template import render_chat
    from .collator import MultimodalCollator, Sample
    from .configuration import VLMConfig
    from .data import load_mixture, load_source
    from .errors import UserError
    from .freeze import FreezePlan
    from .generation import answer, stream_answer
    from .handover import hand_over
    from .loading import load
    from .modeling import VLMForConditionalGeneration, VLMModel
    from .processor import VLMProcessor
    from .recipe import Recipe, load_recipe
    from .stack import Stack, build_stack, match_embeddings
    from .trainer import VLMSFTTrainer

_HOMES = {
    "answer": "generation",
    "build_stack": "stack",
    "FreezePlan": "freeze",
    "hand_over": "handover",
    "load": "loading",
    "load_mixture": "data",
    "load_recipe": "recipe",
    "load_source": "data",
    "lora_config": "adapters",
    "match_embeddings": "stack",
    "MultimodalCollator": "collator",
    "Recipe": "recipe",
    "render_chat": "chat_template",
    "Sample": "collator",
    "save_bundle": "bundle",
    "Stack": "stack",
    "stream_answer": "generation",
    "UserError": "errors",
    "VLMConfig": "configuration",
    "VLMForConditionalGeneration": "modeling",
    "VLMModel": "modeling",
    "VLMProcessor": "processor",
    "VLMSFTTrainer": "trainer",
}

__all__ = [
    "FreezePlan",
    "MultimodalCollator",
    "Recipe",
    "Sample",
    "Stack",
    "UserError",
    "VLMConfig",
    "VLMForConditionalGeneration",
    "VLMModel",
    "VLMProcessor",
    "VLMSFTTrainer",
    "answer",
    "build_stack",
    "hand_over",
    "load",
    "load_mixture",
    "load_recipe",
    "load_source",
    "lora_config",
    "match_embeddings",
    "render_chat",
    "save_bundle",
    "stream_answer",
]

try:
    __version__ = version("vlm-sft")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlm_sft' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
