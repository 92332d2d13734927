"""What lies beside the weights of a checkpoint and is obeyed too: looked at before transformers reads it.

A checkpoint is read by the files that are expected of it. What would make transformers load other weights, fetch code
or let short texts grow is refused with its name; what is fingerprinted is what is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..base.errors import UserError
from ..base.limits import READERS, limits
from ..base.names import ADAPTER_CONFIG, CONFIG, PROCESSOR_CONFIG, Json, Values
from ..base.whole_files import read_bytes
from ..base.words import short
from ..recipe.library_names import GENERATION, UNSAID
from ..recipe.passed_on import flaw, flaw_of_answers
from ..recipe.safety import check_length, check_picture, most_bytes, read_json
from ..systems.sentencepieces import is_sound, longest_of, read_pieces, table_of
from .checkpoints import fetch_file
from .expected import VOCABULARIES, WHOLE

# Of a `generation_config.json`: what transformers writes there itself, and what runs code or compiles.
_WRITTEN = ("_from_model_config", "transformers_version", "_original_object_hash", "_commit_hash")
_NEUTRAL = (*UNSAID, 0, 1)

# Keys of a `config.json`, at any depth, and of what stands beside it, that name another file, code or repository.
_ELSEWHERE = {
    *("transformers_weights", "configuration_files", "gguf_file", "adapter_kwargs", "custom_generate"),
    *("use_kernels", "kernel_config", "kernel", "kernels", "use_pretrained_backbone", "audio_tokenizer"),
}
# Keys whose value is a word, which is a repository as soon as it holds one of these.
_WORDS = ("attn_implementation", "experts_implementation", "backbone", "architecture")
_MARKS = ("/", "\\", ":")
# Of a `tokenizer_config.json`: names of files that transformers replaces by those of the checkpoint, and others.
_REPLACED = {"tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "added_tokens_file", "spm_file"}
_SENTENCEPIECE = {"enable_sampling", "nbest_size", "alpha"}


def keep_plain_generation(model: PreTrainedModel, where: str) -> None:
    """Leaves of a checkpoint's `generation_config.json` what a recipe may say; the rest is not handed on.

    Published files hold settings of their models' own code, which is not run here.

    Raises:
        UserError: A setting asks transformers for code, or has a value that it cannot have.
    """
    config = getattr(model, "generation_config", None)
    for name, value in list(vars(config).items()) if config is not None else []:
        if name in _WRITTEN or value is None:
            continue
        if name not in GENERATION.names:
            delattr(config, name)
        elif name in GENERATION.never and (value in _NEUTRAL or "code" not in GENERATION.never[name]):
            setattr(config, name, None)
        elif sentence := flaw(GENERATION, name, value):
            raise UserError(f"{where}: its generation_config.json is refused: {sentence}")
    if found := flaw_of_answers(vars(config) if config is not None else {}, limits()):
        raise UserError(f"{where}: its generation_config.json is refused: {found[1]}")


def check_config_names(config: Values, where: str, file: str = CONFIG) -> None:
    """Refuses what a `config.json` says beside sizes: kernels, other files, other repositories.

    Args:
        config: What stands in the file.
        where: Named in the message.
        file: What the file is called.

    Raises:
        UserError: It names the key.
    """
    for name, value in _entries(config):
        word = name.strip("_").removesuffix("_internal")
        if word == "quantization_config" and isinstance(value, Mapping):
            method = value.get("quant_method", "bitsandbytes")
            if method != "bitsandbytes":
                raise UserError(
                    f"{where}: its {file} says that its weights are quantised by {method!r}, for which transformers "
                    f"may fetch code; name the checkpoint that is not quantised. For 4 or 8 bits, a recipe has the key "
                    f"`quantization`."
                )
        named = [value, *(value.values() if isinstance(value, Mapping) else ())]
        other = word in _WORDS and any(isinstance(each, str) and any(m in each for m in _MARKS) for each in named)
        if other or (word in _ELSEWHERE and value not in UNSAID):
            raise UserError(
                f"{where}: its {file} says {name}: {value!r}, which makes transformers fetch or read something else; "
                f"remove it there."
            )


def refuse_adapter(pretrained: str, revision: str | None, key: str) -> None:
    """Refuses a checkpoint with an adapter beside its weights: transformers would put it in, or follow it elsewhere.

    Raises:
        UserError: There is an `adapter_config.json`.
    """
    if fetch_file(pretrained, ADAPTER_CONFIG, revision, key, required=False) is not None:
        raise UserError(
            f"{key}: {pretrained!r} has an {ADAPTER_CONFIG} beside its weights, which would change them without a "
            f"word; merge the adapter first, or name a checkpoint without one."
        )


def check_tokenizer(pretrained: str, revision: str | None, key: str, subfolder: str = "") -> None:
    """Looks at a tokenizer's files before transformers reads them.

    Args:
        pretrained: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        key: The recipe's key, or what else messages begin with.
        subfolder: Where the files are in it.

    Raises:
        UserError: They name other files, or make long texts of short ones.
    """
    files = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", WHOLE)
    said = {file: _read(pretrained, f"{subfolder}/{file}".lstrip("/"), revision, key) for file in files}
    where, whole = f"{key}: {pretrained!r}", said.pop(WHOLE)
    for name, value in said["tokenizer_config.json"].items():
        elsewhere = name.endswith(("_file", "_files", "_path", "_dir", "_object")) and name not in _REPLACED
        elsewhere |= name in ("vocab", "merges", "mecab_kwargs", "sudachi_kwargs", "jumanpp_kwargs", *_ELSEWHERE)
        elsewhere |= name == "sp_model_kwargs" and (
            not isinstance(value, Mapping) or bool(value.keys() - _SENTENCEPIECE)
        )
        if elsewhere and value not in UNSAID:
            raise UserError(f"{where}: its tokenizer_config.json says {name}: {short(str(value))}; it is refused.")
    for file, stated in said.items():
        _check_words((text for name, text in _texts(stated) if name != "chat_template"), where, file)
    check_growth(whole, where)
    for name in () if whole else VOCABULARIES:
        _check_vocabulary(pretrained, f"{subfolder}/{name}".lstrip("/"), revision, key)


def _check_vocabulary(pretrained: str, name: str, revision: str | None, key: str) -> None:
    """Looks at the file of a vocabulary before a library makes a tokenizer of it: some end the process at long words.

    Raises:
        UserError: It is too large, has too many or too long tokens, or a table of replacements that is damaged.
    """
    if Path(pretrained).is_file():
        return
    path, where = fetch_file(pretrained, name, revision, key, required=False), f"{key}: {pretrained!r}"
    if path is None or not Path(path).is_file():
        return
    if name.endswith(".json"):
        _check_words(read_json(Path(path), "checkpoint"), where, name)
        return
    check_length(path, most_bytes(name))
    data = read_bytes(path)
    if name.endswith(".txt") or (proto := read_pieces(data)) is None:
        _check_words(data.split(b"\n"), where, name)
        return
    _check_words((piece.piece for piece in proto.pieces), where, name)
    charsmap = proto.normalizer_spec.precompiled_charsmap
    check_growth({"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap}}, where, name)


def _check_words(words: Iterable[str | bytes], where: str, file: str) -> None:
    """Refuses too many or too long tokens, and long ones in such numbers that looking for merges takes hours."""
    most, count, longest, squares = limits(), 0, 0, 0
    for word in words:
        count, longest, squares = count + 1, max(longest, len(word)), squares + len(word) ** 2
    if longest > most.token_characters:
        raise UserError(
            f"{where}: its {file} has a token of {longest:,} characters; more than {most.token_characters:,} "
            f"(`limits.token_characters`) are refused."
        )
    if count > most.vocabulary:
        raise UserError(
            f"{where}: its {file} has {count:,} entries; more than {most.vocabulary:,} (`limits.vocabulary`) are "
            f"refused."
        )
    if squares > READERS.token_squares:
        raise UserError(f"{where}: its {file} has too many long tokens; no published one has such.")


def check_processor(pretrained: str, revision: str | None, key: str) -> None:
    """The same for the files of an image processor.

    Raises:
        UserError: They name other files or code, or make more of an image than any model takes.
    """
    for file in ("preprocessor_config.json", PROCESSOR_CONFIG):
        settings = _read(pretrained, file, revision, key)
        check_config_names(settings, f"{key}: {pretrained!r}", file)
        check_picture(settings, f"{key}: {pretrained!r}", file)


def check_growth(tokenizer: Values, where: str, file: str = WHOLE) -> None:
    """Refuses a `tokenizer.json` that makes very long texts of short ones, or has endless tokens.

    Args:
        tokenizer: What stands in the file.
        where: Named in the message.
        file: Its name.

    Raises:
        UserError: It does.
    """
    most = limits()
    if not all(map(is_sound, _charsmaps(tokenizer.get("normalizer")))):
        raise UserError(f"{where}: the table of replacements in its {file} is damaged; fetch it again.")
    for part in ("normalizer", "decoder"):  # published ones make 18 characters of one at most (NFKD of one Arabic sign)
        if (growth := _growth(tokenizer.get(part))) > most.tokenizer_growth:
            raise UserError(
                f"{where}: the {part} of its {file} makes up to {growth:,.0f} characters of one; more than "
                f"{most.tokenizer_growth:,} (`limits.tokenizer_growth`) are refused."
            )
    if (more := _added(tokenizer.get("post_processor"))) > most.tokens_around:
        raise UserError(
            f"{where}: its {file} puts {more:,} tokens around each text; more than {most.tokens_around:,} "
            f"(`limits.tokens_around`) are refused."
        )
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    entries = vocabulary if isinstance(vocabulary, Mapping | list) else ()
    added = tokenizer.get("added_tokens")
    tokens = [entry[0] if isinstance(entry, list) and entry else entry for entry in entries]
    tokens += [each.get("content") for each in added if isinstance(each, Mapping)] if isinstance(added, list) else []
    _check_words((token for token in tokens if isinstance(token, str)), where, file)


def _growth(step: object) -> float:
    """How many characters one character may become in a step of a `tokenizer.json`, and in those within it."""
    if not isinstance(step, Mapping):
        return 1
    within = [entry for value in step.values() if isinstance(value, list) for entry in value]
    inner = math.prod(map(_growth, within))
    texts = [value for name, value in step.items() if name in ("content", "prepend", "replacement", "prefix", "suffix")]
    longest = max((len(text) for text in texts if isinstance(text, str)), default=0)
    if step.get("type") == "Replace":
        pattern = step.get("pattern")
        given = pattern.get("String") if isinstance(pattern, Mapping) else pattern
        # A regular expression may match nothing, between any two characters.
        grown = longest / len(given) if isinstance(given, str) and given else longest + 1
    elif step.get("type") == "Precompiled":
        grown = longest_of(step.get("precompiled_charsmap"))
    else:
        grown = longest
    return max(grown, 1) * inner


def _added(step: object) -> int:
    """Tokens that the last step of a `tokenizer.json` puts around a text, and those within it."""
    if not isinstance(step, Mapping):
        return 0
    tokens = step.get("special_tokens")
    ids = (
        [each.get("ids") for each in tokens.values() if isinstance(each, Mapping)]
        if isinstance(tokens, Mapping)
        else []
    )
    longest = max((len(each) for each in ids if isinstance(each, list)), default=0)
    places = max((len(step[name]) for name in ("single", "pair") if isinstance(step.get(name), list)), default=0)
    within = [entry for value in step.values() if isinstance(value, list) for entry in value]
    return longest * places + sum(map(_added, within))


def _charsmaps(step: object) -> Iterator[bytes]:
    """The tables of replacements in a step of a `tokenizer.json`, and in those within it."""
    if isinstance(step, Mapping):
        if step.get("type") == "Precompiled" and (table := table_of(step.get("precompiled_charsmap"))):
            yield table
        for value in step.values():
            for entry in value if isinstance(value, list) else ():
                yield from _charsmaps(entry)


def _texts(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of every text in mappings and lists, and of every key."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield "", str(key)
            yield from _texts(entry, str(key))
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry, name)


def _entries(value: object) -> Iterator[tuple[str, Any]]:
    """(key, value) of every entry of mappings, at any depth."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield str(name), entry
            yield from _entries(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _entries(entry)


def _read(pretrained: str, name: str, revision: str | None, key: str) -> Json:
    """A mapping in a JSON file of a checkpoint; empty where it has no such file."""
    if Path(pretrained).is_file():  # a bare file of weights
        return {}
    path = fetch_file(pretrained, name, revision, key, required=False)
    return {} if path is None or not Path(path).is_file() else read_json(Path(path), "checkpoint")
