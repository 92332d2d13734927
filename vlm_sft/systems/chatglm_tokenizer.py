"""ChatGLM's tokenizer (`ice_text.model`) as a fast one, without the Python file that its checkpoints bring along.

Upstream (`tokenization_chatglm.py`) writes white space as pieces before it asks sentencepiece: a line break as `<n>`, a
tab as `<|tab|>`, two to eighty spaces as `<|blank_2|>` to `<|blank_80|>`. Here these pieces are called what they stand
for, so that tokens lie where they are in the text. Upstream asks sentencepiece anew for the answer and behind an image,
and each time it sets a space in front; here only in front of the whole text: a template writes the others.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

from ..base.errors import UserError
from ..base.limits import limits
from ..base.whole_files import read_bytes, read_text

VOCABULARY = "ice_text.model"
# `SPTokenizer.special_tokens` of upstream, and the names of ChatGLM's own special tokens.
CONTROL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>", "<unk>", "<s>", "</s>",
           "<pad>")  # fmt: skip
SPECIAL = {"bos_token": "<sop>", "eos_token": "<eop>", "pad_token": "<pad>", "unk_token": "<unk>",
           "mask_token": "[MASK]"}  # fmt: skip
BLANK = re.compile(r"<\|blank_(\d{1,18})\|>", re.ASCII)
NORMAL, CONTROLS, USERS = 1, 3, 4  # kinds of pieces in sentencepiece's file
UNIGRAM = 1  # the other kind of model is BPE
# What upstream's class takes where `tokenizer_config.json` does not say it: ids below are for images (first releases).
IMAGE_TOKENS = 20_000


def read_tokenizer(folder: Path, key: str) -> PreTrainedTokenizerFast:
    """The tokenizer in the folder of a checkpoint.

    Args:
        folder: Holds `ice_text.model`, and `tokenizer_config.json` where there is one.
        key: What messages begin with.

    Raises:
        UserError: The file is none of sentencepiece, or not one of ChatGLM's.
    """
    path, settings = folder / VOCABULARY, folder / "tokenizer_config.json"
    try:
        proto = import_protobuf().ModelProto.FromString(read_bytes(path))
        stated = json.loads(read_text(settings)) if settings.is_file() else {}
        shift = int(stated.get("num_image_tokens", IMAGE_TOKENS))
        most = limits().vocabulary
        if not 0 <= shift <= most:
            raise UserError(
                f"{key}: its tokenizer_config.json says num_image_tokens: {shift:,}; no tokenizer has more than "
                f"{most:,} (`limits.vocabulary`)."
            )
        return _fast(proto, shift)
    except UserError:
        raise
    except Exception as error:  # protobuf and tokenizers raise anything at odd bytes
        raise UserError(f"{key}: {VOCABULARY} cannot be read as a tokenizer of ChatGLM; fetch it again.") from error


def _fast(proto: Any, shift: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer of a sentencepiece model.

    Args:
        proto: The file, as protobuf reads it.
        shift: How many ids come before that of its first piece.
    """
    white = {_text_of(piece.piece) for piece in proto.pieces if piece.type == USERS}
    pieces = []
    for number, piece in enumerate(proto.pieces):
        if piece.type == USERS:
            pieces.append((_text_of(piece.piece), piece))
        else:  # upstream never meets a piece that is called like what it replaces before
            pieces.append((f"<piece_{number}>" if piece.piece in white else piece.piece, piece))
    kinds = {text: CONTROLS if text in CONTROL else piece.type for text, piece in pieces}
    if "<sop>" not in kinds:
        raise ValueError("it has no <sop>")
    scores = {text: piece.score for text, piece in pieces if kinds[text] == NORMAL}
    vocabulary = [*(f"<image_{number}>" for number in range(shift)), *(text for text, _ in pieces)]
    as_bytes = proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == UNIGRAM:
        never = min(scores.values()) - 1000  # so low that no text is ever cut into pieces that stand for no text
        scored = [(text, scores.get(text, never)) for text in vocabulary]
        model: models.Model = models.Unigram(scored, shift + proto.trainer_spec.unk_id, as_bytes)
    else:
        ids = {text: number for number, text in enumerate(vocabulary)}
        merges = generate_merges(ids, scores, skip_tokens=set(ids) - set(scores))
        model = models.BPE(ids, merges, unk_token=SPECIAL["unk_token"], fuse_unk=True, byte_fallback=as_bytes)
    tokenizer = Tokenizer(model)
    if charsmap := proto.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    scheme = "first" if proto.normalizer_spec.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    found = ((text, kinds[text]) for text, _ in pieces if kinds[text] in (CONTROLS, USERS))
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=kind == CONTROLS) for text, kind in found])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)


def _text_of(piece: str) -> str:
    """The white space that a piece stands for, or the piece."""
    if blank := BLANK.fullmatch(piece):
        return " " * min(int(blank[1]), limits().token_characters)
    return {"<n>": "\n", "<|tab|>": "\t"}.get(piece, piece)
