"""`vlm-sft apply-delta`: a language model that is published as its difference from another, put together again.

Vicuna v1.1 is a difference in every tensor (FastChat, `fastchat/model/apply_delta.py`). Ziya-LLaMA, which has more
tokens than LLaMA, has whole embeddings and a whole head, and differences elsewhere (Fengshenbang-LM,
`fengshen/utils/apply_delta.py`). One output shard at a time is in memory.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..base.errors import UserError
from ..base.names import CONFIG, TEMPLATE, Json
from ..base.whole_files import remove_unfinished, write_json, written_beside
from ..base.words import reason_of, short
from ..recipe.safety import read_json
from .checkpoints import Checkpoint, fetch_file

REPORT, INDEX = "apply_delta.json", "model.safetensors.index.json"
Kinds = dict[str, tuple[tuple[int, ...], torch.dtype]]
# What a causal language model needs beside its weights; it comes with the delta, whose vocabulary it is.
SMALL_FILES = (
    *(CONFIG, "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", TEMPLATE),
)
# Settings that training does not change. A base that differs in one is another model, also where all shapes agree:
# LLaMA and Llama 2 of 13B parameters differ in rms_norm_eps alone.
SETTINGS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "rope_theta", "hidden_act"),
)
TABLE = re.compile(r"(?:.*\.)?(embed_tokens|lm_head|wte|embed_in|embed_out|word_embeddings)\.weight")
# Old files have it, transformers computes it; it is no weight.
COMPUTED = "rotary_emb.inv_freq"
# Of weights that are added, and of whole numbers, which are taken over.
TYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
SHARD_BYTES = 2 * 10**9


def apply_delta(
    base: str,
    delta: str,
    out: str | Path,
    tables: str | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = lambda message: None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Json:
    """Adds a delta to its base and writes the model as sharded safetensors, with the delta's config and tokenizer.

    Nothing stands under `out` until all of it is written, read back and compared; an interrupted run is started again.

    Args:
        base: Folder or Hub id of the model that the delta was made from.
        delta: Folder or Hub id of the delta.
        out: Folder to write; must be empty or not there.
        tables: How the delta holds embeddings and head: `whole` (Ziya) or `sum` (Vicuna; rows beyond the base's are the
            delta's own). Unset, it is told by comparing the tables.
        shard_bytes: Size of the shards; about one of them is in memory.
        say: Receives a sentence for each shard.
        progress: Told after each tensor how many of how many are made.

    Returns:
        What was done, as it stands in `apply_delta.json`: `tables`, `tensors`, `summed`, `whole`, `rows_added`,
        `left_out`, `shards`, `bytes`, and the fingerprints of both sides.

    Raises:
        UserError: The two do not belong together, something cannot be read or written, or the disk is full.
    """
    out = Path(out).absolute()
    if tables not in (None, "whole", "sum"):
        raise UserError(f"--tables {tables!r} is unknown; use whole (Ziya) or sum (Vicuna).")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{str(out)!r} is there already and not empty; name another folder.")
    _check_settings(base, delta)
    old, new = Checkpoint(base, key="BASE"), Checkpoint(delta, key="DELTA")
    kinds = match(old, new)
    tables = tables or tell_tables(old, new, kinds)
    whole = {n for n, (_, kind) in kinds.items() if not kind.is_floating_point or (tables == "whole" and is_table(n))}
    report = _report(old, new, kinds, tables, whole)
    shards = plan_shards(kinds, new.files, shard_bytes)
    with _written_whole(out) as folder:
        _check_room(folder, report["bytes"])
        _copy_small_files(delta, folder)
        made = 0
        for file, names in shards.items():
            tensors = {}
            for name in names:
                tensors[name] = _combine(name, old, new, name in whole)
                progress(made := made + 1, len(kinds))
            write_shard(folder / file, tensors)
            say(f"{file}: {len(names)} tensors, read back and equal.")
        write_json(folder / REPORT, {**report, "shards": len(shards)})
        places = {name: file for file, names in shards.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": report["bytes"]}, "weight_map": places})
    return {**report, "shards": len(shards)}


def _report(old: Checkpoint, new: Checkpoint, kinds: Kinds, tables: str, whole: set[str]) -> Json:
    """What will be done, as `apply_delta` returns it, without the shards."""
    before = old.shapes(filter(is_table, kinds))
    more = {name: kinds[name][0][0] - shape[0] for name, shape in before.items()}
    return {
        "base": {"pretrained": old.pretrained, "fingerprint": old.fingerprint()},
        "delta": {"pretrained": new.pretrained, "fingerprint": new.fingerprint()},
        "tables": tables,
        "tensors": len(kinds),
        "summed": len(kinds) - len(whole),
        "whole": sorted(whole),
        "rows_added": {name: rows for name, rows in sorted(more.items()) if rows},
        "left_out": len(new.files) - len(kinds),
        "bytes": sum(_bytes(kind) for kind in kinds.values()),
    }


@contextmanager
def _written_whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when all is written, and is removed when something fails."""
    try:
        remove_unfinished(out)  # what a killed run left may be most of a disk
        with written_beside(out) as unfinished:
            unfinished.mkdir()
            yield unfinished
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(out)!r} cannot be written: {reason_of(error)}; nothing was left there.") from error


