"""Asks a model: batches of conversations, or one answer as it is written."""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..base.errors import RowError, UserError
from ..batch.box_text import write_boxes
from ..batch.encoding import EncodedChat
from ..batch.pictures import Pictures, check_frames, image_inputs, load_picture, name_of, picture_sizes
from ..batch.processor import VLMProcessor
from ..batch.typed_text import unsaid_tokens
from ..reading.video import Films
from ..rows.messages import unpacked
from .picture_fault import pictures_named, place_of
from .settings import ends_of, generation_options, refusal, split_settings


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
    processor: VLMProcessor, conversations: Sequence[dict[str, Any]], device: torch.device | str = "cpu"
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
        chat = encode_question(processor, row, where)
        encoded.append(chat)
        given = row["images"][: chat.num_images]
        with Films() as films:
            loaded = [load_picture(processor, image, where=where, films=films) for image in given]
        said = processor.instructions(row["messages"])[: chat.num_images]
        pictures.append(Pictures(loaded, said, where, [name_of(image) for image in given]))
    batch = processor.batch(encoded, side="left")
    batch.pop("labels")
    batch.update(image_inputs(processor, pictures))
    return {name: tensor.to(device) for name, tensor in batch.items()}


def encode_question(processor: VLMProcessor, row: dict[str, Any], where: str = "") -> EncodedChat:
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


def with_boxes_written(processor: VLMProcessor, row: Mapping[str, Any], where: str = "") -> dict[str, Any]:
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
    model: PreTrainedModel, processor: VLMProcessor, conversations: Sequence[dict[str, Any]], **options: Any
) -> list[str]:
    """Answers a batch of conversations.

    Args:
        model: The model, on its device, in evaluation mode.
        processor: Its processor.
        conversations: Each `{"messages", "images"}`, as `prompt_batch` takes them.
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
    count = len(conversations)
    conversations = [with_boxes_written(processor, row, place_of(row, n, count)) for n, row in enumerate(conversations)]
    batch = prompt_batch(processor, conversations, model.device)
    settings = generation_options(model, processor, options)
    for number, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        check_length(model, length, place_of(conversations[number], number, count))
    if not _fit(model, batch, settings) and count > 1:
        # The room of a short conversation must not depend on a long one beside it.
        return [text for row in conversations for text in answer(model, processor, [row], **options)]
    with pictures_named(conversations, partial(_first_token, model, processor), options):
        output = _generate(model, batch, settings)
    ends, mark = ends_of(processor)
    return [cut_at(_decode(processor, _before(ends, ids)), mark) for ids in output.tolist()]


def answer_each(
    model: PreTrainedModel, processor: VLMProcessor, conversations: Sequence[dict[str, Any]], **options: Any
) -> list[str | RowError]:
    """Answers as `answer` does; in place of an answer stands what is wrong with a row, and the others are answered."""
    try:
        return list(answer(model, processor, conversations, **options))
    except RowError as error:
        if len(conversations) == 1:
            return [error]
    return [each for row in conversations for each in answer_each(model, processor, [row], **options)]


def _first_token(model: PreTrainedModel, processor: VLMProcessor, row: dict[str, Any], **options: Any) -> None:
    """Begins an answer and forgets it; without options also without those of the model."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    own, options = core.generation_config, {name: given for name, given in options.items() if name != "max_length"}
    core.generation_config = own if options else GenerationConfig()
    try:
        settings = generation_options(model, processor, {**options, "max_new_tokens": 1})
        torch.inference_mode()(_generate)(model, prompt_batch(processor, [row], model.device), settings)
    finally:
        core.generation_config = own


def _fit(model: PreTrainedModel, batch: dict[str, torch.Tensor], settings: dict[str, Any]) -> bool:
    """Whether the longest answer fits behind the longest prompt; where not, `max_new_tokens` is lowered to fit."""
    limit, wanted = position_limit(model), settings.get("max_new_tokens")
    room = None if limit is None else limit - batch["attention_mask"].shape[1]
    if room is None or wanted is None or wanted <= room:
        return True
    settings["max_new_tokens"] = room
    return False


def _generate(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], settings: dict[str, Any], **more: Any
) -> torch.Tensor:
    """Calls `generate`; returns new tokens alone."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    known, objects = split_settings(settings)
    config, more = GenerationConfig(**known), more | objects
    given = core.generation_inputs(batch, config.num_beams or core.generation_config.num_beams or 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*with `inputs_embeds` and without `input_ids`")
        try:
            output: torch.Tensor = model.generate(**given, generation_config=config, **more)
        except (ValueError, TypeError, ImportError) as error:
            raise refusal(error) from error
    # Given embeddings, `generate` returns what is new alone.
    return output[:, batch["input_ids"].shape[1] :] if "input_ids" in given else output


def _before(ends: Sequence[int], ids: list[int]) -> list[int]:
    """Ids before the first that ends an answer."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _decode(processor: VLMProcessor, ids: list[int]) -> str:
    unsaid = unsaid_tokens(processor.tokenizer)
    # Cleaning up would take back spaces that a stream has shown already.
    text: str = processor.tokenizer.decode([i for i in ids if i not in unsaid], clean_up_tokenization_spaces=False)
    return text


