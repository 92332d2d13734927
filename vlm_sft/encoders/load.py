"""Published encoders of image and text with a head (VLE): model, tokenizer and image processor, out of their files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from ..base.errors import UserError
from ..pieces.load_parts import check_size, load_module
from ..pieces.piece import Piece
from ..reading.images import grown_size
from ..stack.build_processor import load_image_processor, load_tokenizer
from ..systems.vle import VLEConfig
from ..systems.vle_heads import TASKS, VLEForTask, VLEForVQA


class Published(NamedTuple):
    """Where an encoder is, as a `Piece` asks for it.

    Attributes:
        pretrained: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
    """

    pretrained: str
    revision: str | None = None


class Encoder:
    """A model with what makes its inputs.

    Attributes:
        model: With one head, in fp32, not training.
        tokenizer: Of its texts.
        image_processor: Of its images.
        cuts: Whether a text that is too long is cut; else it is an error.
        reads_sizes: Never: every image makes equally many tokens.
        one_image: Always.
    """

    cuts = False
    reads_sizes = False
    one_image = True

    def __init__(self, model: VLEForTask, tokenizer: PreTrainedTokenizerBase, images: BaseImageProcessor) -> None:
        self.model, self.tokenizer, self.image_processor = model, tokenizer, images
        self.longest = model.config.text_config.max_position_embeddings

    def grown_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the largest picture on the way from one of `size`."""
        return grown_size(size, self.image_processor)

    def expansion(self, size: tuple[int, int]) -> str:
        """Nothing stands for an image in the text."""
        return ""

    def image_inputs(self, images: Sequence[Image.Image], instructions: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """N pictures → `pixel_values` (N, 3, H, W)."""
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

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
        """N images and N texts → what the head says of each pair, (N, …) in fp32 on the CPU."""
        inputs = {**self.text_inputs(texts), **self.image_inputs(images)}
        device = self.model.device
        return self.model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits.float().cpu()


def load_encoder(
    pretrained: str, task: str, revision: str | None = None, key: str = "MODEL", device: str | None = None
) -> Encoder:
    """Loads a published encoder for one task.

    Args:
        pretrained: Folder or Hub id of a VLE.
        task: A key of `TASKS`; the checkpoint must hold its head.
        revision: Branch, tag or commit on the Hub.
        key: What messages call the checkpoint.
        device: Where it runs; None: the first GPU if there is one, else the CPU.

    Raises:
        UserError: It cannot be had, is no VLE, or has another head.
    """
    piece = Piece("model", Published(pretrained, revision))
    piece.section = piece.key = key
    piece.where = f"{key}: {pretrained!r}"
    if (kind := piece.raw.get("model_type")) != VLEConfig.model_type and piece.raw:
        raise UserError(f"{piece.where} is a {kind!r} model; name a VLE, such as hfl/vle-base-for-vqa.")
    chosen, files = TASKS[task], piece.checkpoint.files
    if not _holds(chosen.model, files):
        held = " and ".join(each.what for each in TASKS.values() if _holds(each.model, files))
        raise UserError(
            f"{piece.where} has no head that {chosen.what}: it {held or 'is an encoder alone'}; name one that has."
        )
    config = piece.whole
    if task == "vqa":
        _check_answers(config, piece)
    model = check_size(chosen.model, config, piece.checkpoint)
    load_module(model, piece.checkpoint, torch.float32)
    tokenizer, images = load_tokenizer(piece), load_image_processor(piece, config.vision_config.image_size)
    if len(tokenizer) > (rows := config.text_config.vocab_size):
        raise UserError(
            f"{piece.where}: its tokenizer has {len(tokenizer):,} tokens, and its text encoder knows {rows:,}; fetch "
            f"the checkpoint again."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Encoder(model.eval().requires_grad_(False).to(device), tokenizer, images)


def _holds(model: type[VLEForTask], names: Iterable[str]) -> bool:
    """Whether the tensors of a checkpoint are those of this head too."""
    return any(name.startswith(f"{model.head}.") for name in names)


def _check_answers(config: VLEConfig, piece: Piece[Published]) -> None:
    """Sets how many answers the head has by its own tensor, and compares it with the answers that are named."""
    last = f"{VLEForVQA.head}.3.bias"
    config.num_vqa_labels = piece.checkpoint.shapes([last])[last][0] if last in piece.checkpoint.files else None
    if config.num_vqa_labels is not None and sorted(config.id2label) != list(range(config.num_vqa_labels)):
        raise UserError(
            f"{piece.where}: its head has {config.num_vqa_labels:,} answers and its config.json names "
            f"{len(config.id2label):,} (id2label); fetch the checkpoint again."
        )
