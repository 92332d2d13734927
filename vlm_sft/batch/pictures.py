"""Where pictures meet a model's own image processor: what it refuses is the error of one row, not of its batch.

Image processors raise whatever their libraries raise, over a whole batch, and name no picture. So a batch that fails is
tried again row by row and picture by picture; where none fails by itself, the error is not a picture's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from PIL import Image

from ..base.errors import RowError, row_error
from ..base.limits import limits
from ..base.names import ImageEntry, Inputs
from ..base.words import reason_of
from ..reading.images import ImageLike, image_size, load_image, too_long
from ..reading.video import Films
from ..rows.videos import shows_frames

if TYPE_CHECKING:
    from .processor import VLMProcessor

BLANK = (64, 64)  # (width, height) of a picture that every image processor and tower takes
NO_SIDE = re.compile(r"Size must contain .*(height|width)=0\b")
ODD_SIDE, ODD_SHAPE = 28, 8.0  # shorter, or longer by its width, than what image processors are made for


class ReadsPictures(Protocol):
    """What is asked of a processor here; see `VLMProcessor`."""

    reads_sizes: bool
    one_image: bool

    def grown_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the largest picture on the way."""

    def expansion(self, size: tuple[int, int]) -> str:
        """What stands for an image of that size in the text, of a processor that `reads_sizes`."""

    def image_inputs(self, images: Sequence[Image.Image], instructions: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the model takes for images."""


class KeepsFeatures(Protocol):
    """What is asked of a cache of features; see `cache.prefix.Kept`."""

    def picture(self, image: ImageEntry, decode: Callable[[], Image.Image]) -> Image.Image:
        """The picture, decoded only where its features are not kept."""

    def image_inputs(
        self, processor: VLMProcessor, images: Sequence[Image.Image], instructions: Sequence[str]
    ) -> Inputs:
        """What a batch has of such pictures."""


class Pictures(NamedTuple):
    """The pictures of one row.

    Attributes:
        images: RGB images.
        instructions: What is said beside each, or fewer.
        where: The row in words; "" where there is one alone.
        names: Paths of the images, or fewer.
    """

    images: Sequence[Image.Image]
    instructions: Sequence[str] = ()
    where: str = ""
    names: Sequence[str] = ()


class PictureError(RowError):
    """A picture that can be decoded, and that the model's own image processor or vision tower refuses."""


def refused(where: str, name: str, size: tuple[int, int], by: str, error: Exception) -> PictureError:
    """The error of one picture.

    Args:
        where: Its row in words; "" for none.
        name: Its path, or "".
        size: (width, height) in pixels.
        by: What refuses it.
        error: What that says.
    """
    what = f"the image {name}" if name else "an image"
    sentence = (
        f"{where and where + ': '}{what} of {size[0]:,} x {size[1]:,} pixels is refused by {by} "
        f"({why(error)}): give it another shape or format, or remove {'the row' if where else 'it'}."
    )
    return PictureError(sentence, where=where, reason="image refused")


def why(error: Exception) -> str:
    """What an image processor says, in the words of a sentence."""
    said = reason_of(error)
    # transformers takes a side of 0 pixels for one that was not given.
    return "resized, its short side has no pixel left" if NO_SIDE.search(said) else said[:200]


def load_picture(
    processor: ReadsPictures,
    image: ImageLike,
    *,
    where: str = "",
    max_pixels: int | None = None,
    side: int | None = None,
    fetch: Callable[[str], str] | None = None,
    films: Films | None = None,
) -> Image.Image:
    """One image of a row as RGB, of which the processor makes no more pixels than `max_pixels`.

    Args and Raises: see `load_image`.
    """
    loaded = load_image(image, where=where, max_pixels=max_pixels, side=side, fetch=fetch, films=films)
    grown = processor.grown_size(loaded.size)
    if grown[0] * grown[1] > (most := max_pixels or limits().image_pixels):
        raise too_long(where, name_of(image) or "in the row", loaded, grown, most)
    return loaded


def picture_size(
    image: ImageLike,
    *,
    where: str = "",
    max_pixels: int | None = None,
    fetch: Callable[[str], str] | None = None,
    films: Films | None = None,
) -> tuple[int, int]:
    """(width, height) of one image of a row, mostly from the head of its file.

    Raises:
        RowError: As `load_image`; also where its head says that it has more than `max_pixels`.
    """
    size = image_size(image, where=where, fetch=fetch, films=films)
    if size[0] * size[1] > (max_pixels or limits().image_pixels):
        load_image(image, where=where, max_pixels=max_pixels, fetch=fetch, films=films)
    return size


def picture_sizes(
    processor: ReadsPictures,
    images: Sequence[ImageLike],
    *,
    where: str = "",
    max_pixels: int | None = None,
    fetch: Callable[[str], str] | None = None,
    films: Films | None = None,
) -> list[tuple[int, int]]:
    """(width, height) of a row's images where the number of their tokens depends on it, else nothing.

    Raises:
        RowError: As `picture_size`, or the model's own processor takes no image of such a shape.
    """
    sizes = []
    for image in images if processor.reads_sizes else ():
        sizes.append(picture_size(image, where=where, max_pixels=max_pixels, fetch=fetch, films=films))
        try:
            processor.expansion(sizes[-1])
        except RowError as error:
            name = name_of(image)
            said = str(error).replace("an image of", f"the image {name} of") if name else str(error)
            raise RowError(f"{where and where + ': '}{said}", where=where, reason=error.reason) from error
    return sizes


def name_of(image: object) -> str:
    """The path of an image as rows have it; "" where it has none."""
    path = image.get("path") if isinstance(image, Mapping) else image
    return str(path) if isinstance(path, str) else ""


def image_inputs(processor: ReadsPictures, rows: Sequence[Pictures]) -> dict[str, torch.Tensor]:
    """What the model takes for the pictures of several rows; see `VLMProcessor.image_inputs`.

    Raises:
        PictureError: The processor refuses one; the message names its row.
    """
    images = [image for row in rows for image in row.images]
    try:
        return processor.image_inputs(images, [text for row in rows for text in row.instructions])
    except Exception:
        for row in rows:
            check_pictures(processor, row)
        raise


def check_pictures(processor: ReadsPictures, row: Pictures) -> None:
    """Sends each picture of a row through the processor by itself.

    Raises:
        PictureError: The processor refuses one, or makes something of another shape of it than of others.
    """
    made = _shape(processor, Image.new("RGB", BLANK), "") if row.images and not processor.reads_sizes else None
    for number, image in enumerate(row.images):
        try:
            shape = _shape(processor, image, row.instructions[number] if number < len(row.instructions) else "")
            if made is not None and shape != made:
                raise ValueError(f"it makes {_by(shape)} of it, and {_by(made)} of others")
        except Exception as error:  # image processors raise anything
            name = row.names[number] if number < len(row.names) else ""
            raise refused(row.where, name, image.size, "the model's image processor", error) from error


def read_pictures(processor: ReadsPictures, images: Sequence[ImageLike], names: Sequence[str]) -> list[Image.Image]:
    """Pictures that somebody gives to ask about, each tried on the processor.

    Args:
        processor: The model's.
        images: As `load_picture` takes them.
        names: Their paths.

    Raises:
        RowError: As `load_picture`, or the processor refuses one.
    """
    loaded = [load_picture(processor, image) for image in images]
    check_pictures(processor, Pictures(loaded, names=names))
    return loaded


def check_frames(processor: ReadsPictures, images: Sequence[ImageLike], where: str) -> None:
    """Looks whether a model can be shown a row's video.

    Raises:
        RowError: It takes one image, and the video is shown as several.
    """
    if processor.one_image and len(images) > 1 and shows_frames(images):
        what = f"its video is shown as {len(images)} images, and this model was made for one"
        mend = "set `video: {frames: 1}`, or take a model that reads several (docs/systems.md)"
        raise row_error(where, what, mend, "one image only")


def is_odd(image: Image.Image) -> bool:
    """Whether an image is so small or thin that an image processor may refuse it."""
    return min(image.size) < ODD_SIDE or max(image.size) > ODD_SHAPE * min(image.size)


def _shape(processor: ReadsPictures, image: Image.Image, instruction: str) -> tuple[int, ...]:
    pixels = processor.image_inputs([image], [instruction]).get("pixel_values")
    return () if pixels is None else tuple(pixels.shape)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


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
