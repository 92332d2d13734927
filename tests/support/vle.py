"""A VLE at tiny size with the numbers of upstream's code, in the files in which iFLYTEK publishes one."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.golden import Golden
from vlm_sft.systems.vle import Boxes, VLEConfig

GOLDEN = Golden("vle")
ANSWERS = ["yes", "no", "red", "两只", "a dog", "5", "kitchen"]


def config_file() -> dict[str, Any]:
    """`config.json` as VLE's own code writes it."""
    own = GOLDEN.config
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_token_types")
    return {
        "model_type": "vle",
        **{name: own[name] for name in names},
        "text_config": own["text_config"],
        "vision_config": own["vision_config"],
        "num_vqa_labels": own["num_vqa_labels"],
        "id2label": {str(number): answer for number, answer in enumerate(ANSWERS)},
        "label2id": {answer: number for number, answer in enumerate(ANSWERS)},
    }


def config() -> VLEConfig:
    """The same as our code reads it."""
    return VLEConfig(**{name: value for name, value in config_file().items() if name != "model_type"})


def boxes(length: int, times: int = 1) -> Boxes:
    """The boxes of the golden for texts of `length` tokens, each row's `times` behind each other."""
    lists = GOLDEN.config["lists"]
    patches = torch.zeros(2, 2, 16, dtype=torch.bool)
    for row, places in enumerate(lists["patch"]):
        for number, place in enumerate(places):
            patches[row, number, place] = True

    def padded(rows: list[list[int]], width: int) -> torch.Tensor:
        return torch.tensor([row + [0] * (width - len(row)) for row in rows]).repeat_interleave(times, dim=0)

    return Boxes(
        patches.repeat_interleave(times, dim=0), padded(lists["img_types"], 2), padded(lists["txt_types"], length)
    )


@functools.cache
def vocabulary() -> bytes:
    """DeBERTa's `spm.model`, of 79 pieces; transformers adds `[MASK]`."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["how many dogs", "two dogs", "一只猫", "a red dog"] * 9),
        model_writer=written, vocab_size=79, model_type="unigram",
        hard_vocab_limit=False, pad_id=0, pad_piece="[PAD]", bos_id=1, bos_piece="[CLS]", eos_id=2, eos_piece="[SEP]",
        unk_id=3, unk_piece="[UNK]", minloglevel=2, num_threads=1,
    )  # fmt: skip
    return written.getvalue()


def save_vle(folder: Path, *heads: str, weights: str = "pytorch_model.bin") -> Path:
    """Writes a checkpoint with the encoder and these heads, by the first parts of their tensors' names."""
    folder.mkdir(parents=True)
    found = {name: tensor for name, tensor in GOLDEN.tensors().items() if name.split(".")[0] in ("vle", *heads)}
    if weights.endswith(".bin"):
        torch.save(found, folder / weights)
    else:
        save_file(found, folder / weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_file(), ensure_ascii=False), encoding="utf-8")
    (folder / "spm.model").write_bytes(vocabulary())
    settings = {"tokenizer_class": "DebertaV2Tokenizer", "do_lower_case": False, "vocab_type": "spm"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": False,
        "size": {"height": 28, "width": 28},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder
