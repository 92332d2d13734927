"""Images cut into tiles, each of which the vision tower sees as a picture: LLaVA-1.6's anyres and InternVL's way.

How an image is cut is said by transformers' own image processors of the two, which are told the size, mean and
deviation of the tower's. What an image becomes follows from its size in pixels alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import BaseImageProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from ..base.errors import UserError
from ..base.names import Json
from ..batch.box_text import Seen
from ..batch.processor import VLMProcessor
from ..model.configuration import VLMConfig
from ..model.towers import tokens_in
from ..recipe.safety import check_picture

if TYPE_CHECKING:
    from ..recipe.schema import Recipe
    from ..recipe.sections import VisionTower

# (rows, columns) of LLaVA-1.6, whose own checkpoints say the same in pixels.
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
# What an image processor of tiles takes over from that of the tower.
KEPT = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
KEY = ("stack", "vision_tower")


class TiledProcessor(VLMProcessor):
    """A processor whose images become several tiles each, of `num_image_tokens` tokens; see `VLMProcessor`."""

    reads_sizes = True

    def count_image_tokens(self, size: tuple[int, int]) -> int:
        """Tokens of an image of (width, height) pixels."""
        raise NotImplementedError

    def expansion(self, size: tuple[int, int]) -> str:
        """What stands for an image of (width, height) pixels in the text."""
        return self.image_token * self.count_image_tokens(size)

    def tokens_of_images(self, images: int, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """See `VLMProcessor.tokens_of_images`.

        Raises:
            UserError: There are fewer sizes than images.
        """
        if len(sizes) < images:
            raise UserError(
                f"the conversation has places for {images} images, but the sizes of {len(sizes)} are given: how many "
                f"tokens an image becomes depends on its size here, so give encode_rendered the size of each."
            )
        return [self.count_image_tokens(size) for size in sizes[:images]]

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor | None:
        """(N, 3, H, W) pixel values of all tiles of RGB images, in reading order, or None for none."""
        return torch.cat([self._cut(image) for image in images]) if images else None

    def image_inputs(self, images: Sequence[Image.Image], instructions: Sequence[str]) -> dict[str, torch.Tensor]:
        """What a model takes for I images: pixels of N tiles, an instruction for each of those, and (I, 2) sizes."""
        if not images:
            return {}
        tiles = [self._cut(image) for image in images]
        texts = [text for text, cut in zip(instructions, tiles, strict=False) for _ in cut]
        sizes = [[image.height, image.width] for image in images]
        made = {"pixel_values": torch.cat(tiles), **self.instruction_inputs(texts)}
        return {**made, "image_sizes": torch.tensor(sizes)} if self.lays_out else made

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
        """What `ProcessorMixin.__call__` asks for: tensors of images, and what stands for each in the text."""
        flat = [image for each in images for image in (each if isinstance(each, list) else [each])]
        flat = [image.convert("RGB") for image in flat]
        return self.image_inputs(flat, [""] * len(flat)), [self.expansion(image.size) for image in flat]

    @property
    def needed_side(self) -> int | None:
        """None: a large image is cut into tiles, and needs all of its pixels."""
        return None

    def grown_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """See `VLMProcessor.grown_size`; pictures of tiles are bounded, whatever the image."""
        return size

    def seen(self, size: tuple[int, int]) -> Seen:
        """See `VLMProcessor.seen`: all of the picture, in its own size."""
        return Seen.whole(size)

    def check_seen(self) -> None:
        """See `VLMProcessor.check_seen`; what is cut into tiles is the whole picture."""

    # -- what differs between the two ---------------------------------------------------------------------------------

    lays_out = False

    def _cut(self, image: Image.Image) -> torch.Tensor:
        raise NotImplementedError


class AnyresProcessor(TiledProcessor):
    """LLaVA-1.6's: a picture of all, then the tiles, which a `TileLayout` puts beside each other again."""

    lays_out = True

    def count_image_tokens(self, size: tuple[int, int]) -> int:
        """See `TiledProcessor.count_image_tokens`."""
        side, grids = _side(self.image_processor), self.image_processor.image_grid_pinpoints
        return tokens_in(size[::-1], self.num_image_tokens, side, grids)

    def _cut(self, image: Image.Image) -> torch.Tensor:
        return self.image_processor([image], return_tensors="pt")["pixel_values"][0]


class DynamicProcessor(TiledProcessor):
    """InternVL's: the tiles, then a picture of all where there are several."""

    def count_image_tokens(self, size: tuple[int, int]) -> int:
        """See `TiledProcessor.count_image_tokens`."""
        return self.num_image_tokens * self.image_processor.get_number_of_image_patches(size[1], size[0])

    def _cut(self, image: Image.Image) -> torch.Tensor:
        return self.image_processor([image], return_tensors="pt")["pixel_values"]


PROCESSORS: dict[str, type[TiledProcessor]] = {"anyres": AnyresProcessor, "dynamic": DynamicProcessor}


def processor_class(config: VLMConfig) -> type[VLMProcessor]:
    """The processor of a stack with this configuration."""
    return VLMProcessor if config.tiles is None else PROCESSORS[config.tiles["type"]]


