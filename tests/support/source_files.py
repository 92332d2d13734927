"""Small files of rows for tests, and the sentence with which a file or a source is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.data.dataset import load_mixture, load_source
from vlm_sft.reading.locations import read_rows
from vlm_sft.recipe.sections import Source

ROWS = [{"image": "1.png", "caption": "a red 3"}, {"image": "2.png", "caption": "左上角是红色的3"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def write(path: Path, content: list | str | bytes) -> str:
    """Writes rows as JSON lines, or text or bytes as they are; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "\n".join(json.dumps(row, ensure_ascii=False) for row in content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def captions(folder: Path, name: str, count: int) -> Source:
    rows = [{"image": f"{i}.png", "caption": f"{name} 第{i}张"} for i in range(count)]
    return Source(path=write(folder / f"{name}.jsonl", rows), format="caption")


def refused(*sources: Source, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        load_mixture(sources, **kwargs) if len(sources) > 1 else load_source(sources[0])
    return sentence(error.value)


def sentence(error: UserError) -> str:
    """What a user reads: one line that is a whole sentence."""
    message = str(error)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def write_file(path: Path, content: str | bytes) -> Path:
    return Path(write(path, content))


def values(path, **kwargs) -> list[dict]:
    return [row.values for row in read_rows(str(path), **kwargs)]


def refused_file(path, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        values(path, **kwargs)
    return sentence(error.value)


def check_rows_or_sentence(path) -> None:
    """Whatever the file holds, reading it gives rows or one sentence, and no other error."""
    try:
        rows, message = values(path), ""
    except UserError as error:
        rows, message = [], str(error)
    assert all(isinstance(row, dict) for row in rows)
    assert "\n" not in message
