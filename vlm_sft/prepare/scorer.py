"""How well a text fits an image, by a model that was trained to match them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch.nn import functional

from ..base.errors import UserError
from ..base.words import one_line
from ..encoders.ask import match
from ..encoders.encoder import piece_of
from ..encoders.vle import load_vle
from ..pieces.beside import check_processor, check_tokenizer, refuse_adapter
from ..pieces.checkpoints import WEIGHT_FILES, Checkpoint
from ..pieces.expected import IMAGES, MODEL, TOKENIZER, laid_out
from ..pieces.load_parts import check_size

KEY = "--model"


class Scorer:
    """Scores pairs of an image and a text with a model of transformers.

    CLIP, SigLIP and their kin give the cosine of the two embeddings (-1 … 1), the matching heads of BLIP and VLE the
    probability that they belong together (0 … 1). A text is cut to what the model reads.

    Args:
        path: Folder or Hub id of the model, with its processor.
        device: Where it runs; default the first GPU if there is one, else the CPU.
        key: What messages call the model.

    Raises:
        UserError: There is no such model, or it does not match images and texts.
    """

    def __init__(self, path: str, device: str | torch.device | None = None, key: str = KEY) -> None:
        from transformers import AutoModel, AutoProcessor, BlipForImageTextRetrieval

        try:
            piece = piece_of(path, None, key)
            config = piece.whole
            kind = config.model_type
            if kind not in SCORES:
                raise UserError(
                    f"{key} {path} is a {kind!r} model: give one that matches images and texts, of the types "
                    f"{', '.join(SCORES)}."
                )
            if kind == "vle":
                self.processor = load_vle(path, "itm", key=key, device=None if device is None else str(device))
                self.processor.cuts, self.model = True, self.processor.model
                self.device, self._score = self.model.device, SCORES[kind]
                return
            if kind == "blip" and "BlipForImageTextRetrieval" not in (config.architectures or ()):
                raise UserError(f"{key} {path} has no matching head: give a BLIP-ITM model, like blip-itm-base-coco.")
            model_class = BlipForImageTextRetrieval if kind == "blip" else AutoModel
            weights = Checkpoint(path, None, key, WEIGHT_FILES[:2])  # in safetensors
            refuse_adapter(path, None, key)
            check_tokenizer(path, None, key)
            check_processor(path, None, key)
            weights.check_shards()
            check_size(model_class._from_config if kind == "blip" else AutoModel.from_config, config, weights)
            place = laid_out(path, None, key, (*MODEL, *IMAGES, *TOKENIZER), weights)
            self.model = model_class.from_pretrained(place, use_safetensors=True, dtype=torch.float32).eval()
            self.processor = AutoProcessor.from_pretrained(place, use_fast=False)
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{key} {path} cannot be loaded: {one_line(error)[:300]}") from None
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model.to(self.device)
        self._score = SCORES[kind]

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """Scores of N pairs."""
        return self._score(self, list(images), list(texts)).float().tolist() if images else []

    def tokens(self, texts: list[str], **padding: Any) -> dict[str, torch.Tensor]:
        """Texts as the model reads them: (N, L) ids and mask, cut where it ends."""
        longest = self.model.config.text_config.max_position_embeddings
        return self.processor(text=texts, return_tensors="pt", truncation=True, max_length=longest, **padding).to(
            self.device
        )

    def pixels(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """Images as the model sees them: (N, 3, H, W)."""
        return self.processor.image_processor(images=images, return_tensors="pt").to(self.device)

    def reads(self, text: str) -> bool:
        """Whether the model knows most of a text's words: what it does not know it cannot compare with an image."""
        tokenizer = self.processor.tokenizer
        unknown, ids = tokenizer.unk_token_id, tokenizer(text, add_special_tokens=False)["input_ids"]
        return unknown in (None, tokenizer.eos_token_id) or 2 * ids.count(unknown) <= len(ids)


def _each_once(images: list[Image.Image]) -> tuple[list[Image.Image], list[int]]:
    """Pictures without those that come again, and where each of all stands among them: several texts, one look."""
    places: dict[int, int] = {}
    numbers = [places.setdefault(id(image), len(places)) for image in images]
    return [images[numbers.index(place)] for place in range(len(places))], numbers


def _cosine(scorer: Scorer, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
    # SigLIP was trained on texts padded to their full length, without a mask.
    padding = "max_length" if scorer.model.config.model_type.startswith("siglip") else True
    once, numbers = _each_once(images)
    seen = scorer.model.get_image_features(**scorer.pixels(once)).pooler_output[numbers]
    read = scorer.model.get_text_features(**scorer.tokens(texts, padding=padding)).pooler_output
    return functional.cosine_similarity(seen, read)


def _matching(scorer: Scorer, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
    """P(match) of BLIP's image-text matching head."""
    model = scorer.model
    once, numbers = _each_once(images)
    seen = model.vision_model(**scorer.pixels(once)).last_hidden_state[numbers]
    everywhere = torch.ones(seen.shape[:-1], dtype=torch.long, device=seen.device)
    read = model.text_encoder(
        **scorer.tokens(texts, padding=True), encoder_hidden_states=seen, encoder_attention_mask=everywhere
    ).last_hidden_state
    return model.itm_head(read[:, 0]).softmax(-1)[:, 1]


def _of_vle(scorer: Scorer, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
    return torch.tensor(match(scorer.processor, images, texts))


SCORES: dict[str, Callable[[Scorer, list[Image.Image], list[str]], torch.Tensor]] = {
    "clip": _cosine,
    "siglip": _cosine,
    "siglip2": _cosine,
    "chinese_clip": _cosine,
    "altclip": _cosine,
    "blip": _matching,
    "vle": _of_vle,
}


def decides(path: str, key: str = KEY) -> float | None:
    """The score from which a model itself takes a pair for one that belongs together; None where it says nothing of it.

    Raises:
        UserError: There is no such model, or it does not match images and texts.
    """
    kind = piece_of(path, None, key).whole.model_type
    return None if SCORES.get(kind) is _cosine else 0.5
