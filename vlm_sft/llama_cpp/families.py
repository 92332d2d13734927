"""Existing VLMs for which llama.cpp was seen to answer as transformers does, as a table: a row for each model type.

llama.cpp's own converter writes both files. Another family is added here once a test has seen its answers to be equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from safetensors.torch import save_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from ..base.errors import UserError
from ..base.whole_files import write_json
from ..families.processor import FamilyProcessor
from .mmproj import REFUSED
from .packages import known_classes


class Pictures(NamedTuple):
    """How llama.cpp shows a family its pictures, and how its converter wants the family's files.

    Attributes:
        before: What it writes in front of each itself, so that the file's template must not.
        after: And behind.
        shape: What it makes of one: `kept`, so many tokens as its size asks for; `square`, one of a fixed size; `rows`,
            tiles with a token for each place; `tiles`, without.
        fewest: Tokens of a `kept` one at least, whatever a processor says (`set_limit_image_tokens` of its `clip.cpp`);
            0 where the file says it.
        most: And at most.
        tower: The class by whose name its converter knows the tower, where that is not the model's own.
        names: Beginnings of the model's own names → of those that the converter knows.
        turned: Ends of names: of positions with a class token's in front, where the graph has that token last.
        transposed: Ends of names: of experts, which were published the other way round.
        told: What it does otherwise with pictures of other shapes than the one that is compared.
    """

    before: str = ""
    after: str = ""
    shape: str = "kept"
    fewest: int = 0
    most: int = 0
    tower: str = ""
    names: Mapping[str, str] = {}
    turned: str = ""
    transposed: tuple[str, ...] = ()
    told: str = ""


QWEN = Pictures("<|vision_start|>", "<|vision_end|>", fewest=8, most=4096)
QWEN2 = QWEN._replace(names={"model.visual.": "visual."})
FAKE = "<fake_token_around_image>"
ROWS = Pictures(
    FAKE, FAKE, "rows",
    told="Pictures: llama.cpp makes the small one of the whole by bicubic interpolation, and all tiles in one step.",
)  # fmt: skip
FAMILIES = {
    "qwen2_vl": QWEN2,
    "qwen2_5_vl": QWEN2,
    "qwen3_vl": QWEN,
    "qwen3_vl_moe": QWEN._replace(transposed=("experts.gate_up_proj", "experts.down_proj")),
    "qwen3_5": QWEN,
    "qwen3_5_moe": QWEN,
    "glm4v": Pictures("<|begin_of_image|>", "<|end_of_image|>", fewest=8, most=4096),
    "idefics3": ROWS,
    "smolvlm": ROWS,
    "gemma3": Pictures(
        "<start_of_image>", "<end_of_image>", "square",
        names={"model.vision_tower.": "vision_tower.vision_model.",
               "model.multi_modal_projector.": "multi_modal_projector."},
        told="Pictures that are not square: llama.cpp pads them with black, the bundle stretches them.",
    ),
    "janus": Pictures(
        shape="square", told="Pictures that are not square: llama.cpp pads them after resizing, the bundle before.",
    ),
    "internvl": Pictures(
        "<img>", "</img>", "tiles", tower="InternVisionModel", turned="position_embeddings",
        told="Pictures that are no whole tiles: llama.cpp pads them with black, the bundle stretches them.",
    ),
}  # fmt: skip
"""By the model type."""
WINDOW = 112  # pixels that the windows of Qwen2.5-VL's attention have there
SIDE = 8  # tokens that the picture which is compared is high: more than one window
COARSE = 12  # spots across it: so few that every way of resizing shows the same
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
    texts, towers = known_classes()
    row = FAMILIES.get(config.model_type)
    if row is None or text_class(config, name) not in texts or (row.tower or name) not in towers:
        raise UserError(NO_FAMILY.format(name, ", ".join(FAMILIES)))
    vision = config.vision_config
    if getattr(vision, "window_size", WINDOW) != WINDOW:
        raise UserError(REFUSED.format(f"its windows are {WINDOW} pixels wide, this bundle's {vision.window_size}"))
    if (frames := getattr(vision, "temporal_patch_size", 2)) != 2:
        raise UserError(REFUSED.format(f"it reads patches of two frames, this bundle of {frames}"))


def text_class(config: PreTrainedConfig, name: str) -> str:
    """By which class the converter knows the language model: the model's own, or that of the text alone."""
    if name in known_classes()[0]:
        return name
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config.get_text_config()), None)
    return kind.__name__ if kind else name


