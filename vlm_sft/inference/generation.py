"""Asks a model: batches of conversations."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)

from ..base.errors import RowError, UserError
from ..base.names import Options, Row, Values
from ..batch.box_text import write_boxes
from ..batch.counts import ANSWERS
from ..batch.encoding import EncodedChat
from ..batch.pictures import Pictures, check_frames, check_pictures, image_inputs, load_picture, name_of, picture_sizes
from ..batch.processor import VLMProcessor
from ..batch.typed_text import unsaid_tokens
from ..reading.video import Films
from ..rows.messages import unpacked
from .confidence import Confidence, Said, pieces_of
from .picture_fault import pictures_named, place_of
from .settings import check_cache, ends_of, generation_options, refusal, split_settings


class PromptTooLongError(UserError):
    """A conversation that the language model has no positions for.

    Attributes:
        length: Tokens of the conversation, images included.
        limit: Positions of the language model.
    """

    def __init__(self, length: int, limit: int, where: str = "") -> None:
        self.length, self.limit = length, limit
        super().__init__(
            f"{where and where + ': '}the conversation takes {length:,} tokens with its images, but the language model "
            f"reads at most {limit:,} with the answer: shorten it or give fewer images."
        )


def prompt_batch(
    processor: VLMProcessor, conversations: Sequence[Row], device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Conversations → (B, S) left-padded prompts and (N, 3, H, W) images, on the device.

    Args:
        processor: The model's processor.
        conversations: Each `{"messages", "images"}`, maybe with an `id` for errors; a last message of the assistant is
            left out (it is the answer), and so are images beyond the placeholders (they belong to later messages).
        device: Where the model is.

    Raises:
        UserError: A conversation is malformed, has too few images, or an image cannot be read or is refused.
    """
    encoded, pictures = [], []
    for number, row in enumerate(conversations):
        where = place_of(row, number, len(conversations))
        row = with_boxes_written(processor, row, where)
        encoded.append(encode_question(processor, row, where))
        pictures.append(pictures_of(processor, row, encoded[-1], where))
    return left_padded(processor, encoded, pictures, device)


def pictures_of(processor: VLMProcessor, row: Row, chat: EncodedChat, where: str = "") -> Pictures:
    """The pictures of a conversation that was encoded as `chat`, decoded; see `prompt_batch`."""
    given = row["images"][: chat.num_images]
    with Films() as films:
        loaded = [load_picture(processor, image, where=where, films=films) for image in given]
    said = processor.instructions(row["messages"])[: chat.num_images]
    return Pictures(loaded, said, where, [name_of(image) for image in given])


