"""`bundle.json`: what a bundle says of itself, and which parts it must hold."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.errors import UserError, without_tokens
from ..base.names import MANIFEST, Json
from ..base.whole_files import write_json
from ..recipe.safety import check_folder, check_pieces, is_words, read_json
from .run_folder import find_manifest

if TYPE_CHECKING:
    from ..model.freeze import FreezePlan
    from ..recipe.schema import Recipe

FORMAT = 1
# What a bundle is that stands on merged adapters or has new words: a version that knows neither must not load it.
FURTHER = 2
LIBRARIES = ("vlm_sft", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers")


@dataclass
class Provenance:
    """Where a bundle comes from.

    Args:
        recipe: The resolved recipe.
        pieces: Part → id, revision and fingerprint, as `Stack.pieces`.
        notes: Anything else worth keeping (rows used and rejected, for instance).
        earlier: What `stages_so_far` says of the bundle that this stage started from; None to look when it is saved.
    """

    recipe: Recipe
    pieces: dict[str, Json]
    notes: Json = field(default_factory=dict)
    earlier: list[Json] | None = None


def make_manifest(plan: FreezePlan, provenance: Provenance | None, adapter: bool, merged: Sequence[str] = ()) -> Json:
    """What `bundle.json` says.

    Args:
        plan: Says which parts are trained.
        provenance: The recipe and its pieces; without it the bundle cannot name its base.
        adapter: Whether the bundle has one.
        merged: The bundles whose adapters were merged into its base, in their order.
    """
    pieces = provenance.pieces if provenance else {}
    words = provenance.recipe.words if provenance else []
    return {
        "format": FURTHER if merged or words else FORMAT,
        "pieces": pieces,
        "trained": sorted(plan.train),
        "held": sorted(held_parts(plan, pieces)),
        "adapter": adapter,
        **({"merged": list(merged)} if merged else {}),
        "stages": stages_of(plan, provenance, adapter) if provenance else [],
        "versions": {name: _version(name) for name in LIBRARIES},
        **(provenance.notes if provenance else {}),
    }


def stages_of(plan: FreezePlan, provenance: Provenance, adapter: bool) -> list[Json]:
    """What each stage up to this one trained, and on which sources; the earlier ones as their bundles say."""
    recipe = provenance.recipe
    told = provenance.earlier
    if told is None:
        told = stages_so_far(recipe.init_from) if (Path(recipe.init_from or "") / MANIFEST).is_file() else []
    this = {
        "recipe": recipe.path.stem if recipe.path else None,
        "trained": sorted(plan.train),
        "adapter": adapter,
        **({"lora_from": recipe.lora_from} if recipe.lora_from else {}),
        "data": [source.name for source in recipe.data.train],
    }
    return [*told, this]


def stages_so_far(folder: str | Path | None) -> list[Json]:
    """What a bundle says of the stages up to its own."""
    return list(read_manifest(folder or "").get("stages", []))


def held_parts(plan: FreezePlan, pieces: Mapping[str, Json]) -> set[str]:
    """The parts that a bundle must hold, because no base piece is like them.

    They are the trained ones, those that `init_from` brought from an earlier stage, and a stack's projector.
    """
    from ..stack.kinds import kind_of  # imported here, because reading a manifest, to push a bundle, takes no torch

    return {*plan.train, *kind_of(pieces).held(pieces)}


def update_manifest(folder: str | Path, entries: Json) -> None:
    """Adds to `bundle.json`, without the secrets that rows hold which are quoted."""
    write_json(Path(folder) / MANIFEST, {**read_manifest(folder), **without_secrets(entries)})


def read_manifest(folder: str | Path) -> Json:
    """Reads `bundle.json`.

    Raises:
        UserError: The folder is no bundle, or a bundle of a later format.
    """
    path = find_manifest(folder)
    check_folder(Path(folder))
    manifest = read_json(path)
    if manifest.get("format") not in (FORMAT, FURTHER):
        raise UserError(
            f"{str(path)!r} has the format {manifest.get('format')}, this version reads {FORMAT} and {FURTHER}; "
            f"upgrade vlm_sft."
        )
    check_pieces(manifest.get("pieces"), str(path))
    for name in ("trained", "held", "merged"):
        if not is_words(manifest.get(name, [])):
            raise UserError(f"{str(path)!r}: `{name}` is no list of words; the bundle is not whole.")
    if not isinstance(manifest.get("adapter", False), bool) or not isinstance(manifest.get("stages", []), list):
        raise UserError(f"{str(path)!r}: `adapter` or `stages` is not what a bundle has; it is not whole.")
    return {"trained": [], "held": [], "adapter": False, **manifest}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def without_secrets(value: object) -> Any:
    """A value as JSON has them, its texts without tokens, passwords and keys: what the ledger says quotes rows."""
    if isinstance(value, dict):
        return {name: without_secrets(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [without_secrets(entry) for entry in value]
    return without_tokens(value) if isinstance(value, str) else value
