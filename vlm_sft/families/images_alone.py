"""A model's own processor without its parts that read no images: those of videos cannot be had without torchvision."""

from __future__ import annotations

from typing import Any, Self

from transformers import ProcessorMixin

from ..base.names import Json

# Parts of a model's own processor that read something else than images.
NO_IMAGES = ("video_processor", "feature_extractor")


class _Nothing:
    """A processor of videos or of sounds that is not there: whatever is asked of it is None."""

    font = ""  # ERNIE's looks for a file of that name, to save it too

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _ImagesAlone(ProcessorMixin):
    """Takes from a model's own processor class, which it stands behind, what reads no images; see `images_alone`."""

    whole: tuple[str, ...]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(self.whole, args, strict=False)), **kwargs}
        super().__init__(**{name: value for name, value in given.items() if name not in NO_IMAGES})

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in cls.whole if name not in NO_IMAGES]

    @classmethod
    def from_args_and_dict(cls, args: list[object], processor_dict: Json, **kwargs: Any) -> Self:
        given = dict(zip(cls.get_attributes(), args, strict=True))
        nothing = _Nothing()
        whole = [given.get(name, nothing) for name in cls.whole]
        return super().from_args_and_dict(whole, processor_dict, **kwargs)


def images_alone(native: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A model's own processor class without its processors of videos and of sounds.

    Those of videos cannot be had without torchvision.
    """
    attributes = native.get_attributes()
    if not set(NO_IMAGES) & set(attributes):
        return native
    further = {"whole": tuple(attributes), **dict.fromkeys(NO_IMAGES, _Nothing())}
    return type(native.__name__, (native, _ImagesAlone), further)  # its own name is written into what it saves
