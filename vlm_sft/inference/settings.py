"""How a bundle answers: its recipe's settings and what a user asks for over our defaults, and where an answer ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import (
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.utils import is_hqq_available, is_optimum_quanto_available, logging

from ..base.console import make_console
from ..base.errors import UserError
from ..base.limits import limits
from ..base.names import Options, Values
from ..base.progress import waiting
from ..base.words import closest, gib, one_line
from ..batch.processor import VLMProcessor
from ..bundle.hub import find_bundle
from ..bundle.load import load, recipe_of
from ..bundle.manifest import read_manifest
from ..recipe.library_names import GENERATION
from ..recipe.passed_on import flaw, flaw_of_answers
from ..rows.videos import Sampling

DEFAULTS = {"max_new_tokens": 128, "do_sample": False}
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": None}
"""Settings that mean sampling, and the values that mean nothing."""
PROCESSORS: Options = {
    "temperature": TemperatureLogitsWarper,
    "top_p": TopPLogitsWarper,
    "top_k": TopKLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
}
"""What transformers does with them, for those who draw tokens themselves."""
FLOATS = {*SAMPLING, "top_h", "repetition_penalty", "encoder_repetition_penalty"} - {"top_k"}
"""Settings whose whole numbers transformers refuses."""
NAMING_TOKENS = {"forced_bos_token_id", "forced_eos_token_id", "bos_token_id", "bad_words_ids", "sequence_bias"}
GROWING_CACHES = {"dynamic", "offloaded", "quantized"}
CACHE_BACKENDS = {"quanto": is_optimum_quanto_available, "hqq": is_hqq_available}
# What `answer` and `stream_answer` also pass on: a caller in Python makes them, and no file can say them.
OBJECTS = {"tokenizer", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"}


def split_settings(settings: Options) -> tuple[Options, Options]:
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


def check_options(options: Options) -> None:
    """Refuses generation settings that are on no list of ours, that transformers does not take, or that take too much.

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
    if found := flaw_of_answers(options, limits()):
        raise UserError(found[1])
    backend = (options.get("cache_config") or {}).get("backend") or "quanto"
    if options.get("cache_implementation") == "quantized" and not CACHE_BACKENDS[backend]():
        raise UserError(f"`cache_implementation: quantized` needs {backend}, which is not installed; leave it out.")


def tidy(options: Options) -> Options:
    """`temperature=0` means greedy to most programs, and 2 is as good as 2.0; transformers refuses both."""
    options = {name: float(v) if name in FLOATS and isinstance(v, int) else v for name, v in options.items()}
    if options.get("temperature") == 0:
        options = {**{name: value for name, value in options.items() if name not in SAMPLING}, "do_sample": False}
    return options


def generation_options(model: PreTrainedModel, processor: VLMProcessor, options: Options) -> Options:
    """Options for `generate`: what was asked for over our defaults, and where an answer ends.

    An answer ends with the tokenizer's end token or with what the chat template puts after an answer (`###`, a line
    break, `<|im_end|>`), the same that was in the loss.

    Raises:
        UserError: As `check_options`; a setting names a token that the model does not have.
    """
    tokenizer, own = processor.tokenizer, model.generation_config
    check_options({name: value for name, value in options.items() if name not in OBJECTS})
    words = model.config.get_text_config().vocab_size
    for name in NAMING_TOKENS & options.keys():
        if (most := max(_numbers(options[name]), default=0)) >= words:
            raise UserError(f"`{name}` names the token {most:,}, but the model has {words:,} of them, from 0.")
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        if len(set(options.get(name) or ())) >= words:
            raise UserError(f"`{name}` leaves no token for an answer; the model has {words:,} of them.")
    options = tidy(options)
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
    else:
        merged.pop("stop_strings", None)  # an empty list would want the tokenizer too
    merged["eos_token_id"] = ends or None
    if processor.answer_start is not None:
        merged["decoder_start_token_id"] = processor.answer_start
    if 0 <= processor.image_token_id < words:  # written, it would be an image to read
        suppressed = options.get("suppress_tokens") or own.suppress_tokens or []
        merged["suppress_tokens"] = [*suppressed, processor.image_token_id]
    return merged


def _numbers(value: object) -> Iterator[int]:
    """The whole numbers in lists of lists; the numbers beside them (a bias) are none of these."""
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _numbers(entry)
    elif isinstance(value, int):
        yield value


def check_cache(model: PreTrainedModel, settings: Values, rows: int, length: int) -> None:
    """Counts the bytes of a cache of fixed length, which is taken whole before the first token.

    Args:
        model: The model.
        settings: Those of an answer.
        rows: How many conversations are answered together.
        length: Tokens of the longest prompt.

    Raises:
        UserError: It is larger than `limits.cache_bytes`.
    """

    def said(name: str) -> Any:
        given = settings.get(name)
        return getattr(model.generation_config, name, None) if given is None else given

    if said("use_cache") is False or (said("cache_implementation") or "dynamic") in GROWING_CACHES:
        return
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    new = settings.get("max_new_tokens")
    longest = max(length + new if new else said("max_length") or 0, said("max_cache_len") or 0)
    if (size := rows * (said("num_beams") or 1) * longest * token) > (most := limits().cache_bytes):
        raise UserError(
            f"`cache_implementation: {said('cache_implementation')}` takes {gib(size)} before the first token, but "
            f"`limits.cache_bytes` is {gib(most)}; ask for fewer tokens, beams or answers at a time, or raise it."
        )


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
    options: Options,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, VLMProcessor, Options]:
    """Model, processor and the settings of the bundle's recipe with `options` over them; `device` as `vlm_sft.load`.

    Raises:
        UserError: As `vlm_sft.load` and `check_has_settings`.
    """
    logging.disable_progress_bar()  # one bar for each file of weights would stand between the lines
    with waiting(make_console(), f"Loading {bundle}"):
        folder = find_bundle(bundle)
        model, processor = load(folder, device, trust_remote_code=trust_remote_code)
    check_has_settings(bundle, processor, options)
    recipe = recipe_of(folder, read_manifest(folder))
    processor.video = Sampling(**recipe.data.video.model_dump())
    return model, processor, {**recipe.generation, **options}  # type: ignore[return-value]


def check_has_settings(bundle: str, processor: VLMProcessor, options: Options) -> None:
    """Refuses settings of one's own for a model that has none.

    Raises:
        UserError: The model chooses its answers.
    """
    if options and processor.chooses and not getattr(processor, "writes", True):  # an encoder says so
        raise UserError(
            f"{bundle} chooses its answers and writes none, so that no setting of generation changes them: leave "
            f"{', '.join(options)} out."
        )


def ignores_text(processor: VLMProcessor) -> bool:
    """Whether the chat template shows the model a question's images but not its words (`plain`)."""

    def prompt(text: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return processor.render([{"role": "user", "content": content}], add_generation_prompt=True).text

    try:
        return prompt("one") == prompt("two")
    except UserError:  # the template wants another kind of conversation
        return False