def cut_at(text: str, end: str) -> str:
    """Text before the end mark, stripped."""
    return (text.split(mark, 1)[0] if (mark := end.strip(" ")) else text).strip()


def stream_answer(
    model: PreTrainedModel,
    processor: VLMProcessor,
    messages: Sequence[dict[str, Any]],
    images: Sequence[Any],
    **options: Any,
) -> Iterator[str]:
    """Yields an answer piece by piece as the model writes it; the pieces joined are what `answer` returns.

    Closing the iterator stops the model after the token it is at. With several beams, which only the end decides
    between, the answer comes in one piece.

    Args and Raises: see `answer`.
    """
    row = with_boxes_written(processor, {"messages": list(messages), "images": list(images)})
    settings = generation_options(model, processor, options)
    if (settings.get("num_beams") or model.generation_config.num_beams or 1) > 1:
        yield from (text for text in answer(model, processor, [row], **options) if text)
        return
    batch = prompt_batch(processor, [row], model.device)
    check_length(model, batch["input_ids"].shape[1])
    _fit(model, batch, settings)
    writer = _Writer(model, processor, batch, settings)
    with closing(writer), pictures_named([row], partial(_first_token, model, processor), options):
        yield from hold_back(writer.pieces(), ends_of(processor)[1])


class _Writer(BaseStreamer, StoppingCriteria):
    """Generates in a thread of its own; the text comes out of a queue as soon as it can no longer change."""

    def __init__(
        self, model: PreTrainedModel, processor: VLMProcessor, batch: dict[str, torch.Tensor], settings: dict[str, Any]
    ) -> None:
        self._processor = processor
        self._ends, _ = ends_of(processor)
        self._ids: list[int] = []
        self._shown = 0
        self._started = False
        # A piece of text, an exception, or None at the end.
        self._queue: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(model, batch, settings), daemon=True)
        self._thread.start()

    def _run(self, model: PreTrainedModel, batch: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
        last: BaseException | None = None
        stop = StoppingCriteriaList([self, *(settings.pop("stopping_criteria", None) or [])])
        try:
            with torch.inference_mode():
                _generate(model, batch, settings, streamer=self, stopping_criteria=stop)
        except BaseException as error:
            last = error
        self._queue.put(last)

    def put(self, value: torch.Tensor) -> None:
        """Takes new ids (called by `generate`; the first time with the prompt, which is no answer)."""
        if not self._started:
            self._started = True
            return
        self._ids += value.flatten().tolist()
        # The character at the end may be a half one.
        self._show(self._text().rstrip("\ufffd"))

    def end(self) -> None:
        """Gives out the rest (called by `generate`)."""
        self._show(self._text())

    def _text(self) -> str:
        return _decode(self._processor, _before(self._ends, self._ids))

    def _show(self, text: str) -> None:
        if len(text) > self._shown:
            self._queue.put(text[self._shown :])
            self._shown = len(text)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Whether to stop, a row (called by `generate` after each token)."""
        return torch.full((len(input_ids),), self._stop.is_set(), dtype=torch.bool, device=input_ids.device)

    def pieces(self) -> Iterator[str]:
        """Text as it comes; raises here what was raised in the thread."""
        while (piece := self._queue.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def close(self) -> None:
        """Stops the model and waits for it."""
        self._stop.set()
        self._thread.join()


def hold_back(pieces: Iterable[str], mark: str) -> Iterator[str]:
    """Passes pieces on, but never the mark, what may be its beginning, or anything after it.

    Surrounding white space is dropped, so the pieces joined are `cut_at` of the whole text.
    """
    pending, started = "", False
    for piece in pieces:
        pending += piece
        if mark and mark in pending:
            pending = pending.split(mark, 1)[0]
            break
        keep = max((n for n in range(1, len(mark)) if pending.endswith(mark[:n])), default=0)
        ready = pending[: len(pending) - keep].rstrip()
        pending = pending[len(ready) :]
        ready = ready if started else ready.lstrip()
        if ready:
            started = True
            yield ready
    rest = pending.rstrip() if started else pending.strip()
    if rest:
        yield rest
