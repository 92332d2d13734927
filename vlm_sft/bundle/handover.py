"""The typed hand-over: a stage starts from an earlier one only when everything frozen is the same."""

from __future__ import annotations

import json
from pathlib import Path

from ..base.errors import UserError
from ..base.names import CONFIG
from ..base.whole_files import read_text
from ..model.freeze import FreezePlan, is_quantised
from ..pieces.fingerprints import compare_pieces
from ..stack.build_stack import Stack
from ..stack.kinds import kind_of
from .load import load_trained
from .manifest import read_manifest

# What must be as it was for a tower's features to mean the same → the key of the recipe that says it.
READ_FROM_TOWER = {
    "vision_feature_layer": "stack.vision_tower.feature_layer",
    "vision_feature_select": "stack.vision_tower.feature_select",
}


def hand_over(stack: Stack, folder: str | Path) -> list[str]:
    """Starts a stage from an earlier one: checks that the frozen pieces are the same, then takes what was trained.

    Args:
        stack: The new stage's stack, before its adapters are put in.
        folder: Bundle of the earlier stage (`init_from`).

    Returns:
        The parts that were taken over.

    Raises:
        UserError: A piece differs, or the projector has another kind or shape.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    compare_pieces(manifest["pieces"], stack.pieces, f"init_from {str(folder)!r}")
    if manifest["adapter"]:
        raise UserError(
            f"init_from {str(folder)!r} has a LoRA adapter, which a new stage cannot train on top of; merge it with "
            f"`vlm-sft export --to bundle-merged` first, or go on with sft.resume_from_checkpoint."
        )
    config, ours = _read_config(folder), stack.model.config
    kind = (getattr(ours, "projector_type", None), getattr(ours, "projector_options", None))
    if (config.get("projector_type"), config.get("projector_options")) != kind:
        raise UserError(
            f"init_from {str(folder)!r} has a {config.get('projector_type')} projector "
            f"{config.get('projector_options')}, but this recipe asks for {ours.projector_type} "
            f"{ours.projector_options}; use the same projector."
        )
    for name, key in READ_FROM_TOWER.items():
        if (old := config.get(name)) != (new := getattr(ours, name, None)):
            raise UserError(
                f"init_from {str(folder)!r} was trained with {key}: {old}, but this recipe has {new}; use the same."
            )
    if "language_model" in manifest["held"] and is_quantised(stack.model):
        raise UserError(
            f"init_from {str(folder)!r} holds a trained language model, which cannot be put into a quantised one; "
            f"remove quantization, or export that bundle (--to bundle-merged) and start from what is written."
        )
    load_trained(folder, stack.model, FreezePlan({}))
    kind_of(stack.pieces).mark_taken(
        stack.pieces, manifest["held"], str(folder)
    )  # the new stage's bundle must hold them too
    return list(manifest["held"])


def _read_config(folder: Path) -> dict:
    try:
        return dict(json.loads(read_text(folder / CONFIG)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"init_from {str(folder)!r}: its config.json cannot be read ({error}).") from error
