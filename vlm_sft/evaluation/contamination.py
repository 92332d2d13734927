"""Was a benchmark seen in training? Its pictures against those of the training sources, by bytes and by look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..base.console import make_console
from ..base.errors import UserError
from ..base.names import ImageEntry, Json, Row, Values
from ..base.progress import RowProgress
from ..data.dataset import load_source
from ..data.image_files import shared_images
from ..data.look_alikes import find_look_alikes
from ..recipe.schema import Recipe
from .pictures import Pictures
from .task_rows import Asked

if TYPE_CHECKING:
    from datasets import Dataset

EXAMPLES = 5


def contamination(recipe: Recipe, asked: Sequence[Asked], pictures: Pictures) -> Json:
    """Pictures of a benchmark that the training sources of a recipe have too.

    Returns:
        `pictures` (different ones in the benchmark), `same` (byte for byte), `alike` (by look: resized, saved anew,
        cut, mirrored), `questions` on either, `examples`; or `unchecked`, a sentence why nothing was compared.
    """
    rows = _Shown(asked, pictures)
    try:
        read = (load_source(source, reject=lambda error: None) for source in recipe.data.train)
        train = _Chained([found.select_columns(["images", "id", "source"]) for found in read])
    except UserError as error:
        return {"unchecked": f"The training sources are not here to compare with ({str(error).rstrip('.')})."}
    exact = shared_images(train, rows)
    with RowProgress(make_console(), "contamination") as progress:
        found = find_look_alikes(train, rows, most=recipe.data.look_images, tick=partial(progress.tell))
    same = {leak.held_out for leak in exact}
    alike = {pair.held_out.row for pair in found.pairs} - same
    touched = sum(rows.shows(one, same | alike) for one in asked)
    examples = [f"{leak.train} = {leak.held_out}" for leak in exact[:EXAMPLES]]
    examples += [str(pair) for pair in found.pairs[: EXAMPLES - len(examples)]]
    return {
        "pictures": len(rows.first), "same": len(same), "alike": len(alike), "questions": touched,
        "examples": examples, "left_out": found.left_out(),
    }  # fmt: skip


def is_seen(value: object) -> bool:
    """Whether a value is what `contamination` gives."""
    if not isinstance(value, dict) or "unchecked" in value:
        return isinstance(value, dict) and isinstance(value["unchecked"], str)
    counts = [value.get(name) for name in ("pictures", "same", "alike", "questions")]
    first = value.get("examples")
    whole = all(isinstance(count, int) and 0 <= count < 10**9 for count in counts)
    return whole and isinstance(first, list) and (bool(first) or not (value["same"] or value["alike"]))


def seen_in_words(seen: Values) -> str:
    """What was found of a benchmark in the training sources, in a sentence."""
    if "unchecked" in seen:
        return str(seen["unchecked"])
    count = seen["same"] + seen["alike"]
    if not count:
        return f"None of its {seen['pictures']:,} pictures is among those of the training sources."
    return (
        f"{count:,} of its {seen['pictures']:,} pictures are among those of the training sources ({seen['same']:,} by "
        f"their bytes, {seen['alike']:,} by look), and {seen['questions']:,} questions are on them; the first: "
        f"{seen['examples'][0]}."
    )


class _Chained:
    """The rows of several data sets, walked through as often as asked."""

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[Row]:
        for part in self._parts:
            yield from part


class _Shown:
    """The different pictures of a benchmark, each as a row of its own, called by the first question on it."""

    def __init__(self, asked: Sequence[Asked], pictures: Pictures) -> None:
        self._pictures = pictures
        self.first: dict[str, tuple[str, ImageEntry]] = {}
        for one in asked:
            for place, (name, image) in enumerate(zip(one.names(), one.images, strict=True), start=1):
                self.first.setdefault(name, (one.id if place == 1 else f"{one.id}, picture {place}", image))

    def __iter__(self) -> Iterator[Row]:
        for number, image in self.first.values():
            yield {"id": number, "source": "benchmark", "images": [self._pictures.whole(image)]}

    def shows(self, one: Asked, found: set[str]) -> bool:
        """Whether a question shows one of the pictures that were found."""
        return any(self.first[name][0] in found for name in one.names())