def left_padded(
    processor: VLMProcessor,
    encoded: Sequence[EncodedChat],
    pictures: Sequence[Pictures],
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """What `encode_question` and `pictures_of` gave of several conversations, as one batch; see `prompt_batch`."""
    batch = processor.batch(encoded, side="left")
    batch.pop("labels")
    batch.update(image_inputs(processor, pictures))
    return {name: tensor.to(device) for name, tensor in batch.items()}


def encode_question(processor: VLMProcessor, row: Row, where: str = "") -> EncodedChat:
    """Ids of one conversation up to where the answer begins; see `prompt_batch`."""
    row = with_boxes_written(processor, row, where)
    messages, place = row["messages"], f"{where}: " if where else ""
    check_frames(processor, row["images"], where)
    with Films() as films:
        sizes = picture_sizes(processor, row["images"], where=where, films=films)
    messages = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    try:
        chat = processor.encode_chat(messages, add_generation_prompt=True, sizes=sizes)
    except RowError as error:
        raise RowError(f"{place}{error}", where=where, reason=error.reason) from None
    except UserError as error:
        raise UserError(f"{place}{error}") from None
    if not chat.input_ids:
        raise UserError(f"{place}the prompt is empty: give an image.")
    if len(row["images"]) < chat.num_images:
        raise UserError(
            f"{place}the messages have places for {chat.num_images} images, but {len(row['images'])} are given: give "
            "every place its image, in order."
        )
    return chat


def with_boxes_written(processor: VLMProcessor, row: Values, where: str = "") -> Row:
    """A row with what its `extras` say where it belongs, and its boxes as text.

    Raises:
        UserError: As `write_boxes`.
    """
    row = unpacked(row)
    return {**row, "messages": write_boxes(processor, row["messages"], row["images"], where or "the question")}


def position_limit(model: PreTrainedModel) -> int | None:
    """How many positions the language model was made for; None where nothing limits them (ALiBi)."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    # Only these two kinds of scaling leave the original length in max_position_embeddings (Vicuna 16k).
    stretched = isinstance(limit, int) and rope.get("rope_type") in ("linear", "dynamic")
    return int(limit * rope.get("factor", 1)) if stretched else limit


def check_length(model: PreTrainedModel, length: int, where: str = "") -> None:
    """Checks that a prompt of so many tokens leaves the language model room for an answer.

    Raises:
        PromptTooLongError: It does not.
    """
    limit = position_limit(model)
    if limit is not None and length >= limit:
        raise PromptTooLongError(length, limit, where)


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    processor: VLMProcessor,
    conversations: Sequence[Row],
    *,
    confidence: bool = False,
    **options: Any,
) -> list[Said]:
    """Answers a batch of conversations.

    Args:
        model: The model, on its device, in evaluation mode.
        processor: Its processor.
        conversations: Each `{"messages", "images"}`, as `prompt_batch` takes them.
        confidence: Says of each answer how sure the model was; not of one that several beams found.
        **options: For transformers' `generate` (default: greedy, at most 128 new tokens). Near the end of the language
            model's positions an answer becomes shorter than `max_new_tokens`.

    Returns:
        One text a conversation, without the end mark and surrounding white space.

    Raises:
        UserError: As `prompt_batch`; a conversation is longer than the language model can read
            (`PromptTooLongError`); the model fails on a picture, and on no other in its place.
    """
    if not conversations:
        return []
    if processor.chooses:
        return _chosen(model, processor, conversations, options)
    count = len(conversations)
    conversations = [with_boxes_written(processor, row, place_of(row, n, count)) for n, row in enumerate(conversations)]
    batch = prompt_batch(processor, conversations, model.device)
    settings = generation_options(model, processor, options)
    for number, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        check_length(model, length, place_of(conversations[number], number, count))
    if not fit(model, batch, settings) and count > 1:
        # The room of a short conversation must not depend on a long one beside it.
        alone = partial(answer, model, processor, confidence=confidence, **options)
        return [text for row in conversations for text in alone([row])]
    sure = Confidence() if confidence and beams_of(model, settings) == 1 else None
    with pictures_named(conversations, partial(first_token, model, processor), options):
        output = new_tokens(model, batch, settings if sure is None else sure.watching(settings))
    ends, mark = ends_of(processor)
    kept = [before_end(ends, ids) for ids in output.tolist()]
    texts = [cut_at(decode(processor, ids), mark) for ids in kept]
    if sure is None:
        return [Said(text) for text in texts]
    return [
        Said(text, pieces_of(text, ids, shares, partial(decode, processor)))
        for text, ids, shares in zip(texts, kept, sure.probabilities(), strict=True)
    ]


def _chosen(
    model: PreTrainedModel, processor: VLMProcessor, conversations: Sequence[dict[str, Any]], options: Options
) -> list[Said]:
    """What an encoder answers: it chooses, and has no settings, or writes a few words."""
    writes = getattr(model, "generation_config", None) is not None
    settings = generation_options(model, processor, options) if writes else {}
    images: list[Image.Image] = []
    for number, row in enumerate(conversations):
        where = place_of(row, number, len(conversations))
        row = with_boxes_written(processor, row, where)
        encode_question(processor, row, where)
        pictures = pictures_of(processor, row, EncodedChat([], [], 1), where)
        check_pictures(processor, pictures)
        images += pictures.images
    try:
        said = processor.choose(model, images, conversations, settings)
    except (ValueError, TypeError, ImportError, OverflowError) as error:
        raise refusal(error) from error
    return [Said(text) for text in said]


def answer_each(
    model: PreTrainedModel, processor: VLMProcessor, conversations: Sequence[Row], **options: Any
) -> list[Said | RowError]:
    """Answers as `answer` does; in place of an answer stands what is wrong with a row, and the others are answered."""
    try:
        return list(answer(model, processor, conversations, **options))
    except RowError as error:
        if len(conversations) == 1:
            return [error]
    return [each for row in conversations for each in answer_each(model, processor, [row], **options)]


def first_token(model: PreTrainedModel, processor: VLMProcessor, row: Row, **options: Any) -> None:
    """Begins an answer and forgets it; without options also without those of the model."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    own, options = core.generation_config, {name: given for name, given in options.items() if name != "max_length"}
    core.generation_config = own if options else GenerationConfig()
    try:
        settings = generation_options(model, processor, {**options, "max_new_tokens": 1})
        torch.inference_mode()(new_tokens)(model, prompt_batch(processor, [row], model.device), settings)
    finally:
        core.generation_config = own


def beams_of(model: PreTrainedModel, settings: Values) -> int:
    """How many beams an answer is searched with."""
    return settings.get("num_beams") or model.generation_config.num_beams or 1


def fit(model: PreTrainedModel, batch: dict[str, torch.Tensor], settings: Options) -> bool:
    """Whether the longest answer fits behind the longest prompt; where not, `max_new_tokens` is lowered to fit.

    A `max_length`, which counts prompt and answer, becomes the `max_new_tokens` that it leaves.

    Raises:
        UserError: It leaves none.
    """
    limit, length = position_limit(model), batch["attention_mask"].shape[1]
    wanted, whole = settings.get("max_new_tokens"), settings.pop("max_length", None)
    if wanted is None and whole is not None:
        limit = min(whole, limit or whole)
        if whole <= length:
            raise UserError(
                f"`max_length` is {whole:,}, and a prompt alone has {length:,} tokens; say `max_new_tokens`."
            )
    room = None if limit is None else limit - length
    if room is None or (wanted is not None and wanted <= room):
        return True
    settings["max_new_tokens"] = room
    return False


def new_tokens(model: PreTrainedModel, batch: dict[str, torch.Tensor], settings: Options, **more: Any) -> torch.Tensor:
    """Calls `generate`; returns new tokens alone."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    known, objects = split_settings(settings)
    check_cache(model, settings, *batch["attention_mask"].shape)
    more = more | objects
    given = core.generation_inputs(batch, known.get("num_beams") or core.generation_config.num_beams or 1)
    penalty = known.get("repetition_penalty") or core.generation_config.repetition_penalty or 1.0
    if "input_ids" not in given and penalty != 1.0:
        # transformers would spare as many new tokens of a row as it has pads, which it takes for ids in front of them.
        known = {**known, "repetition_penalty": 1.0}
        own = RepetitionPenaltyLogitsProcessor(float(penalty))
        more["logits_processor"] = LogitsProcessorList([own, *(more.get("logits_processor") or [])])
    config = GenerationConfig(**known)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*with `inputs_embeds` and without `input_ids`")
        try:
            output: torch.Tensor = model.generate(**given, generation_config=config, **more)
        except (ValueError, TypeError, ImportError, OverflowError) as error:
            raise refusal(error) from error
    # Given embeddings, `generate` returns what is new alone.
    written = next((given[name] for name in ("input_ids", ANSWERS) if name in given), None)
    return output if written is None else output[:, written.shape[1] :]


def before_end(ends: Sequence[int], ids: list[int]) -> list[int]:
    """Ids before the first that ends an answer."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def decode(processor: VLMProcessor, ids: list[int]) -> str:
    """The text of an answer's ids, without the special tokens that nobody reads."""
    unsaid = unsaid_tokens(processor.tokenizer)
    # Cleaning up would take back spaces that a stream has shown already.
    text: str = processor.tokenizer.decode([i for i in ids if i not in unsaid], clean_up_tokenization_spaces=False)
    return text


def cut_at(text: str, end: str) -> str:
    """Text before the end mark, stripped."""
    return (text.split(mark, 1)[0] if (mark := end.strip(" ")) else text).strip()
