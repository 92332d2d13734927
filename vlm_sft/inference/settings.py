"""How a bundle answers: its recipe's settings and what a user asks for over our defaults, and where an answer ends."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.utils import logging

from ..base.errors import UserError
from ..base.words import closest, one_line
from ..batch.processor import VLMProcessor
from ..bundle.hub import find_bundle
from ..bundle.load import load, recipe_of
from ..bundle.manifest import read_manifest
from ..recipe.library_names import GENERATION
from ..recipe.passed_on import flaw
from ..rows.videos import Sampling

DEFAULTS = {"max_new_tokens": 128, "do_sample": False}
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": None}
"""Settings that mean sampling, and the values that mean nothing."""
COUNTS = {"max_new_tokens", "max_length", "num_beams"}
PROCESSORS: dict[str, Any] = {
    "temperature": TemperatureLogitsWarper,
    "top_p": TopPLogitsWarper,
    "top_k": TopKLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
}
"""Each refuses, in words, what it cannot work with."""
# What `answer` and `stream_answer` also pass on: a caller in Python makes them, and no file can say them.
OBJECTS = {"tokenizer", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"}


def split_settings(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of an answer: those of `GenerationConfig`, and objects that are handed to `generate` beside it.

    Raises:
        UserError: One is neither: it is never handed on, whoever says it.
    """
    known = GENERATION.names - set(GENERATION.never)
    if strange := set(settings) - known - OBJECTS:
        raise UserError(f"generation has no setting {min(strange)!r} that is handed on; see docs/security.md.")
    objects = {name: value for name, value in settings.items() if name in OBJECTS}
    return {name: value for name, value in settings.items() if name not in OBJECTS}, objects


def refusal(error: Exception) -> Exception:
    """What `generate` raises of settings that it cannot work with, in one sentence."""
    if isinstance(error, UserError) or type(error).__name__ == "OutOfMemoryError":
        return error
    return UserError(f"the model cannot answer with these settings of `generation`: {one_line(error)}")


def check_options(options: dict[str, Any]) -> None:
    """Refuses generation settings that are on no list of ours, or that transformers does not take.

    Raises:
        UserError: It names the setting, and the closest one there is or what is wrong with its value.
    """
    known = GENERATION.names - set(GENERATION.never)
    for name, value in options.items():
        if name not in GENERATION.names:
            hint = closest(name, known)
            raise UserError(
                f'There is no generation setting "{name}"; '
                + (f'did you mean "{hint}"?' if hint else "see transformers.GenerationConfig for those there are.")
            )
        if sentence := flaw(GENERATION, name, value):
            raise UserError(sentence)
    options = _tidy(options)
    for name in COUNTS.intersection(options):
        value = options[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f'The generation setting "{name}" must be a whole number from 1, not {value!r}.')
    for name, value in options.items():
        try:
            GenerationConfig(**{"do_sample": True, name: value})
            if name in PROCESSORS and value is not None and (name, value) != ("top_k", 0):  # 0 turns it off
                PROCESSORS[name](value)
        except Exception as error:  # whatever a value of another type makes a class raise
            raise UserError(f'The generation setting "{name}" cannot be {value!r}: {one_line(error)}') from None


def _tidy(options: dict[str, Any]) -> dict[str, Any]:
    """`temperature=0` means greedy to most programs, and 2 is as good as 2.0; transformers refuses both."""
    whole = {name for name, value in options.items() if isinstance(value, int) and not isinstance(value, bool)}
    options = {n: float(v) if n in PROCESSORS and n in whole and n != "top_k" else v for n, v in options.items()}
    if options.get("temperature") == 0:
        options = {**{name: value for name, value in options.items() if name not in SAMPLING}, "do_sample": False}
    return options


def generation_options(model: PreTrainedModel, processor: VLMProcessor, options: dict[str, Any]) -> dict[str, Any]:
    """Options for `generate`: what was asked for over our defaults, and where an answer ends.

    An answer ends with the tokenizer's end token or with what the chat template puts after an answer (`###`, a line
    break, `<|im_end|>`), the same that was in the loss.

    Raises:
        UserError: Several answers to one question were asked for.
    """
    tokenizer, own = processor.tokenizer, model.generation_config
    if options.get("num_return_sequences", own.num_return_sequences) not in (None, 1):
        raise UserError("num_return_sequences must be 1: every question gets one answer.")
    options = _tidy(options)
    defaults = {**DEFAULTS, "max_new_tokens": own.max_new_tokens or DEFAULTS["max_new_tokens"]}
    if "max_length" in options:
        del defaults["max_new_tokens"]
    # Sampling knobs mean that the user wants sampling.
    if any(name in options for name in SAMPLING):
        defaults["do_sample"] = True
    merged = {**defaults, **options, "pad_token_id": tokenizer.pad_token_id}
    if not merged["do_sample"]:  # the language model's own may be set, and transformers would warn of them
        merged = {**SAMPLING, **merged}
    ends, end = ends_of(processor)
    if end:
        own_ends = options.get("stop_strings") or []
        merged["stop_strings"] = [*([own_ends] if isinstance(own_ends, str) else own_ends), end]
    if merged.get("stop_strings"):
        merged["tokenizer"] = tokenizer
    merged["eos_token_id"] = ends or None
    if processor.image_token_id < model.config.get_text_config().vocab_size:  # written, it would be an image to read
        suppressed = options.get("suppress_tokens") or own.suppress_tokens or []
        merged["suppress_tokens"] = [*suppressed, processor.image_token_id]
    return merged


def ends_of(processor: VLMProcessor) -> tuple[list[int], str]:
    """Ids that end an answer, and the text that does; "" where what the template puts there is one of these tokens.

    The same letters in an answer, spelled in other tokens, are text.
    """
    tokenizer, end = processor.tokenizer, processor.end_of_answer.strip(" ")
    ids = {tokenizer.eos_token_id} - {None}
    if (token := tokenizer.get_vocab().get(end)) in tokenizer.added_tokens_decoder:
        return sorted({*ids, token}), ""
    return sorted(ids), end


def open_bundle(
    bundle: str,
    options: dict[str, Any],
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, VLMProcessor, dict[str, Any]]:
    """Model, processor and the settings of the bundle's recipe with `options` over them; `device` as `vlm_sft.load`.

    Raises:
        UserError: As `vlm_sft.load`.
    """
    logging.disable_progress_bar()  # one bar for each file of weights would stand between the lines
    folder = find_bundle(bundle)
    model, processor = load(folder, device, trust_remote_code=trust_remote_code)
    recipe = recipe_of(folder, read_manifest(folder))
    processor.video = Sampling(**recipe.data.video.model_dump())
    return model, processor, {**recipe.generation, **options}  # type: ignore[return-value]


def ignores_text(processor: VLMProcessor) -> bool:
    """Whether the chat template shows the model a question's images but not its words (`plain`)."""

    def prompt(text: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return processor.render([{"role": "user", "content": content}], add_generation_prompt=True).text

    try:
        return prompt("one") == prompt("two")
    except UserError:  # it wants another kind of conversation
        return False
