"""Where each part of a stack came from, told apart by fingerprints: what the hand-over and the loader compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.errors import UserError
from ..base.names import PARTS
from .load_parts import find_tensors
from .part_configs import open_checkpoint

if TYPE_CHECKING:
    from ..recipe.schema import Recipe

COMPARED = ("model", "vision_tower", "resampler", "language_model")


def pieces_of(recipe: Recipe, model: Any) -> dict[str, dict[str, Any]]:
    """Where each part came from, with a fingerprint of its tensors there (the hand-over and the loader compare it)."""
    specs = {part: getattr(recipe.stack, part, None) for part in PARTS if part != "projector"}
    pieces = {}
    for part, spec in {**specs, "model": recipe.model}.items():
        if spec is None:
            continue
        checkpoint = open_checkpoint(spec, part)
        names = None
        if part in ("vision_tower", "resampler"):
            wanted = getattr(model.model, part).state_dict()
            kind = getattr(spec, "type", part)
            try:
                names = [n for origin in find_tensors(wanted, checkpoint, kind).values() for n in origin.names]
            except UserError:  # transformers renamed the tensors while loading: then all of them count
                names = None
        pieces[part] = {
            "pretrained": spec.pretrained,
            "revision": spec.revision,
            "fingerprint": checkpoint.fingerprint(names),
        }
        if (commit := checkpoint.commit) is not None:
            pieces[part]["commit"] = commit  # a branch moves on; what was trained on is found again
        if Path(spec.pretrained).exists():  # so that the bundle loads from another working directory
            pieces[part]["path"] = str(Path(spec.pretrained).resolve())
        if more := getattr(spec, "more", None):
            pieces[part]["more"] = [str(Path(path).resolve()) for path in more]
    return pieces


def compare_pieces(earlier: dict[str, Any], now: dict[str, Any], where: str) -> None:
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
