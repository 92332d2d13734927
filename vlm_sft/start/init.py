"""`vlm-sft init`: from a folder as it lies there to a recipe that trains, its rows shared out so that nothing leaks."""

from __future__ import annotations

import csv
import os
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.console import make_console, say
from ..base.errors import UserError
from ..base.names import Json
from ..base.progress import RowProgress, waiting
from ..base.whole_files import write_whole, written_beside
from ..base.words import counted, gib, reason_of
from ..machine.machine import Machine, flops_of, this_machine
from ..machine.recipe_edit import set_keys
from ..reading.locations import is_hub_id
from ..spoken.catalogue import translated
from ..spoken.language import in_words
from .answers import Answers, draft_of
from .folder import Folder, look_into
from .gather import IMAGES, Gathered, Pictures, gather, gather_hub
from .models import Plan, plan
from .questions import Asker
from .recipe_text import Draft, recipe_text
from .rows_folder import Kind, check_rows, write_sides
from .sides import TEST, TRAIN, VALIDATION, Sides, share_out

if TYPE_CHECKING:
    from rich.console import Console

MOST_SAID = 8  # sentences on what is left out, before the others are counted


@dataclass(frozen=True)
class Place:
    """Where it is written.

    Attributes:
        name: Of the run.
        recipe: The recipe.
        rows: The folder of its rows.
    """

    name: str
    recipe: Path
    rows: Path


def init(
    given: str,
    answers: Answers,
    *,
    output: str | None = None,
    images: str | None = None,
    ask: bool = True,
    seed: int = 0,
) -> Json:
    """Writes a recipe for what lies in a folder, and the rows of its three sides beside it.

    Nothing in the folder is touched, and nothing that is there is overwritten.

    Args:
        given: A folder, a data file, or the id of a data set on the Hub.
        answers: What flags say to the questions.
        output: The recipe to write; None: named after what is given, in the working directory.
        images: The folder of the pictures that a data file names.
        ask: Whether questions are asked.
        seed: Draws the sides.

    Returns:
        What was found and written, ready for JSON.

    Raises:
        UserError: There is nothing to learn from, or something of that name is there already.
    """
    console = make_console()
    place = _place(given, output)
    machine = this_machine(place.recipe.parent)
    say(console, in_words(f"This machine: {machine}.", f"这台机器：{machine}。"))
    found = None if _on_hub(given) else _look(Path(given).expanduser(), images)
    try:
        with written_beside(place.rows) as stage:
            stage.mkdir()
            kinds, left_out = _read(given, found, stage, console)
            if not kinds:
                raise _nothing(given, found, left_out)
            draft = draft_of(Asker(ask), kinds, machine, answers, place.name, given, seed)
            with RowProgress(console, given) as progress:
                sides = share_out([row for kind in kinds for row in kind.shown], seed, progress.tell)
            _say_all(console, _about(sides))
            counts = {side: sides.of.count(side) for side in (TRAIN, VALIDATION, TEST)}
            root = None if found is None else Path(_relative(found.root))
            parts = write_sides(kinds, sides.of, stage, _relative(place.rows), root, draft.learn, draft.language)
    except OSError as error:
        raise UserError(f"{place.rows} cannot be written ({reason_of(error)}): choose another --output.") from None
    planned = plan(draft.plan.pretrained, counts[TRAIN], machine, draft.hours)
    draft = draft._replace(parts=parts, counts=counts, plan=planned)
    write_whole(place.recipe, recipe_text(draft).encode())
    _check(place.recipe)
    if planned.known is None and machine.gpus:
        planned = _fit(place.recipe, draft, machine, console)
    return {
        "recipe": _relative(place.recipe), "rows": _relative(place.rows), **counts, "groups": sides.groups,
        "alike": sides.alike, "left_out": [*left_out, *_about(sides)], "learn": draft.learn,
        "language": draft.language, "model": planned.pretrained, "four_bits": planned.four_bits,
        "epochs": planned.epochs, "hours": planned.hours, "memory": planned.memory and gib(int(planned.memory)),
        "commands": _commands(place, draft, kinds, sides),
    }  # fmt: skip


def _on_hub(given: str) -> bool:
    return not Path(given).expanduser().exists() and given.count("/") == 1 and is_hub_id(given)


