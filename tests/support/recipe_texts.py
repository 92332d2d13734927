"""A small recipe as text, and the sentence with which a recipe is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.recipe.libraries import validate_libraries
from vlm_sft.recipe.schema import load_recipe

TEXT = """\
# a comment
stack:
  vision_tower: {pretrained: some/tower}
  projector:
    type: linear
  language_model: {pretrained: some/llm}
chat_template: plain
train: {projector: 1e-3}
data:
  train:
    - {path: data/a.jsonl, format: caption, prompts: ["描述这张图片。"]}
    - {path: data/b.jsonl, format: caption}
sft:
  output_dir: outputs/x
  bf16: false
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problem(path: Path, *overrides: str) -> str:
    """The message of the error that a recipe gives, checked against the libraries too."""
    with pytest.raises(UserError) as caught:
        validate_libraries(load_recipe(path, overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message