def is_table(name: str) -> bool:
    """Whether a tensor has one row for each token of the vocabulary."""
    return TABLE.fullmatch(name) is not None


def match(old: Checkpoint, new: Checkpoint) -> Kinds:
    """Pairs the tensors of both sides, each of one with one of the other.

    Returns:
        Name → shape and type in the delta, without what is computed.

    Raises:
        UserError: A tensor is on one side only, or has another shape there.
    """
    sides = [{n for n in side.files if not n.endswith(COMPUTED)} for side in (old, new)]
    advice = "BASE is not the model that the delta was made from, or one of both is not whole."
    for (has, lacks), extra in (((new, old), sides[1] - sides[0]), ((old, new), sides[0] - sides[1])):
        if extra:
            raise UserError(
                f"{lacks.key}: {lacks.pretrained!r} lacks {len(extra)} tensors that {has.key} has, for instance "
                f"{min(extra)!r}; {advice}"
            )
    kinds, shapes = new.kinds(sides[1]), old.shapes(sides[0])
    for name, (shape, kind) in kinds.items():
        if kind not in TYPES:
            raise UserError(
                f"DELTA: tensor {name!r} of {new.pretrained!r} has the type {kind}, which is not added; name the "
                f"checkpoint in bf16, fp16 or fp32."
            )
        before = shapes[name]
        if is_table(name) and len(shape) != 2:
            raise UserError(f"DELTA: tensor {name!r} of {new.pretrained!r} has the shape {shape}, which is no table.")
        rows = is_table(name) and shape[1:] == before[1:]
        if rows and shape[0] >= before[0]:
            continue
        if shape != before:
            swapped = rows
            raise UserError(
                f"BASE: tensor {name!r} of {old.pretrained!r} has the shape {before}, the delta's has {shape}; "
                + ("the delta has fewer tokens than its base: are BASE and DELTA swapped?" if swapped else advice)
            )
    return kinds


def tell_tables(old: Checkpoint, new: Checkpoint, kinds: Kinds) -> str:
    """Tells whether embeddings and head are `whole` in a delta, or differences (`sum`), by their likeness to the base.

    A table that was trained further is like the one it started from; a difference is small and has no such direction.

    Raises:
        UserError: It is neither, or DELTA is no delta: its other tensors, too, are like the base's.
    """
    matrices = sorted(name for name, (shape, _) in kinds.items() if len(shape) == 2 and not is_table(name))
    if matrices and min(likeness(old, new, matrices[0])) > 0.5:
        where = f"DELTA: {new.pretrained!r} holds a whole model and no differences"
        raise UserError(f"{where} (its {matrices[0]!r} is like the base's); use it as it is.")
    found = {name: likeness(old, new, name) for name in sorted(filter(is_table, kinds))}
    if all(cosine > 0.3 for cosine, _ in found.values()) and found:
        return "whole"
    if all(cosine < 0.1 and size < 0.5 for cosine, size in found.values()):
        return "sum"
    name, (cosine, size) = max(found.items(), key=lambda item: item[1][1])
    raise UserError(
        f"DELTA: {name!r} of {new.pretrained!r} is neither like the base's (cosine {cosine:.2f}; Ziya's is) nor small "
        f"({size:.2f} of its size; Vicuna's is): is BASE the model that the delta was made from? If so, say what the "
        f"table is: --tables whole or --tables sum."
    )


