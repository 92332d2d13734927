"""What every trainer of `peers.py` is given: one LLaVA of random weights as published ones lie, and one set of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).parent.parent
TEMPLATE = "vicuna_v1"  # which LLaMA-Factory calls llava
SPOKEN = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: ASSISTANT:"
).split()
# Name → tower, pixels of a side, language model (the last of SmolLM2-135M's shape).
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "tower": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        "side": 28, "patch": 14,
        "lm": {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
               "num_attention_heads": 2},
    },
    "25m": {
        "tower": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
        "side": 56, "patch": 14,
        "lm": {"vocab_size": 32000, "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6,
               "num_attention_heads": 6},
    },
    "135m": {
        "tower": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6},
        "side": 112, "patch": 16,
        "lm": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
               "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    },
}  # fmt: skip


def make_checkpoint(size: str, folder: Path) -> None:
    """Writes `llava` (the whole with its processor), `tower` and `lm` (with the tokenizer), of the same weights."""
    shape = SIZES[size]
    torch.manual_seed(0)
    side, patch = shape["side"], shape["patch"]
    tokenizer = make_tokenizer(shape["lm"]["vocab_size"])
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = LlamaConfig(**shape["lm"], **ids, max_position_embeddings=2048)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape["tower"], image_size=side, patch_size=patch),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // patch) ** 2,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config).float()
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=(ROOT / "chat_templates" / f"{TEMPLATE}.jinja").read_text(encoding="utf-8"),
    )  # fmt: skip
    model.save_pretrained(folder / "llava")
    processor.save_pretrained(folder / "llava")
    tower = CLIPVisionModel(config.vision_config)
    tower.load_state_dict(model.model.vision_tower.state_dict())
    tower.save_pretrained(folder / "tower")
    images.save_pretrained(folder / "tower")
    language_model = text_model_of(model)
    language_model.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")


def text_model_of(model: LlavaForConditionalGeneration) -> Any:
    """Its language model with its head, as a causal language model of its own."""
    from transformers import LlamaForCausalLM

    whole = LlamaForCausalLM(model.config.text_config)
    whole.model.load_state_dict(model.model.language_model.state_dict())
    whole.lm_head.load_state_dict(model.lm_head.state_dict())
    return whole


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A word is a token, so that nobody joins two across the border of an answer."""
    words = ["<unk>", "<pad>", "</s>", "<image>", *SPOKEN]
    words = [*dict.fromkeys(words)]
    words += [f"w{number}" for number in range(size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[1:4]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", padding_side="right",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def make_rows(folder: Path, images: int, questions: int, words: int) -> None:
    """Writes `rows.jsonl`, `questions` rows an image in a drawn order, and LLaMA-Factory's files of the same rows."""
    chance = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(images):
        blocks = chance.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"images/{number}.jpg")
    rows = []
    for number in chance.permutation(images * questions).tolist():
        question, answer = (
            " ".join(f"w{word}" for word in chance.integers(0, 400, count))
            for count in (8, int(np.clip(chance.lognormal(np.log(words), 0.7), 4, 8 * words)))
        )
        image = f"images/{number // questions}.jpg"
        rows.append({"id": str(len(rows)), "image": image, "question": question, "answer": answer})
    write_lines(folder / "rows.jsonl", rows)
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"<image>\n{row['question']}"},
                {"role": "assistant", "content": row["answer"]},
            ],
            "images": [str(folder / row["image"])],
        }
        for row in rows
    ]
    (folder / "talks.json").write_text(json.dumps(talks), encoding="utf-8")
    roles = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    about = {"rows": {"file_name": "talks.json", "formatting": "sharegpt", "columns": columns, "tags": roles}}
    (folder / "dataset_info.json").write_text(json.dumps(about), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows, their images as whole paths."""
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return [{**row, "image": str(folder / row["image"])} for row in map(json.loads, lines)]
