"""What of a recipe's mappings is handed to the libraries that receive them: judged names with plain values.

No torch here: a recipe is read without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..base.errors import UserError
from ..base.limits import Limits, limits
from ..base.names import Json, Values
from ..base.words import closest, short
from .library_names import DEFAULTS, GENERATION, HERE, PASSED_ON, UNSAID, PassedOn, Takes
from .yaml_file import KeyPath

if TYPE_CHECKING:
    from .schema import Recipe

AnswerMetric = Literal[
    "exact_match",
    "contains",
    "gqa",
    "vqa",
    "vqa_evalai",
    "anls",
    "relaxed",
    "captions",
    "captions_characters",
    "chinese",
]
"""What answers to rows of one's own can be measured by."""

LOSSES = ("loss", "token_accuracy", "image_use", "loss_own_image", "loss_other_image")
"""What every evaluation measures by itself."""

TEXT_LOSS = "text_loss"
"""What is measured of texts without pictures, with `evaluation.forgetting`."""

_BLEU = ("ROUGE-L", "BLEU-4", "BLEU-3", "BLEU-2", "BLEU-1")
MORE_SCORES = {
    "captions": _BLEU, "captions_characters": _BLEU, "chinese": ("BLEU-4",),
    "vqa": ("VQA_accuracy_EvalAI",), "vqa_evalai": ("VQA_accuracy",),
}  # fmt: skip
"""Metric of answers → the scores that it has beside the one of its own name."""