def _place(given: str, output: str | None) -> Place:
    if not given.strip():
        raise UserError("FOLDER is empty; give a folder, a data file, or the id of a data set on the Hub.")
    source = given if _on_hub(given) else Path(given).expanduser().resolve().name
    stem = Path(source).stem if Path(source).suffix and Path(given).expanduser().is_file() else source
    recipe = Path(output or f"{_plain(stem)}.yaml").expanduser()
    if recipe.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output {recipe} must end in .yaml; the rows go into a folder beside it.")
    place = Place(_plain(recipe.stem), recipe, recipe.with_name(f"{_plain(recipe.stem)}_rows"))
    for path in (place.recipe, place.rows):
        if path.exists():
            raise UserError(f"{path} exists already and is not overwritten; remove it, or give another --output.")
        if "${" in _relative(path):
            raise UserError(f"{path} holds ${{, which a recipe takes for a reference; give another --output.")
    return place


def _plain(name: str) -> str:
    """A name of letters, digits and a few marks, which no shell, recipe or file system reads otherwise."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._-") or "my_data"


def _relative(path: Path) -> str:
    """A path as a recipe writes it: from the working directory where it lies below that."""
    here, whole = Path.cwd(), Path(os.path.abspath(path))
    return whole.relative_to(here).as_posix() if whole.is_relative_to(here) else str(whole)


def _look(path: Path, images: str | None) -> Folder:
    found = look_into(path)
    if images is not None:
        if not path.is_file():
            raise UserError("--images goes with a data file; a folder is searched for its pictures.")
        table, found = found.tables, look_into(Path(images).expanduser())
        found = Folder(found.root, found.pictures, tables=table, alone=True)
    if "${" in str(found.root):
        raise UserError(f"{found.root} holds ${{, which a recipe takes for a reference; rename the folder.")
    return found


def _read(given: str, found: Folder | None, stage: Path, console: Console) -> tuple[list[Kind], list[str]]:
    """The rows that can be used, and sentences on the others, which are said."""
    with RowProgress(console, given) as progress:
        pictures = Pictures(found, stage / IMAGES)
        tick = partial(progress.tell, "read", of=None)
        gathered: Gathered = gather_hub(given, pictures, tick) if found is None else gather(found, pictures, tick)
        root = None if found is None else Path(os.path.abspath(found.root))
        kinds = check_rows(gathered, stage, root, partial(progress.tell, "checked", of=None))
    if found is not None and kinds:
        shown = {image["path"] for kind in kinds for row in kind.shown for image in row.images}
        bare = [path for path in found.pictures if os.path.abspath(path) not in shown]
        if bare and len(bare) < len(found.pictures):
            gathered.left_out.append(f"{counted(len(bare), 'picture')} left out without a text, the first: {bare[0]}.")
    _say_all(console, gathered.left_out)
    return kinds, gathered.left_out


def _say_all(console: Console, sentences: list[str]) -> None:
    for sentence in sentences[:MOST_SAID]:
        say(console, translated(sentence))
    if (more := len(sentences) - MOST_SAID) > 0:
        say(console, in_words(f"And {more:,} more of this kind; --json lists them all.",
                              f"还有 {more:,} 条同类的；--json 会全部列出。"))  # fmt: skip


def _nothing(given: str, found: Folder | None, left_out: list[str]) -> UserError:
    """Says why there is nothing to learn, and makes a list of pictures without texts to fill in."""
    if found is None or not found.pictures or found.tables or found.saved:
        why = f"; the first reason: {left_out[0]}" if left_out else ": it holds no pictures and no data files."
        return UserError(f"{given} has nothing that can be learned from{why}")
    sheet = Path(f"{_plain(Path(os.path.abspath(given)).name)}_captions.csv")
    again = f"vlm-sft init {sheet} --images {given}"
    if sheet.exists():
        return UserError(
            f"{given} holds {counted(len(found.pictures), 'picture')} and no text, and {sheet} is there already: fill "
            f"in its column `caption`, then run: {again}"
        )
    with sheet.open("w", encoding="utf-8-sig", newline="") as opened:  # the mark tells Excel that it is UTF-8
        writer = csv.writer(opened)
        writer.writerow(["image", "caption"])
        writer.writerows([picture.relative_to(found.root).as_posix(), ""] for picture in found.pictures)
    return UserError(
        f"{given} holds {counted(len(found.pictures), 'picture')} and no text to learn; {sheet} now lists them: write "
        f"what each shows into its column `caption` (or a .txt beside each picture), then run: {again}"
    )


def _about(sides: Sides) -> list[str]:
    """What became of rows when they were shared out."""
    found = []
    if sides.unreadable:
        first = next(iter(sides.unreadable.values())).removeprefix("row ")
        found.append(in_words(
            f"{counted(len(sides.unreadable), 'row')} left out because a picture cannot be read, the first: {first}",
            f"{len(sides.unreadable):,} 行因图片无法读取而略去，第一个：{first}"))  # fmt: skip
    if sides.alike:
        are = "picture looks" if sides.alike == 1 else "pictures look"
        found.append(in_words(
            f"{sides.alike:,} {are} like another one; such rows stay on one side.",
            f"{sides.alike:,} 张图片与别的图片相似；这样的行都放在同一边。"))  # fmt: skip
    if sides.moved:
        found.append(in_words(
            f"{counted(sides.moved, 'row')} left out because another side of your own split shows the same picture.",
            f"{sides.moved:,} 行略去，因为您自己划分的另一边有同样的图片。"))  # fmt: skip
    if sides.searched < 1:
        found.append(in_words(
            f"So many pictures look alike that others were looked for to {sides.searched:.0%} of them only.",
            f"相似的图片太多，只对其中 {sides.searched:.0%} 查找了相似图片。"))  # fmt: skip
    return found


def _fit(recipe: Path, draft: Draft, machine: Machine, console: Console) -> Plan:
    """Finds the batch of a model of which nothing is known here, by the count of its memory, and writes it."""
    from ..machine.fit import Gpu, fit, keys_of
    from ..recipe.schema import load_recipe

    gpu = Gpu(machine.room, len(machine.gpus), flops_of(machine.gpus[0][0]))
    try:
        with waiting(console, in_words("Counting the memory of steps", "正在计算显存")):
            found = fit(load_recipe(recipe), gpu)
    except UserError as error:
        say(console, in_words(f"Whether it fits was not found out: {error}", f"未能确定是否放得下：{error}"))
        return draft.plan
    best = found.settings[0]
    fitted = draft.plan._replace(
        rows=best.batch, accumulation=best.accumulation, four_bits=best.four_bits, memory=float(best.memory)
    )
    write_whole(recipe, recipe_text(draft._replace(plan=fitted, checkpointing=best.checkpointing)).encode())
    as_written = replace(best, length=found.now.length, pixels=None)
    set_keys(recipe, keys_of(best, as_written))  # a shorter row or a smaller picture, which the text does not know
    return fitted


def _check(recipe: Path) -> None:
    """What was written must be a recipe."""
    from ..recipe.libraries import validate_libraries
    from ..recipe.schema import load_recipe

    validate_libraries(load_recipe(recipe))


def _commands(place: Place, draft: Draft, kinds: list[Kind], sides: Sides) -> list[str]:
    """What to type next: look, train, ask."""
    recipe = _quoted(_relative(place.recipe))
    shown = [row for kind in kinds for row in kind.shown]
    tested = next(row for row, side in zip(shown, sides.of, strict=True) if side == TEST)
    picture = next((str(image["path"]) for image in tested.images if image["path"]), None)
    if picture is not None and f"{place.rows.name}{os.sep}" in picture:  # it was written in a folder beside its place
        picture = str(place.rows / IMAGES / Path(picture).name)
    ask = {"caption": ("Describe this picture.", "描述这张图片。")}.get(draft.learn, ("What is this?", "这是什么？"))
    question = ask[draft.language == "zh"]
    image = f" --image {_quoted(_relative(Path(picture)))}" if picture else ""
    launch = "vlm-sft train" if draft.processes == 1 else "accelerate launch -m vlm_sft.train"
    return [
        f"vlm-sft preflight {recipe}",
        f"{launch} {recipe}",
        f'vlm-sft chat {_quoted("outputs/" + place.name)}{image} "{question}"',
    ]


def _quoted(text: str) -> str:
    """A word of a command, in quotation marks where a shell would take it apart; letters of any script are none."""
    return text if re.fullmatch(r"[\w./:@%+=,-]+", text) else "'" + text.replace("'", "'\\''") + "'"