def save_for_converter(model: PreTrainedModel, folder: Path) -> None:
    """Writes a model as the converter reads it, whatever its base looked like.

    Args:
        model: In its type.
        folder: Where its processor is.
    """
    row, tensors, seen = FAMILIES[model.config.model_type], {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:  # tied
            continue
        seen.add(tensor.data_ptr())
        if row.turned and name.endswith(row.turned):
            tensor = tensor.roll(-1, 1)
        if row.transposed and name.endswith(row.transposed):
            tensor = tensor.transpose(1, 2)
        known = next((begin for begin in row.names if name.startswith(begin)), "")
        tensors[row.names.get(known, "") + name.removeprefix(known)] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.generation_config.save_pretrained(folder)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    config["text_config"]["architectures"] = [text_class(model.config, type(model).__name__)]
    if row.tower:
        config["vision_config"]["architectures"] = [row.tower]
    write_json(folder / "config.json", config)


def family_template(template: str, family: str, expansion: str, token: str) -> str:
    """A family's template without what llama.cpp writes around pictures, and with what only the processor writes.

    Args:
        template: The bundle's.
        family: The model type.
        expansion: What its processor writes for a picture.
        token: The places for features in it.
    """
    row = FAMILIES[family]
    if not row.before or row.before in expansion:
        left = expansion[: expansion.index(row.before or token)]
        right = expansion[expansion.rindex(row.after or token) + len(row.after or token) :]
        return f"{{%- set image_token = {left!r} ~ image_token ~ {right!r} -%}}{template}"
    return template.replace(f"'{row.before}'", "''").replace(f"'{row.after}'", "''")


def picture_of(processor: FamilyProcessor, config: PreTrainedConfig, picture: Image.Image) -> Image.Image:
    """A picture that both sides show the model alike: neither resizes it, or both by the same factor in one step.

    Raises:
        UserError: There is none: what one makes the smallest is more than the other's largest.
    """
    size = _size(processor, config)
    return picture.resize((COARSE, COARSE), Image.Resampling.NEAREST).resize(size, Image.Resampling.BICUBIC)


def _size(processor: FamilyProcessor, config: PreTrainedConfig) -> tuple[int, int]:
    images, row, vision = processor.image_processor, FAMILIES[config.model_type], config.vision_config
    if row.shape == "kept":
        unit, (fewest, most) = images.patch_size * images.merge_size, bounds(processor)
        high = math.isqrt(max(fewest, row.fewest, SIDE * SIDE) - 1) + 1
        largest = min(most, row.most or most)
        wide = high + 2 if high * (high + 2) <= largest else high
        if high * wide > largest:
            raise UserError(
                REFUSED.format(
                    f"the picture that is compared has {high * wide} tokens, more than the {largest} allowed"
                )
            )
        return wide * unit, high * unit
    if row.shape == "rows":
        side, tile = images.size["longest_edge"], images.max_image_size["longest_edge"]
        return side, side // 2 if side // 2 % tile == 0 else side
    side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    return (2 * side, side) if row.shape == "tiles" else (side * 5 // 4, side * 5 // 4)


def bounds(processor: FamilyProcessor) -> tuple[int, int]:
    """Tokens that the bundle's processor makes of a picture at least and at most."""
    images = processor.image_processor
    area = (images.patch_size * images.merge_size) ** 2
    return max(1, images.size["shortest_edge"] // area), images.size["longest_edge"] // area


def differences(processor: FamilyProcessor, family: str) -> list[str]:
    """What llama.cpp does otherwise with pictures than the bundle, in sentences."""
    row = FAMILIES[family]
    found = [row.told] if row.told else []
    if row.most and (own := bounds(processor)) != (row.fewest, row.most):
        found.append(
            f"Pictures become {row.fewest} to {row.most} tokens in llama.cpp, {own[0]} to {own[1]} in the bundle: "
            f"start llama-server with --image-min-tokens {own[0]} --image-max-tokens {own[1]}."
        )
    return found
