"""Small data files for tests of the readers, and the sentence with which one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support import source_files
from vlm_sft.base.errors import UserError
from vlm_sft.reading.locations import read_rows

ROWS = [{"image": "1.png", "caption": "a red 3"}, {"image": "2.png", "caption": "左上角是红色的3"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def write(path: Path, content: str | bytes) -> Path:
    return Path(source_files.write(path, content))


def values(path, **kwargs) -> list[dict]:
    return [row.values for row in read_rows(str(path), **kwargs)]


def refused(path, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        values(path, **kwargs)
    return source_files.sentence(error.value)


def check_rows_or_sentence(path) -> None:
    """Whatever the file holds, reading it gives rows or one sentence, and no other error."""
    try:
        rows, message = values(path), ""
    except UserError as error:
        rows, message = [], str(error)
    assert all(isinstance(row, dict) for row in rows)
    assert "\n" not in message
