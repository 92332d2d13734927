"""Sources → one dataset of rows ``{"messages", "images", "source", "id"}``, the contract of everything behind it.

Rows know messages, not tokens, and images stay paths or encoded bytes until a data-loader worker decodes them.
"""

from __future__ import annotations

import base64
import binascii
import os
import random
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher

from .assets import closest
from .chat_template import normalise_messages
from .errors import UserError
from .formats import COLUMNS, convert
from .readers import Row, read_rows

# Stated, not inferred: the first rows may all lack an image, a path or bytes.
FEATURES = Features(
    {
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List({"path": Value("string"), "bytes": Value("binary")}),
        "source": Value("string"),
        "id": Value("string"),
    }
)
_CHUNK_ROWS, _CHUNK_BYTES = 1000, 2**28  # an Arrow chunk of `binary` may not pass 2 GiB

_SHARES = {"proportional": lambda size: size, "sqrt": lambda size: size**0.5, "weights": lambda size: 1.0}


class SourceLike(Protocol):
    """What is read of a `recipe.Source`; any object with these attributes will do."""

    path: str
    format: Any
    name: str | None
    images: str | None
    split: str
    revision: str | None
    columns: dict[str, str]
    prompts: list[str]
    weight: float
    max_rows: int | None


def load_source(source: SourceLike, *, seed: int = 0) -> Dataset:
    """Read one source into memory; its images are named or embedded, never decoded.

    Args:
        source: where the rows lie and what they mean; a `recipe.Source`.
        seed: draws the prompts of captions. The draw of a row depends on seed, source name and row number only.

    Returns:
        Rows in the order of the file with the columns ``messages`` (list of ``{"role", "content"}``, content a list of
        ``{"type", "text"}``), ``images`` (list of ``{"path", "bytes"}``, paths absolute), ``source`` and ``id``
        (``source/own id`` or ``source/row number``, with ``#k`` for the k-th caption of a row).

    Raises:
        UserError: the source or a row of it is not what the recipe says.
    """
    name = source.name or Path(source.path).stem
    _check_source(source, name)
    rows = islice(_rows(source, name, seed), source.max_rows)
    table = pa.Table.from_batches(list(_batches(rows)), schema=FEATURES.arrow_schema)
    if len(table) == 0:
        raise UserError(f"The source {source.path} holds no rows: add some or remove the source.")
    # Given here because the default hashes the whole table.
    fingerprint = Hasher.hash([name, source.path, source.format, seed, len(table), table.nbytes])
    return Dataset(table, info=DatasetInfo(features=FEATURES), fingerprint=fingerprint)


def load_mixture(sources: Sequence[SourceLike], sampling: str = "proportional", *, seed: int = 0) -> Dataset:
    """Read several sources and mix them.

    Source d takes part with the probability p_d: ``proportional`` weight_d * S_d, ``sqrt`` weight_d * sqrt(S_d)
    (InstructBLIP, arXiv:2305.06500), ``weights`` weight_d, each divided by the sum over all sources; S_d is the number
    of rows. The mixture is as long as all sources together. Where p_d asks for fewer rows than a source has, each row
    is there at most once; where it asks for more, the source is repeated in whole passes and a part of one.

    Args:
        sources: recipe sources with names that differ.
        sampling: ``proportional``, ``sqrt`` or ``weights``.
        seed: decides what is drawn and in which order. Sources in proportion to their size are concatenated unshuffled:
            shuffling is the trainer's.

    Raises:
        UserError: as `load_source`; names that are not unique; a share so small that it gives no row.
    """
    if sampling not in _SHARES:
        raise UserError(f'sampling is "{sampling}": it must be one of {", ".join(_SHARES)}.')
    if not sources:
        raise UserError("A mixture needs at least one source: add one under `data`.")
    names = [source.name or Path(source.path).stem for source in sources]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise UserError(f'Two sources are called "{double}": give each its own `name`.')
    parts = [load_source(source, seed=seed) for source in sources]
    together = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    weights = [source.weight for source in sources]
    if len(parts) == 1 or (sampling == "proportional" and len(set(weights)) == 1):
        return together
    counts = mixture_counts([len(part) for part in parts], weights, sampling)
    if 0 in counts:
        raise UserError(f'The source "{names[counts.index(0)]}" would get no row: raise its `weight` or remove it.')
    return together.select(mixture_order([len(part) for part in parts], counts, seed))


