"""What a vision tower that was trained has forgotten of the texts that it was pretrained beside.

CLIP, SigLIP and their kin have a text tower, to which a tuned vision tower should still be true: it names pictures of
known things (zero-shot), and finds a right caption a better match than those of other pictures, as a filter of captions
does. Both are measured with the published weights and with the tuned ones in their place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from peft.tuners.lora import LoraLayer
from PIL import Image
from torch.nn import functional

from ..base.assets import assets_root
from ..base.errors import UserError
from ..base.names import Json
from ..base.progress import steps
from ..base.whole_files import open_regular, read_text
from ..data.dataset import load_source
from ..prepare.scorer import Scorer
from ..reading.images import load_image

if TYPE_CHECKING:
    from torch import nn

    from ..recipe.schema import Recipe

DUAL = ("clip", "siglip", "siglip2", "chinese_clip", "altclip")
PROMPTS = {"chinese_clip": "一张{}的照片"}
PROMPT = "a photo of {}"
PAIRS = 64  # captions, each compared with the pictures of the others
EACH = 6  # pictures of each digit that ships
AT_ONCE = 16
KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass
class Pictures:
    """What a tower is shown: pictures with a label, and pictures with their captions."""

    labelled: list[tuple[Image.Image, str]] = field(default_factory=list)
    captioned: list[tuple[Image.Image, str]] = field(default_factory=list)


def read_pictures(
    folder: str | None, recipe: Recipe | None, say: Callable[[str], None] = lambda line: None
) -> Pictures:
    """Pictures in folders named by what they show (default: digits that ship), and captions of `data.eval` or `test`.

    Args:
        folder: With a folder for each label.
        recipe: For its `data`; None for no captions.
        say: Told of a source of captions that is not there.

    Raises:
        UserError: The folder has no such folders, or a picture cannot be read.
    """
    found = Pictures(_digits() if folder is None else _in_folders(Path(folder).expanduser()))
    for source in [*recipe.data.eval, *recipe.data.test] if recipe else []:
        if source.format not in ("caption", "coco", "cc_sbu_align"):
            continue
        few = source.model_copy(update={"max_rows": min(source.max_rows or PAIRS, PAIRS)})
        try:
            for row in load_source(few):
                if len(row["images"]) == 1 and len(found.captioned) < PAIRS:
                    said = "".join(part["text"] or "" for part in row["messages"][-1]["content"])
                    found.captioned.append((load_image(row["images"][0], where=f"row {row['id']}"), said))
        except UserError as error:
            say(f"The captions of {source.name} are not compared: {error}")
    return found


def _in_folders(folder: Path) -> list[tuple[Image.Image, str]]:
    kinds = sorted(path for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []
    found = [
        (load_image(str(path), where=str(folder)), kind.name.replace("_", " "))
        for kind in kinds
        for path in sorted(kind.iterdir())
        if path.suffix.lower() in KINDS
    ]
    if len({label for _, label in found}) < 2:
        raise UserError(
            f"{str(folder)!r} has no pictures of two kinds: make a folder for each, named by what its pictures show."
        )
    return found


def _digits() -> list[tuple[Image.Image, str]]:
    """The handwritten digits of the example, dark on white."""
    folder = assets_root() / "examples" / "digitscenes"
    facts = json.loads(read_text(folder / "sprites.json"))
    tile, columns, rows = facts["tile"], facts["columns"], facts["rows_per_label"]
    with open_regular(folder / "sprites.png") as file, Image.open(file) as opened:
        sheet = opened.convert("L")
    found = []
    for digit in range(len(facts["counts"])):
        for place in range(EACH):
            left, top = place % columns * tile, (digit * rows + place // columns) * tile
            small = sheet.crop((left, top, left + tile, top + tile))
            large = small.resize((112, 112), Image.Resampling.BILINEAR)
            found.append((Image.eval(large, lambda value: 255 - value).convert("RGB"), f"the digit {digit}"))
    return found


class TowerTest:
    """Compares a tuned vision tower with its piece.

    Args:
        pretrained: The piece: a dual encoder.
        pictures: What is shown.
        device: Where it is computed.

    Raises:
        UserError: The piece has no text tower.
    """

    def __init__(self, pretrained: str, pictures: Pictures, device: str | torch.device | None = None) -> None:
        self.pictures = pictures
        self.scorer = Scorer(pretrained, device)
        kind = self.scorer.model.config.model_type
        if kind not in DUAL:
            raise UserError(
                f"{pretrained} is a {kind!r} model: what a tower forgot is measured of those of {', '.join(DUAL)}."
            )
        self.prompt = PROMPTS.get(kind, PROMPT)

    def compare(self, tower: nn.Module) -> dict[str, Json]:
        """What both weigh: `zero_shot` and `ranking`, each `before`, `after` and `of` how many.

        Args:
            tower: The vision tower of a stack, maybe with LoRA in it.

        Raises:
            UserError: It is another than the piece's.
        """
        before = self._measure()
        self._fill(weights_of(tower))
        after = self._measure()
        return {name: {"before": before[name][0], "after": after[name][0], "of": before[name][1]} for name in before}

    @torch.inference_mode()
    def _measure(self) -> dict[str, tuple[float, int]]:
        found = {}
        if labelled := self.pictures.labelled:
            labels = sorted({label for _, label in labelled})
            close = self._seen([picture for picture, _ in labelled]) @ self._read(map(self.prompt.format, labels)).T
            right = [labels[k] == label for k, (_, label) in zip(close.argmax(1).tolist(), labelled, strict=True)]
            found["zero_shot"] = (sum(right) / len(right), len(right))
        captions = [caption for _, caption in self.pictures.captioned]
        if len(set(captions)) > 1:
            close = self._seen([picture for picture, _ in self.pictures.captioned]) @ self._read(captions).T
            # Pictures with the same caption are no wrong pairs.
            others = torch.tensor([[a != b for b in captions] for a in captions], device=close.device)
            won = (close.diagonal()[:, None] > close).float() + 0.5 * (close.diagonal()[:, None] == close).float()
            found["ranking"] = (won[others].mean().item(), len(captions))
        return found

    def _seen(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        parts = [list(pictures[start : start + AT_ONCE]) for start in range(0, len(pictures), AT_ONCE)]
        model = self.scorer.model
        shown = steps(parts, "shown", f"lots of {AT_ONCE} pictures")
        made = [model.get_image_features(**self.scorer.pixels(some)).pooler_output for some in shown]
        return functional.normalize(torch.cat(made), dim=-1)

    def _read(self, texts: Iterable[str]) -> torch.Tensor:
        padding = "max_length" if self.scorer.model.config.model_type.startswith("siglip") else True
        tokens = self.scorer.tokens(list(texts), padding=padding)
        return functional.normalize(self.scorer.model.get_text_features(**tokens).pooler_output, dim=-1)

    def _fill(self, weights: dict[str, torch.Tensor]) -> None:
        own = dict(self.scorer.model.vision_model.named_parameters())
        tuned = {name: weights.get(name, weights.get(f"vision_model.{name}")) for name in own}
        wrong = [name for name, value in tuned.items() if value is None or value.shape != own[name].shape]
        # A tower may have lost what comes behind the layer that is read, such as the pooling head.
        if len(wrong) == len(own) or any("embedding" in name or ".layers.0." in name for name in wrong):
            raise UserError(f"the vision tower is not that of its piece: {wrong[0]} differs, so it is not compared.")
        with torch.no_grad():
            for name, parameter in own.items():
                if name not in wrong:
                    parameter.copy_(cast("torch.Tensor", tuned[name]).to(parameter))


def weights_of(tower: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a tower under the names of its piece, with LoRA merged into copies of them."""
    found = {}
    for name, value in tower.state_dict().items():
        if "lora_" not in name:
            found[name.replace(".base_layer", "")] = value
    for name, module in tower.named_modules():
        if isinstance(module, LoraLayer):
            weight = found[f"{name}.weight"].clone()
            for adapter in module.lora_A:
                weight += module.get_delta_weight(adapter).to(weight)  # type: ignore[operator]
            found[f"{name}.weight"] = weight
    return found


def was_tuned(tower: nn.Module, trained: Sequence[str]) -> bool:
    """Whether a stage changed a tower: whole, or by LoRA."""
    return "vision_tower" in trained or any(isinstance(module, LoraLayer) for module in tower.modules())
