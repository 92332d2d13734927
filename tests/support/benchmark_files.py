"""Pictures, tables and lines that benchmarks are made of, and a task of one's own."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image


def png(number: int) -> bytes:
    """A picture with a pattern that no other number has."""
    stream = io.BytesIO()
    colours = [((x * 7 + number * 53) % 256, (y * 11 + number * 97) % 256, (x * y + number * 31) % 256)
               for y in range(24) for x in range(32)]  # fmt: skip
    image = Image.new("RGB", (32, 24))
    image.putdata(colours)
    image.save(stream, "PNG")
    return stream.getvalue()


def inside(number: int) -> dict:
    """A picture as the Hub's tables hold it."""
    return {"bytes": png(number), "path": f"{number}.png"}


def parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def document(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(number))


def ten(*answers: str) -> list[dict]:
    texts = (answers * 10)[:10]
    return [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(texts, start=1)]


def own_task(folder: Path, count: int = 3, **keys: object) -> str:
    """A task of one's own with rows beside it, each two on a picture.

    Args:
        folder: Where to.
        count: Of rows.
        **keys: Of the task; None leaves one out.
    """
    lines(folder / "rows.jsonl", [
        {"id": f"q{n}", "image": f"{n % 2}.png", "question": f"有几只狗 {n}?", "answer": str(n)} for n in range(count)
    ])  # fmt: skip
    for n in range(2):
        picture(folder / f"{n}.png", n)
    task = {"about": "dogs", "sources": ["ours"], "path": "rows.jsonl", "id": "id", "metric": "exact_match"} | keys
    path = folder / "dogs.yaml"
    said = {key: value for key, value in task.items() if value is not None}
    path.write_text(yaml.safe_dump(said, allow_unicode=True), encoding="utf-8")
    return str(path)
