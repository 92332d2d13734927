"""The process in which llama.cpp's own code rounds a language model's file to fewer bits.

`python -m vlm_sft.llama_cpp.quantize IN OUT NAME` writes OUT, a mixture that llama.cpp knows by NAME, and prints how
many tensors have which type. Blocks are made by `ggml_quantize_chunk` of the llama.cpp that `xllamacpp` brings.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from ..base.console import harmless_json, tell
from ..base.errors import UserError, exit_on_user_error
from .mixture import MIXTURES, Shape, types_of

VERSION = 2
"""Of the layout of blocks (`GGML_QNT_VERSION`)."""
VALUES_AT_ONCE = 2**22
_TYPE, _VERSION = "general.file_type", "general.quantization_version"
BROKEN = "llama.cpp finds values that are no numbers in {}, or blocks that are none"


class Rounding:
    """llama.cpp's functions that round rows of numbers."""

    def __init__(self) -> None:
        import xllamacpp.xllamacpp as module

        library = ctypes.CDLL(module.__file__)
        self._chunk = library.ggml_quantize_chunk
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
        self._chunk.restype = ctypes.c_size_t
        self._valid = library.ggml_validate_row_data
        self._valid.argtypes, self._valid.restype = [ctypes.c_int, pointer, ctypes.c_size_t], ctypes.c_bool

    def __call__(self, rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
        """Rows of numbers (rows, width) as bytes (rows, bytes of a row).

        Raises:
            UserError: What comes out is no number.
        """
        size, stored = GGML_QUANT_SIZES[kind]
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        out = np.empty((len(rows), rows.shape[1] // size * stored), dtype=np.uint8)
        written = self._chunk(int(kind), rows.ctypes.data, out.ctypes.data, 0, len(rows), rows.shape[1], None)
        assert written == out.nbytes
        # It looks at the blocks' scales alone, and those of a block with no number in it may be any.
        if not np.isfinite(rows).all() or not self._valid(int(kind), out.ctypes.data, out.nbytes):
            raise UserError(BROKEN.format("this model"))
        return out


def quantize(source: Path, out: Path, name: str) -> dict[str, int]:
    """Writes a file anew with its tensors in the types of a mixture; returns how many have which.

    Args:
        source: A language model's file in 16 or 32 bits.
        out: File to write.
        name: A key of `MIXTURES`.

    Raises:
        UserError: It has values that are no numbers, or is of an architecture that is not known here.
    """
    reader = GGUFReader(source)
    tensors = {each.name: each for each in reader.tensors}
    types = types_of(name, {key: [int(n) for n in each.shape[::-1]] for key, each in tensors.items()}, shape_of(reader))
    writer = GGUFWriter(out, str(_value(reader, "general.architecture")))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", _TYPE, _VERSION):
            array = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=array)
    writer.add_file_type(MIXTURES[name].file)
    writer.add_quantization_version(VERSION)
    for key, tensor in tensors.items():
        kind = types[key] or tensor.tensor_type
        shape = [int(size) for size in tensor.shape[::-1]]
        size, stored = GGML_QUANT_SIZES[kind]
        nbytes = int(np.prod(shape)) // size * stored
        writer.add_tensor_info(key, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rounding = Rounding()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for key, tensor in tensors.items():
            writer.write_tensor_data(_rounded(tensor, types[key], rounding, pool))
    writer.close()
    return dict(Counter((types[key] or each.tensor_type).name for key, each in tensors.items()))


def _rounded(
    tensor: Any, kind: GGMLQuantizationType | None, rounding: Rounding, pool: ThreadPoolExecutor
) -> np.ndarray:
    """The bytes of a tensor in its type."""
    if kind is None or kind == tensor.tensor_type:
        return tensor.data
    numbers = _numbers(tensor)
    if kind == GGMLQuantizationType.F16:
        return numbers.astype(np.float16)
    rows = numbers.reshape(-1, numbers.shape[-1])
    some = max(1, VALUES_AT_ONCE // rows.shape[1])
    pieces = [rows[at : at + some] for at in range(0, len(rows), some)]
    return np.concatenate(list(pool.map(lambda piece: rounding(piece, kind), pieces)))


def _numbers(tensor: Any) -> np.ndarray:
    """A tensor of 16 or 32 bits, as numpy has it."""
    if tensor.tensor_type == GGMLQuantizationType.BF16:
        bits = tensor.data.view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tensor.shape[::-1])
    assert tensor.tensor_type in (GGMLQuantizationType.F16, GGMLQuantizationType.F32)
    return tensor.data


def shape_of(reader: GGUFReader) -> Shape:
    """What a file says of its model, as far as mixtures ask."""
    architecture = str(_value(reader, "general.architecture"))
    heads, shared = (
        _first(_value(reader, f"{architecture}.attention.{key}")) for key in ("head_count", "head_count_kv")
    )
    layers, experts = (_first(_value(reader, f"{architecture}.{key}")) for key in ("block_count", "expert_count"))
    return Shape(architecture, layers, heads // (shared or heads or 1), experts)


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _first(value: Any) -> int:
    """A number, or the first of those that stand for the layers; 0 where none does."""
    return int(value[0] if isinstance(value, list) and value else value or 0)


if __name__ == "__main__":
    with exit_on_user_error():
        tell(harmless_json(quantize(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
