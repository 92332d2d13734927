"""Tiny FlanT5, alone and inside BLIP-2 and InstructBLIP, as transformers' own classes write them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from support.tiny_pieces import TEXT

VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 28, "patch_size": 7, "initializer_range": 0.1}  # fmt: skip
QFORMER = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
           "intermediate_size": 32, "max_position_embeddings": 16, "encoder_hidden_size": 24,
           "initializer_range": 0.1}  # fmt: skip
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] what is this ? are you sure a the image cat describe 猫 这 是".split()


def flant5_tokenizer():
    """T5's own class of tokenizer: <pad>, </s> and <unk> first, no BOS, `</s>` behind every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    letters = sorted({letter for text in TEXT for letter in text})
    special = ["<pad>", "</s>", "<unk>"]
    backend.train_from_iterator(
        TEXT * 3,
        trainers.UnigramTrainer(vocab_size=280, special_tokens=special, unk_token="<unk>", initial_alphabet=letters),
    )
    # The trainer adds in an order of its own in every process, so scores and the order of equal ones differ a little.
    pieces = [(piece, round(score, 1)) for piece, score in json.loads(backend.to_str())["model"]["vocab"]]
    count = len(special)
    return T5Tokenizer(vocab=pieces[:count] + sorted(pieces[count:], key=lambda p: (-p[1], p[0])), extra_ids=2)


def flant5_config(**changes):
    """As FlanT5's: gated GELU, a head of its own; more layers in the decoder than in the encoder."""
    from transformers import T5Config

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    return T5Config(**{**sizes, "vocab_size": 320, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
                       "decoder_start_token_id": 0, **changes})  # fmt: skip


def spread(model, seed=0):
    """Draws every weight anew, so that answers differ; the head is no table of embeddings any more."""
    generator = torch.Generator().manual_seed(seed)
    if getattr(model, "lm_head", None) is not None:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for name, parameter in model.named_parameters():
        size = 0.4 if "shared" in name or "head" in name else 0.12
        scales = parameter.dim() == 1 and "bias" not in name
        parameter.data = torch.randn(parameter.shape, generator=generator) * size + scales
    return model


def write_flant5(folder: Path, **changes) -> str:
    """FlanT5 by itself, as `google/flan-t5-xl`."""
    from transformers import T5ForConditionalGeneration

    model = spread(T5ForConditionalGeneration(flant5_config(**changes)))
    if changes.get("tie_word_embeddings"):  # the first T5
        model.lm_head.weight = model.shared.weight
    model.save_pretrained(folder)
    flant5_tokenizer().save_pretrained(folder)
    return str(folder)


def write_blip2_flant5(folder: Path, equal_depth: bool = False) -> str:
    """BLIP-2 on FlanT5, as `Salesforce/blip2-flan-t5-xl`."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig

    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION),
        qformer_config=Blip2QFormerConfig(**QFORMER),
        text_config=flant5_config(**({"num_decoder_layers": 2} if equal_depth else {})),
        num_query_tokens=4,
        image_token_index=len(flant5_tokenizer()),
    )
    return _write(Blip2ForConditionalGeneration(config), folder)


def write_instructblip_flant5(folder: Path, equal_depth: bool = False) -> str:
    """InstructBLIP on FlanT5, as `Salesforce/instructblip-flan-t5-xl`."""
    from transformers import (
        BertTokenizerFast,
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipQFormerConfig,
        InstructBlipVisionConfig,
    )

    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**VISION),
        qformer_config=InstructBlipQFormerConfig(**{**QFORMER, "max_position_embeddings": 160}),
        text_config=flant5_config(**({"num_decoder_layers": 2} if equal_depth else {})),
        num_query_tokens=4,
        image_token_index=len(flant5_tokenizer()),
    )
    written = _write(InstructBlipForConditionalGeneration(config), folder)
    BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder / "qformer_tokenizer")
    return written


def _write(model, folder: Path) -> str:
    from transformers import BlipImageProcessorPil

    spread(model.language_model)
    torch.nn.init.normal_(model.query_tokens)
    model.save_pretrained(folder)
    flant5_tokenizer().save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)
    return str(folder)


def write_lavis_blip2_flant5(folder: Path) -> tuple[dict[str, str], torch.nn.Module]:
    """LAVIS's files of a BLIP-2 on FlanT5, and transformers' class of the same weights.

    Returns:
        `vit` (EVA's file), `blip2` (Q-Former, queries, `ln_vision`, `t5_proj`) and `t5` (a folder), by their paths; the
        class as LAVIS computes: another epsilon behind the ViT, and no bias on its keys.
    """
    import re

    from transformers import AutoModelForImageTextToText

    published = write_blip2_flant5(folder / "published", equal_depth=True)
    native = AutoModelForImageTextToText.from_pretrained(published).eval()
    native.vision_model.post_layernorm.eps = 1e-5
    vit: dict[str, torch.Tensor] = {"head.weight": torch.zeros(2, 24)}
    for name, tensor in native.vision_model.state_dict().items():
        if name.endswith("qkv.bias"):
            width = len(tensor) // 3
            tensor[width : 2 * width] = 0
            stem = name.removesuffix("qkv.bias").replace("encoder.layers.", "blocks.").replace("self_attn", "attn")
            vit |= {f"{stem}q_bias": tensor[:width].clone(), f"{stem}v_bias": tensor[2 * width :].clone()}
            continue
        for theirs, lavis in (
            ("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
            ("embeddings.patch_embedding", "patch_embed.proj"), ("encoder.layers.", "blocks."), ("layer_norm", "norm"),
            ("self_attn.projection", "attn.proj"), ("self_attn.qkv", "attn.qkv"), ("post_layernorm", "ln_vision"),
        ):  # fmt: skip
            name = name.replace(theirs, lavis)
        vit[name] = tensor.clone()
    blip2 = {name: vit.pop(name) for name in ("ln_vision.weight", "ln_vision.bias")}
    blip2["query_tokens"] = native.query_tokens.detach().clone()
    blip2 |= {f"t5_proj.{end}": value.clone() for end, value in native.language_projection.state_dict().items()}
    for name, tensor in native.qformer.state_dict().items():
        name = re.sub(r"attention\.attention\.", "attention.self.", name).replace("layernorm.", "embeddings.LayerNorm.")
        blip2[f"Qformer.bert.{name}"] = tensor.clone()
    torch.save(vit, folder / "eva_vit_g.pth")
    torch.save({"model": blip2, "epoch": 9}, folder / "blip2_pretrained_flant5xl.pth")
    native.language_model.save_pretrained(folder / "t5")
    flant5_tokenizer().save_pretrained(folder / "t5")
    names = {"vit": "eva_vit_g.pth", "blip2": "blip2_pretrained_flant5xl.pth", "t5": "t5"}
    return {name: str(folder / file) for name, file in names.items()}, native
