"""The YAML file that describes one training stage, its rules, and the libraries' own configs made of it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .libraries import build_lora_config, build_sft_config, validate_libraries
    from .schema import Recipe, load_recipe, recipe_schema
    from .sections import Source

_HOMES = {
    "Recipe": "schema",
    "Source": "sections",
    "build_lora_config": "libraries",
    "build_sft_config": "libraries",
    "load_recipe": "schema",
    "recipe_schema": "schema",
    "validate_libraries": "libraries",
}

__all__ = [
    "Recipe",
    "Source",
    "build_lora_config",
    "build_sft_config",
    "load_recipe",
    "recipe_schema",
    "validate_libraries",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlm_sft.recipe' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