def cut_tiles(images: BaseImageProcessor, spec: VisionTower, where: str) -> BaseImageProcessor:
    """The image processor of a tower, or in its place one that cuts images into tiles of its size.

    Args:
        images: Of the tower.
        spec: What the recipe says of the tower.
        where: Named in messages.

    Raises:
        UserError: Its pictures have no one side, or tiles would be more, or make larger pictures, than any model takes.
    """
    if spec.tiles is None:
        return images
    settings = images.to_dict()
    side = _side(images)
    made = {name: settings[name] for name in KEPT if name in settings}
    square = {"height": side, "width": side}
    cut: BaseImageProcessor
    if spec.tiles == "anyres":
        grids = [[rows * side, columns * side] for rows, columns in spec.tile_grids or GRIDS]
        if spec.tile_grids is None and type(images).__name__.startswith("LlavaNextImageProcessor"):
            grids = [list(grid) for grid in images.image_grid_pinpoints]
            if any(pixels % side for grid in grids for pixels in grid):
                raise UserError(
                    f"{where} cuts images into sizes that are no multiples of a tile of {side} pixels; say "
                    f"{'.'.join(KEY)}.tile_grids, in tiles."
                )
        check_picture({"image_grid_pinpoints": grids}, where, "`tile_grids`")
        cut = LlavaNextImageProcessorPil(
            **made, size={"shortest_edge": side}, crop_size=square, image_grid_pinpoints=grids
        )
    else:
        most = spec.max_tiles or settings.get("max_patches") or 12
        fewest = min(settings.get("min_patches") or 1, most)
        check_picture({"max_patches": most}, where, "`max_tiles`")
        cut = GotOcr2ImageProcessorPil(**made, size=square, crop_to_patches=True, min_patches=fewest, max_patches=most)
    check_picture(cut.to_dict(), where)
    return cut


def tiles_of(images: BaseImageProcessor) -> Json | None:
    """`VLMConfig.tiles` of an image processor that `cut_tiles` made, or that was read again; None of another."""
    kind = type(images).__name__
    if kind.startswith("LlavaNextImageProcessor"):
        grids = [list(grid) for grid in images.image_grid_pinpoints]
        return {"type": "anyres", "side": _side(images), "grids": grids}
    if kind.startswith("GotOcr2ImageProcessor") and images.crop_to_patches:
        return {"type": "dynamic", "min": images.min_patches, "max": images.max_patches}
    return None


def _side(images: BaseImageProcessor) -> int:
    """Pixels of a side of what an image processor makes at last."""
    cropped = dict(getattr(images, "crop_size", None) or {}) if getattr(images, "do_center_crop", False) else {}
    size = {**dict(images.size), **{name: value for name, value in cropped.items() if value}}
    return int(size.get("height") or size.get("shortest_edge") or 0)


def refuse_beside_tiles(recipe: Recipe) -> None:
    """Refuses what a recipe says that does not go with its tiles.

    Raises:
        UserError: It does.
    """
    tower, resampler = recipe.parts.vision_tower, recipe.parts.resampler
    for name, kind in (("tile_grids", "anyres"), ("max_tiles", "dynamic")):
        if getattr(tower, name) is not None and tower.tiles != kind:
            raise UserError(
                f"{recipe.where((*KEY, name))}: `{name}` belongs to `tiles: {kind}`; add that or remove it."
            )
    where = recipe.where((*KEY, "tiles"))
    if tower.tile_grids == []:
        raise UserError(f"{recipe.where((*KEY, 'tile_grids'))}: it is empty; remove it, or name grids like [2, 2].")
    if tower.tiles and tower.pad_to_square:
        raise UserError(
            f"{where}: tiles keep the shape of an image, so it is not padded to a square; remove `pad_to_square`."
        )
    if tower.tiles == "anyres" and resampler is not None:
        raise UserError(
            f"{where}: `anyres` lays patches out as they lie in the image, and behind a {resampler.type} there are "
            f"queries in place of patches; use `tiles: dynamic`, or remove the resampler."
        )


def check_tiles(config: VLMConfig, size: tuple[int, int]) -> None:
    """Checks that tiles can be laid out beside each other.

    Args:
        config: With its tiles and the tokens of each.
        size: (height, width) of a tile in pixels.

    Raises:
        UserError: They are no squares, in pixels or in tokens.
    """
    if config.tiles is None:
        return
    if size[0] != size[1]:
        raise UserError(
            f"{'.'.join(KEY)}.tiles: the vision tower sees pictures of {size[0]}×{size[1]} pixels, and tiles are "
            f"squares; remove `tiles`, or use another tower."
        )
    tokens = config.num_image_tokens
    if config.tiles["type"] == "anyres" and math.isqrt(tokens) ** 2 != tokens:
        raise UserError(
            f"{'.'.join(KEY)}.tiles: `anyres` lays the tokens of tiles out in squares, and a tile has {tokens}, "
            f"which is no square; set {'.'.join(KEY)}.feature_select: patch (no class token), or use `dynamic`."
        )


def most_tokens(config: VLMConfig) -> int:
    """The most tokens that an image may become."""
    tokens, tiles = config.num_image_tokens, config.tiles
    if tiles is None:
        return tokens
    if tiles["type"] == "dynamic":
        return tokens * (tiles["max"] + (tiles["max"] > 1))
    edge = math.isqrt(tokens)
    sizes = [(height // tiles["side"] * edge, width // tiles["side"] * edge) for height, width in tiles["grids"]]
    return tokens + max(rows * (columns + 1) for rows, columns in sizes)
