"""What an existing VLM makes of pictures, kept and given again: for many questions on few pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from PIL import Image
from transformers.utils import ModelOutput

from ..base.names import Inputs
from ..batch.processor import VLMProcessor
from .model import IMAGE_OUTPUTS, FamilyModel

# Of an image's inputs, those that the model looks at beside the features: they say where its tokens stand.
BESIDE = ("image_grid_thw", "aspect_ratio_ids", "aspect_ratio_mask")
# The key under which some models give features of several layers: a list for each layer, of a tensor for each picture.
BY_LAYER = "deepstack_features"

Features: TypeAlias = torch.Tensor | ModelOutput
"""What an image path gives: a tensor, or an output of transformers that holds some."""


@dataclass(frozen=True)
class Seen:
    """A picture that went through the image path.

    Attributes:
        size: (width, height) of the picture, by which its tokens are counted.
        features: What the image path gave: a tensor, or an output of transformers.
        beside: What the model looks at beside them.
        pixels: Names of the pixels that it was made of: some models take a picture in two sizes.
    """

    size: tuple[int, int]
    features: Features
    beside: Mapping[str, torch.Tensor]
    pixels: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the features."""
        return sum(tensor.nbytes for tensor in _tensors(self.features))


class ImagePath:
    """The image path of an existing VLM.

    Args:
        model: On its device, in evaluation mode.
        processor: Its processor.
    """

    def __init__(self, model: FamilyModel, processor: VLMProcessor) -> None:
        self._owner, self._name = model.image_path()
        self._own = getattr(self._owner, self._name)
        self._model, self._processor = model, processor
        pictures = [Image.new("RGB", (64, 64))] * 2
        one, two = (type(processor).image_inputs(processor, pictures[:count], []) for count in (1, 2))
        # MiniCPM-V 4.6 has all pictures of a batch in one sequence and takes the first of `pixel_values` alone.
        self._one_sequence = all(len(two[name]) == len(one[name]) for name in one if name.endswith("pixel_values"))

    def look(self, picture: Image.Image) -> Seen:
        """Sends one picture through."""
        inputs = type(self._processor).image_inputs(self._processor, [picture], [])
        given = self._own(**{name: tensor.to(self._model.device) for name, tensor in inputs.items()})
        if not isinstance(given, torch.Tensor):
            named = [name for name in IMAGE_OUTPUTS if given.get(name) is not None] or ["last_hidden_state"]
            given = type(given)(**{name: given[name] for name in named})
        beside = {name: inputs[name] for name in BESIDE if name in inputs}
        return Seen(picture.size, given, beside, tuple(name for name in inputs if name.endswith("pixel_values")))

    def inputs(self, numbers: Sequence[int], seen: Sequence[Seen]) -> dict[str, torch.Tensor]:
        """What the model takes in place of pictures: their numbers, and what it looks at beside the features."""
        beside = {
            name: torch.cat([seen[number].beside[name] for number in numbers]) for name in seen[numbers[0]].beside
        }
        told = torch.tensor([numbers] if self._one_sequence else numbers)
        return {**dict.fromkeys(seen[numbers[0]].pixels, told), **beside}

    @contextmanager
    def giving(self, seen: Callable[[], Sequence[Seen]]) -> Iterator[None]:
        """Within, the image path gives what it gave before, for the numbers of pictures."""

        @functools.wraps(self._own)  # `generate` looks at what it takes
        def give(pixel_values: torch.Tensor, *more: Any, **options: Any) -> Features:
            now = seen()
            # GOT-OCR makes its own type of them; 16 bits hold whole numbers up to 256, more than a batch has pictures.
            return joined([now[int(number)].features for number in pixel_values.flatten().tolist()])

        setattr(self._owner, self._name, give)
        try:
            yield
        finally:
            delattr(self._owner, self._name)


def joined(features: Sequence[Features]) -> Features:
    """What the image path gives for several pictures at once, out of what it gave for each."""
    first = features[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(features))
    found: Inputs = {}
    for name, value in first.items():
        values = [each[name] for each in features]
        if name == BY_LAYER:
            found[name] = [_joined_layer(layer) for layer in zip(*values, strict=True)]
        elif isinstance(value, torch.Tensor):
            found[name] = torch.cat(values)
        else:
            found[name] = [one for each in values for one in each]
    return type(first)(**found)


def _joined_layer(parts: Sequence[Any]) -> Any:
    """The features of a layer, of several pictures; Granite 4 says beside them which layer they are for."""
    first = parts[0]
    if isinstance(first, tuple) and isinstance(first[0], int):
        return first[0], [one for _, part in parts for one in part]
    return [one for part in parts for one in part]


def _tensors(value: Features | Sequence[Features] | int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        return
    if isinstance(value, int):  # which layer they are for
        return
    for each in value.values() if isinstance(value, Mapping) else value:
        yield from _tensors(each)
