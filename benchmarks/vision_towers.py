"""Which vision encoders of transformers can be a vision tower: each is built without weights and tried.

    python benchmarks/vision_towers.py [model type …]

Each gets its class's own default configuration and a picture of that size. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import logging
import warnings

from transformers import CONFIG_MAPPING, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_MAPPING_NAMES, MODEL_MAPPING_NAMES

from vlm_sft import UserError, VLMConfig
from vlm_sft.model.configuration import image_size_of
from vlm_sft.model.parts import VISION_MODELS
from vlm_sft.pieces.part_configs import vision_config_of
from vlm_sft.stack.compose import count_image_tokens
from vlm_sft.stack.fit import measure_tower

KEY = "stack.vision_tower.pretrained"
TEXT = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def encoders() -> list[str]:
    """Model types of every encoder that transformers lists as one of images, or that is named as one."""
    named = [name for name in MODEL_MAPPING_NAMES if name.endswith(("_vision", "_vision_model"))]
    ours = [name for name in VISION_MODELS if not name.startswith("vlm_sft")]
    return sorted({*MODEL_FOR_IMAGE_MAPPING_NAMES, *named, *ours})


def attempt(model_type: str) -> str:
    """`works: …`, or why it does not.

    Args:
        model_type: As `encoders` lists them.
    """
    try:
        vision = vision_config_of(CONFIG_MAPPING[model_type](), KEY)
        if getattr(vision, "image_size", None) is None:
            vision.image_size = 224
        height, width = image_size_of(vision)
        config = VLMConfig(vision_config=vision, text_config=TEXT)
        config.vision_width = measure_tower(config, height, width, KEY)
        tokens = count_image_tokens(config, (height, width))
        config.vision_feature_select = "patch"
        patches = count_image_tokens(config, (height, width))
    except UserError as error:
        sentence = str(error).partition("; ")[0].removeprefix(f"{KEY}: ")
        reason = sentence.partition("as it is: ")[2].partition(". ")[0].partition(" for this kind")[0]
        return f"no: {reason}" if reason else sentence.replace(f"a {model_type!r} checkpoint", "no: it")
    except Exception as error:  # its default configuration is none
        return f"not tried: its default configuration makes no model ({type(error).__name__})"
    fewer = "" if tokens == patches else f", {patches} with `feature_select: patch`"
    return f"works: {height}×{width} → {tokens} tokens of {config.vision_width}{fewer}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("encoders", nargs="*", help="model types; default all")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    for name in given.encoders or encoders():
        print(f"| `{name}` | {attempt(name)} |", flush=True)


if __name__ == "__main__":
    main()
