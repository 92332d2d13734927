"""The typed hand-over: a stage starts from an earlier one only when everything frozen is the same.

What becomes of an earlier stage's LoRA is said by `lora_from`. Three steps, each when what it needs is there:
`settle_adapter` completes the recipe from the bundle's, `check_adapter` compares both on a model without weights, and
`hand_over` puts into the model what was trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from ..base.errors import UserError
from ..base.names import ADAPTER_CONFIG, ANSWER_LIST, CONFIG, MANIFEST, Json
from ..base.whole_files import read_text
from ..encoders.answers import read_answer_list
from ..model.freeze import FreezePlan, is_quantised
from ..pieces.fingerprints import compare_pieces
from ..stack.adapters import MERGED, merge_adapter, merge_again, read_config
from ..stack.build_stack import Stack, build_empty_stack
from ..stack.kinds import kind_of
from ..stack.lora import try_adapter
from ..stack.vocabulary import start_words
from .load import load_trained, recipe_of
from .manifest import FURTHER, read_manifest

if TYPE_CHECKING:
    from ..families.kind import Composed
    from ..recipe.schema import Recipe

# What must be as it was for a tower's features to mean the same → the key of the recipe that says it.
READ_FROM_TOWER = {
    "vision_feature_layer": "stack.vision_tower.feature_layer",
    "vision_feature_select": "stack.vision_tower.feature_select",
}
# What lays tiles out, which is new in the first stage that cuts any.
NEWLINE = ("model.projector.layout.newline",)
# What may be another way in a stage that trains an adapter on: it says how it is trained, not what it is.
FREE = ("lora_dropout", "init_lora_weights", "runtime_config", "inference_mode", "base_model_name_or_path", "revision",
        "peft_version", "task_type", "auto_mapping", "loftq_config", "eva_config", "corda_config")  # fmt: skip
# What `_reach` compares instead: the modules that are adapted, however they are named.
REACH = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def settle_adapter(recipe: Recipe, checkpoint: str | Path | None = None, *, planned: bool = False) -> Recipe:
    """The recipe with what it leaves to the bundle of `init_from`: the words of earlier stages, and a continued LoRA.

    Args:
        recipe: A validated recipe.
        checkpoint: Where the run goes on, if it has begun: it says all that the earlier bundle said.
        planned: The earlier stage may not have run yet; then nothing is filled in.

    Raises:
        UserError: There is no bundle; it has LoRA and `lora_from` does not say what becomes of it, or the other way
            round.
    """
    recipe = _settle_answers(recipe, checkpoint)
    if recipe.init_from is None or (planned and not (Path(recipe.init_from) / MANIFEST).is_file()):
        return recipe
    origin, where = Path(checkpoint or recipe.init_from), f"init_from {recipe.init_from!r}"
    manifest = read_manifest(origin)
    if checkpoint is None:
        if manifest["adapter"] and recipe.lora_from is None:
            raise UserError(
                f"{where} has LoRA, and the recipe does not say what becomes of it: add `lora_from: continue` to train "
                f"it on, or `lora_from: merge` to put it into the weights, beside which a new one starts."
            )
        if recipe.lora_from and not manifest["adapter"]:
            raise UserError(
                f"{where} has no LoRA for `lora_from: {recipe.lora_from}`; remove that key: what the bundle has is "
                f"taken over without it."
            )
        others = [path.parent for path in sorted(origin.glob(f"*/{ADAPTER_CONFIG}"))]
        if more := [path.name for path in others if not (path / MANIFEST).exists() and path.name[:7] != MERGED[:7]]:
            raise UserError(f"{where} has several adapters ({', '.join(more)} beside its own); keep one of them.")
    old = _recipe_with_more(origin, manifest)
    if old is None:
        return recipe
    changes: Json = {}
    if recipe.lora_from == "continue":
        changes["lora"] = {**(old.lora or {}), **(recipe.lora or {})}
    merged = recipe.lora_from == "merge" and checkpoint is None
    words = old.words if merged else old.text_piece.added_tokens
    if (spec := recipe.text_piece).added_tokens not in ([], words):
        raise UserError(
            f"{recipe.where(('lora', 'add_tokens'))}: the recipe says added_tokens: {spec.added_tokens} of its "
            f"language model, but {where} added {words or 'none'}; remove the key, `init_from` fills it in."
        )
    return recipe.with_words(words).model_copy(update=changes)


def _settle_answers(recipe: Recipe, checkpoint: str | Path | None) -> Recipe:
    """An encoder's recipe with the answers that the head was trained for from which it starts or goes on.

    Raises:
        UserError: The recipe names others.
    """
    origin = checkpoint or recipe.init_from
    path = Path(origin or "") / ANSWER_LIST
    if recipe.encoder is None or origin is None or not path.is_file():
        return recipe
    named, where = recipe.encoder.answers, recipe.where(("encoder", "answers"))
    if named and read_answer_list(named, where) != read_answer_list(str(path), str(path)):
        raise UserError(f"{where}: {str(origin)!r} was trained for other answers than {named!r}; leave the key out.")
    return recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"answers": str(path)})})


def _recipe_with_more(folder: Path, manifest: Json) -> Recipe | None:
    """The recipe of a bundle that has LoRA, merged adapters or words; of another, nothing of it is needed."""
    return recipe_of(folder, manifest) if manifest["adapter"] or manifest["format"] == FURTHER else None


def check_adapter(recipe: Recipe, composed: Composed, checkpoint: str | Path | None = None) -> None:
    """Checks LoRA on the model without its weights; one that is trained on must be the bundle's.

    Args:
        recipe: What `settle_adapter` gave.
        composed: What `compose` gave for it; left as it is.
        checkpoint: Where the run goes on, if it has begun.

    Raises:
        UserError: PEFT refuses it, it matches nothing, or it is another than that of the bundle.
    """
    if recipe.lora is None:
        return
    model = build_empty_stack(recipe, composed).model
    names = [name for name, _ in model.named_modules()]
    config = try_adapter(recipe, model)
    there = (Path(recipe.init_from or "") / MANIFEST).is_file()
    if recipe.lora_from == "continue" and checkpoint is None and config is not None and there:
        _compare(recipe, config, names)


def _compare(recipe: Recipe, config: LoraConfig, names: list[str]) -> None:
    """Compares the recipe's LoRA with that of `init_from`: what each key says, and which modules are adapted."""
    folder = Path(recipe.init_from or "")
    earlier = read_config(folder)
    ours, theirs = config.to_dict(), earlier.to_dict()
    for key in sorted(set(ours) - {*FREE, *REACH}):
        if _plain(ours[key]) != _plain(theirs.get(key)):
            shown = "add_tokens" if key == "trainable_token_indices" else key
            old, new = theirs.get(key), ours[key]
            if shown != key:
                bundle = recipe_of(folder, read_manifest(folder))
                old, new = ((each.lora or {}).get(shown) for each in (bundle, recipe))
            raise UserError(_contradiction(recipe, shown, old, new))
    if (ours := _reach(config, names)) != (theirs := _reach(earlier, names)):
        said = recipe_of(folder, read_manifest(folder)).lora or {}
        key = next((key for key in REACH if (recipe.lora or {}).get(key) != said.get(key)), REACH[0])
        raise UserError(_contradiction(recipe, key, _last(theirs), _last(ours)))


