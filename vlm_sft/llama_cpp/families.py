"""Existing VLMs for which llama.cpp was seen to answer as transformers does: what it writes around pictures, and sizes.

llama.cpp's own converter writes both files. Another family is added here once a test has seen its answers to be equal.
"""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedConfig

from ..base.errors import UserError
from ..families.processor import FamilyProcessor
from .mmproj import REFUSED
from .packages import known_classes


class Pictures(NamedTuple):
    """How llama.cpp shows a family its pictures.

    Attributes:
        before: What it writes in front of each itself, so that the file's template must not.
        after: And behind.
        fewest: Tokens that it makes of a picture at least.
        most: And at most.
    """

    before: str
    after: str
    fewest: int
    most: int


QWEN = Pictures("<|vision_start|>", "<|vision_end|>", 8, 4096)
FAMILIES = {"qwen2_vl": QWEN, "qwen2_5_vl": QWEN}
"""By the model type. The numbers are `set_limit_image_tokens` of llama.cpp's `clip.cpp`, whatever a processor says."""
WINDOW = 112  # pixels that the windows of Qwen2.5-VL's attention have there
SIDE = 8  # tokens that the picture which is compared is wide and high: more than one window
NO_FAMILY = (
    "llama.cpp's answers for a {} were never seen to be those of the bundle, so no GGUF is written of it: use --to "
    "transformers, whose folder llama.cpp's convert_hf_to_gguf.py reads where it knows the class. Written are {}."
)


def check_family(config: PreTrainedConfig, name: str) -> None:
    """Refuses an existing VLM that llama.cpp does not compute, or that nobody compared.

    Args:
        config: Of the model.
        name: Of its class.

    Raises:
        UserError: It is refused.
    """
    if config.model_type not in FAMILIES or name not in set.intersection(*map(set, known_classes())):
        raise UserError(NO_FAMILY.format(name, ", ".join(FAMILIES)))
    vision = config.vision_config
    if getattr(vision, "window_size", WINDOW) != WINDOW:
        raise UserError(REFUSED.format(f"its windows are {WINDOW} pixels wide, this bundle's {vision.window_size}"))
    if vision.temporal_patch_size != 2:
        raise UserError(REFUSED.format("it reads patches of two frames"))


def family_template(template: str, family: str) -> str:
    """A family's template without what llama.cpp writes around pictures."""
    around = FAMILIES[family]
    return template.replace(f"'{around.before}'", "''").replace(f"'{around.after}'", "''")


def side_of(config: PreTrainedConfig) -> int:
    """Pixels of a square that makes `SIDE` times as many tokens: neither side resizes it."""
    return int(SIDE * config.vision_config.patch_size * config.vision_config.spatial_merge_size)


def bounds(processor: FamilyProcessor) -> tuple[int, int]:
    """Tokens that the bundle's processor makes of a picture at least and at most."""
    images = processor.image_processor
    area = (images.patch_size * images.merge_size) ** 2
    return max(1, images.size["shortest_edge"] // area), images.size["longest_edge"] // area


def differences(processor: FamilyProcessor, family: str) -> list[str]:
    """What llama.cpp does otherwise with pictures than the bundle, in sentences."""
    (fewest, most), theirs = bounds(processor), FAMILIES[family]
    found = ["Pictures are resized by other code than the bundle's; the compared one was not resized."]
    if (fewest, most) != (theirs.fewest, theirs.most):
        found.append(
            f"Pictures become {theirs.fewest} to {theirs.most} tokens in llama.cpp, {fewest} to {most} in the bundle: "
            f"start llama-server with --image-min-tokens {fewest} --image-max-tokens {most}."
        )
    return found
