"""Where each part of a stack came from, told apart by fingerprints: what the hand-over and the loader compare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..base.errors import UserError
from ..base.names import Json
from .layouts import Origin
from .load_parts import find_tensors
from .piece import Piece, Spec

COMPARED = ("model", "encoder", "vision_tower", "resampler", "language_model")


def entries_of(pieces: Mapping[str, Piece[Any]], model: nn.Module) -> dict[str, Json]:
    """What a bundle says of each piece: where it came from, and a fingerprint of its tensors there."""
    entries: dict[str, Json] = {}
    for part, piece in pieces.items():
        inside = part in ("vision_tower", "resampler")  # these often lie inside a larger checkpoint
        names = names_of(piece, model.get_submodule(f"model.{part}")) if inside else None
        entry = {
            "pretrained": piece.pretrained,
            "revision": piece.spec.revision,
            "fingerprint": piece.checkpoint.fingerprint(names),
        }
        if (commit := piece.checkpoint.commit) is not None:
            entry["commit"] = commit  # a branch moves on; what was trained on is found again
        if Path(piece.pretrained).exists():  # so that the bundle loads from another working directory
            entry["path"] = str(Path(piece.pretrained).resolve())
        if more := getattr(piece.spec, "more", None):
            entry["more"] = [str(Path(path).resolve()) for path in more]
        entries[part] = entry
    return entries


def names_of(piece: Piece[Spec], module: nn.Module) -> list[str] | None:
    """The tensors of a part in its checkpoint, by the part or by what stands for it; None for all there are."""
    origins = piece.origins or _find(piece, getattr(module, "empty", module))
    return [name for origin in origins.values() for name in origin.names] or None


def _find(piece: Piece[Spec], module: nn.Module) -> dict[str, Origin]:
    """Empty where transformers renamed the tensors while it loaded them: then all of the checkpoint count."""
    try:
        return find_tensors(module.state_dict(), piece.checkpoint, getattr(piece.spec, "type", piece.part))
    except UserError:
        return {}


def compare_pieces(earlier: Json, now: Json, where: str) -> None:
    """Checks that a bundle's frozen pieces are those of a stack.

    Raises:
        UserError: One is missing or differs; the message names the part and both.
    """
    if not earlier:
        raise UserError(f"{where}: the bundle does not say what it was trained on; it was saved without its recipe.")
    for part in COMPARED:
        old, new = earlier.get(part), now.get(part)
        if (old is None) != (new is None):
            has, lacks = ("the bundle", "this stack") if old else ("this stack", "the bundle")
            raise UserError(f"{where}: {has} has a {part} but {lacks} has none; use the same stack.")
        if old and new and old["fingerprint"] != new["fingerprint"]:
            raise UserError(
                f"{where}: the bundle was trained on the {part} of {old['pretrained']!r} (fingerprint "
                f"{old['fingerprint']}), but {new['pretrained']!r} gives {new['fingerprint']}; use the same base."
            )
