"""Reads checkpoints: lists their tensors, takes single ones, and knows two of them apart.

Works on folders, on Hub repositories and on single weight files, on one file or shards, on safetensors, GGUF or
(weights only) `.bin`.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from ..base.errors import UserError
from ..base.hub import hub_is_away, look_for_hub
from ..base.names import CONFIG
from ..base.progress import steps
from ..base.whole_files import check_entries, check_regular, read_text
from ..recipe.safety import check_length, most_bytes
from .gguf_files import GgufFile, is_gguf

# In the order in which transformers looks for them, so that both read the same file where a folder has several.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# How the file of a shard is called: it lies beside its index.
_SHARD = re.compile(r"(?!\.)[\w.+=-]+\.(safetensors|bin|pt|pth)")


class Checkpoint:
    """The tensors of a folder, Hub repository or weight file, listed without reading them.

    Args:
        pretrained: A folder, a Hub id, or a single file of weights.
        revision: Branch, tag or commit on the Hub.
        key: The recipe key this came from, for messages.
        candidates: Names of weight files, the first that is there is taken.
        more: Further weight files on this machine, for what the checkpoint lacks (MiniGPT-4's norm after the ViT).

    Raises:
        UserError: There are no weights, or they cannot be read.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        key: str = "",
        candidates: Iterable[str] = WEIGHT_FILES,
        more: Iterable[str] = (),
    ) -> None:
        self.pretrained, self.revision, self.key = pretrained, revision, key
        self._paths: dict[str, str] = {}  # the Hub is asked once for each file
        self.files = self._list(tuple(candidates))
        for path in more:
            check_regular(path)
            if not Path(path).is_file():
                raise UserError(f"{key}: the weight file {path!r} (named under `more`) does not exist.")
            self.files = self._of_file(path) | self.files

    @property
    def where(self) -> str:
        """The recipe's key and the checkpoint, as messages begin."""
        return f"{self.key}: {self.pretrained!r}"

    def _list(self, candidates: tuple[str, ...]) -> dict[str, str]:
        """Tensor name → the file it is in: a name inside the checkpoint, or an absolute path."""
        if Path(self.pretrained).is_file():
            return self._of_file(self.pretrained)
        for name in candidates:
            if (path := fetch_file(self.pretrained, name, self.revision, self.key, required=False)) is None:
                continue
            self._paths[name] = path
            if not name.endswith(".index.json"):
                return dict.fromkeys(self._names(path), name)
            return self._read_index(path, name)
        if not Path(self.pretrained).exists():
            raise unreachable(self.pretrained, self.key)
        raise UserError(
            f"{self.where} has no weights that can be read here ({', '.join(candidates)}); check the folder or the Hub "
            f"id."
        )

    def _read_index(self, path: str, name: str) -> dict[str, str]:
        """The map of an index; its files lie beside it, so that nothing elsewhere is read."""
        where = f"{self.key}: {name} of {self.pretrained!r}"
        check_length(path, most_bytes(name))
        try:
            found = dict(json.loads(read_text(path))["weight_map"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise (
                error if isinstance(error, UserError) else UserError(f"{where} is no index of weight files.")
            ) from error
        for file in found.values():
            if not isinstance(file, str) or not _SHARD.fullmatch(file):
                raise UserError(f"{where} names {file!r}, which is no weight file beside it; it is refused.")
        return found

    def check_shards(self) -> None:
        """Compares an index with the files that it names: transformers loads all that they hold.

        Raises:
            UserError: A file holds a tensor that the index does not say it holds.
        """
        files = {name for name in self.files.values() if not Path(name).is_absolute()}
        for file in sorted(files) if len(files) > 1 or not files <= set(WEIGHT_FILES) else ():
            more = set(self._names(self._path(file))) - {name for name, its in self.files.items() if its == file}
            if more:
                raise UserError(
                    f"{self.key}: {file} of {self.pretrained!r} holds {min(more)!r}, which its index does not say; "
                    f"fetch the checkpoint again."
                )

    def _of_file(self, path: str) -> dict[str, str]:
        return dict.fromkeys(self._names(path), str(Path(path).resolve()))

    def _names(self, path: str) -> list[str]:
        if (file := _open(path, self.key)) is None:
            return list(_load_bin(path, self.key))
        with file:
            return list(file.keys())

    def paths(self) -> dict[str, str]:
        """Name of each of its own files of weights, and of their index → where it lies on this machine."""
        names = {name for name in self.files.values() if not Path(name).is_absolute()}
        return {**self._paths, **{name: self._path(name) for name in names}}

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(os.path.getsize(self._path(name)) for name in set(self.files.values()))

    @property
    def commit(self) -> str | None:
        """The commit on the Hub that these tensors are from; None for files on this machine."""
        names = [name for name in self.files.values() if not Path(name).is_absolute()]
        if not names or Path(self.pretrained).exists():
            return None
        return extract_commit_hash(self._path(names[0]), None)

    def _path(self, name: str) -> str:
        """Where a file of `files` lies on this machine."""
        if Path(name).is_absolute():
            return name
        if name not in self._paths:
            self._paths[name] = fetch_file(self.pretrained, name, self.revision, self.key)
        return self._paths[name]

    def paths_of(self, names: Iterable[str]) -> list[str]:
        """The files on this machine that hold these tensors."""
        return [self._path(file) for file in sorted({self.files[name] for name in names})]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Reads these tensors and no others."""
        read = list(names)
        return {name: tensor for name, _, tensor in steps(self._walk(read, sample=False), "read", "weights", len(read))}

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Shapes of these tensors."""
        return {name: shape for name, (shape, _) in self.kinds(names).items()}

    def kinds(self, names: Iterable[str]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and types of these tensors."""
        return {name: (shape, tensor.dtype) for name, shape, tensor in self._walk(names, sample=True)}

    def fingerprint(self, names: Iterable[str] | None = None) -> str:
        """Short hash of names, shapes, types and first values of these tensors (default: of all).

        Two checkpoints that differ in training differ here, and one that was only cut into other shards does not;
        reading takes seconds, also for 13B parameters.
        """
        lines = []
        read = list(names if names is not None else self.files)
        for name, shape, tensor in steps(self._walk(read, sample=True), "fingerprint", "weights", len(read)):
            values = tensor.flatten()[:256].contiguous().view(torch.uint8).numpy().tobytes()
            lines.append(f"{name}:{shape}:{tensor.dtype}:".encode() + values)
        return hashlib.sha256(b"".join(sorted(lines))).hexdigest()[:16]

    def _walk(self, names: Iterable[str], sample: bool) -> Iterator[tuple[str, tuple[int, ...], torch.Tensor]]:
        """Name, whole shape, and tensor (when sampling: its first row), file by file."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for file_name, wanted in sorted(by_file.items()):
            path = self._path(file_name)
            if (opened := _open(path, self.key)) is not None:
                with opened as file:
                    self._check_index(wanted, set(file.keys()), file_name)
                    for name in wanted:
                        piece = file.get_slice(name)
                        shape = tuple(piece.get_shape())
                        yield name, shape, piece[:1] if sample and len(shape) > 1 else file.get_tensor(name)
            else:
                tensors = _load_bin(path, self.key)
                self._check_index(wanted, set(tensors), file_name)
                for name in wanted:
                    tensor = tensors[name]
                    yield name, tuple(tensor.shape), tensor[:1] if sample and tensor.dim() > 1 else tensor

    def _check_index(self, wanted: list[str], held: set[str], file_name: str) -> None:
        if missing := [name for name in wanted if name not in held]:
            raise UserError(
                f"{self.key}: {file_name} of {self.pretrained!r} lacks {missing[0]!r}, which its index says it holds; "
                f"fetch the checkpoint again."
            )


def _open(path: str, key: str) -> safe_open | GgufFile | None:
    """A file whose tensors are read one by one; None where it is none of that kind."""
    if is_gguf(path):
        return GgufFile(path, key)
    if not path.endswith(".safetensors"):
        return None
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        # Safetensors would say that a file which may not be read is not there.
        if os.path.exists(path) and not os.access(path, os.R_OK):
            raise UserError(
                f"{key}: the file {path!r} may not be read by this user; change its permissions."
            ) from error
        raise UserError(f"{key}: the file {path!r} is no whole safetensors file ({error}); fetch it again.") from error


def _load_bin(path: str, key: str) -> dict[str, torch.Tensor]:
    """Tensors of a file that `torch.save` wrote; never runs code that is in it."""
    _check_archive(path, key)
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):  # the file was written before torch 1.6
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{key}: the file {path!r} holds more than weights, and reading it could run code: it is refused; use a "
            f"checkpoint in safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{key}: the file {path!r} cannot be read as weights; fetch it again.") from error
    for name in ("model", "module"):  # LAVIS, MiniGPT-4, mPLUG; and what DeepSpeed saves
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            if any(isinstance(value, torch.Tensor) for value in state.values()):
                raise UserError(
                    f"{key}: the file {path!r} holds tensors beside `{name}`; only one of both can be meant."
                )
            state = state[name]
    if not isinstance(state, dict):
        raise UserError(f"{key}: the file {path!r} holds no tensors by name.")
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    for name, tensor in tensors.items():
        if not _is_whole(tensor):
            raise UserError(
                f"{key}: the tensor {name!r} in {path!r} is larger than what the file holds of it; it is refused."
            )
    return tensors


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a place in memory for each of its numbers: strides of zero and sparse ones have not."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _check_archive(path: str, key: str) -> None:
    """`torch.save` never compresses; an archive that does unpacks to more than the file holds."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if packed or sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise UserError(f"{key}: the file {path!r} is a packed archive, which torch never writes; it is refused.")


def fetch_file(pretrained: str, name: str, revision: str | None, key: str, required: bool = True) -> Any:
    """Path of a file of a folder or Hub repository, downloaded if it must be.

    Raises:
        UserError: The file, folder or repository cannot be had.
    """
    if not Path(pretrained).exists():
        look_for_hub()
    elif Path(pretrained).is_dir():
        check_entries(pretrained)
    else:
        check_regular(pretrained)
    try:
        path = cached_file(
            pretrained,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=required,
        )
    except (OSError, ValueError) as error:  # ValueError: what was given cannot be the name of a repository
        raise unreachable(pretrained, key) from error
    if path is None and required:
        if not Path(pretrained).exists():
            raise unreachable(pretrained, key)
        raise UserError(f"{key}: {pretrained!r} has no file {name}.")
    if path is not None and Path(pretrained).is_dir() and not name.endswith(WEIGHTS):
        _check_inside(path, pretrained, key)
    return path


def _check_inside(path: str, folder: str, key: str) -> None:
    """A small file of a folder is not read behind a link that leads out of it: what it holds may be saved and shared.

    Weights may lie on another disk. In the cache of `huggingface_hub` every file is a link to a blob of its repository.

    Raises:
        UserError: It does.
    """
    root, real = Path(folder).resolve(), Path(path).resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (real.is_relative_to(root) or real.is_relative_to(blobs)):
        raise UserError(f"{key}: {path!r} leads out of its checkpoint; put the file itself there.")


def unreachable(pretrained: str, key: str, lacks: str = CONFIG) -> UserError:
    """The one sentence for a piece that is neither a folder with what it needs nor to be had from the Hub."""
    if Path(pretrained).exists():
        what = "folder" if Path(pretrained).is_dir() else "file"
        return UserError(f"{key}: the {what} {pretrained!r} has no {lacks} that transformers can read.")
    mend = "check the name, the revision, the network, and (for a gated model) your token"
    if constants.is_offline_mode() and not hub_is_away():
        mend = "HF_HUB_OFFLINE=1 forbids asking it: unset that, or name a folder"
    return UserError(f"{key}: {pretrained!r} is no folder here and could not be had from the Hub; {mend}.")
