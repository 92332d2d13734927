"""Lengths of rows, kept once all were measured: the next start that packs, merges or groups them measures none anew.

One file for rows and for what measures them, in the cache of `datasets`. They are kept only where both are known for
sure: rows that are kept themselves (`data.row_cache`) and hold nothing that waits for a picture's own size, and a stack
with this package's collator and processor, where an image has as many tokens as any other. All else is measured anew.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from datasets import config, is_caching_enabled

from ..base.limits import limits
from ..base.whole_files import digest, read_bytes, written_beside
from ..batch.collator import MultimodalCollator
from ..batch.processor import VLMProcessor
from ..rows.messages import IN_EXTRAS
from ..templates.render import resolve

if TYPE_CHECKING:
    from datasets import Dataset

FEWEST = 20_000  # rows that are worth it: fewer are measured within some seconds
COLUMNS = ("tokens", "turns_lost", "front", "reason", "sentence")
# What decides over the tokens of a row.
_ROOMS = tuple(Path(__file__).parents[1] / room for room in ("batch", "templates", "rows"))
_LIBRARIES = ("transformers", "tokenizers", "jinja2")


def place_of(rows: Dataset, picked: np.ndarray, collator: MultimodalCollator) -> Path | None:
    """Where the lengths of rows are kept; None where they are not.

    Args:
        rows: Rows of one source.
        picked: The numbers of those that are measured.
        collator: Measures them.
    """
    if len(picked) < FEWEST or type(collator) is not MultimodalCollator or not is_caching_enabled():
        return None
    processor, tokenizer = collator.processor, collator.processor.tokenizer
    if type(processor) is not VLMProcessor or not rows.cache_files or IN_EXTRAS in rows.column_names:
        return None
    said = {
        "rows": rows._fingerprint, "of": [len(rows), len(picked), digest(picked.tobytes()).hex()],
        "tokenizer": tokenizer.backend_tokenizer.to_str(), "special": tokenizer.special_tokens_map,
        "added": [str(each) for each in tokenizer.get_added_vocab().items()],
        "template": resolve(processor._template()), "length": collator.max_length, "limits": repr(limits()),
        "image": [processor.num_image_tokens, processor.image_token, processor.system, processor.box_notation],
        "code": _code(), "libraries": [version(name) for name in _LIBRARIES],
    }  # fmt: skip
    name = digest(json.dumps(said, sort_keys=True, default=str).encode("utf-8", "replace")).hex()
    return Path(config.HF_DATASETS_CACHE) / "vlm_sft" / f"{name}.lengths"


def load(place: Path) -> list[tuple[int, int, int, str | None, str | None]] | None:
    """What `save` kept, for each row; None where nothing whole is there."""
    try:
        table = pa.ipc.open_stream(read_bytes(place)).read_all()
        return list(zip(*(table.column(name).to_pylist() for name in COLUMNS), strict=True))
    except (OSError, pa.ArrowException, ValueError, KeyError):
        return None


def save(place: Path, measures: Sequence[tuple[int, int, int, str | None, str | None]]) -> None:
    """Keeps tokens, turns lost and the end of the last image of each row, or reason and sentence of one that is wrong.

    A full or read-only disk keeps nothing.
    """
    table = pa.table(dict(zip(COLUMNS, map(list, zip(*measures, strict=True)), strict=True)))
    try:
        with written_beside(place) as beside, pa.ipc.new_stream(str(beside), table.schema) as stream:
            stream.write_table(table)
    except OSError:
        return


@cache
def _code() -> str:
    """What another or edited package has measured is not taken for what this one would."""
    return digest(b"".join(read_bytes(path) for room in _ROOMS for path in sorted(room.glob("*.py")))).hex()
