"""What a step of each model takes that `vlm-sft init` proposes: the memory in `vlm_sft/start/models.py`, counted anew.

    python benchmarks/starting_models.py [NAME …]     # prints the numbers, and names those that the table has otherwise

Each model is built at its published size without weights, from its family's tiny processor with the published sizes of
pictures, and the recipe that `init` writes for it is weighed by the count of `--dry-run`: a picture of 1280×960 pixels
in a row of the full length, activations checkpointed, 16 bits and 4. Nothing is downloaded; a row takes minutes of a
core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.first_families import qwen2_5_vl, qwen3_vl, smolvlm  # noqa: E402
from vlm_sft.base.names import Options  # noqa: E402
from vlm_sft.machine.fit import FOUR_BITS  # noqa: E402
from vlm_sft.preflight.dry_run import SIZES, weigh  # noqa: E402
from vlm_sft.preflight.launch import Launch  # noqa: E402
from vlm_sft.recipe.schema import load_recipe  # noqa: E402
from vlm_sft.start.models import CANDIDATES, GB, Candidate  # noqa: E402

CLOSE, ROUNDED = 0.03, 0.11  # how far a number of the table may be off: a share of it, or as it is rounded up
SIGLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "image_size": 512, "patch_size": 16}  # fmt: skip
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
          "image_size": 384, "patch_size": 14}  # fmt: skip
QWEN25 = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "patch_size": 14,
          "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
QWEN3 = {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "num_heads": 16, "patch_size": 16,
         "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17]}  # fmt: skip
QWEN3_LARGE = {**QWEN3, "hidden_size": 1152, "intermediate_size": 4304, "depth": 27,
               "deepstack_visual_indexes": [8, 16, 24]}  # fmt: skip


def _text(width: int, inner: int, layers: int, heads: int, groups: int, words: int, tied: bool = False) -> Options:
    return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": words,
            "num_attention_heads": heads, "num_key_value_heads": groups, "max_position_embeddings": 32768,
            "tie_word_embeddings": tied}  # fmt: skip


# Hub id, shortened → how its family is made; sizes of its tower and of its language model, as its config.json has them;
# others of the whole model; of its processor: what one tile or picture becomes, and how large a picture may be.
SIZED: dict[str, tuple[Any, Options, Options, Options]] = {
    "SmolVLM-256M-Instruct": (smolvlm, SIGLIP, _text(576, 1536, 30, 9, 3, 49280), {"scale_factor": 4, "edge": 2048}),
    "SmolVLM-500M-Instruct": (smolvlm, SIGLIP, _text(960, 2560, 32, 15, 5, 49280), {"scale_factor": 4, "edge": 2048}),
    "Qwen3-VL-2B-Instruct": (qwen3_vl, QWEN3, _text(2048, 6144, 28, 16, 8, 151936, True), {}),
    "SmolVLM-Instruct": (smolvlm, SO400M, _text(2048, 8192, 24, 32, 32, 49155), {"scale_factor": 3, "edge": 1536}),
    "Qwen2.5-VL-3B-Instruct": (qwen2_5_vl, QWEN25, _text(2048, 11008, 36, 16, 2, 151936, True), {}),
    "Qwen3-VL-4B-Instruct": (qwen3_vl, QWEN3, _text(2560, 9728, 36, 32, 8, 151936, True), {}),
    "Qwen2.5-VL-7B-Instruct": (qwen2_5_vl, QWEN25, _text(3584, 18944, 28, 28, 4, 152064), {}),
    "Qwen3-VL-8B-Instruct": (qwen3_vl, QWEN3_LARGE, _text(4096, 12288, 36, 32, 8, 151936), {}),
}


def write_model(name: str, folder: Path) -> Path:
    """Writes configuration and processor of a model at its published size; no weights.

    Args:
        name: A key of `SIZED`.
        folder: Where; it must not be there.
    """
    from transformers import LlamaConfig

    make, vision, text, more = SIZED[name]
    config, processor = make()
    whole, images = config.to_dict(), processor.image_processor
    if make is smolvlm:
        edge, side, factor = more["edge"], vision["image_size"], more["scale_factor"]
        images.size, images.max_image_size = {"longest_edge": edge}, {"longest_edge": side}
        processor.image_seq_len = (side // vision["patch_size"] // factor) ** 2
        whole |= {"scale_factor": factor, "text_config": LlamaConfig(**text).to_dict(), "tie_word_embeddings": False}
        whole["vision_config"] |= {**vision, "model_type": "smolvlm_vision"}
        processor.tokenizer.add_special_tokens(
            {"additional_special_tokens": [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]}
        )
    else:
        images.patch_size, images.merge_size = vision["patch_size"], 2
        images.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
        head = text["hidden_size"] // text["num_attention_heads"] if make is qwen2_5_vl else 128
        sections = [16, 24, 24] if make is qwen2_5_vl else [24, 20, 20]
        rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6}
        whole["text_config"].pop("layer_types", None)  # of the tiny one, which has fewer
        whole["text_config"] |= {**text, "head_dim": head, "rope_parameters": rope}
        whole["vision_config"] |= {**vision, "out_hidden_size": text["hidden_size"], "spatial_merge_size": 2}
        whole["tie_word_embeddings"] = text["tie_word_embeddings"]
    type(config).from_dict(whole).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def weigh_model(known: Candidate, rows: int, four_bits: bool, folder: Path) -> tuple[float, float, int]:
    """GiB of a step of so many rows, billions of parameters, and tokens of a picture."""
    name = known.pretrained.rpartition("/")[2]
    model: Options = {"pretrained": str(folder / name)}
    if known.max_pixels:
        model["processor"] = {"max_pixels": known.max_pixels}
    recipe: Options = {
        "model": model, "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
        "data": {"train": [{"path": "unread.jsonl", "format": "vqa"}]},
        "sft": {"output_dir": "unwritten", "per_device_train_batch_size": rows,
                "gradient_accumulation_steps": 16 // rows,
                "max_length": known.length, "activation_checkpointing": True, "bf16": True},
    }  # fmt: skip
    if four_bits:
        recipe["quantization"] = FOUR_BITS
    import yaml

    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    found = weigh(load_recipe(path), Launch(1, "single"))
    billions = sum(row.total for row in found.rows if "LoRA" not in str(row.part)) / 1e9
    return found.estimate.total / GB, billions, found.stack.processor.count_image_tokens(SIZES[0])


def main() -> None:
    """Prints the numbers of the models that are named, or of all; the exit code is 1 where the table has others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*SIZED, []], help="which models; default all")
    names = parser.parse_args().names or list(SIZED)
    wrong = False
    for known in CANDIDATES:
        name = known.pretrained.rpartition("/")[2]
        if name not in names:
            continue
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write_model(name, folder / name)
            one, billions, tokens = weigh_model(known, 1, False, folder)
            two, few = (weigh_model(known, *how, folder)[0] for how in ((2, False), (1, True)))
        found = {"billions": billions, "tokens": tokens, "gib": one, "gib_4bit": few, "row": two - one}
        differs = [
            key for key, value in found.items() if abs(value - getattr(known, key)) > max(CLOSE * value, ROUNDED)
        ]
        wrong |= bool(differs)
        said = ", ".join(f"{key} {value:,.2f}" for key, value in found.items())
        print(f"{name}: {said}" + (f"; the table differs in {', '.join(differs)}" if differs else ""), flush=True)
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()