def _contradiction(recipe: Recipe, key: str, old: object, new: object) -> str:
    return (
        f"{recipe.where(('lora', key))}: `lora_from: continue` trains the LoRA of {recipe.init_from!r} on, which has "
        f"lora.{key}: {old}, but this recipe has {new}; leave lora.{key} out, or start a new LoRA with `lora_from: "
        f"merge`."
    )


def _plain(value: object) -> Any:
    """Sets and lists as JSON has them; nothing is as good as an empty one."""
    return sorted(value, key=str) if isinstance(value, (set, list, tuple)) else value or None


def _reach(config: LoraConfig, names: list[str]) -> frozenset[str]:
    """The modules that an adapter is put on, as PEFT finds them."""
    return frozenset(name for name in names if check_target_module_exists(config, name))


def _last(names: frozenset[str]) -> str:
    return f"[{', '.join(sorted({name.rsplit('.', 1)[-1] for name in names}))}] ({len(names)} modules)"


def hand_over(stack: Stack, folder: str | Path, lora_from: str | None = None, taken_as: str | None = None) -> list[str]:
    """Starts a stage from an earlier one: checks that the frozen pieces are the same, then takes what was trained.

    Args:
        stack: The new stage's stack, before its adapters are put in.
        folder: Bundle of the earlier stage (`init_from`).
        lora_from: What becomes of its LoRA: `merge` puts it into the stack's weights; `continue` leaves it
            for the new adapter, which is not there yet.
        taken_as: What the bundle is called in that of the new stage; default `folder`.

    Returns:
        The parts that were taken over.

    Raises:
        UserError: A piece differs, or the projector has another kind or shape.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    compare_pieces(manifest["pieces"], stack.pieces, f"init_from {str(folder)!r}")
    if manifest["adapter"] and lora_from is None:
        raise UserError(
            f"init_from {str(folder)!r} has a LoRA adapter; say what becomes of it: lora_from='continue' or 'merge'."
        )
    tiles = _compare_features(stack, folder)
    if "language_model" in manifest["held"] and is_quantised(stack.model):
        raise UserError(
            f"init_from {str(folder)!r} holds a trained language model, which cannot be put into a quantised one; "
            f"remove quantization, or export that bundle (--to bundle-merged) and start from what is written."
        )
    name = taken_as or str(folder)
    merge_again(folder, manifest, stack.model)
    load_trained(folder, stack.model, FreezePlan({}), new=() if tiles else NEWLINE)
    if manifest["adapter"] and lora_from == "merge":
        merge_adapter(folder, stack.model, name)
    earlier = _recipe_with_more(folder, manifest)
    known = earlier.words if earlier is not None else []
    start_words(stack.model, [word for word in stack.processor.words if word.text not in known])
    stack.plan.apply(stack.model)
    # The new stage's bundle must hold them too.
    kind_of(stack.pieces).mark_taken(stack.pieces, manifest["held"], name)
    return list(manifest["held"])


def _compare_features(stack: Stack, folder: Path) -> Json | None:
    """The projector must have the same kind and shape, and read the same features; returns the earlier stage's tiles.

    LLaVA-1.6's first stage sees whole images, so a stage may be the first to cut them.
    """
    ours = stack.model.config
    try:
        config = dict(json.loads(read_text(folder / CONFIG)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"init_from {str(folder)!r}: its config.json cannot be read ({error}).") from error
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
    tiles, now = config.get("tiles"), getattr(ours, "tiles", None)
    if tiles is not None and tiles != now:
        raise UserError(
            f"init_from {str(folder)!r} was trained with stack.vision_tower.tiles: {tiles}, but this recipe has {now}; "
            f"use the same."
        )
    return tiles
