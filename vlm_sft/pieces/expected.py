"""What is read of a checkpoint: the files that are expected of it, laid out in a folder that holds nothing else.

transformers obeys dozens of names beside the weights (adapters, further templates, versions of a file, other weights,
code), and new ones with each version. It is shown a folder of links to the files on these lists, and finds nothing more
to obey: what was looked at and fingerprinted is what is loaded. Everything else in a checkpoint is never opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ..base.errors import refused_by_library
from ..base.names import CONFIG, PROCESSOR_CONFIG
from ..recipe.safety import check_config
from ..systems.chatglm_tokenizer import VOCABULARY as ICE_TEXT
from .checkpoints import Checkpoint, fetch_file, unreachable
from .gguf_files import GgufFile, positions_of

MODEL = (CONFIG, "generation_config.json")
"""Beside the weights, which a `Checkpoint` lists."""
IMAGES = (PROCESSOR_CONFIG, "preprocessor_config.json")
VOCABULARIES = (
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("spm.model", "sentencepiece.model", "tiktoken.model", ICE_TEXT),
)
"""What tokenizers of language models are made of where there is no `tokenizer.json`, which holds all of it."""
WHOLE = "tokenizer.json"
TOKENIZER = (
    *(CONFIG, "tokenizer_config.json", WHOLE, "special_tokens_map.json", "added_tokens.json"),
    *VOCABULARIES,
)
"""`config.json` says of which class a tokenizer is."""


def laid_out(
    pretrained: str,
    revision: str | None,
    key: str,
    names: Iterable[str],
    weights: Checkpoint | None = None,
) -> str:
    """A folder with links to the files of a checkpoint that are expected, and to no others.

    It stays until this process ends: some tokenizers copy their vocabulary from where it was when they are saved.

    Args:
        pretrained: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        key: The recipe's key, for messages.
        names: The files, of which some may not be there.
        weights: Its weights, where they are to be in it too.

    Raises:
        UserError: The folder or repository cannot be had, or has none of them.
    """
    links: dict[str, str] = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        if last in VOCABULARIES and f"{folder}/{WHOLE}".lstrip("/") in links:
            continue
        if (path := fetch_file(pretrained, name, revision, key, required=False)) is not None:
            links[name] = os.path.realpath(path)
    if weights is not None:
        links |= {name: os.path.realpath(path) for name, path in weights.paths().items()}
    if not links:
        raise unreachable(pretrained, key)
    place = _kept(repr([pretrained, sorted(links.items())]))
    for name, path in links.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).symlink_to(path)
    return str(place)


@cache
def unpacked(path: str, key: str) -> str:
    """The same for a GGUF file: a folder with its configuration and tokenizer, as transformers reads them out of it.

    Args:
        path: The file.
        key: The recipe's key, for messages.

    Raises:
        UserError: The file is not whole, or transformers knows no such language model or tokenizer.
    """
    looked_at = GgufFile(path, key)  # transformers would believe what the file says of its lengths
    place, file = _kept(path), os.path.realpath(path)
    with refused_by_library(f"{key}: the GGUF file {path!r} cannot be read"):
        found, _ = PreTrainedConfig.get_config_dict(str(place), gguf_file=file)
        config = {name: value for name, value in found.items() if not name.startswith("_")}
        check_config(config, f"{key}: {path!r}", "its metadata")
        config |= positions_of(looked_at, config)
        PreTrainedTokenizerFast.from_pretrained(str(place), gguf_file=file).save_pretrained(str(place))
        (place / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return str(place)


def _kept(name: str) -> Path:
    """An empty folder, by what it is for."""
    place = _root() / hashlib.sha256(name.encode()).hexdigest()[:16]
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return place


@cache
def _root() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="vlm-sft-expected-")
    _KEPT.append(folder)
    return Path(folder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def name_again(model: PreTrainedModel, pretrained: str) -> None:
    """Lets a model say that it is from the checkpoint, not from the folder of links."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.name_or_path = module.config.name_or_path = pretrained
