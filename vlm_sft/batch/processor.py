"""Turns conversations and images into what the model reads. Only the processor knows tokens.

The mask is made on the rendered text, before image placeholders are expanded; then both are expanded together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin

from ..base.errors import UserError
from ..base.names import IGNORED, IMAGE_TOKEN
from ..templates.render import RenderedChat, render
from ..templates.template import end_of_answer, owns_bos

PAD = "<pad>"  # added where a tokenizer has no pad token
# Where transformers' InstructBLIP, and a bundle, keep the tokenizer of the Q-Former; the tokens that LAVIS gives it.
QFORMER_TOKENIZER = "qformer_tokenizer"
MAX_INSTRUCTION = 128


@dataclass
class EncodedChat:
    """A conversation as ids.

    Attributes:
        input_ids: S token ids, image placeholders expanded.
        labels: S labels, -100 outside the answers.
        num_images: Number of images the ids have room for.
        places: S flags, 1 where an image feature goes.
    """

    input_ids: list[int]
    labels: list[int]
    num_images: int
    places: list[int] = field(default_factory=list)

    def append(self, token: int, learned: bool = False, place: bool = False) -> None:
        """Adds one token."""
        self.input_ids.append(token)
        self.labels.append(token if learned else IGNORED)
        self.places.append(int(place))

    def extend(self, tokens: Sequence[int], labels: Sequence[int] | None = None, place: bool = False) -> None:
        """Adds tokens with their labels; without labels they are not learned."""
        self.input_ids += tokens
        self.labels += [IGNORED] * len(tokens) if labels is None else labels
        self.places += [int(place)] * len(tokens)


class VLMProcessor(ProcessorMixin):
    """Image processor, tokenizer and chat template of a composed stack.

    Args:
        image_processor: Any image processor of transformers that gives one (3, H, W) tensor an image.
        tokenizer: A fast tokenizer; the image token and, where it is missing, a pad token are added to it.
        chat_template: Jinja source with `{% generation %}` markers.
        num_image_tokens: Tokens that one image becomes.
        image_token: Text of the placeholder.
        pad_to_square: Pads images to a square with the image processor's mean colour first (LLaVA-1.5).
        system: System text for conversations that bring none; None leaves the template's own.

    Attributes:
        qformer_tokenizer: Tokenizer of a resampler that reads the instruction, or None. It is saved along.
        reads_sizes: Whether the number of tokens of an image depends on its size, so that `sizes` must be given.

    Raises:
        UserError: The tokenizer cannot tell where in the text its tokens lie.
    """

    reads_sizes = False

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 32,
        image_token: str = IMAGE_TOKEN,
        pad_to_square: bool = False,
        system: str | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"stack.language_model: the tokenizer {type(tokenizer).__name__} is a slow one and cannot say where "
                f"its tokens lie in the text, so no mask can be made; save it as a fast tokenizer (tokenizer.json)."
            )
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.pad_to_square = pad_to_square
        self.system = system
        self.qformer_tokenizer: Any = None
        self.added_tokens = add_missing_tokens(tokenizer, image_token)
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    # -- text -----------------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> RenderedChat:
        """Text of a conversation with the places of images and answers, by this processor's template."""
        tokenizer = self.tokenizer
        return render(
            messages,
            self._template(),
            add_generation_prompt,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token or "",
            image_token=self.image_token,
            system=self.system,
        )

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = False,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> EncodedChat:
        """Ids and labels of a conversation.

        Args:
            messages: Roles and content parts.
            add_generation_prompt: Ends with what stands before the next answer (for inference).
            sizes: See `encode_rendered`.

        Raises:
            UserError: The conversation is malformed; the message says which message of it.
        """
        return self.encode_rendered(self.render(messages, add_generation_prompt), sizes)

    def encode_rendered(self, chat: RenderedChat, sizes: Sequence[tuple[int, int]] = ()) -> EncodedChat:
        """Ids and labels of a rendered conversation; a token is in the loss when all its characters are.

        Args:
            chat: The conversation.
            sizes: (width, height) of each image, for a processor that `reads_sizes`; this one does not.
        """
        supervised = supervised_characters(chat)
        images = {start for start, _ in chat.image_spans}
        encoded = EncodedChat([], [], len(chat.image_spans))
        if self._adds_bos(chat.text):
            encoded.append(self.tokenizer.bos_token_id)
        # Neither may have a row among the embeddings; no template prints a pad token of this name.
        marks = {self.image_token_id, *([self.tokenizer.pad_token_id] if self.tokenizer.pad_token == PAD else [])}
        ids, borders = self._tokenize(chat.text, supervised)
        labels = [
            token if end > start and supervised[start] else IGNORED
            for token, (start, end) in zip(ids, borders, strict=True)
        ]
        done = 0  # all at once between one mark and the next: rows have thousands of tokens and a mark or two
        for place in [place for place, token in enumerate(ids) if token in marks]:
            encoded.extend(ids[done:place], labels[done:place])
            token, (start, end) = ids[place], borders[place]
            if token == self.image_token_id and start in images:
                encoded.extend([token] * self.num_image_tokens, place=True)
            else:  # somebody typed it: it is text
                pieces = self._as_plain_text(chat.text[start:end])
                encoded.extend(pieces, None if labels[place] == IGNORED else pieces)
            done = place + 1
        encoded.extend(ids[done:], labels[done:])
        return encoded

    def _tokenize(self, text: str, supervised: bytearray, offset: int = 0) -> tuple[list[int], list[tuple[int, int]]]:
        """The id of every token, and its (start, end); no token lies across the border of an answer.

        At inference the answer follows a prompt that was tokenised by itself, so a token that joins the last character
        of a prompt with the first of an answer would never be seen there: the text is cut at such borders.
        """
        output = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, borders = output.input_ids, output.offset_mapping
        if offset:
            borders = [(start + offset, end + offset) for start, end in borders]
        crossing = [(s, e) for s, e in borders if e - s > 1 and supervised.count(supervised[s], s, e) < e - s]
        if not crossing:
            return ids, borders
        cuts = {i for s, e in crossing for i in range(s + 1, e) if supervised[i] != supervised[i - 1]}
        pieces = pairwise([offset, *sorted(cuts), offset + len(text)])
        done = [self._tokenize(text[a - offset : b - offset], supervised, a) for a, b in pieces]
        return [i for ids, _ in done for i in ids], [border for _, borders in done for border in borders]

    def _as_plain_text(self, text: str) -> list[int]:
        """Ids of a placeholder that somebody typed, none of them its own."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        if len(ids) > 1 or len(text) < 2:
            return ids
        # Added to the tokenizer, but not as a special token: only its letters are text.
        return [i for part in (text[:1], text[1:]) for i in self.tokenizer(part, add_special_tokens=False).input_ids]

    def _adds_bos(self, text: str) -> bool:
        """BOS comes first where the tokenizer puts one, unless the template writes it (BLIP-2: after the images)."""
        bos = self.tokenizer.bos_token_id
        if bos is None or owns_bos(self._template()):
            return False
        return first_id_of(self.tokenizer) == bos and not text.startswith(self.tokenizer.bos_token)

    def _template(self) -> str:
        if not isinstance(self.chat_template, str):
            raise UserError("This processor has no chat template; set chat_template in the recipe.")
        return self.chat_template

    @property
    def end_of_answer(self) -> str:
        """What the template puts after an answer: generation stops there."""
        return end_of_answer(self._template(), eos_token=self.tokenizer.eos_token or "")

    # -- images ---------------------------------------------------------------------------------------------------

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor | None:
        """(N, 3, H, W) pixel values of RGB images, or None for none."""
        if not images:
            return None
        if self.pad_to_square:
            images = [pad_to_square(image, self.image_processor.image_mean) for image in images]
        return self.image_processor(list(images), return_tensors="pt")["pixel_values"]

    def instructions(self, messages: Sequence[dict[str, Any]]) -> list[str]:
        """What the user says beside each image, in reading order: what a resampler that reads the instruction gets."""
        found = []
        for message in messages:
            parts = message["content"] if isinstance(message["content"], list) else []
            text = " ".join(part["text"].strip() for part in parts if part["type"] == "text" and part["text"])
            found += [text.strip()] * sum(part["type"] == "image" for part in parts)
        return found

    def image_inputs(self, images: Sequence[Image.Image], instructions: Sequence[str]) -> dict[str, torch.Tensor]:
        """What a model takes for images: (N, 3, H, W) `pixel_values`, and their instructions where it reads them.

        Args:
            images: N RGB images.
            instructions: N texts, as `instructions` gives them.
        """
        pixel_values = self.encode_images(images)
        if pixel_values is None:
            return {}
        if self.qformer_tokenizer is None:
            return {"pixel_values": pixel_values}
        text = self.qformer_tokenizer(
            list(instructions), padding=True, truncation=True, max_length=MAX_INSTRUCTION, return_tensors="pt"
        )
        return {
            "pixel_values": pixel_values,
            "qformer_input_ids": text["input_ids"],
            "qformer_attention_mask": text["attention_mask"],
        }

    # -- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Writes tokenizer, image processor and template, and the Q-Former's tokenizer in a folder of its own."""
        saved = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if self.qformer_tokenizer is not None:
            self.qformer_tokenizer.save_pretrained(Path(save_directory) / QFORMER_TOKENIZER)
        return saved

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> VLMProcessor:
        """Reads what `save_pretrained` wrote."""
        processor: VLMProcessor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if (Path(pretrained_model_name_or_path) / QFORMER_TOKENIZER).is_dir():
            processor.qformer_tokenizer = load_qformer_tokenizer(pretrained_model_name_or_path)
        return processor

    # -- what other processors do -----------------------------------------------------------------------------------

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The placeholder as often as an image has tokens (called by `ProcessorMixin.__call__`)."""
        return self.image_token * self.num_image_tokens

    @property
    def image_token_ids(self) -> list[int]:
        """Ids that stand for image features."""
        return [self.image_token_id]

    @property
    def ids_per_image(self) -> int:
        """How many `image_token_id` every image has; 0 where that depends on its size."""
        return self.num_image_tokens

    def batch(self, rows: Sequence[EncodedChat], side: str = "right", multiple_of: int | None = None) -> BatchFeature:
        """Pads rows to (B, S) `input_ids`, `attention_mask` and `labels`.

        Args:
            rows: Encoded conversations.
            side: `right` for training, `left` for generation.
            multiple_of: Rounds S up to a multiple (tensor cores like 8).
        """
        longest = max(len(row.input_ids) for row in rows)
        if multiple_of:
            longest = -(-longest // multiple_of) * multiple_of
        fills = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        columns: dict[str, list[list[int]]] = {name: [] for name in fills}
        for row in rows:
            values = {"input_ids": row.input_ids, "attention_mask": [1] * len(row.input_ids), "labels": row.labels}
            for name, fill in fills.items():
                padding = [fill] * (longest - len(row.input_ids))
                columns[name].append(values[name] + padding if side == "right" else padding + values[name])
        return BatchFeature({name: torch.tensor(column) for name, column in columns.items()})


def supervised_characters(chat: RenderedChat) -> bytearray:
    """0 for each character of a rendered conversation that is not in the loss; 1 and 2 in turn for those of spans."""
    supervised = bytearray(len(chat.text))
    for number, (start, end) in enumerate(chat.spans):
        supervised[start:end] = bytes([1 + number % 2]) * (end - start)
    return supervised


_FIRST_IDS: WeakKeyDictionary[Any, int | None] = WeakKeyDictionary()


def first_id_of(tokenizer: Any) -> int | None:
    """The id that a tokenizer begins every text with by itself (asked for every row, so it is remembered)."""
    if tokenizer not in _FIRST_IDS:
        ids = tokenizer("a").input_ids
        _FIRST_IDS[tokenizer] = ids[0] if ids else None
    return _FIRST_IDS[tokenizer]


def load_qformer_tokenizer(pretrained: str | Path, subfolder: str = QFORMER_TOKENIZER, **options: Any) -> Any:
    """The tokenizer of a Q-Former; a long instruction loses its beginning (LAVIS: `truncation_side="left"`).

    Args:
        pretrained: Hub id or folder.
        subfolder: Where it is in there; "" for the top.
        **options: `revision` and such.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(pretrained), subfolder=subfolder, trust_remote_code=False, **options)
    tokenizer.truncation_side = "left"
    return tokenizer


def add_missing_tokens(tokenizer: Any, image_token: str) -> list[str]:
    """Adds the image token and, where there is none, a pad token; returns what was added, to be said.

    Neither needs a row of the embedding matrix: placeholders are replaced by features and padding is masked. The pad
    token is never the end token, or the model would not learn to stop.
    """
    added = []
    vocabulary = tokenizer.get_vocab()
    if image_token not in vocabulary:
        tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
        added.append(image_token)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        if PAD not in vocabulary:
            added.append(PAD)
        tokenizer.add_special_tokens({"pad_token": PAD})
    return added


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Centres an RGB image on a square of the mean colour (LLaVA, `mm_utils.py`, expand2square).

    Args:
        image: RGB image.
        mean: Mean of the three channels, 0 to 1.
    """
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
