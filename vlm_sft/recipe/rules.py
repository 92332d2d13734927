"""The rules of a recipe that concern more than one key, each a small function that yields what is broken.

A rule gets the sections that it is about, after every key was checked by itself, and yields `(path of the key,
sentence)`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, TypeGuard

from ..base.assets import template_path
from ..base.errors import UserError
from ..base.names import ENCODER_PARTS, GROUPED, PARTS, Options
from ..base.words import closest
from .passed_on import answers_are_bounded, best_is_measured, names_that_pass
from .sections import Data, Hub, Stack
from .yaml_file import KeyPath

if TYPE_CHECKING:
    from .schema import Recipe

Broken = Iterator[tuple[str | KeyPath, str]]
"""(Key with dots, or its parts, sentence)."""

_COLLATOR = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")

# Numbers of `trl.SFTConfig` that neither it nor the libraries below refuse in words, and what they must be.
_ABOVE_ZERO = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("num_train_epochs", "max_length", "save_steps", "eval_steps", "adam_epsilon"),
)
_FROM_ZERO = ("weight_decay", "warmup_steps", "dataloader_num_workers", "seed", "data_seed")
_BELOW_ONE = ("adam_beta1", "adam_beta2")


def first_broken_rule(recipe: Recipe) -> tuple[KeyPath, str] | None:
    """Returns the first broken rule as (path of the key, sentence), or None."""
    rules = chain(
        _one_model(recipe),
        _suits_an_encoder(recipe),
        names_that_pass(recipe),
        _trained_parts_exist(recipe.train, recipe.stack, PARTS if recipe.encoder is None else ENCODER_PARTS),
        _something_is_trained(recipe),
        _lora_comes_from_a_bundle(recipe),
        _lora_or_full(recipe.lora, recipe.train),
        _quantised_is_frozen(recipe),
        _pieces_fit_their_options(recipe.stack),
        _template_exists(recipe.chat_template),
        _sources_are_told_apart(recipe.data),
        _rows_can_be_merged(recipe),
        _stream_has_an_end_and_weights(recipe.data, recipe.sft.get("max_steps")),
        _collator_is_a_class(recipe.collator),
        _rows_pack_whole(recipe.sft),
        _sft_fits(recipe.sft, bool(recipe.data.eval or recipe.evaluation.benchmarks), recipe.data.streaming),
        best_is_measured(recipe),
        answers_are_bounded(recipe),
        _hub_can_be(recipe.hub),
    )
    if (found := next(rules, None)) is None:
        return None
    key, sentence = found
    if isinstance(key, str):
        key = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    return key, sentence


def _one_model(recipe: Recipe) -> Broken:
    if recipe.stack is None and recipe.model is None and recipe.encoder is None:
        yield "stack", 'the key "stack" is missing: the parts of the model (or `model`: an existing VLM).'
    if recipe.stack is not None and recipe.model is not None:
        yield "model", "`model` is an existing VLM and `stack` composes one; keep one of them."
    if recipe.encoder is not None and (recipe.stack or recipe.model) is not None:
        yield "encoder", "`encoder` is a model of its own; keep it, or `stack`, or `model`."
    if recipe.stack is not None and recipe.chat_template is None:
        yield "chat_template", 'the key "chat_template" is missing.'


def _something_is_trained(recipe: Recipe) -> Broken:
    if not recipe.train and not _has_lora(recipe):
        yield "train", "nothing would be trained; name a part under `train` (part: learning rate) or add `lora`."


def _suits_an_encoder(recipe: Recipe) -> Broken:
    """What a prompt, a language model or what it writes is told, and nothing else has."""
    if recipe.encoder is None:
        return
    for key in ("chat_template", "system", "box_notation", "lora", "lora_from", "quantization", "cache"):
        if getattr(recipe, key):
            yield key, f"`{key}` is not for an `encoder`, which reads a question alone; remove it."
    for key in ("packing", "eval_packing", "use_liger_kernel", "torch_compile"):
        if recipe.sft.get(key):
            yield f"sft.{key}", f"`sft.{key}` is not for an `encoder`, which has no language model; remove it."
    for group in ("train", "eval", "test"):
        for number, source in enumerate(getattr(recipe.data, group)):
            if source.merge_by_image:
                path = f"data.{group}.{number}.merge_by_image"
                yield path, "`merge_by_image` is not for an `encoder`, which reads one question; remove it."


def _trained_parts_exist(train: dict[str, float], stack: Stack | None, parts: Sequence[str]) -> Broken:
    for part, rate in train.items():
        if part not in parts:
            hint = closest(part, parts)
            advice = f'did you mean "{hint}"?' if hint else f"the parts are {', '.join(parts)}."
            yield ("train", part), f'unknown part "{part}" under `train`; {advice}'
        if not (rate > 0 and math.isfinite(rate)):
            wrong = f"the learning rate of {part} must be above zero, not {rate:g}"
            yield ("train", part), f"{wrong}; left out, it is frozen."
    if "resampler" in train and (stack is None or stack.resampler is None):
        yield "train.resampler", "`train.resampler` is set but the stack has no resampler; remove it or add one."


def _has_lora(recipe: Recipe) -> bool:
    return recipe.lora is not None or recipe.lora_from == "continue"


def _lora_comes_from_a_bundle(recipe: Recipe) -> Broken:
    if recipe.lora_from is None:
        return
    if recipe.init_from is None:
        yield "lora_from", "`lora_from` says what becomes of the LoRA of `init_from`; name that bundle, or remove it."
    if recipe.lora_from == "continue" and "language_model" in recipe.train:
        yield (
            "train.language_model",
            "the language model cannot be trained whole while its LoRA is trained on; remove `train.language_model`, "
            "or merge the LoRA first (`lora_from: merge`).",
        )
    if recipe.lora_from == "merge" and recipe.quantization is not None:
        yield (
            "lora_from",
            "LoRA cannot be merged into a language model in 4 or 8 bits, which are too few to hold it; train it on "
            "(`lora_from: continue`), or write the merged one with `vlm-sft export --to bundle-merged` and start "
            "from that bundle.",
        )


def _lora_or_full(lora: Options | None, train: dict[str, float]) -> Broken:
    if lora is None:
        return
    if "language_model" in train:
        mend = "remove `train.language_model` or `lora`"
        yield "train.language_model", f"the language model cannot be trained whole and by LoRA at once; {mend}."
    if _is_number(rank := lora.get("r")) and rank <= 0:
        yield "lora.r", f"the rank `lora.r` must be above zero, not {rank}; to do without LoRA, remove `lora`."
    if _is_number(dropout := lora.get("lora_dropout")) and not 0 <= dropout < 1:
        yield "lora.lora_dropout", f"`lora.lora_dropout` must be zero or above and below one, not {dropout}."
    if not all(word.strip() for word in lora.get("add_tokens") or [] if isinstance(word, str)):
        yield "lora.add_tokens", "`lora.add_tokens` holds an empty word; remove it."
    # PEFT copies whole modules named there, and silently neither trains nor saves bare parameters such as query tokens.
    for name in lora.get("modules_to_save") or []:
        if name in PARTS:
            yield "lora.modules_to_save", f"to train {name} beside LoRA, write `train: {{{name}: <learning rate>}}`."


def _quantised_is_frozen(recipe: Recipe) -> Broken:
    if recipe.quantization is None:
        return
    if "language_model" in recipe.train:
        yield (
            "train.language_model",
            "a quantised language model cannot be trained whole; remove `train.language_model` (`lora` learns beside "
            "it) or `quantization`.",
        )
    if not _has_lora(recipe):
        mend = "add `lora` or remove it"
        yield "quantization", f"`quantization` needs `lora`, which learns beside the quantised weights; {mend}."
    if [bool(recipe.quantization.get(key)) for key in ("load_in_4bit", "load_in_8bit")] in ([False] * 2, [True] * 2):
        yield "quantization", "`quantization` needs one of `load_in_4bit: true` and `load_in_8bit: true`."


def _pieces_fit_their_options(stack: Stack | None) -> Broken:
    if stack is None:
        return
    resampler, projector = stack.resampler, stack.projector
    if resampler is not None and resampler.pretrained is None:
        yield (
            "stack.resampler",
            f"a resampler of type {resampler.type} needs `pretrained`: the Hub id or folder of a checkpoint that "
            f"contains one.",
        )
    if resampler is not None and resampler.tokenizer is not None and resampler.type != "instruct_qformer":
        mend = "remove `tokenizer`, or use type instruct_qformer"
        yield "stack.resampler.tokenizer", f"a resampler of type {resampler.type} reads no text; {mend}."
    if projector.pretrained is not None and projector.init != "default":
        yield "stack.projector.init", "a pretrained projector is not initialised; remove `init` or `pretrained`."


def _template_exists(template: str | None) -> Broken:
    if template is None:
        return
    try:
        template_path(template)
    except UserError as error:
        yield "chat_template", str(error)


def _sources_are_told_apart(data: Data) -> Broken:
    for group in ("train", "eval", "test"):
        names: set[str | None] = set()
        for index, source in enumerate(getattr(data, group)):
            if source.name in names:
                called = f'two sources of data.{group} are called "{source.name}"'
                yield f"data.{group}.{index}", f"{called}; give one of them another `name`."
            names.add(source.name)
    if data.sampling == "weights":
        for index, source in enumerate(data.train):
            if "weight" not in source.model_fields_set:
                yield f"data.train.{index}", f'`sampling: weights` needs a `weight` for source "{source.name}" too.'


def _rows_can_be_merged(recipe: Recipe) -> Broken:
    data, stack = recipe.data, recipe.stack
    for group in ("train", "eval", "test"):
        for index, source in enumerate(getattr(data, group)):
            path = f"data.{group}.{index}"
            if source.independent and not source.merge_by_image:
                mend = "add `merge_by_image: true`, or remove it"
                yield f"{path}.independent", f"`independent` says how rows on one picture are merged; {mend}."
            if not source.merge_by_image:
                continue
            if group == "test":
                yield f"{path}.merge_by_image", "rows of data.test are asked one by one; remove `merge_by_image`."
            if group == "train" and data.streaming:
                mend = "remove one of them"
                yield (
                    f"{path}.merge_by_image",
                    f"`merge_by_image` needs all rows on a picture, which a stream does not know; {mend}.",
                )
            if stack is not None and stack.resampler is not None and stack.resampler.type == "instruct_qformer":
                yield (
                    f"{path}.merge_by_image",
                    "a resampler of type instruct_qformer sees a picture anew for each question, so questions cannot "
                    "share it; remove `merge_by_image`.",
                )
            model = stack.language_model if stack is not None else recipe.model
            kernel = (model.attn_implementation if model is not None else None) or ""
            if source.independent and "flash" in kernel:
                yield (
                    f"{path}.independent",
                    f"{kernel} takes no mask in which several questions see one picture; set attn_implementation to "
                    "sdpa or flex_attention, or remove `independent`.",
                )


def _stream_has_an_end_and_weights(data: Data, steps: object) -> Broken:
    if not data.streaming:
        if data.shuffle_buffer != type(data).model_fields["shuffle_buffer"].default:
            yield "data.shuffle_buffer", "`data.shuffle_buffer` belongs to `data.streaming: true`; remove it."
        return
    if not _is_number(steps) or steps <= 0:
        yield "data.streaming", "`data.streaming` has no end of its own; say how long to train: `sft.max_steps`."
    if len(data.train) > 1 and data.sampling != "weights":
        yield (
            "data.sampling",
            "`data.streaming` does not know the sizes of its sources; set `sampling: weights` and give each source a "
            "`weight`, such as its number of rows.",
        )
    if data.languages:
        yield "data.languages", "`data.languages` needs to know all rows, which a stream does not; remove one."
    for index, source in enumerate(data.train):
        if source.repeat > 1:
            mend = "give it a larger `weight` instead of `repeat`"
            yield f"data.train.{index}.repeat", f"a stream repeats every source without end; {mend}."


def _collator_is_a_class(collator: str | None) -> Broken:
    if collator is not None and not _COLLATOR.match(collator):
        yield "collator", f'`collator` must look like my_package.my_module:MyCollator, not "{collator}".'


def _sft_fits(sft: Options, evaluates: bool, streaming: bool) -> Broken:
    output = sft.get("output_dir")
    if not isinstance(output, str) or not output:
        yield "sft.output_dir", "`sft.output_dir` is missing: the folder that checkpoints and the bundle go to."
    strategy = sft.get("train_sampling_strategy")
    needs = f"`sft.train_sampling_strategy: {strategy}` needs the length of every row"
    if strategy == "batch_rebalance":
        lacks = "rows with images do not have before they are made into batches"
        yield "sft.train_sampling_strategy", f"{needs}, which {lacks}; use random, sequential or {GROUPED}."
    if strategy == GROUPED and streaming:
        mend = "remove it, or set `data.streaming` to false"
        yield "sft.train_sampling_strategy", f"{needs}, which a stream does not know; {mend}."
    yield from _numbers_that_train(sft)
    rate = sft.get("learning_rate")
    if rate is not None and not (_is_number(rate) and rate > 0 and math.isfinite(rate)):
        yield "sft.learning_rate", f"`sft.learning_rate` must be a number above zero, not {rate!r}."
    if sft.get("bf16") and sft.get("fp16"):
        yield "sft.fp16", "`sft.bf16` and `sft.fp16` cannot both be true; keep one."
    if sft.get("eval_strategy", "no") not in ("no", None) and not evaluates:
        mend = "add one, or `evaluation.benchmarks`"
        yield "sft.eval_strategy", f"`sft.eval_strategy` asks for evaluations but `data.eval` has no source; {mend}."


def _rows_pack_whole(sft: Options) -> Broken:
    if not (sft.get("packing") or sft.get("eval_packing")):
        return
    if sft.get("max_length", 1) is None:
        yield ("sft", "max_length"), "`sft.packing` fills packs up to `sft.max_length`, so it cannot be null; say one."
    if (strategy := sft.get("packing_strategy", "bfd")) != "bfd":
        yield (
            ("sft", "packing_strategy"),
            f"`sft.packing_strategy: {strategy}` cuts rows in two, and images with them; leave it out: rows are packed "
            "whole, by best fit (bfd).",
        )
    if sft.get("packing") and sft.get("train_sampling_strategy") == GROUPED:
        yield (
            ("sft", "train_sampling_strategy"),
            f"`sft.packing` leaves no padding for `{GROUPED}` to save; remove one of them.",
        )


def _numbers_that_train(sft: Options) -> Broken:
    for keys, least in ((_ABOVE_ZERO, "above zero"), (_FROM_ZERO, "zero or above")):
        for key in keys:
            value = sft.get(key)
            if _is_number(value) and not (value > 0 or (value == 0 and keys is _FROM_ZERO)):
                yield f"sft.{key}", f"`sft.{key}` must be {least}, not {value}."
    for key in _BELOW_ONE:
        if _is_number(value := sft.get(key)) and not 0 <= value < 1:
            yield f"sft.{key}", f"`sft.{key}` must be zero or above and below one, not {value}."
    steps = sft.get("max_steps")
    if _is_number(steps) and (steps == 0 or steps < -1):
        mend = "left out, `sft.num_train_epochs` says how long"
        yield "sft.max_steps", f"`sft.max_steps` must be above zero, not {steps}; {mend}."


def _hub_can_be(hub: Hub | None) -> Broken:
    if hub is None:
        return
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(hub.repo_id)
    except HFValidationError:
        mend = 'write name/repository, of letters, digits, "-", "_" and "."'
        yield "hub.repo_id", f'"{hub.repo_id}" cannot be a repository of the Hub; {mend}.'


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
