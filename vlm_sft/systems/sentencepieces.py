"""Sentencepiece's forms: the file of a vocabulary, and the table of replacements that a `tokenizer.json` holds too."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
from transformers.convert_slow_tokenizer import import_protobuf


def read_pieces(data: bytes) -> Any:
    """What sentencepiece's file says; None where it is none, as tiktoken's."""
    try:
        found = import_protobuf().ModelProto.FromString(data)
    except Exception:  # protobuf's own errors, which are not to be imported
        return None
    return found if found.pieces else None


def longest_of(charsmap: object) -> float:
    """The longest text in sentencepiece's table of replacements: a trie of so many bytes, then texts ended by zeros."""
    table = table_of(charsmap)
    end = 4 + int.from_bytes(table[:4], "little")
    return max(map(len, table[end:].split(b"\0"))) if table and end <= len(table) else math.inf if table else 1


def table_of(charsmap: object) -> bytes:
    """The bytes of a table, of which `tokenizer.json` has the base64; none where there is none."""
    try:
        return base64.b64decode(charsmap or "") if isinstance(charsmap, str) else bytes(charsmap or ())  # type: ignore[call-overload]
    except (ValueError, TypeError):
        return b"?"


def is_sound(table: bytes) -> bool:
    """Whether the trie of a table leads nowhere outside it, and its leaves to the beginnings of characters.

    The library that walks through it believes it, and ends the process where it leads out: at a text, not before.
    Each unit says its label, whether it has a leaf, and where its children are, as `darts-clone` has it.
    """
    end = 4 + int.from_bytes(table[:4], "little")
    units = np.frombuffer(table[4:end], "<u4") if end <= len(table) and end % 4 == 0 else np.zeros(0, np.uint32)
    if not len(units):
        return False
    texts = np.frombuffer(table[end:] + b"\0", np.uint8)
    seen = np.zeros(len(units), bool)
    places = units[:1] >> 10 << ((units[:1] & 0x200) >> 6)
    while len(places):
        children = (places[:, None] ^ np.arange(1, 256, dtype=np.uint32)).reshape(-1)
        if children.max() >= len(units):
            return False
        labels = np.tile(np.arange(1, 256, dtype=np.uint32), len(places))
        found = np.unique(children[(units[children] & 0x800000FF) == labels])
        found = found[~seen[found]]
        seen[found] = True
        places = found.astype(np.uint32) ^ (units[found] >> 10 << ((units[found] & 0x200) >> 6))
        leaves = places[(units[found] >> 8 & 1) == 1]
        if len(leaves) and leaves.max() >= len(units):
            return False
        starts = units[leaves] & 0x7FFFFFFF
        if len(starts) and (starts.max() >= len(texts) or np.any(texts[starts] >> 6 == 2)):
            return False
    return True
