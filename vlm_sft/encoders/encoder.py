"""What encoders have in common: a model, what makes its inputs, and how they are asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..base.errors import UserError
from ..base.names import Json, Options
from ..pieces.piece import Piece
from ..reading.images import grown_size


class Published(NamedTuple):
    """Where an encoder is, as a `Piece` asks for it.

    Attributes:
        pretrained: Folder, Hub id or weight file.
        revision: Branch, tag or commit on the Hub.
    """

    pretrained: str
    revision: str | None = None


class Answer(NamedTuple):
    """An answer of a model.

    Attributes:
        answer: The words.
        score: How likely it is, 0 … 1; see `Encoder.answers`.
    """

    answer: str
    score: float


class ReadsQuestions:
    """What makes the inputs of an encoder.

    Attributes:
        tokenizer: Of its texts.
        image_processor: Of its images.
        longest: Tokens of the longest text that it reads.
        cuts: Whether a text that is too long is cut; else it is an error.
        reads_sizes: Never: every image makes equally many tokens.
        one_image: Always.
    """

    cuts = False
    reads_sizes = False
    one_image = True
    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    longest: int

    def grown_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the largest picture on the way from one of `size`."""
        return grown_size(size, self.image_processor)

    def expansion(self, size: tuple[int, int]) -> str:
        """Nothing stands for an image in the text."""
        return ""

    def image_inputs(self, images: Sequence[Image.Image], instructions: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """N pictures → `pixel_values` (N, 3, H, W)."""
        if not images:
            return {}
        return {"pixel_values": self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]}

    def text_inputs(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """N texts → `input_ids` and `attention_mask` (N, L).

        Raises:
            UserError: One is longer than what the model reads.
        """
        cut = {"truncation": True, "max_length": self.longest} if self.cuts else {}
        made = self.tokenizer(list(texts), return_tensors="pt", padding=True, return_token_type_ids=False, **cut)
        if (length := made["input_ids"].shape[1]) > self.longest:
            raise UserError(
                f"A text of {length:,} tokens was given, and this model reads at most {self.longest:,}: shorten it."
            )
        return dict(made)


class Encoder(ReadsQuestions, ABC):
    """A model with what makes its inputs.

    Attributes:
        model: On its device, in evaluation mode.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, images: BaseImageProcessor) -> None:
        self.model, self.tokenizer, self.image_processor = model, tokenizer, images
        self.longest = model.config.get_text_config().max_position_embeddings

    @abstractmethod
    def answers(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        top: int,
        candidates: Sequence[str] = (),
        settings: Options | None = None,
    ) -> list[list[Answer]]:
        """The likeliest answers to N questions about N images, the likeliest first.

        Args:
            images: One a question.
            questions: Their texts.
            top: How many answers each gets, or fewer where fewer are known.
            candidates: Answers to choose from; none: those that the model knows or writes.
            settings: For transformers' `generate`, over those of the model; only one that writes has any.
        """


def piece_of(pretrained: str, revision: str | None, key: str) -> Piece[Published]:
    """A checkpoint that no recipe names; `key` is what messages call it."""
    piece = Piece("model", Published(pretrained, revision))
    piece.section = piece.key = key
    piece.where = f"{key}: {pretrained!r}"
    return piece


def told(piece: Piece[Published]) -> Json:
    """What the `config.json` of a checkpoint says; nothing where it is one weight file."""
    return {} if Path(piece.pretrained).is_file() else piece.raw
