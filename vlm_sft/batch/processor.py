"""Turns conversations and images into what the model reads. Only the processor knows tokens.

The mask is made on the rendered text, before image placeholders are expanded; then both are expanded together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    BaseImageProcessor,
    BatchFeature,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..base.errors import UserError
from ..base.names import IGNORED, IMAGE_TOKEN, Options, Row
from ..base.whole_files import check_entries
from ..reading.images import grown_size, needed_side
from ..rows.messages import Message
from ..rows.videos import Sampling
from ..templates.notations import DEFAULT, GRID_SIDE, Notation, missing_token, notation_of
from ..templates.render import RenderedChat, render
from ..templates.template import end_of_answer, owns_bos
from .box_text import Seen, check_seen, seen_through
from .counts import batched
from .encoding import PAD, EncodedChat, Word, add_missing_tokens, first_id_of, in_loss, supervised_characters
from .pictures import pad_to_square
from .typed_text import control_tokens, tokenize_chat

# Where transformers' InstructBLIP, and a bundle, keep the tokenizer of the Q-Former; the tokens that LAVIS gives it.
QFORMER_TOKENIZER = "qformer_tokenizer"
MAX_INSTRUCTION = 128


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
        box_notation: How boxes are written, a key of `NOTATIONS`; None: `DEFAULT` of `box_text`.
        answer_start: Of a language model that reads its prompt by an encoder, the id that every answer begins behind;
            then the last answer of a conversation is learned alone.

    Attributes:
        qformer_tokenizer: Tokenizer of a resampler that reads the instruction, or None. It is saved along.
        reads_sizes: Whether the number of tokens of an image depends on its size, so that `sizes` must be given.
        video, one_image: Which frames of a video are shown; whether the model was made for one image, so that none are.
        words: Words that its tokenizer was given for this run (`add_words`).
        chooses: Whether answers are had by `choose`, and not by `generate`.
        cuts_answers: Whether answers become tokens.
        longest: Tokens of the longest row it makes, whatever `sft.max_length` says; None for no end of its own.

    Raises:
        UserError: The tokenizer cannot tell where in the text its tokens lie.
    """

    reads_sizes = one_image = chooses = False
    _notation: Notation | None = None  # None until it was looked at
    cuts_answers = True
    longest: int | None = None
    video = Sampling()
    words: Sequence[Word] = ()
    answer_start: int | None = None

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        num_image_tokens: int = 32,
        image_token: str = IMAGE_TOKEN,
        pad_to_square: bool = False,
        system: str | None = None,
        box_notation: str | None = None,
        answer_start: int | None = None,
    ) -> None:
        check_fast(tokenizer, "stack.language_model")
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.pad_to_square = pad_to_square
        self.system = system
        self.box_notation = box_notation or DEFAULT
        self.answer_start = answer_start
        self.qformer_tokenizer: PreTrainedTokenizerBase | None = None
        self.added_tokens = add_missing_tokens(tokenizer, image_token)
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    # -- text -----------------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> RenderedChat:
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
            control=self.control_tokens,
        )

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts that are control tokens where the template writes them, and text where people do."""
        return control_tokens(self.tokenizer, self._template())

    def encode_chat(
        self,
        messages: Sequence[Message],
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
        encoded = self.encode_rendered(self.render(messages, add_generation_prompt), sizes)
        if add_generation_prompt and self.answer_start is not None:  # what was answered before is read
            encoded.labels = [IGNORED] * len(encoded.labels)
        return encoded

    def encode_rendered(self, chat: RenderedChat, sizes: Sequence[tuple[int, int]] = ()) -> EncodedChat:
        """Ids and labels of a rendered conversation; a token is in the loss when all its characters are.

        Args:
            chat: The conversation.
            sizes: (width, height) of each image, for a processor that `reads_sizes`; this one does not.
        """
        if self.answer_start is not None:
            chat = replace(chat, spans=chat.spans[-1:], unlearned=sorted([*chat.unlearned, *chat.spans[:-1]]))
        supervised = supervised_characters(chat)
        encoded = EncodedChat([], [], len(chat.image_spans))
        if self._adds_bos(chat):
            encoded.append(self.tokenizer.bos_token_id)
        # The image token and a pad token of ours may have no row among the embeddings: where typed, they become text.
        marks = {self.image_token_id, *([self.tokenizer.pad_token_id] if self.tokenizer.pad_token == PAD else [])}
        ids, borders = tokenize_chat(self.tokenizer, chat, supervised, marks)
        labels = [
            token if end > start and in_loss(supervised[start]) else IGNORED
            for token, (start, end) in zip(ids, borders, strict=True)
        ]
        done = 0  # the text between two images goes over at once: rows have thousands of tokens and an image or two
        places = [place for place, token in enumerate(ids) if token == self.image_token_id]
        for place, count in zip(places, self.tokens_of_images(len(places), sizes), strict=True):
            encoded.extend(ids[done:place], labels[done:place])
            encoded.extend([self.image_token_id] * count, place=True)
            done = place + 1
        encoded.extend(ids[done:], labels[done:])
        return encoded

    def tokens_of_images(self, images: int, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """How many tokens each of so many images of a conversation has; `sizes` as `encode_rendered` takes them."""
        return [self.num_image_tokens] * images

    def _adds_bos(self, chat: RenderedChat) -> bool:
        """BOS comes first where the tokenizer puts one, unless the template writes it (BLIP-2: after the images)."""
        bos = self.tokenizer.bos_token_id
        if bos is None or owns_bos(self._template()):
            return False
        written = chat.text.startswith(self.tokenizer.bos_token) and 1 not in chat.typed
        return first_id_of(self.tokenizer) == bos and not written

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

    @property
    def needed_side(self) -> int | None:
        """Pixels on each side that an image must keep when it is decoded; None where all of them are needed."""
        return needed_side(self.image_processor)

    def grown_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the largest picture that is made of an image of that size on its way to the model."""
        return grown_size(size, self.image_processor, self.pad_to_square)

    @property
    def notation(self) -> Notation:
        """How boxes are written.

        Raises:
            UserError: There is no such notation, the tokenizer does not have its tokens, or the image processor does
                what boxes cannot follow.
        """
        notation = notation_of(self.box_notation)
        if self._notation is not notation:
            if token := missing_token(notation, self.tokenizer.get_vocab(), self.box_grid):
                raise UserError(
                    f"box_notation {self.box_notation} writes tokens like {token}, which the tokenizer does not have; "
                    f"choose another one."
                )
            self.check_seen()
            self._notation = notation
        return notation

    @property
    def box_grid(self) -> int:
        """Cells of a side, for a notation that counts them."""
        return GRID_SIDE

    def check_seen(self) -> None:
        """Looks that `seen` is what the image processor does."""
        check_seen(self)

    def seen(self, size: tuple[int, int]) -> Seen:
        """Where a picture of (width, height) pixels lies in what the model sees of it."""
        return seen_through(self.image_processor, size, self.pad_to_square)

    def instructions(self, messages: Sequence[Message]) -> list[str]:
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
        return {"pixel_values": pixel_values, **self.instruction_inputs(instructions)}

    def instruction_inputs(self, instructions: Sequence[str]) -> dict[str, torch.Tensor]:
        """(N, L) `INSTRUCTION` of N texts, where the resampler reads them; else nothing."""
        if self.qformer_tokenizer is None:
            return {}
        options = {"padding": True, "truncation": True, "max_length": MAX_INSTRUCTION, "split_special_tokens": True}
        text = self.qformer_tokenizer(list(instructions), return_tensors="pt", **options)
        return {"qformer_input_ids": text["input_ids"], "qformer_attention_mask": text["attention_mask"]}

    def choose(
        self, model: PreTrainedModel, images: Sequence[Image.Image], rows: Sequence[Row], settings: Options
    ) -> list[str]:
        """The answers to N rows that ask once about an image each, of a processor that `chooses`."""
        raise NotImplementedError

    # -- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Writes tokenizer, image processor and template, and the Q-Former's tokenizer in a folder of its own."""
        saved = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if self.qformer_tokenizer is not None:
            self.qformer_tokenizer.save_pretrained(Path(save_directory) / QFORMER_TOKENIZER)
        return saved

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> VLMProcessor:
        """Reads what `save_pretrained` wrote."""
        check_entries(pretrained_model_name_or_path)
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
        """Pads rows to (B, S) `input_ids`, `attention_mask` and `labels`; see `batched`.

        Args:
            rows: Encoded conversations, or packs of them.
            side: `right` for training, `left` for generation.
            multiple_of: Rounds S up to a multiple (tensor cores like 8).
        """
        return BatchFeature(batched(rows, self.tokenizer.pad_token_id, side, multiple_of, self.answer_start))


def load_qformer_tokenizer(
    pretrained: str | Path, subfolder: str = QFORMER_TOKENIZER, **options: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a Q-Former; a long instruction loses its beginning (LAVIS: `truncation_side="left"`).

    Args:
        pretrained: Hub id or folder.
        subfolder: Where it is in there; "" for the top.
        **options: `revision` and such.
    """
    check_entries(Path(pretrained) / subfolder)
    tokenizer = AutoTokenizer.from_pretrained(str(pretrained), subfolder=subfolder, trust_remote_code=False, **options)
    tokenizer.truncation_side = "left"
    return tokenizer


def check_fast(tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """Raises a UserError where a tokenizer, named by the key of the recipe, cannot say where its tokens lie."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{key}: the tokenizer {type(tokenizer).__name__} is a slow one and cannot say where its tokens lie in the "
            f"text, so no mask can be made; save it as a fast tokenizer (tokenizer.json)."
        )
