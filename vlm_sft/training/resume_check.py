"""Whether a run that goes on is the one that was begun: its recipe beside that of the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.errors import UserError
from ..base.names import RECIPE
from ..recipe.libraries import settle_precision
from ..recipe.yaml_file import KeyPath, YamlFile

if TYPE_CHECKING:
    from ..recipe.schema import Recipe

NOT_SET = "not set"
# What the weights or the optimizer's state in a checkpoint were made with. The optimizer brings its rates along, so a
# new one would stand in the table and not be used.
FIXED = re.compile(
    r"(stack|model|encoder|chat_template|system|train|lora|lora_from|quantization)\b"
    r"|sft\.(learning_rate|optim|optim_args|weight_decay|adam_beta1|adam_beta2|adam_epsilon)$"
)
# Where pieces lie (fingerprints are compared), and what a run that has begun no longer reads.
ELSEWHERE = re.compile(
    r"(stack\.\w+|model|encoder)\.(pretrained|revision|more|config|tokenizer|answers|trust_remote_code|init|dtype|attn_implementation)\b"
)
# What a run tells, saves and evaluates on the way.
BESIDE = re.compile(
    r"(init_from|hub|generation|watch)\b|cache(\.path|\.max_gb)?$|data\.(eval|test|max_rejected|measure_rows|decode_rows|url_cache)\b"
    r"|sft\.(output_dir|run_name|report_to|resume_from_checkpoint|use_cpu)$"
    r"|sft\.(log|logging|save|eval|dataloader|ddp|per_device_eval)_"
)
# Sections without defaults in a saved recipe: a key that is only in the new one was added. Elsewhere it is new to us.
AS_GIVEN = ("sft", "lora", "quantization", "train", "collator_args")


def check_resumption(recipe: Recipe, checkpoint: str | Path, say: Callable[[str], None]) -> None:
    """Compares the recipe with that of the checkpoint from which the run goes on.

    Args:
        recipe: What the user gives now.
        checkpoint: Where the run goes on.
        say: Told of differences that change what the rest of the run does.

    Raises:
        UserError: Another model, template, freeze plan or optimizer; a run cannot change those on its way.
    """
    path = Path(checkpoint) / RECIPE
    if not path.is_file():
        return
    told = []
    for key, old, new in _differences(YamlFile.read(path).data, settle_precision(recipe).resolved()):
        dotted = ".".join(map(str, key))
        if ELSEWHERE.match(dotted) or BESIDE.match(dotted):
            continue
        if FIXED.match(dotted):
            raise UserError(
                f"{recipe.where(key)}: the run of {str(checkpoint)!r} was begun with {dotted}: {_shown(old)}, which "
                f"cannot become {_shown(new)} on the way; use the recipe of that run, or start anew in another "
                f"sft.output_dir."
            )
        plain = not isinstance(old, list | dict) and not isinstance(new, list | dict)
        told.append(f"{dotted} ({_shown(old)} → {_shown(new)})" if plain else dotted)
    if told:
        say(f"The recipe has changed since the run began: {', '.join(told)}. From here on the new one counts.")


def _differences(old: object, new: object, key: KeyPath = ()) -> Iterator[tuple[KeyPath, Any, Any]]:
    """The keys whose values differ, as deep as both sides are mappings."""
    if isinstance(old, dict) and isinstance(new, dict):
        if key == ("stack", "projector"):  # older recipes state the defaults of every kind of projector
            old = {name: value for name, value in old.items() if name in new}
        for name in [*old, *(name for name in new if name not in old and key and key[0] in AS_GIVEN)]:
            yield from _differences(old.get(name, NOT_SET), new.get(name, NOT_SET), (*key, name))
    elif key == ("chat_template",):
        if Path(str(old)).stem != Path(str(new)).stem:  # a template may be named or lie elsewhere
            yield key, old, new
    elif key[:1] == ("data",) and isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        # Of sources too a key that only the new recipe states is new to us.
        if any(found for pair in zip(old, new, strict=True) for found in _differences(*pair, (*key, 0))):
            yield key, old, new
    elif old != new:
        yield key, old, new


def _shown(value: object) -> str:
    if value is None or value == NOT_SET:
        return NOT_SET
    return repr(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
