"""ChatGLM's vocabulary at tiny size, as sentencepiece writes it, and what upstream does before and after it."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

from support.tiny_pieces import TEXT

CONTROL = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
LONGEST = 80
SAMPLES = [
    *TEXT,
    "问：这是什么？答：一只猫。",
    "Q: What is this? A: a cat and a dog",
    "<img></img>",
    "0123456789:;/-_",
] * 3


@functools.cache
def ice_text(kind: str = "unigram", rule: str = "nmt_nfkc") -> bytes:
    """A sentencepiece file: `unigram` or `bpe`, with one of sentencepiece's rules of normalisation."""
    import sentencepiece

    written = io.BytesIO()
    blanks = [f"<|blank_{length}|>" for length in range(2, LONGEST + 1)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLES), model_writer=written, vocab_size=520, hard_vocab_limit=False, model_type=kind,
        user_defined_symbols=["<n>", "<|tab|>", *blanks, *CONTROL], pad_id=3, pad_piece="<pad>", byte_fallback=True,
        normalization_rule_name=rule, remove_extra_whitespaces=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return written.getvalue()


def save_ice_text(folder: Path, images: int | None = 0, **options: str) -> None:
    """The tokenizer's files as they lie in a checkpoint, but for the Python that upstream puts beside them."""
    (folder / "ice_text.model").write_bytes(ice_text(**options))
    settings = {"tokenizer_class": "ChatGLMTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_chatglm.X", None]}}
    settings |= {"bos_token": "<sop>", "eos_token": "<eop>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings |= {} if images is None else {"num_image_tokens": images}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def ids_of(text: str, **options: str) -> list[int]:
    """What upstream makes of a text."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for length in range(LONGEST, 1, -1):
        text = text.replace(" " * length, f"<|blank_{length}|>")
    return _pieces(**options).EncodeAsIds(text)


def text_of(ids: list[int], **options: str) -> str:
    """What upstream makes of ids."""
    text = _pieces(**options).DecodeIds(ids).replace("<n>", "\n").replace("<|tab|>", "\t")
    for length in range(2, LONGEST + 1):
        text = text.replace(f"<|blank_{length}|>", " " * length)
    return text


def _pieces(**options: str):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=ice_text(**options))
