"""What of a recipe's mappings is handed to the libraries that receive them: judged names with plain values.

No torch here: a recipe is read without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ..base.errors import UserError
from ..base.limits import Limits
from ..base.words import closest
from .library_names import DEFAULTS, HERE, PASSED_ON, UNSAID, PassedOn
from .yaml_file import KeyPath

if TYPE_CHECKING:
    from .schema import Recipe


def names_that_pass(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """A rule of a recipe: every name in its pass-through mappings stands on a list, and its value is plain."""
    for section, given in _mappings_of(recipe).items():
        passed_on, path = PASSED_ON[section], tuple(section.split("."))
        for name, value in given.items():
            if sentence := flaw(passed_on, name, value, f"{section}."):
                yield (*path, name), sentence


def flaw(passed_on: PassedOn, name: str, value: Any, prefix: str = "") -> str | None:
    """Why a name and its value are not handed to a library; None where they are.

    Args:
        passed_on: The library's lists.
        name: The name.
        value: Its value.
        prefix: What messages put before the name (`lora.`).
    """
    if name in passed_on.ours:
        return None
    if name not in passed_on.names:
        hint = closest(name, passed_on.names - set(passed_on.never) | passed_on.ours)
        advice = f'did you mean "{hint}"?' if hint else f"{passed_on.library} has nothing like it."
        return f'unknown key "{prefix}{name}"; {advice}'
    if name in passed_on.never:
        said = value not in UNSAID and value != DEFAULTS.get(name)
        return f"`{prefix}{name}` cannot be used: {passed_on.never[name]}; remove it." if said else None
    if name in passed_on.own:
        return None
    if isinstance(value, Mapping):
        return _flaw_of_mapping(passed_on, name, value, prefix)
    return None if is_plain(value) else f"`{prefix}{name}` takes numbers and words, not {value!r}."


def _flaw_of_mapping(passed_on: PassedOn, name: str, value: Mapping[str, Any], prefix: str) -> str | None:
    if name not in passed_on.mappings:
        return f"`{prefix}{name}` takes no mapping; write a number or a word."
    keys = passed_on.mappings[name]
    for key, entry in value.items():
        if keys is not None and key not in keys:
            return f'unknown key "{prefix}{name}.{key}"; it has {", ".join(sorted(keys))}.'
        if isinstance(entry, Mapping) or not is_plain(entry):
            return f"`{prefix}{name}.{key}` takes numbers and words, not {entry!r}."
    return None


# Texts that end an answer: transformers makes a table of each letter of each, for every token.
MOST_STOPS, LONGEST_STOP = 64, 200


def flaw_of_answers(settings: Mapping[str, Any], most_of: Limits) -> tuple[str, str] | None:
    """What is wrong with settings for generating that take memory: (name, sentence); None where nothing is.

    Args:
        settings: Of a recipe's `generation`, or of a model.
        most_of: What they may ask for.
    """
    for name, limit in (("num_beams", "beams"), ("max_cache_len", "cache_tokens")):
        value, most = settings.get(name), getattr(most_of, limit)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            return name, f"`{name}` must be a whole number from 1, not {value!r}."
        if value is not None and value > most:
            return name, f"`{name}` is {value:,}, but `limits.{limit}` is {most:,}; lower it, or raise the limit."
    stops = settings.get("stop_strings") or ()
    stops = [stops] if isinstance(stops, str) else list(stops)
    if len(stops) > MOST_STOPS or any(not isinstance(stop, str) or len(stop) > LONGEST_STOP for stop in stops):
        return "stop_strings", f"`stop_strings` has at most {MOST_STOPS} texts of at most {LONGEST_STOP} characters."
    return None


def is_plain(value: object) -> bool:
    """Whether a value is a number, a switch, a word, or lists of them."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def refuse_strange(recipe: Recipe, *sections: str) -> None:
    """Refuses names that say where files, servers or code are, in a recipe that is a stranger's (`Recipe.strange`).

    What its user typed as an override is the user's own word.

    Args:
        recipe: The recipe.
        sections: Keys of `PASSED_ON`: what is about to be handed to its library.

    Raises:
        UserError: It names the key.
    """
    if not recipe.strange:
        return
    for section in sections:
        path = tuple(section.split("."))
        for name, value in _mappings_of(recipe).get(section, {}).items():
            what = PASSED_ON[section].own.get(name)
            if name == "report_to" and {*(value if isinstance(value, list) else [value])} <= HERE:
                what = None
            if name == "output_dir" and (PurePath(value).is_absolute() or ".." in PurePath(value).parts):
                what = "a folder elsewhere"
            if what and value not in UNSAID and not recipe.is_typed((*path, name)):
                raise UserError(
                    f"{recipe.where((*path, name))}: `{section}.{name}` names {what} ({value!r}), and this recipe lies "
                    f"in a bundle, which may be a stranger's; remove it, or type {section}.{name}=… yourself."
                )


def _mappings_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Section → what it hands on, of those that a recipe has."""
    found = {name: getattr(recipe, name) or {} for name in ("sft", "lora", "quantization", "generation")}
    return found | {"model.processor": recipe.model.processor if recipe.model else {}}
