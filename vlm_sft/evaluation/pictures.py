"""Pictures of a benchmark: those out of tables put away once each, and all of them encoded once for all questions."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import BytesIO
from tempfile import SpooledTemporaryFile
from types import TracebackType
from typing import Any

import torch
from PIL import Image

from ..base.names import ImageEntry, Row
from ..batch.pictures import load_picture, name_of, refused
from ..batch.processor import VLMProcessor
from ..families.seen_once import ImagePath
from ..model.modeling import VLMForConditionalGeneration
from ..model.towers import see
from ..reading.image_refs import image_key

IN_MEMORY = 256 * 2**20  # bytes of pictures out of tables; more go into a file without a name
MOST_BYTES = 2 * 2**30  # bytes of features that are kept at a time


class Pictures:
    """Encoded pictures out of tables, each once, kept outside the memory where they are many."""

    def __init__(self) -> None:
        self._file = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0

    def keep(self, image: ImageEntry) -> ImageEntry:
        """An image as rows have it → the same, with its bytes put away."""
        data = image.pop("bytes")
        if data is None:
            return {**image, "bytes": None}
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._places:
            self._file.seek(self._end)
            self._file.write(data)
            self._places[digest] = self._end, len(data)
            self._end += len(data)
        return {**image, "digest": digest, "place": self._places[digest]}

    def whole(self, image: ImageEntry) -> ImageEntry:
        """An image with its bytes, as rows have it."""
        if "place" not in image:
            return dict(image)
        start, length = image["place"]
        self._file.seek(start)
        rest = {name: value for name, value in image.items() if name not in ("place", "digest")}
        return {**rest, "bytes": self._file.read(length)}


def grey() -> ImageEntry:
    """A grey picture, as rows have it."""
    stream = BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(stream, "PNG")
    return {"path": None, "bytes": stream.getvalue()}


class EncodedOnce:
    """A context in which each picture goes through the vision tower once, however many questions are on it.

    In place of pictures, rows have stand-ins whose colour is a number, and the processor gives what came out of the
    tower for that number in place of pixels; of an existing VLM, the whole image path.

    Args:
        model: A composed model, or an existing VLM (`model:`).
        processor: Its processor.
    """

    def __init__(self, model: torch.nn.Module, processor: VLMProcessor) -> None:
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._core = core if isinstance(core, VLMForConditionalGeneration) and not processor.reads_sizes else None
        self._path = ImagePath(core, processor) if hasattr(core, "image_path") else None  # type: ignore[arg-type]
        self._processor = processor
        self._kept: OrderedDict[bytes, Any] = OrderedDict()  # tensors, or of an existing VLM what is `Seen`
        self._now: list[Any] = []
        self._giving = ExitStack()
        self.encoded = 0

    def __enter__(self) -> EncodedOnce:
        """Puts itself between the processor and the pictures."""
        if self._core is not None or self._path is not None:
            self._processor.image_inputs = self._image_inputs  # type: ignore[method-assign]
        if self._path is not None:
            self._giving.enter_context(self._path.giving(lambda: self._now))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Takes itself away."""
        self._processor.__dict__.pop("image_inputs", None)
        self._giving.close()

    def stand_ins(self, rows: Sequence[Row]) -> list[ImageEntry]:
        """Conversations with stand-ins in place of their pictures, which are encoded now where they are not kept.

        Raises:
            RowError: A picture cannot be read, or the model's own processor refuses it.
        """
        if self._core is None and self._path is None:
            return list(rows)
        keys = [image_key(image) for row in rows for image in row["images"]]
        new = {
            key: (image, row) for row in rows for image in row["images"] if (key := image_key(image)) not in self._kept
        }
        if new:
            self.encode(new)
        self._now = [self._kept[key] for key in keys]
        for key in keys:
            self._kept.move_to_end(key)
        size = sum(each.nbytes for each in self._kept.values())
        while len(self._kept) > len(set(keys)) and size > MOST_BYTES:
            size -= self._kept.popitem(last=False)[1].nbytes
        stand_ins = (_stand_in(number, getattr(seen, "size", None)) for number, seen in enumerate(self._now))
        return [{**row, "images": [next(stand_ins) for _ in row["images"]]} for row in rows]

    @torch.inference_mode()
    def encode(self, new: Mapping[bytes, tuple[ImageEntry, Row]]) -> None:
        """Keeps what the tower gives for pictures: key → picture, and a row that has it."""
        if self._path is not None:
            for key, (image, row) in new.items():
                where = f"row {row['id']}"
                picture = load_picture(self._processor, image, where=where)
                with _of_picture(where, name_of(image), picture.size, "the model"):
                    self._kept[key] = self._path.look(picture)
                self.encoded += 1
            return
        assert self._core is not None
        tower, config, pixels, named = self._core.model.vision_tower, self._core.config, [], []
        device = next(tower.parameters()).device
        for image, row in new.values():
            where = f"row {row['id']}"
            picture = load_picture(self._processor, image, where=where)
            named.append((where, name_of(image), picture.size))
            with _of_picture(*named[-1], "the model's image processor"):
                made = self._processor.encode_images([picture])
                assert made is not None
                pixels.append(made.to(device))
        try:
            features = see(tower, config, torch.cat(pixels))
        except torch.OutOfMemoryError:
            raise
        except Exception:
            for one, of in zip(pixels, named, strict=True):
                with _of_picture(*of, "the model"):
                    see(tower, config, one)
            raise
        self._kept |= dict(zip(new, features, strict=True))
        self.encoded += len(new)

    def _image_inputs(self, images: Sequence[Image.Image], instructions: Sequence[str]) -> dict[str, torch.Tensor]:
        if not images:
            return {}
        if self._path is not None:
            return self._path.inputs([_number(image) for image in images], self._now)
        features = torch.stack([self._now[_number(image)] for image in images])
        return {"image_features": features, **self._processor.instruction_inputs(instructions)}


@contextmanager
def _of_picture(where: str, name: str, size: tuple[int, int], by: str) -> Iterator[None]:
    """Makes whatever is raised within the error of one picture."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # image processors and towers raise anything
        raise refused(where, name, size, by, error) from error


def _stand_in(number: int, size: object = None) -> Image.Image:
    """A picture that is a number; of its own size where its tokens are counted by that."""
    return Image.new(
        "RGB", size if isinstance(size, tuple) else (1, 1), (number >> 16 & 255, number >> 8 & 255, number & 255)
    )


def _number(image: Image.Image) -> int:
    red, green, blue = image.getpixel((0, 0))  # type: ignore[misc]
    return red << 16 | green << 8 | blue
