"""`python -m support.fuzz_driver FOLDER SEED FILES`: reads files of every kind with bytes changed by a seeded chance.

Each ends in rows, or in a `UserError` of one line. Whatever else comes of one is printed, with the file's name, and the
file stays. The process has little memory beyond its own.
"""

from __future__ import annotations

import io
import json
import os
import random
import sys
import tarfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save_file

from vlm_sft.base.errors import RowError, UserError
from vlm_sft.pieces.checkpoints import _open
from vlm_sft.reading.files import read_file
from vlm_sft.recipe.safety import read_json
from vlm_sft.recipe.schema import load_recipe
from vlm_sft.templates.serve import bounded

SLOW = 20.0  # seconds of a core
ROWS = [
    {"id": n, "t": f"猫 {n % 3}", "l": [{"a": str(n), "b": n / 3}] * (n % 4), "x": b"\0\xff" * n} for n in range(60)
]
NUMBERS = [b"\xff" * 8, b"\xff\xff\xff\x7f", b"\0" * 8, b"\x80" * 10, (2**40).to_bytes(8, "little"), b"\x01\0\0\0"]
WORDS = [
    b"{",
    b"[" * 300,
    b"NaN",
    b"1e999",
    b'"',
    b"&a [*a]",
    b"${oc.env:HOME}",
    b"!!python/object:os.system",
    b"\\ud800",
]


def write_all(folder: Path) -> list[Path]:
    """A right file of each kind."""
    table = pa.Table.from_pylist(ROWS)
    for name, codec, new in (("stream", "zstd", pa.ipc.new_stream), ("file", "lz4", pa.ipc.new_file)):
        words = table.set_column(1, "t", table["t"].combine_chunks().dictionary_encode())
        with new(
            str(folder / f"{name}.arrow"), words.schema, options=pa.ipc.IpcWriteOptions(compression=codec)
        ) as file:
            file.write_table(words)
    pq.write_table(table, folder / "snappy.parquet")
    pq.write_table(table, folder / "newer.parquet", data_page_version="2.0", compression="gzip", use_dictionary=False)
    plain = [{name: value for name, value in row.items() if name != "x"} for row in ROWS]
    (folder / "a.json").write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, plain)), encoding="utf-8")
    (folder / "a.csv").write_text("id,t\n" + "\n".join(f"{row['id']},{row['t']}" for row in plain), encoding="utf-8")
    picture = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(picture, "png")
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(5):
            for name, data in ((f"{number}.png", picture.getvalue()), (f"{number}.json", b'{"caption": "a"}')):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    recipe = Path(__file__).parents[2] / "recipes" / "ziya_stage2.yaml"
    (folder / "recipe.yaml").write_bytes(recipe.read_bytes())
    (folder / "config.json").write_text(json.dumps({"a": [1, {"b": None}], "猫": 1.5}), encoding="utf-8")
    save_file({"a": np.ones((3, 4), "f4"), "b": np.zeros(5, "i8")}, folder / "a.safetensors")
    return sorted(folder.iterdir())


def write_gguf(path: Path) -> Path:
    """A small GGUF file."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "猫"])
    writer.add_tensor("output_norm.weight", np.ones(8, "f4"))
    writer.add_tensor("token_embd.weight", np.ones((2, 32), "f2"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path) -> None:
    """Reads all of a file, as the package does."""
    if path.suffix in (".safetensors", ".gguf"):
        with _open(str(path), "stack.language_model") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                file.get_tensor(name)
    elif path.name == "config.json":
        assert isinstance(read_json(path), dict)
    elif path.suffix == ".yaml":
        load_recipe(path)
    else:
        for where, row in read_file(path):
            assert where.startswith(str(path)) and isinstance(row, dict | RowError)


def changed(data: bytes, chance: random.Random) -> bytes:
    """Some bytes are others, are gone, or stand twice."""
    found = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        place, length = chance.randrange(len(found) + 1), chance.choice([1, 2, 4, 8, 60])
        kind = chance.randrange(7)
        if kind < 2:
            found[place : place + 1] = bytes([chance.randrange(256)])
        elif kind == 2:
            number = chance.choice(NUMBERS)
            found[place : place + len(number)] = number
        elif kind == 3:
            found[place:place] = chance.choice(WORDS)
        elif kind == 4:
            del found[place : place + length]
        elif kind == 5:
            found[place:place] = found[place : place + length] * chance.choice([1, 1, 50])
        else:
            del found[chance.choice([place, len(found) - length]) :]
    return bytes(found)


def main(folder: Path, seed: int, count: int) -> int:
    """Reads so many files; returns how many ended otherwise than they may."""
    (folder / "right").mkdir()
    kinds = [*write_all(folder / "right"), write_gguf(folder / "right" / "a.gguf")]
    for path in kinds:
        read(path)
    wrong, refused = 0, 0
    with bounded():
        for number in range(count):
            chance, kind = random.Random(f"{seed} {number}"), kinds[number % len(kinds)]
            place = folder / str(number)
            place.mkdir()
            path = place / kind.name
            path.write_bytes(changed(kind.read_bytes(), chance))
            start = time.process_time()
            said = _said(lambda path=path: read(path))
            if said is None and time.process_time() - start < SLOW:
                path.unlink()
                place.rmdir()
                continue
            if said is not None and said.startswith("refused") and "\n" not in said and len(said) < 2000:
                refused += 1
                path.unlink()
                place.rmdir()
                continue
            wrong += 1
            print(f"{path}: {said or 'it takes too long'}", flush=True)
    print(f"{count} files, {refused} refused, {wrong} wrong", flush=True)
    os._exit(min(wrong, 1) if refused else 1)  # what hangs at the end of a process was not asked about


def _said(reads: Callable[[], None]) -> str | None:
    try:
        reads()
    except UserError as error:
        return f"refused: {error}"
    except BaseException:  # all else is what is looked for
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
