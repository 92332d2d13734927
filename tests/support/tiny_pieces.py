"""Tiny pieces in the layouts of the real ones, recipes made of them, and tokenizers of every kind."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
          "image_size": 28, "patch_size": 7}  # fmt: skip


TEXT = [
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT: What is this?",
    "<human>:这是什么？\n<bot>:这是一只猫。", "a red 3 at the top left and a blue 7 at the bottom right",
    "左上角是红色的3，右下角是蓝色的7", "###Human: <Img></Img> describe the image ###Assistant: two dogs###",
    "Question: how many cats are there? Short answer: two", "[INST] What colour is the bus? [/INST] It is yellow.",
]  # fmt: skip


def make_tokenizer():
    """A byte-level BPE of 300 pieces with <s>, </s> and <unk>, but neither a pad nor an image token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def write_blip2(folder: Path, text_config) -> None:
    """Tower, Q-Former, queries and projector of a BLIP-2, without its language model."""
    from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, BlipImageProcessorPil
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2VisionModel

    vision = Blip2VisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                               image_size=28, patch_size=7, initializer_range=0.1)  # fmt: skip
    qformer = Blip2QFormerConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                 intermediate_size=32, max_position_embeddings=16, encoder_hidden_size=24,
                                 initializer_range=0.1)  # fmt: skip
    config = Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text_config, num_query_tokens=4)
    state = {f"vision_model.{n}": t for n, t in Blip2VisionModel(vision).state_dict().items()}
    state |= {f"qformer.{n}": t for n, t in Blip2QFormerModel(qformer).state_dict().items()}
    state |= {"query_tokens": torch.randn(1, 4, 16) * 0.1, "language_projection.weight": torch.randn(32, 16),
              "language_projection.bias": torch.randn(32)}  # fmt: skip
    save_checkpoint(folder, config, state)
    BlipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)


def write_clip(folder: Path) -> None:
    """A whole CLIP, text side and all, as published."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    clip = CLIPConfig(
        vision_config={**VISION, "projection_dim": 16},
        text_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "vocab_size": 50, "projection_dim": 16}, projection_dim=16,
    )  # fmt: skip
    save_checkpoint(folder, clip, CLIPModel(clip).state_dict())
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)


def save_checkpoint(folder: Path, config, state: dict[str, torch.Tensor]) -> None:
    """Writes a checkpoint as the Hub has it: config.json and model.safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def tiny_stack(
    pieces, tower="blip2", resampler="blip2", lm="llama", projector=None, vision=None, language=None
) -> dict:
    """The `stack:` of a recipe by the names of its pieces, or by their paths."""

    def of(piece):
        return {"pretrained": pieces.get(piece, piece)}

    return {
        "vision_tower": {**of(tower), **(vision or {})},
        **({"resampler": {"type": "qformer", **of(resampler)}} if resampler else {}),
        "projector": projector or {"type": "linear"},
        "language_model": {**of(lm), **(language or {})},
    }


def tiny_recipe(pieces, caption_file, output_dir, **changes) -> dict:
    """A recipe of tiny pieces that trains two steps on a CPU; keyword arguments replace top-level keys."""
    return {
        "stack": tiny_stack(pieces),
        "chat_template": "plain",
        "train": {"projector": 1.0e-2},
        "data": {"train": [{"path": caption_file, "format": "caption"}]},
        "sft": {
            "output_dir": str(output_dir), "max_steps": 2, "per_device_train_batch_size": 4,
            "learning_rate": 1.0e-3, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
            "logging_steps": 1, "save_strategy": "no", "max_length": 128, "dataloader_num_workers": 0,
        },
        **changes,
    }  # fmt: skip


# Tokenizers of every kind that language models have: how each cuts a text may depend on what follows.
SPECIAL = ["<unk>", "<s>", "</s>"]
# Renders as templates make them: what a tokenizer learns from them joins answers with what stands around them.
RENDERS = [f"USER: {text} ASSISTANT: {text}</s>USER: {text}\n\n{text}###Human: {text}" for text in TEXT] * 3


def _fast(backend):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentencepieces():
    """As LLaMA's: sentencepiece's BPE, a mark in front of the text, bytes for what it does not know."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=tokens)
    backend.train_from_iterator(RENDERS, trainer)
    return _fast(backend)


def unigram():
    """As T5's: the most probable cut of a whole word, which a letter behind it may change from its beginning."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>")
    backend.train_from_iterator(RENDERS, trainer)
    return _fast(backend)


def words():
    """As BERT's: words in pieces, lower-cased, without white space."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(RENDERS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL))
    return _fast(backend)


def joining():
    """A BPE that cuts nowhere first: its merges run across roles, answers and line breaks."""
    from tokenizers import Tokenizer, decoders, models, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.train_from_iterator(RENDERS, trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL))
    return _fast(backend)


TOKENIZERS = {"bytes": make_tokenizer, "pieces": sentencepieces, "unigram": unigram, "words": words, "joining": joining}


@functools.cache
def tokenizer_json(kind: str) -> str:
    """A kind's tokenizer, trained once."""
    return TOKENIZERS[kind]().backend_tokenizer.to_str()


def tokenizer_of(kind: str):
    """A tokenizer of that kind, of which no other has added anything."""
    from tokenizers import Tokenizer

    return _fast(Tokenizer.from_str(tokenizer_json(kind)))
