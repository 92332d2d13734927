"""The budget: how much a stranger's file may take before it is refused, in one place.

What a person may need more of is a field here and a key of the same name under `limits` of a recipe. The environment
variable `VLM_SFT_LIMITS` holds what differs from the defaults: a recipe of the user's own, and overrides that were
typed, write it (`hold`), so that every process that is started has it too; for commands without such a recipe the user
sets it. What lies in a bundle never does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import TypeVar

from .errors import UserError
from .words import whole_number

_Text = TypeVar("_Text", str, bytes)
ENVIRONMENT = "VLM_SFT_LIMITS"
MEGABYTE = 2**20


def _most(default: int, what: str) -> int:
    found: int = field(default=default, metadata={"what": what})
    return found


@dataclass(frozen=True)
class Limits:
    """What may be taken; `metadata["what"]` of each field says of what."""

    image_pixels: int = _most(178_956_970, "Most pixels of an image, also after it was resized.")
    image_tokens: int = _most(65_536, "Most tokens of an image.")
    picture_pixels: int = _most(16_777_216, "Most pixels that a processor makes of an image for the model.")
    picture_tiles: int = _most(256, "Most tiles that a processor cuts an image into.")
    row_bytes: int = _most(256 * MEGABYTE, "Most bytes of a row of a table, and of a member of a tar file.")
    page_bytes: int = _most(1024 * MEGABYTE, "Most bytes of a page of a parquet file, or a batch of Arrow, unpacked.")
    recipe_bytes: int = _most(MEGABYTE, "Most bytes of a recipe, a template or an adapter's settings in a bundle.")
    config_bytes: int = _most(16 * MEGABYTE, "Most bytes of a config.json, and of a bundle's manifest.")
    text_bytes: int = _most(256 * MEGABYTE, "Most bytes of a text file of a bundle or base, such as a tokenizer.")
    table_bytes: int = _most(256 * MEGABYTE, "Most bytes of a model's tables that no file holds, beyond its weights.")
    model_layers: int = _most(1000, "Most layers of a model.")
    model_labels: int = _most(100_000, "Most labels of a model that names what it sees.")
    model_size: int = _most(100_000_000, "Largest width, vocabulary or other size in a config.json.")
    picture_side: int = _most(10_000, "Most pixels of a side of what a processor makes of an image.")
    vocabulary: int = _most(2_000_000, "Most tokens of a tokenizer that is made of its settings.")
    tokenizer_growth: int = _most(64, "Most characters that a tokenizer makes of one.")
    token_characters: int = _most(10_000, "Most characters of a token.")
    tokens_around: int = _most(1000, "Most tokens that a tokenizer puts around a text.")
    adapter_numbers: int = _most(10_000, "Largest number in the mappings of an adapter's settings.")
    template_bytes: int = _most(1024 * MEGABYTE, "Most bytes of memory of the process that renders templates.")
    template_seconds: int = _most(10, "Most seconds of a core for a template and one conversation.")
    beams: int = _most(64, "Most beams of an answer.")
    cache_tokens: int = _most(1_048_576, "Most tokens of an answer or of a cache before it, all beams together.")
    cache_bytes: int = _most(16_384 * MEGABYTE, "Most bytes of a cache of fixed length, taken before an answer.")
    video_frames: int = _most(4096, "Most frames of a video that a row or a recipe asks for.")
    video_decoded: int = _most(10_000, "Most frames of a video that are decoded on the way to one.")
    stop_texts: int = _most(64, "Most texts that end an answer.")
    stop_characters: int = _most(200, "Most characters of a text that ends an answer.")


@dataclass(frozen=True)
class Readers:
    """Bounds of what reads a file or an answer, far above what any right one has: no keys, because no more is read.

    `metadata["what"]` of each field says of what; docs/security.md shows them.
    """

    yaml_entries: int = _most(100_000, "Entries of a YAML file, with its aliases filled in.")
    recipe_characters: int = _most(8 * MEGABYTE, "Characters of a recipe with its `${…}` filled in.")
    settings_depth: int = _most(64, "Mappings and lists in each other, in a file of settings.")
    json_containers: int = _most(4_000_000, "Mappings and lists of such a file; each takes twenty times its bytes.")
    json_values: int = _most(16_000_000, "Values of such a file.")
    largest_position: int = _most(10**12, "Positions of a model, and the base of their rotation: no sizes of a tensor.")
    tried_parameters: int = _most(500_000_000, "Parameters of a layer of an encoder that is tried before it is read.")
    template_characters: int = _most(1_000_000, "Characters of a template.")
    template_answer: int = _most(64 * MEGABYTE, "Bytes that the process which renders templates may answer.")
    literal_characters: int = _most(100_000, "Characters of a text of a benchmark that is read as a list.")
    pattern_folders: int = _most(10, "Folders of a benchmark's pattern of files.")
    pattern_characters: int = _most(60, "Characters of each of them.")
    tar_header: int = _most(2**14, "Bytes of a tar member's own header.")
    page_header: int = _most(MEGABYTE, "Bytes of the header of a parquet page.")
    video_packets: int = _most(1_000_000, "Packets of a video that are looked at for its length.")
    picture_text: int = _most(MEGABYTE, "Bytes of a picture that are neither pixels nor texts.")
    token_squares: int = _most(2_000_000_000, "Characters of a vocabulary's tokens, those of each squared.")
    gguf_entries: int = _most(100_000, "Settings, and tensors, of a GGUF file.")
    gguf_axes: int = _most(4, "Axes of its tensors.")
    cache_about: int = _most(1_000_000, "Bytes of a cache's `about.json`.")
    sample_picture: int = _most(200_000, "Characters of a small picture in a run's `samples.jsonl`.")
    score_magnitude: int = _most(1_000_000, "A score in a file that somebody else may have written.")
    judge_reply: int = _most(8 * MEGABYTE, "Bytes of a reply of a judge's server.")
    connections: int = _most(800, "Connections to `serve` that are open at a time.")
    asked_parts: int = _most(10_000, "Messages and parts of a request to `serve`.")
    asked_values: int = _most(2_500_000, "Values of its JSON, and marks between them.")
    asked_characters: int = _most(1_000_000, "Characters of their texts: templates and tokenizers take time for each.")
    asked_stops: int = _most(16, "Texts that end an answer, of a request.")
    asked_stop: int = _most(1000, "Characters of each.")
    asked_likely: int = _most(20, "Other tokens that are told at each place.")


READERS = Readers()


def bounded(text: _Text) -> _Text:
    """A JSON text that somebody else may have written; what it would take in memory is told by its marks.

    Raises:
        ValueError: An empty list takes twenty times its bytes, and this has more lists, mappings or values than any
            right file.
    """
    lists, mappings, values = (b"[", b"{", b",") if isinstance(text, bytes) else ("[", "{", ",")
    count = text.count
    if count(lists) + count(mappings) > READERS.json_containers or count(values) > READERS.json_values:
        raise ValueError("it holds more lists, mappings or values than any such file")
    return text


def limits() -> Limits:
    """What holds in this process.

    Raises:
        UserError: `VLM_SFT_LIMITS` names no limit, or says no number.
    """
    return _parsed(os.environ.get(ENVIRONMENT, ""))


def hold(given: Mapping[str, int]) -> None:
    """Lets these limits hold from now on, here and in processes that are started; the others stay as they are.

    Args:
        given: By names of `Limits`.
    """
    new, usual = replace(limits(), **given), Limits()
    changed = {each.name: getattr(new, each.name) for each in fields(Limits)}
    words = (f"{name}={value}" for name, value in changed.items() if value != getattr(usual, name))
    os.environ[ENVIRONMENT] = ",".join(words)


@lru_cache(maxsize=8)
def _parsed(text: str) -> Limits:
    found = {}
    for word in filter(None, (each.strip() for each in text.split(","))):
        name, _, said = word.partition("=")
        if name not in Limits.__dataclass_fields__ or not (value := whole_number(said)):
            known = ", ".join(each.name for each in fields(Limits))
            raise UserError(f"{ENVIRONMENT}: {word!r} is no limit; write name=number, of {known}.")
        found[name] = value
    return Limits(**found)
