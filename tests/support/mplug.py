"""mPLUG's VQA models at tiny size with the numbers of upstream's code, in the files in which they are published."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from support.golden import Golden
from vlm_sft.systems.mplug_vqa import MPlugConfig, MPlugForVQA

GOLDENS = {size: Golden(f"mplug_vqa_{size}") for size in ("base", "large")}
LETTERS = [chr(number) for number in range(ord("a"), ord("z") + 1)]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
    "?",
    "dog",
    "red",
    "猫",
]


def config(size: str) -> MPlugConfig:
    """As our code names its sizes."""
    told = GOLDENS[size].config
    vit = told["vit"]
    return MPlugConfig(
        **{name: value for name, value in told["bert"].items() if name != "encoder_width"},
        vision_width=vit["width"], vision_layers=vit["layers"], vision_heads=vit["heads"],
        vision_patch_size=vit["patch_size"], vision_output_dim=vit["output_dim"], image_size=vit["input_resolution"],
    )  # fmt: skip


def weights(size: str) -> dict[str, torch.Tensor]:
    """Under upstream's names, without the numbers of positions."""
    return {name: each for name, each in GOLDENS[size].tensors().items() if not name.endswith("position_ids")}


def model(size: str) -> MPlugForVQA:
    """With upstream's numbers."""
    made = MPlugForVQA(config(size)).eval()
    made.load_state_dict(weights(size))
    return made


def save_words(folder: Path) -> str:
    """BERT's `vocab.txt`, of letters."""
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return str(folder)


def save_modelscope(folder: Path, size: str, wrapped: str | None = "module", prefix: str = "") -> Path:
    """A folder as ModelScope publishes it; its weights with momentum copies and CLIP's text side, as upstream saves."""
    folder.mkdir(parents=True)
    state = {f"{prefix}{name}": tensor for name, tensor in GOLDENS[size].tensors().items()}
    state |= {
        f"{prefix}text_encoder_m.embeddings.LayerNorm.bias": torch.zeros(24),
        f"{prefix}visual_encoder.logit_scale": torch.ones(()),
    }
    torch.save(state if wrapped is None else {wrapped: state, "epoch": 3}, folder / "pytorch_model.bin")
    (folder / "config.yaml").write_text("image_res: 28\nclip_name: 'ViT-B-16'\n")
    (folder / "config_bert.json").write_text(json.dumps({"model_type": "bert", **GOLDENS[size].config["bert"]}))
    save_words(folder)
    return folder
