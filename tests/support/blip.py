"""Tiny BLIPs in the files in which they are published: one writes captions, one matches them; and a BLIP-2."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a picture of the photo red blue green yellow dog cat two three dogs on grass and "
    "is in white black bird ##s house tree water . , with sitting standing man woman"
).split()
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 28, "patch_size": 7}  # fmt: skip


def tokenizer():
    """BERT's, of a few words."""
    from transformers import BertTokenizerFast

    return BertTokenizerFast(vocab={word: number for number, word in enumerate(WORDS)}, do_lower_case=True)


def config():
    """As `Salesforce/blip-image-captioning-base`: [DEC] and [ENC] are ids behind the words of its tokenizer."""
    from transformers import BlipConfig

    text = {
        "vocab_size": len(WORDS) + 2, "hidden_size": 24, "encoder_hidden_size": 24, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40, "pad_token_id": 0,
        "bos_token_id": len(WORDS), "sep_token_id": 3, "eos_token_id": 2,
    }  # fmt: skip
    return BlipConfig(text_config=text, vision_config=VISION, image_text_hidden_size=8, projection_dim=8)


def _draw(model, seed: int) -> None:
    """Weights with which one picture is told from another."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        size, is_scale = 0.4, parameter.dim() == 1 and "bias" not in name
        if parameter.dim() == 1:
            size = 0.1
        parameter.data = torch.randn(parameter.shape, generator=generator) * size + is_scale


def _save(model, folder: Path, seed: int) -> str:
    from transformers import BlipImageProcessorPil, BlipProcessor

    _draw(model, seed)
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 28, "width": 28}), tokenizer()).save_pretrained(folder)
    return str(folder)


def save_captioner(folder: Path, seed: int = 0) -> str:
    """What writes captions."""
    from transformers import BlipForConditionalGeneration

    return _save(BlipForConditionalGeneration(config()), folder, seed)


def save_matcher(folder: Path, seed: int = 1) -> str:
    """What says whether a caption fits, as `Salesforce/blip-itm-base-coco`."""
    from transformers import BlipForImageTextRetrieval

    return _save(BlipForImageTextRetrieval(config()), folder, seed)


def save_blip2(folder: Path) -> str:
    """BLIP-2 on OPT, as `Salesforce/blip2-opt-2.7b`: it ends with a line break."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        BlipImageProcessorPil,
        OPTConfig,
    )

    from support.tiny_pieces import make_tokenizer

    words = make_tokenizer()
    text = OPTConfig(
        vocab_size=304, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
        eos_token_id=words("\n", add_special_tokens=False).input_ids[0],
    )  # fmt: skip
    qformer = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
               "intermediate_size": 32, "max_position_embeddings": 16, "encoder_hidden_size": 24}  # fmt: skip
    model = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=Blip2VisionConfig(**VISION),
            qformer_config=Blip2QFormerConfig(**qformer),
            text_config=text,
            num_query_tokens=4,
            image_token_index=len(words),
        )
    )
    _draw(model, 0)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)
    return str(folder)
