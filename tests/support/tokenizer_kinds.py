"""Tokenizers of every kind that language models have, tiny: how each cuts a text may depend on what follows."""

from __future__ import annotations

import functools

from support.tiny_pieces import TEXT, make_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
# Renders as templates make them: what a tokenizer learns from them joins answers with what stands around them.
RENDERS = [f"USER: {text} ASSISTANT: {text}</s>USER: {text}\n\n{text}###Human: {text}" for text in TEXT] * 3


def _fast(backend):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def pieces():
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


TOKENIZERS = {"bytes": make_tokenizer, "pieces": pieces, "unigram": unigram, "words": words, "joining": joining}


@functools.cache
def tokenizer_json(kind: str) -> str:
    """A kind's tokenizer, trained once."""
    return TOKENIZERS[kind]().backend_tokenizer.to_str()


def tokenizer_of(kind: str):
    """A tokenizer of that kind, of which no other has added anything."""
    from tokenizers import Tokenizer

    return _fast(Tokenizer.from_str(tokenizer_json(kind)))
