"""A tiny checkpoint as THUDM/visualglm-6b is published: names, `.bin` shards with an index, its tokenizer's files."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from support.ice_text import ice_text, save_ice_text
from support.weight_files import write_bin_shards

WIDTH, SEEN, QUERIES, SIZE, LAYERS = 32, 24, 16, 28, 15  # LoRA goes into the fifteenth layer


def linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(name, width, inner, cross=0):
    """A layer of SwissArmyTransformer, and of ChatGLM; with `cross`, one that looks at features of that width."""
    shapes = {
        **norm(f"{name}.input_layernorm", width), **norm(f"{name}.post_attention_layernorm", width),
        **linear(f"{name}.attention.query_key_value", 3 * width, width),
        **linear(f"{name}.attention.dense", width, width),
        **linear(f"{name}.mlp.dense_h_to_4h", inner, width), **linear(f"{name}.mlp.dense_4h_to_h", width, inner),
    }  # fmt: skip
    if cross:
        shapes |= norm(f"{name}.post_cross_attention_layernorm", width)
        shapes |= linear(f"{name}.cross_attention.query", width, width)
        shapes |= linear(f"{name}.cross_attention.key_value", 2 * width, cross)
        shapes |= linear(f"{name}.cross_attention.dense", width, width)
    return shapes


def shapes_of(vocabulary):
    eye, asks = "image_encoder.vit", "image_encoder.qformer.transformer"
    return {
        "transformer.word_embeddings.weight": (vocabulary, WIDTH), "lm_head.weight": (vocabulary, WIDTH),
        **norm("transformer.final_layernorm", WIDTH),
        **{n: s for i in range(LAYERS) for n, s in block(f"transformer.layers.{i}", WIDTH, 48).items()},
        **{f"transformer.layers.{i}.attention.rotary_emb.inv_freq": (2,) for i in range(LAYERS)},
        f"{eye}.transformer.word_embeddings.weight": (1, SEEN),
        f"{eye}.transformer.position_embeddings.weight": (17, SEEN),
        f"{eye}.mixins.patch_embedding.proj.weight": (SEEN, 3, 7, 7),
        f"{eye}.mixins.patch_embedding.proj.bias": (SEEN,),
        **norm(f"{eye}.mixins.cls.ln_vision", SEEN),
        **{n: s for i in range(2) for n, s in block(f"{eye}.transformer.layers.{i}", SEEN, 48).items()},
        f"{asks}.word_embeddings.weight": (4, QUERIES), **norm(f"{asks}.final_layernorm", QUERIES),
        **block(f"{asks}.layers.0", QUERIES, 32, cross=SEEN), **block(f"{asks}.layers.1", QUERIES, 32),
        **linear("image_encoder.glm_proj", WIDTH, QUERIES),
    }  # fmt: skip


def write_visualglm(folder: Path) -> str:
    """Random weights, norms near one; the ids of its tokens in `config.json` are those of its tokenizer."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_proto=ice_text())
    vocabulary = pieces.vocab_size() + 8
    generator = torch.Generator().manual_seed(0)
    state = {
        n: torch.randn(s, generator=generator) * 0.1 + (n.endswith("weight") and ("norm" in n or "ln_" in n))
        for n, s in shapes_of(vocabulary).items()
    }
    write_bin_shards(folder, state)
    ids = {"bos": "<sop>", "eos": "<eop>", "mask": "[MASK]", "gmask": "[gMASK]", "pad": "<pad>"}
    config = {
        "architectures": ["ChatGLMForConditionalGenerationWithImage"], "model_type": "chatglm",
        "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig",
                     "AutoModel": "modeling_chatglm.ChatGLMForConditionalGenerationWithImage"},
        **{f"{name}_token_id": pieces.piece_to_id(piece) for name, piece in ids.items()},
        "hidden_size": WIDTH, "inner_hidden_size": 48, "layernorm_epsilon": 1e-05, "max_sequence_length": 2048,
        "num_attention_heads": 4, "num_layers": LAYERS, "position_encoding_2d": True, "torch_dtype": "float16",
        "use_cache": True, "vocab_size": vocabulary, "image_length": 4, "quantization_bit": 0, "pre_seq_len": None,
        "eva_config": {"num_layers": 2, "hidden_size": SEEN, "num_attention_heads": 4, "image_size": [SIZE, SIZE]},
        "qformer_config": {"num_layers": 2, "hidden_size": QUERIES, "num_attention_heads": 2},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_ice_text(folder)
    return str(folder)
