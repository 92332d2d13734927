"""Tiny models of the families that go to llama.cpp, with what every published one has and it relies on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

from tokenizers import AddedToken

from support.tiny_families import TINY, write_tiny

LINEAR = ["linear_attention"] * 3 + ["full_attention"]


def write_for_llama_cpp(name: str, folder: Path, **vision: Any) -> Path:
    """Writes a family's tiny model to a folder; `vision` are keys of its tower's configuration."""
    config, processor = TINY[name]()
    as_published(name, config, processor)
    for key, value in vision.items():
        setattr(config.vision_config, key, value)
    with mock.patch.dict(TINY, {name: lambda: (config, processor)}):
        return write_tiny(name, folder)


def as_published(name: str, config: Any, processor: Any) -> None:
    """Changes a tiny model's configuration and processor."""
    tower, text, images = config.vision_config, config.text_config, processor.image_processor
    if hasattr(tower, "spatial_merge_size"):
        tower.depth = 4  # the converter counts the projector's layers by the tower's
        tower.patch_size = images.patch_size = 14  # windows of 112 pixels are 4 tokens wide then
        images.size = {"shortest_edge": 3136, "longest_edge": 401408}
    if name == "qwen2_5_vl":
        tower.window_size, tower.fullatt_block_indexes = 112, [1, 3]
    elif name.startswith("qwen3_5"):
        text.num_hidden_layers, text.layer_types = 4, LINEAR  # every fourth layer sees all
        text.initializer_range = 0.05  # what 16 bits round away grows with the state that it carries
    elif name == "glm4v":  # half of a head turns with the position
        text.hidden_size = tower.out_hidden_size = 32
        text.rope_parameters = {**text.rope_parameters, "partial_rotary_factor": 0.5}
    elif name == "gemma3":  # every sixth layer sees all; the embeddings have no rows to spare
        text.num_hidden_layers, text.layer_types = 6, ["sliding_attention"] * 5 + ["full_attention"]
        words = json.loads(processor.tokenizer.backend_tokenizer.to_str())
        text.vocab_size = len(words["model"]["vocab"]) + len(words["added_tokens"])
    elif name == "internvl":
        tower.num_hidden_layers = 4  # the converter counts the projector's layers by the tower's
    elif name in ("idefics3", "smolvlm"):  # tiles end in an empty line, which is one token
        processor.tokenizer.add_tokens([AddedToken("\n\n", normalized=False, special=False)])