def names_that_pass(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """A rule of a recipe: every name in its pass-through mappings stands on a list, and its value is plain."""
    for section, given in _mappings_of(recipe).items():
        passed_on, path = PASSED_ON[section], tuple(section.split("."))
        for name, value in given.items():
            if sentence := flaw(passed_on, name, value, f"{section}."):
                yield (*path, name), sentence


def best_is_measured(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """A rule of a recipe: what its best checkpoint is chosen by is measured, and what is asked has rows."""
    asked, sft, rows = recipe.evaluation, recipe.sft, bool(recipe.data.eval)
    given, path = sft.get("metric_for_best_model"), ("sft", "metric_for_best_model")
    if asked.patience is not None and given is None:
        yield path, "`evaluation.patience` needs `sft.metric_for_best_model`: what is to become better."
    if asked.patience is not None and not _evaluates(recipe):
        yield ("evaluation", "patience"), "`evaluation.patience` needs evaluations while training: `sft.eval_strategy`."
    for key in ("metrics", "samples"):
        if getattr(asked, key) and not rows and not (key == "samples" and asked.samples_from):
            yield ("evaluation", key), f"`evaluation.{key}` asks rows of `data.eval`, which has no source; add one."
    there = _measured(recipe)
    by_default = sft.get("load_best_model_at_end") or sft.get("save_strategy") == "best"
    if given is None and by_default and not rows:
        yield (
            path,
            f"the best checkpoint is chosen by `loss`, but `data.eval` has no source; choose by {_among(there)}.",
        )
    if not isinstance(given, str):
        return
    name, benchmarks = given.removeprefix("eval_"), _benchmarks(recipe)
    if name in there or any(name.startswith(f"{each}_") for each in benchmarks):
        return  # which scores a benchmark has, its files say
    advice = f'did you mean "{hint}"? It' if (hint := closest(name, there)) else "it"
    yield path, f"no evaluation of this recipe measures {given!r}; {advice} can be {_among(there)}."


def _benchmarks(recipe: Recipe) -> list[str]:
    return [PurePath(each).stem for each in recipe.evaluation.benchmarks or ()]


def _measured(recipe: Recipe) -> list[str]:
    """What the evaluations of a run measure, of benchmarks without the names of their scores."""
    rows = [*LOSSES, *answer_scores()] if recipe.data.eval else []
    texts = [TEXT_LOSS] if recipe.evaluation.forgetting else []
    return [*rows[: len(LOSSES)], *texts, *rows[len(LOSSES) :], *(f"{each}_<score>" for each in _benchmarks(recipe))]


def _among(names: list[str]) -> str:
    return (
        f"one of these: {', '.join(names)}" if names else "nothing: add rows to `data.eval`, or `evaluation.benchmarks`"
    )


def _evaluates(recipe: Recipe) -> bool:
    """Whether a run is evaluated before its end: by its own strategy or, with benchmarks, at its saves."""
    strategies = [recipe.sft.get("eval_strategy", "no")]
    strategies += [recipe.sft.get("save_strategy", "steps")] if recipe.evaluation.benchmarks else []
    return any(each not in ("no", None) for each in strategies)


def answer_scores() -> dict[str, str]:
    """Name of a score of such answers → the metric that gives it; its first score has the metric's own name."""
    more = {f"{metric}_{score}": metric for metric, scores in MORE_SCORES.items() for score in scores}
    return {**{metric: metric for metric in get_args(AnswerMetric)}, **more}


def flaw(passed_on: PassedOn, name: str, value: object, prefix: str = "") -> str | None:
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
    if not is_plain(value):
        return f"`{prefix}{name}` takes numbers and words, not {value!r}."
    return _flaw_of_type(passed_on, name, value, prefix)


def _flaw_of_mapping(passed_on: PassedOn, name: str, value: Values, prefix: str) -> str | None:
    if name not in passed_on.mappings:
        return f"`{prefix}{name}` takes no mapping; write a number or a word."
    keys = passed_on.mappings[name]
    for key, entry in value.items():
        if keys is not None and key not in keys:
            return f'unknown key "{prefix}{name}.{key}"; it has {", ".join(sorted(keys))}.'
        if isinstance(entry, Mapping) or not is_plain(entry):
            return f"`{prefix}{name}.{key}` takes numbers and words, not {entry!r}."
        if sentence := _flaw_of_type(passed_on, f"{name}.{key}", entry, prefix):
            return sentence
    return None


def _flaw_of_type(passed_on: PassedOn, name: str, value: object, prefix: str) -> str | None:
    if value is None or (takes := passed_on.types.get(name)) is None:
        return None
    try:
        _adapter(takes).validate_python(value)
    except ValidationError:
        return f"`{prefix}{name}` must be {takes.words}, not {short(repr(value))}."
    return None


@cache
def _adapter(takes: Takes) -> TypeAdapter[Any]:
    return TypeAdapter(takes.type, config=ConfigDict(strict=True))


# Settings that say how many tokens there may be; the first three are what is taken for every beam at once.
_TOKENS = (
    *("max_new_tokens", "max_length", "max_cache_len", "min_length", "min_new_tokens", "prefill_chunk_size"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
)


def flaw_of_answers(settings: Values, most_of: Limits) -> tuple[str, str] | None:
    """What is wrong with settings for generating that take memory: (name, sentence); None where nothing is.

    Args:
        settings: Of a recipe's `generation`, or of a model.
        most_of: What they may ask for.
    """
    for name, value in settings.items():
        if name in GENERATION.types and (sentence := _flaw_of_type(GENERATION, name, value, "")):
            return name, sentence
    for name in ("num_beams", *_TOKENS):
        limit = "beams" if name == "num_beams" else "cache_tokens"
        if (value := settings.get(name) or 0) > (most := getattr(most_of, limit)):
            return name, f"`{name}` is {value:,}, but `limits.{limit}` is {most:,}; lower it, or raise the limit."
    beams = settings.get("num_beams") or 1
    for name in _TOKENS[:3]:
        if beams > 1 and beams * (value := settings.get(name) or 0) > most_of.cache_tokens:
            asked = f"`num_beams` and `{name}` ask for {beams:,} x {value:,} tokens at a time"
            return name, f"{asked}, but `limits.cache_tokens` is {most_of.cache_tokens:,}; lower one."
    stops = settings.get("stop_strings") or ()
    stops = [stops] if isinstance(stops, str) else stops
    if len(stops) > most_of.stop_texts or max(map(len, stops), default=0) > most_of.stop_characters:
        most = f"{most_of.stop_texts:,} texts of {most_of.stop_characters:,} characters"
        mend = "leave some out, or raise `limits.stop_texts` or `limits.stop_characters`"
        return "stop_strings", f"`stop_strings` has more than {most}; {mend}."
    return None


def answers_are_bounded(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """A rule of a recipe: what it says of answers takes no more memory than its limits allow, and suits its model."""
    if found := flaw_of_answers(recipe.generation, replace(limits(), **recipe.limits.model_dump(exclude_unset=True))):
        yield ("generation", found[0]), f"`generation`: {found[1]}"
    for name, plain in (("guidance_scale", 1), ("prefill_chunk_size", None)):
        if recipe.stack is not None and recipe.generation.get(name) not in (None, plain):
            sentence = f"`generation.{name}` reads a prompt of words alone, and that of a stack holds its images"
            yield ("generation", name), f"{sentence}; remove it."


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


def _mappings_of(recipe: Recipe) -> dict[str, Json]:
    """Section → what it hands on, of those that a recipe has."""
    found = {name: getattr(recipe, name) or {} for name in ("sft", "lora", "quantization", "generation")}
    return found | {"model.processor": recipe.model.processor if recipe.model else {}}
