"""The rows that a command of `vlm-sft data` is given: those of a recipe, or of a file, folder or Hub id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pydantic import ValidationError

from ..base.assets import list_recipes
from ..base.console import make_console
from ..base.errors import UserError
from ..base.names import Json, Row
from ..data.ledger import Ledger, ledger_table
from ..data.source import name_of, source_rows
from ..reading.image_refs import TIME
from ..recipe.schema import load_recipe
from ..recipe.sections import Data, Source


class RowsOf:
    """The rows of SRC, read anew each time that they are iterated; `frames` are the frames of videos among them so far.

    Args:
        src: A recipe, whose training sources are read; else what a source's `path` says.
        kind: The source's `format`; None for a recipe.
        images: The source's `images`.
        columns: The source's `columns`, each as `OURS=THEIRS`.
        max_rejected: Largest share of wrong rows of a source.
        image_folders: The source's `image_folders`.

    Raises:
        UserError: The format is missing or not known, or a column is no `OURS=THEIRS`. While iterating: a source cannot
            be read, or, at the end, more rows are wrong than allowed.
    """

    def __init__(
        self,
        src: str,
        kind: str | None,
        images: str | None,
        columns: list[str] | None,
        max_rejected: float,
        image_folders: list[str] | None = None,
    ) -> None:
        self.sources, self.held_out, self.look_images = _sources(src, kind, images, columns, image_folders or [])
        self.max_rejected = max_rejected
        self.frames = 0

    def __iter__(self) -> Iterator[Row]:
        """Yields the rows and then, if any was left out, prints the ledger."""
        ledger = Ledger(self.max_rejected)
        for source in self.sources:
            name = name_of(source)
            counted = ledger.source(name)
            for row in source_rows(source, reject=ledger.rejecter(name), unused=counted.leave):
                counted.read += 1
                counted.used += 1
                self.frames += sum(TIME in image for image in row["images"])
                yield row
        console = make_console()
        ledger.check(console, limit="--max-rejected")
        if any(source.lost or source.unused for source in ledger.sources.values()):
            console.print(ledger_table({"data": ledger}))

    def quietly(self, held_out: bool = False) -> Iterable[Row]:
        """The same rows, or those of the recipe's `data.eval` and `data.test`, read anew each time.

        Rows that are wrong are left out and nothing is said of them.
        """
        return _Quietly(self.held_out if held_out else self.sources)

    def describe(self) -> list[Json]:
        """What the rows depend on, for a file that is made of them."""
        return [source.model_dump(mode="json") for source in self.sources]


class _Quietly:
    """Rows of sources, read anew each time."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    def __iter__(self) -> Iterator[Row]:
        for source in self._sources:
            yield from source_rows(source, reject=lambda error: None)


def _sources(
    src: str, kind: str | None, images: str | None, columns: list[str] | None, image_folders: list[str]
) -> tuple[list[Source], list[Source], int | None]:
    """The training sources of a recipe, those held out and its `look_images`; or what the options describe."""
    if src.endswith((".yaml", ".yml")) or (kind is None and src in list_recipes()):
        if kind or images or columns or image_folders:
            raise UserError(f"{src} is a recipe, which says itself what its sources hold: leave out --format.")
        data = load_recipe(src).data
        return data.train, [*data.eval, *data.test], data.look_images
    if kind is None:
        raise UserError(f"What does {src} hold? Give --format, as a recipe does (messages, llava, caption, …).")
    pairs = [column.partition("=") for column in columns or []]
    if wrong := next((ours for ours, equals, theirs in pairs if not (ours and equals and theirs)), None):
        raise UserError(f"--column {wrong} must be OURS=THEIRS, like --column caption=text.")
    try:
        mapped = {ours: theirs for ours, _, theirs in pairs}
        source = Source(path=src, format=kind, images=images, image_folders=image_folders, columns=mapped)  # type: ignore[arg-type]
        return [source], [], Data.model_fields["look_images"].default
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise UserError(f"--{problem['loc'][0]} {problem['input']}: {problem['msg']}.") from None
