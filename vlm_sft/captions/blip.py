"""BLIP's captioning model, as transformers publishes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import BlipForConditionalGeneration

from ..base.errors import RowError, UserError
from ..base.names import Options
from ..base.words import one_line
from ..batch.pictures import Pictures, image_inputs
from ..encoders.encoder import Published, ReadsQuestions
from ..inference.settings import refusal
from ..pieces.load_parts import check_size, from_pretrained
from ..pieces.part_configs import load_image_processor, load_tokenizer
from ..pieces.piece import Piece
from .drawn import NUCLEUS, is_drawn

LENGTHS = {"max_length": 30, "min_length": 10}
"""Of a caption with its prompt, in tokens (salesforce/BLIP, models/blip.py)."""
BEAMS = {"num_beams": 3, "do_sample": False}
"""How BLIP's own code finds the likeliest caption."""
DRAWN = {**NUCLEUS, "repetition_penalty": 1.1}
"""And how it draws one."""


class Blip(ReadsQuestions):
    """BLIP; it goes on with the words that it is given, and they are no part of its caption. See `Captioner`.

    Args:
        piece: Its checkpoint.
        options: For transformers' `generate`, over BLIP's own.
        device: Where it runs.

    Raises:
        UserError: It cannot be had, or has no head that writes.
    """

    prompts: Mapping[str, str] = {"en": "a picture of"}

    def __init__(self, piece: Piece[Published], options: Options, device: str | torch.device) -> None:
        kinds = piece.whole.architectures or [BlipForConditionalGeneration.__name__]
        if BlipForConditionalGeneration.__name__ not in kinds:
            raise UserError(
                f"--captioner {piece.pretrained} is a BLIP that writes no captions ({', '.join(kinds)}): give one like "
                f"Salesforce/blip-image-captioning-base."
            )
        self.where, self.options = piece.pretrained, options
        self.tokenizer, self.image_processor = load_tokenizer(piece), load_image_processor(piece)
        check_size(BlipForConditionalGeneration._from_config, piece.whole, piece.checkpoint)
        self.model = from_pretrained(BlipForConditionalGeneration, piece, dtype=torch.float32).to(device).eval()
        text = piece.whole.text_config
        self.longest = text.max_position_embeddings
        # [DEC], which begins a caption, is no word of the tokenizer that is published with the model.
        self.outside = {text.bos_token_id, text.sep_token_id, text.pad_token_id, *self.tokenizer.all_special_ids}
        self.reader = self

    def check(self, prompts: Sequence[str]) -> None:
        """See `Captioner.check`."""
        for prompt in prompts:
            ids = self.tokenizer(prompt)["input_ids"]
            if self.tokenizer.unk_token_id in ids:
                raise UserError(
                    f"--captioner {self.where} does not know the words of the prompt {one_line(prompt)!r}: write it in "
                    f"the language that it writes (BLIP's is English), or give another captioner."
                )
            asked = self.options.get("max_new_tokens") or 0
            most = max(len(ids) - 1 + asked, self.options.get("max_length") or 0)
            if most >= self.longest:
                raise UserError(
                    f"The prompt {one_line(prompt)[:60]!r} and its caption may have {most:,} tokens, and {self.where} "
                    f"has {self.longest:,} positions: shorten it, or lower --set max_new_tokens."
                )

    @torch.inference_mode()
    def captions(self, rows: Sequence[Pictures], prompt: str, count: int) -> Iterator[list[str | RowError]]:
        """See `Captioner.captions`."""
        pixels = image_inputs(self, rows)["pixel_values"].to(self.model.device)
        begun = self.text_inputs([prompt] * len(rows)) if prompt else {}
        # Before [SEP], which transformers takes off, a prompt is what the decoder has written so far.
        length = begun["input_ids"].shape[1] - 1 if prompt else 1
        lengths = {} if "max_new_tokens" in self.options else LENGTHS
        settings = {**lengths, **(DRAWN if is_drawn(self.options, count) else BEAMS), **self.options}
        given = {name: tensor.to(self.model.device) for name, tensor in begun.items()}
        try:
            written = self.model.generate(pixel_values=pixels, **given, num_return_sequences=count, **settings)
        except (ValueError, TypeError, ImportError, OverflowError) as error:
            raise refusal(error) from error
        texts = [self._text(ids[length:]) for ids in written.tolist()]
        for number in range(count):
            yield list(texts[number::count])

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode([each for each in ids if each not in self.outside])
        return text.strip()
