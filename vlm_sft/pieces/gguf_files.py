"""GGUF files, as llama.cpp has them: a language model in one file, dequantised when it is loaded.

transformers reads configuration, tokenizer and weights out of such a file. Here the file is looked at before it is
believed, and its tensors are listed and fingerprinted like those of any other checkpoint.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..base.errors import UserError
from ..base.limits import READERS, limits
from ..base.names import Json, Values
from ..base.whole_files import open_regular
from ..base.words import one_line

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
# A factor for each frequency, and how Llama 3.1 and those after it make them; the file has no word on the latter.
FACTORS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Metadata values of a fixed length: their type → how `struct` reads one.
NUMBERS = {
    GGUFValueType[name]: form
    for name, form in {
        "UINT8": "<B",
        "INT8": "<b",
        "UINT16": "<H",
        "INT16": "<h",
        "UINT32": "<I",
        "INT32": "<i",
        "FLOAT32": "<f",
        "BOOL": "<?",
        "UINT64": "<Q",
        "INT64": "<q",
        "FLOAT64": "<d",
    }.items()
}


class Place(NamedTuple):
    """Where a tensor lies in a file.

    Attributes:
        shape: As torch has it, the slowest axis first.
        kind: How its numbers are written.
        start: Its first byte.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int

    @property
    def row(self) -> int:
        """Bytes of a row, which is the last axis; blocks never reach over its end."""
        numbers, size = GGML_QUANT_SIZES[self.kind]
        return (self.shape[-1] if self.shape else 1) // numbers * size

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape[:-1]) * self.row


def is_gguf(path: str) -> bool:
    """Whether something is a file, and a GGUF by its first bytes or (one that was cut off) by its name."""
    if not os.path.isfile(path):
        return False
    with open_regular(path) as file:
        return file.read(len(MAGIC)) == MAGIC or path.endswith(".gguf")


class GgufFile:
    """The tensors of a GGUF file, with the methods by which safetensors files are read here.

    Args:
        path: The file.
        key: The recipe's key, for messages.

    Raises:
        UserError: It is no whole GGUF file, or one that cannot be read here. Nothing in it is believed before: what
            it says of its lengths is compared with its own, so that no number in it costs memory or time.
    """

    def __init__(self, path: str, key: str) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
                self.settings, self.places = _read(file, os.path.getsize(path))
        except OSError as error:
            raise UserError(f"{key}: the file {path!r} cannot be read: {one_line(error)}.") from error
        except (ValueError, KeyError, struct.error) as error:
            raise UserError(
                f"{key}: the file {path!r} is no whole GGUF file ({one_line(error)}); fetch it again."
            ) from error

    @property
    def architecture(self) -> str:
        """What llama.cpp calls this kind of model; empty where the file does not say."""
        return _text(self.settings.get("general.architecture", b""))

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is held open."""

    def keys(self) -> list[str]:
        """Names of the tensors, as llama.cpp calls them."""
        return list(self.places)

    def get_slice(self, name: str) -> _Slice:
        """A tensor that is read by rows."""
        return _Slice(self, self.places[name])

    def get_tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, dequantised."""
        return self.get_slice(name)[:]


def unpacking(path: str, key: str) -> str:
    """A sentence on what loading a GGUF file does to its weights."""
    places = GgufFile(path, key).places.values()
    sizes: Counter[str] = Counter()
    for place in places:
        sizes[place.kind.name] += place.size
    numbers = sum(math.prod(place.shape) for place in places)
    kinds = ", ".join(name for name, _ in sizes.most_common())
    return (
        f"{path} is a GGUF file ({kinds}); its {numbers:,} weights are dequantised, so they take the memory of a model "
        f"that was never quantised and keep what rounding took from them."
    )


