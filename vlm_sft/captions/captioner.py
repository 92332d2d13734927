"""What writes captions: a BLIP, a BLIP-2 or InstructBLIP, an existing VLM, or a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel

from ..base.errors import RowError, UserError
from ..base.names import MANIFEST, Json, Options
from ..batch.pictures import Pictures, ReadsPictures
from ..batch.processor import VLMProcessor
from ..encoders.encoder import Published, piece_of
from ..families.table import FAMILIES, default_template
from ..inference.generation import answer_each
from ..inference.settings import check_options, ignores_text, open_bundle, tidy
from ..pieces.checkpoints import fetch_file
from ..pieces.piece import Piece
from ..recipe.schema import Recipe
from ..rows.messages import image_part, text_part
from ..stack.build_stack import build_stack
from .blip import Blip
from .drawn import NUCLEUS

PROMPTS = {"en": "Describe this picture in one sentence.", "zh": "用一句话描述这张图片。"}
RESAMPLERS = {"blip-2": "qformer", "instructblip": "instruct_qformer"}
"""Published models that are a stack here → the type of their resampler."""
# BLIP-2 on OPT goes on with what it is given, which may be nothing, and ends with a line break (LAVIS, blip2_opt.py).
_CONTINUED = """
{%- for message in messages -%}
    {%- for part in message['content'] -%}
        {{- image_token if part['type'] == 'image' else '' -}}
    {%- endfor -%}
    {{- bos_token if message['role'] == 'user' else '' -}}
    {%- for part in message['content'] if part['type'] == 'text' -%}
        {%- if message['role'] == 'assistant' -%}
            {%- generation -%}{{- ' ' + part['text'] + '\\n' -}}{%- endgeneration -%}
        {%- else -%}
            {{- part['text'] | trim -}}
        {%- endif -%}
    {%- endfor -%}
{%- endfor -%}"""


class Captioner(Protocol):
    """Says what pictures show."""

    @property
    def reader(self) -> ReadsPictures:
        """Makes what the model takes of pictures."""

    @property
    def prompts(self) -> Mapping[str, str]:
        """Language → what it is asked where nobody gives a prompt; the languages that it can be asked in."""

    def check(self, prompts: Sequence[str]) -> None:
        """Looks whether it reads these prompts.

        Raises:
            UserError: It does not.
        """

    def captions(self, rows: Sequence[Pictures], prompt: str, count: int) -> Iterator[list[str | RowError]]:
        """Captions of pictures, one a row.

        Args:
            rows: Each with one picture.
            prompt: What all of them are asked.
            count: How many captions each gets.

        Yields:
            `count` times one caption a row, or why there is none.
        """


class Asked:
    """A model that answers: a bundle or an existing VLM; see `Captioner`."""

    def __init__(self, model: PreTrainedModel, processor: VLMProcessor, settings: Options, said: Options) -> None:
        self.model, self.reader, self.settings, self.said = model, processor, settings, said
        self.prompts: Mapping[str, str] = {"en": ""} if ignores_text(processor) else PROMPTS

    def check(self, prompts: Sequence[str]) -> None:
        """See `Captioner.check`."""
        if "" in self.prompts.values() and set(prompts) != {""}:
            raise UserError(
                "--captioner shows its model images only, so that no prompt is read: leave out --prompt and --language."
            )

    def captions(self, rows: Sequence[Pictures], prompt: str, count: int) -> Iterator[list[str | RowError]]:
        """See `Captioner.captions`."""
        content = [image_part(), *([text_part(prompt)] if prompt else [])]
        asked = [
            {"messages": [{"role": "user", "content": content}], "images": list(row.images), "id": row.where}
            for row in rows
        ]
        settings = self.settings if count == 1 else {**self.settings, **NUCLEUS, **self.said}
        for _ in range(count):
            yield [
                each if isinstance(each, RowError) else str(each)
                for each in answer_each(self.model, self.reader, asked, **settings)
            ]


def load_captioner(path: str, options: Options, device: str | torch.device | None = None) -> Captioner:
    """Loads what writes captions.

    Args:
        path: Bundle, or folder or Hub id of a BLIP, a BLIP-2, an InstructBLIP or another VLM.
        options: For transformers' `generate`.
        device: Where it runs; None: the first GPU if there is one, else the CPU.

    Raises:
        UserError: It cannot be had, or writes no captions.
    """
    check_options(options)
    options = tidy(options)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if fetch_file(path, MANIFEST, None, "--captioner", required=False) is not None:
        model, processor, settings = open_bundle(path, options, device=device)
        if processor.chooses:
            raise UserError(f"--captioner {path} chooses among answers and writes none: give a model that writes.")
        return Asked(model, processor, settings, options)
    piece = piece_of(path, None, "--captioner")
    kind = piece.whole.model_type
    if kind == "blip":
        return Blip(piece, options, device)
    if kind not in (*RESAMPLERS, *FAMILIES):
        raise UserError(
            f"--captioner {path} is a {kind!r} model: give a bundle, or a model of the types "
            f"{', '.join(('blip', *RESAMPLERS, *FAMILIES))}."
        )
    stack = build_stack(_recipe_of(piece, kind))
    return Asked(stack.model.to(device).eval().requires_grad_(False), stack.processor, dict(options), options)


def _recipe_of(piece: Piece[Published], kind: str) -> Recipe:
    """A recipe of a published model as it is; it is never trained."""
    named: Json = {"pretrained": piece.pretrained}
    text = piece.whole.get_text_config().model_type
    if kind in FAMILIES:
        template, model = default_template(piece.whole, piece.pretrained), {"model": named}
    else:
        template = "flant5" if text == "t5" else "instructblip" if kind == "instructblip" else _CONTINUED
        resampler, projector = {"type": RESAMPLERS[kind], **named}, {"type": "linear", **named}
        parts = {"vision_tower": named, "resampler": resampler, "projector": projector, "language_model": named}
        model = {"stack": parts}
    recipe = Recipe.model_validate(
        {
            **model,
            "chat_template": "plain",
            "lora": {"r": 1},  # a recipe has something to train; only a trainer puts it in
            "data": {"train": [{"path": "none.jsonl", "format": "caption"}]},
            "sft": {"output_dir": "none", "bf16": torch.cuda.is_available()},
        }
    )
    return recipe.model_copy(update={"chat_template": template})