def likeness(old: Checkpoint, new: Checkpoint, name: str) -> tuple[float, float]:
    """(cosine of the two sides' tensors over the base's rows, size of the delta's as a share of the base's)."""
    before = old.read([name])[name][:2000].float()
    after = new.read([name])[name][: len(before)].float()
    scale, size = float(before.norm()) or 1.0, float(after.norm())
    return float((before * after).sum()) / (scale * (size or 1.0)), size / scale


def _combine(name: str, old: Checkpoint, new: Checkpoint, whole: bool) -> torch.Tensor:
    """One tensor of the result, in the delta's type.

    The base is rounded to that type first, as it was when the delta was made from it (both projects load it so).
    """
    delta = new.read([name])[name]
    if whole:
        return delta.clone().contiguous()
    base = old.read([name])[name].to(delta.dtype)
    total = delta.clone().contiguous()
    rows = total[: len(base)] if base.dim() else total  # rows beyond those of the base are the delta's own
    rows += base
    if not torch.isfinite(total).all():
        raise UserError(f"The sum of {name!r} is not finite in {delta.dtype}; BASE or DELTA is broken: fetch it again.")
    return total


def plan_shards(kinds: Kinds, files: dict[str, str], shard_bytes: int) -> dict[str, list[str]]:
    """File → names of its tensors, in the order in which the delta's files hold them."""
    shards: list[list[str]] = [[]]
    held = 0
    for name in sorted(kinds, key=lambda name: (files[name], name)):
        size = _bytes(kinds[name])
        if held and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a safetensors file, reads it back and compares all tensors by type, shape and SHA-256; empties `tensors`.

    Raises:
        UserError: What was read is not what was written.
    """
    written = {name: (tensor.dtype, tensor.shape, _digest(tensor)) for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    tensors.clear()  # or the shard would be in memory twice while it is read back
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != set(written):
            raise UserError(f"{path.name} was written, but holds other tensors when read back; check the disk.")
        for name, wanted in written.items():
            tensor = file.get_tensor(name)
            if (tensor.dtype, tensor.shape, _digest(tensor)) != wanted:
                raise UserError(f"{path.name} was written, but {name!r} differs when it is read back; check the disk.")


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()


def _bytes(kind: tuple[tuple[int, ...], torch.dtype]) -> int:
    shape, dtype = kind
    return torch.Size(shape).numel() * dtype.itemsize


def _settings(pretrained: str, key: str) -> Json:
    return read_json(Path(fetch_file(pretrained, CONFIG, None, key)), "checkpoint")


def _check_settings(base: str, delta: str) -> None:
    """A setting that both state must be the same."""
    before, after = _settings(base, "BASE"), _settings(delta, "DELTA")
    for name in SETTINGS:
        if name in before and name in after and before[name] != after[name]:
            raise UserError(
                f"BASE: {base!r} has {name} {short(str(before[name]))} in its config.json, the delta "
                f"{short(str(after[name]))}; it is not "
                f"the model that the delta was made from."
            )


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"The result needs {needed / 1e9:.1f} GB, but {str(folder.parent)!r} has {free / 1e9:.1f} GB free; make "
            f"room or name another folder."
        )


def _copy_small_files(delta: str, folder: Path) -> None:
    for name in SMALL_FILES:
        if (path := fetch_file(delta, name, None, "DELTA", required=False)) is not None:
            shutil.copyfile(path, folder / name)
    if not list(folder.glob("tokenizer*")):
        raise UserError(f"DELTA: {delta!r} has no tokenizer (tokenizer.model or tokenizer.json); fetch it whole.")
