"""Tiny random VLMs of every family, written to disk once a session, and rows for them."""

from __future__ import annotations

import atexit
import functools
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from support.first_families import FIRST
from support.further_families import FURTHER
from support.recent_families import RECENT
from support.torchvision_families import BESIDE

# Model type → what makes its configuration and its processor.
TINY: dict[str, Callable[[], tuple[Any, Any]]] = {**FIRST, **FURTHER, **RECENT, **BESIDE}
# Running every test of families on every family would take most of the suite's time: on the further ones run those that
# are quick (`EVERY`), on the recent ones those that compare with transformers' own classes (`ALL`), and all of them on
# each where `benchmarks/families.py` asks for it. What needs torchvision has a process of its own:
# tests/families/test_needs.py.
_asked = os.environ.get("VLM_SFT_FAMILIES", "").split()
CHECKED = _asked or list(FIRST)
EVERY = _asked or [*FIRST, *FURTHER]
ALL = _asked or [*FIRST, *FURTHER, *RECENT]


def write_tiny(name: str, folder: Path) -> Path:
    """Writes a tiny model of a family, random but the same every time, with its processor."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    torch.manual_seed(0)
    config, processor = TINY[name]()
    model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config)
    for parameter in model.parameters():
        # Gemma 3's projector and Mllama's gates start at zero, and nothing would pass them.
        if not parameter.any() and (parameter.dim() > 1 or len(parameter) == 1):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@functools.cache
def tiny(name: str) -> Path:
    """The folder of a family's tiny model, written once a session and removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_tiny(name, folder)


def processor_of(name: str, folder: Path | None = None, **options: Any) -> Any:
    """Our processor of a family's tiny model, its own one with further options."""
    from transformers import AutoConfig

    from vlm_sft.families.build_family import load_processor
    from vlm_sft.families.table import default_template
    from vlm_sft.recipe.sections import PretrainedModel
    from vlm_sft.templates.template import load_template

    config = AutoConfig.from_pretrained(tiny(name))
    spec = PretrainedModel(pretrained=str(folder or tiny(name)), processor=options)
    return load_processor(spec, config, load_template(default_template(config, name)), None)


def encoded(size: tuple[int, int]) -> bytes:
    """A PNG of noise, the same for a size every time."""
    stream = io.BytesIO()
    noise = np.random.default_rng(size).normal(128, 90, size[::-1]).clip(0, 255).astype(np.uint8)
    Image.fromarray(noise).convert("RGB").save(stream, "PNG")
    return stream.getvalue()


def rows(*images: tuple[int, int] | None) -> list[dict]:
    """One row an argument: with an image of that size, or of text alone."""
    made = []
    for number, size in enumerate(images):
        parts = [{"type": "image"}] * (size is not None) + [{"type": "text", "text": "What is this?"}]
        answer = [{"type": "text", "text": f"number {number}"}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        picture = [{"path": None, "bytes": encoded(size)}] if size else []
        made.append({"id": str(number), "messages": messages, "images": picture, "source": "x"})
    return made