def mixture_counts(sizes: Sequence[int], weights: Sequence[float], sampling: str) -> list[int]:
    """How many rows of a mixture come from each source, by largest remainder; they add up to ``sum(sizes)``."""
    shares = [weight * _SHARES[sampling](size) for size, weight in zip(sizes, weights, strict=True)]
    total = sum(sizes)
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(rows) for rows in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda d: (counts[d] - exact[d], d))
    for d in by_remainder[: total - sum(counts)]:
        counts[d] += 1
    return counts


def mixture_order(sizes: Sequence[int], counts: Sequence[int], seed: int) -> np.ndarray:
    """Row numbers of a mixture in the concatenation of its sources: `counts` of each, interleaved at random.

    Every row of a source is drawn once before any of them is drawn again.
    """
    rng = np.random.default_rng([seed % 2**32, len(sizes)])
    labels = np.repeat(np.arange(len(sizes)), counts)
    rng.shuffle(labels)
    order = np.empty(len(labels), dtype=np.int64)
    offset = 0
    for d, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        passes = [rng.permutation(size) for _ in range(-(-count // size))]
        if passes:
            order[labels == d] = offset + np.concatenate(passes)[:count]
        offset += size
    return order


def check_images(dataset: Dataset) -> None:
    """Look for every image file that a dataset names, without opening any.

    Raises:
        UserError: some are missing, empty or folders; the message counts them and names the first and its row.
    """
    paths: dict[str, None] = {}  # a set in the order of the rows
    for chunk in dataset.data.column("images").chunks:
        paths |= dict.fromkeys(_paths_without_bytes(chunk))
    todo = iter(paths)
    groups = iter(lambda: list(islice(todo, 512)), [])
    with ThreadPoolExecutor(16) as pool:  # network file systems answer many at once
        bad = dict(problem for found in pool.map(_problems, groups) for problem in found)
    if not bad:
        return
    first = next(iter(bad))
    users = (row["id"] for row in dataset if any(image["path"] == first for image in row["images"]))
    raise UserError(
        f"{len(bad):,} of {len(paths):,} images cannot be used; the first is {first} ({next(users, 'not drawn')}), "
        f"which {bad[first]}: correct the paths or the source's `images` folder, or remove the rows."
    )


def _paths_without_bytes(images: pa.Array) -> list[str]:
    flat = images.flatten()
    path, encoded = pc.struct_field(flat, "path"), pc.struct_field(flat, "bytes")
    return path.filter(pc.and_(path.is_valid(), encoded.is_null())).to_pylist()


def _problems(paths: list[str]) -> list[tuple[str, str]]:
    return [(path, problem) for path in paths if (problem := _problem(path))]


def _problem(path: str) -> str | None:
    try:
        status = os.stat(path)
    except OSError as error:
        return "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be reached ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return "is not a file"
    return None if status.st_size else "is empty (0 bytes)"


# -------------------------------------------------------------------------------------------------- rows of a source


def _check_source(source: SourceLike, name: str) -> None:
    if source.format not in COLUMNS:
        raise UserError(
            f'The source "{name}" has the format "{source.format}": it must be one of {", ".join(COLUMNS)}.'
        )
    known = COLUMNS[source.format]
    for ours in source.columns:
        if ours not in known:
            hint = f'; did you mean "{near}"' if (near := closest(ours, known)) else ""
            raise UserError(
                f'The source "{name}" maps the column "{ours}", which the format {source.format} does not have{hint}: '
                f"it has {', '.join(known)}."
            )
    if source.prompts and source.format != "caption":
        raise UserError(f'The source "{name}" has prompts, but only the format caption takes them: remove them.')
    if source.images is not None and not os.path.isdir(os.path.expanduser(source.images)):
        raise UserError(f'The source "{name}" takes its images from {source.images}, which is no folder: correct it.')


def _rows(source: SourceLike, name: str, seed: int) -> Iterator[dict[str, Any]]:
    images_folder = None if source.images is None else os.path.abspath(os.path.expanduser(source.images))
    unseen = set(source.columns.values())
    for number, row in enumerate(read_rows(source.path, split=source.split, revision=source.revision), start=1):
        unseen -= row.values.keys()
        folder = images_folder or (None if row.folder is None else os.path.abspath(row.folder))
        draw = partial(random.Random(f"{seed}/{name}/{number}").choice, source.prompts) if source.prompts else str
        examples = list(convert(row.values, source.format, where=row.where, columns=source.columns, draw_prompt=draw))
        for k, example in enumerate(examples, start=1):
            yield {
                "messages": _checked(example.messages, row),
                "images": [resolve_image(image, folder, row.where) for image in example.images],
                "source": name,
                "id": f"{name}/{example.id or number}" + (f"#{k}" if len(examples) > 1 else ""),
            }
    if unseen:
        raise UserError(
            f'No row of {source.path} has the column "{min(unseen)}" that `columns` maps: correct the name.'
        )


def _checked(messages: list[dict[str, Any]], row: Row) -> list[dict[str, Any]]:
    try:
        messages = normalise_messages(messages)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from None
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{row.where}: there is no answer to learn from: add an assistant's message or remove the row.")
    return messages


def resolve_image(image: Any, folder: str | None, where: str) -> dict[str, Any]:
    """An image as the row names it → ``{"path": absolute, "bytes": None}`` or ``{"path": name, "bytes": ...}``."""
    name = None
    if isinstance(image, Mapping):
        name = image.get("path")
        encoded = image.get("bytes")
        image = name if encoded is None else encoded
    if isinstance(image, bytes):
        if not image:
            raise UserError(f"{where}: an embedded image is empty (0 bytes): write it again or remove the row.")
        return {"path": name if isinstance(name, str) else None, "bytes": image}
    if not isinstance(image, str):
        raise UserError(f"{where}: an image is neither a path nor bytes: write the path of a file.")
    if image.startswith("data:"):
        return {"path": None, "bytes": _from_data_uri(image, where)}
    if "://" in image[:12]:
        shown = " ".join(image[:200].split())
        raise UserError(f"{where}: the image {shown} is a URL and no URL is fetched: download it first.")
    path = os.path.expanduser(image)
    if "\0" in path or not path.strip() or path.encode("utf-8", "ignore").decode() != path:
        raise UserError(f"{where}: the image path {path[:200]!a} is blank or no text: correct it.")
    if not os.path.isabs(path) and folder is None:
        raise UserError(
            f"{where}: the image path {path} is relative, but rows of the Hub lie in no folder: set `images`."
        )
    return {"path": os.path.abspath(os.path.join(folder or "", path)), "bytes": None}


def _from_data_uri(uri: str, where: str) -> bytes:
    head, _, data = uri.partition(",")
    try:
        decoded = base64.b64decode(data, validate=True) if head.endswith(";base64") else b""
    except (binascii.Error, ValueError):
        decoded = b""
    if not decoded:
        raise UserError(f"{where}: the data URI {uri[:40]!a}... holds no base64 image: write it again or give a path.")
    return decoded


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    schema = FEATURES.arrow_schema
    chunk: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += sum(len(image["bytes"] or b"") for image in row["images"])
        if len(chunk) >= _CHUNK_ROWS or size >= _CHUNK_BYTES:
            yield pa.RecordBatch.from_pylist(chunk, schema=schema)
            chunk, size = [], 0
    if chunk:
        yield pa.RecordBatch.from_pylist(chunk, schema=schema)