def read_weights(file: GgufFile, empty: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All weights of a file, dequantised, by the names that transformers has for them.

    It is what transformers' `load_gguf_checkpoint` does, by the same tables, without reading all lists of the file once
    more, which takes as long as all else where there are many tokens; and nothing in the file is left out.

    Args:
        file: The file.
        empty: The model, without weights.
        dtype: Type of the weights in memory.

    Raises:
        ValueError: The file holds a tensor that transformers has no place for, so that the model would be another one.
    """
    config: Json = empty.config.to_dict()
    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=config)
    places = get_gguf_hf_weights_map(empty, processor)
    names = [name for name in file.places if name != FACTORS]  # see `positions_of`
    # Experts are found by the names of their stacks, without what follows them.
    if left := sorted(name for name in names if name not in places and name.removesuffix(".weight") not in places):
        raise ValueError(f"transformers has no place for its tensor {left[0]!r}; use its safetensors")
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        made = processor.process(
            file.get_tensor(name).numpy(),
            name,
            tensor_key_mapping=places,
            parsed_parameters={"tensors": tensors, "config": config},
        )
        if made.name in places:
            tensors[places[made.name]] = torch.from_numpy(np.ascontiguousarray(made.weights)).to(dtype)
    return tensors


def positions_of(file: GgufFile, config: Values) -> Json:
    """What a file says of its positions, which transformers leaves out: Llama 3.1's, whose factors lie in a tensor.

    Args:
        file: The file.
        config: What transformers read of it.

    Returns:
        What belongs into the configuration besides.

    Raises:
        ValueError: The file scales its positions in a way that is not known here.
    """
    scaling = file.settings.get(f"{file.architecture}.rope.scaling.type")
    said = {"rope_scaling", "rope_parameters"} & config.keys()
    if scaling not in (None, b"none") and not said:
        raise ValueError(f"it scales its positions ({_text(scaling)}), which would be lost; use its safetensors")
    if FACTORS not in file.places or not torch.any((factors := file.get_tensor(FACTORS)) != 1):
        return {}
    llama3 = {"rope_type": "llama3", **LLAMA3, "factor": float(factors.max())}
    made = AutoConfig.for_model(**{**config, "rope_scaling": dict(llama3)})
    plain = 1 / config["rope_theta"] ** (torch.arange(0, 2 * len(factors), 2) / (2 * len(factors)))
    if not torch.allclose(
        plain / factors, ROPE_INIT_FUNCTIONS["llama3"](made, torch.device("cpu"))[0], rtol=1e-4, atol=0
    ):
        raise ValueError(f"its tensor {FACTORS!r} scales positions otherwise than Llama 3.1; use its safetensors")
    return {"rope_scaling": llama3}


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


class _Slice:
    def __init__(self, file: GgufFile, place: Place) -> None:
        self.file, self.place = file, place

    def get_shape(self) -> tuple[int, ...]:
        return self.place.shape

    def __getitem__(self, rows: slice) -> torch.Tensor:
        place = self.place
        shape = (len(range(*rows.indices(place.shape[0]))), *place.shape[1:]) if place.shape else ()
        size = math.prod(shape[:-1]) * place.row
        raw = np.fromfile(self.file.path, np.uint8, size, offset=place.start).reshape(*shape[:-1], place.row)
        return torch.from_numpy(dequantize(raw, place.kind).reshape(shape).copy())


class _Reader:
    """Takes one value after the other out of a file, never more than it holds; a ValueError says what is wrong."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left = file, size

    def take(self, count: int) -> bytes:
        """So many bytes."""
        if count > self.left:
            raise ValueError("it ends before what it announces")
        self.left -= count
        return self.file.read(count)

    def number(self, form: str) -> Any:
        """A number, as `struct` calls its form."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> bytes:
        """A text behind its length."""
        return self.take(self.number("<Q"))

    def value(self) -> object:
        """A value behind its type; None for a list, which is passed over."""
        kind = GGUFValueType(self.number("<I"))
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == GGUFValueType.STRING:
            return self.text()
        inner, count = GGUFValueType(self.number("<I")), self.number("<Q")
        if count > (most := limits().vocabulary):  # transformers takes hundreds of bytes for each entry
            raise ValueError(f"it has a list of {count:,}; more than {most:,} (`limits.vocabulary`) are refused")
        if inner in NUMBERS:
            self.take(count * struct.calcsize(NUMBERS[inner]))
        elif inner == GGUFValueType.STRING:
            longest = 2 * limits().token_characters  # a merge is two tokens
            for _ in range(count):
                if len(text := self.text()) > longest:
                    raise ValueError(f"it has a token of {len(text):,} bytes (`limits.token_characters`)")
        else:
            raise ValueError("it has lists of lists")
        return None

    def place(self) -> Place:
        """What follows the name of a tensor."""
        if (axes := self.number("<I")) > READERS.gguf_axes:
            raise ValueError(f"a tensor has {axes:,} axes")
        shape = tuple(self.number("<Q") for _ in range(axes))[::-1]
        return Place(shape, GGMLQuantizationType(self.number("<I")), self.number("<Q"))


def _read(file: BinaryIO, size: int) -> tuple[dict[str, object], dict[str, Place]]:
    """Settings that are no lists, and where each tensor is; a ValueError says what is wrong with the file."""
    reader = _Reader(file, size)
    if reader.take(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin like one")
    if (version := reader.number("<I")) not in VERSIONS:
        raise ValueError(f"its version {version:,} is not read")
    tensors, entries = reader.number("<Q"), reader.number("<Q")
    if max(tensors, entries) > READERS.gguf_entries:
        raise ValueError(f"it announces {max(tensors, entries):,} entries")
    settings = {}
    for _ in range(entries):
        name = reader.text().decode()
        settings[name] = reader.value()
    alignment = settings.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError("its alignment is no length")
    places: dict[str, Place] = {}
    for _ in range(tensors):
        if (tensor := reader.text().decode()) in places:
            raise ValueError(f"its tensor {tensor!r} is there twice")
        places[tensor] = reader.place()
    start = math.ceil((size - reader.left) / alignment) * alignment
    for tensor, place in places.items():
        places[tensor] = place = place._replace(start=start + place.start)
        if (place.shape and place.shape[-1] % GGML_QUANT_SIZES[place.kind][0]) or place.start + place.size > size:
            raise ValueError(f"its tensor {tensor!r} of the shape {place.shape} is not whole in it")
    return settings, places
