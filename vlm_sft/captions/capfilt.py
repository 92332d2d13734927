"""CapFilt: captions are made of pictures, and those that a matcher finds to fit are kept (arXiv:2201.12086, section 3).

`vlm-sft data caption`. Every process takes its share of the pictures and writes what it made into a file of its own;
the first one puts the rows together at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import torch

from ..base.console import say
from ..base.errors import RowError, UserError
from ..base.names import Json, Options
from ..base.processes import hold_folder, on_first_process, share_work
from ..base.progress import RowProgress, waiting
from ..base.words import language_of, one_line
from ..batch.pictures import Pictures, load_picture, name_of
from ..prepare.filtering import check_grown, score_pairs
from ..prepare.scorer import Scorer
from ..reading.video import Films
from .captioner import Captioner, load_captioner
from .made import Caption, Made, Parts
from .wanted import Wanted, WantedPictures

if TYPE_CHECKING:
    from rich.console import Console

EMPTY, TWICE, OTHER, UNREAD = "empty", "said twice", "other language", "not read by the matcher"
"""Why a caption is dropped without a score."""


@dataclass(frozen=True)
class Wish:
    """How captions are made.

    Attributes:
        captioner: See `load_captioner`.
        matcher: See `Scorer`; None: nothing is scored.
        languages: Languages that captions are wanted in, each asked for in its own; none where prompts are given.
        prompts: What the captioner is asked, each for captions of its own.
        count: Captions for each prompt.
        options: For transformers' `generate`.
        seed: Of captions that are drawn.
        batch_size: Pictures at a time.
    """

    captioner: str
    matcher: str | None = None
    languages: Sequence[str] = ()
    prompts: Sequence[str] = ()
    count: int = 1
    options: Options = field(default_factory=dict)
    seed: int = 0
    batch_size: int = 8

    def about(self, found: WantedPictures) -> Json:
        """What captions depend on, batches aside."""
        asked = {"languages": [*self.languages], "prompts": [*self.prompts], "captions": self.count, "seed": self.seed}
        settings = {name: self.options[name] for name in sorted(self.options)}
        models = {"captioner": self.captioner, "matcher": self.matcher}
        return {**models, **asked, "settings": settings, "source": found.describe()}


def make_captions(found: WantedPictures, wish: Wish, folder: Path, console: Console) -> Parts:
    """Makes and scores the captions that are not there yet, in all processes of a launch.

    Args:
        found: The pictures.
        wish: How.
        folder: Where they are kept until rows are made of them.
        console: Where to say how far it is.

    Returns:
        What is there now.

    Raises:
        UserError: A model cannot be had, or does not do what is wanted.
    """
    parts = Parts(folder, wish.about(found))
    with ExitStack() as held:
        lock = hold_folder(folder, partial(say, console), "the folder of captions so far,")
        on_first_process(partial(held.enter_context, lock))
        on_first_process(parts.settle)
        share_work(lambda process, processes: _share(found, wish, parts, console, process, processes))
        for _ in parts.read():
            pass
    return parts


def _share(found: WantedPictures, wish: Wish, parts: Parts, console: Console, process: int, processes: int) -> int:
    """Makes the captions of every so-manieth picture; says how many were made."""
    there = sum(1 for _ in parts.read())
    numbered = enumerate(found.through(lambda error: None))
    todo = ((n, each) for n, each in numbered if n % processes == process and n not in parts)
    first = next(todo, None)
    if first is None:
        return 0
    if there:
        say(console, f"{there:,} pictures are in {parts.folder} already.")
    with waiting(console, "Loading the models"):
        maker = _Maker(wish, processes)
    done = 0
    with parts.writing(process) as write, RowProgress(console, "captions") as progress:
        batch = [first, *islice(todo, wish.batch_size - 1)]
        while batch:
            write(maker.made(batch))
            done += len(batch)
            progress.tell("made for", done, None, "pictures")
            batch = list(islice(todo, wish.batch_size))
    return done


class _Maker:
    """The loaded models.

    Args:
        wish: See `Wish`.
        processes: How many there are; of several, each has a device of its own.
    """

    def __init__(self, wish: Wish, processes: int) -> None:
        from accelerate import PartialState

        device = PartialState().device if processes > 1 else None
        self.wish = wish
        self.captioner: Captioner = load_captioner(wish.captioner, wish.options, device)
        self.matcher = None if wish.matcher is None else Scorer(wish.matcher, device, "--matcher")
        self.asked = _asked(wish, self.captioner)
        self.captioner.check([prompt for prompt, _ in self.asked])

    def made(self, batch: Sequence[tuple[int, Wanted]]) -> list[Made]:
        """What is made of pictures, captions scored; a broken picture does not take the others with it."""
        errors: dict[int, RowError] = {}
        rows: dict[int, Pictures] = {}
        for number, each in batch:
            try:
                with Films() as films:
                    image = load_picture(self.captioner.reader, each.image, where=each.id, films=films)
                check_grown(image, name_of(each.image), each.id, self.matcher)
                rows[number] = Pictures([image], [""], each.id, [name_of(each.image)])
            except RowError as error:
                errors[number] = error
        captions = {number: [Caption(one_line(text), True) for text in each.given] for number, each in batch}
        fresh = [number for number, each in batch if number in rows and not each.again]
        torch.manual_seed(crc32(repr((self.wish.seed, [each.id for _, each in batch])).encode("utf-8", "replace")))
        for prompt, language in self.asked:
            for number, said in zip(fresh, self._said([rows[n] for n in fresh], prompt), strict=True):
                for each_error in (text for text in said if isinstance(text, RowError)):
                    errors.setdefault(number, each_error)
                captions[number] += [Caption(one_line(text), False, None, _wrong(text, language)) for text in said]
        found = []
        for number, each in batch:
            if (why := errors.get(number)) is not None:
                found.append(Made(number, each.id, [], str(why), why.reason))
            else:
                found.append(Made(number, each.id, _each_once(captions[number])))
        return self._scored(found, rows)

    def _said(self, rows: Sequence[Pictures], prompt: str) -> list[list[str | RowError]]:
        """The captions of each picture."""
        if not rows:
            return []
        try:
            rounds = list(self.captioner.captions(rows, prompt, self.wish.count))
        except RowError as error:
            if len(rows) == 1:
                return [[error]]
            return [said for row in rows for said in self._said([row], prompt)]
        except torch.OutOfMemoryError:
            raise _too_many(len(rows)) from None
        return [list(said) for said in zip(*rounds, strict=True)]

    def _scored(self, found: list[Made], rows: dict[int, Pictures]) -> list[Made]:
        if self.matcher is None:
            return found
        reads = self.matcher.reads
        found = [
            made._replace(
                captions=[
                    each if each.dropped or reads(each.text) else each._replace(dropped=UNREAD)
                    for each in made.captions
                ]
            )
            for made in found
        ]
        pairs = [(made, each) for made in found for each in made.captions if not each.dropped]
        try:
            scores = score_pairs(
                self.matcher,
                [rows[made.number].images[0] for made, _ in pairs],
                [each.text for _, each in pairs],
                [(made.id, rows[made.number].names[0]) for made, _ in pairs],
            )
        except torch.OutOfMemoryError:
            raise _too_many(len(pairs)) from None
        of: dict[int, list[float | RowError]] = {}
        for (made, _), score in zip(pairs, scores, strict=True):
            of.setdefault(made.number, []).append(score)
        return [self._with_scores(made, of.get(made.number, [])) for made in found]

    def _with_scores(self, made: Made, scores: Sequence[float | RowError]) -> Made:
        if error := next((score for score in scores if isinstance(score, RowError)), None):
            return Made(made.number, made.id, [], str(error), error.reason)
        numbers = [score for score in scores if not isinstance(score, RowError)]
        if not all(map(math.isfinite, numbers)):
            raise UserError(f"--matcher {self.wish.matcher} gives no number for a caption of {made.id}: give another.")
        left = iter(numbers)
        captions = [each if each.dropped else each._replace(score=round(next(left), 6)) for each in made.captions]
        return made._replace(captions=captions)


def _too_many(rows: int) -> UserError:
    return UserError(
        f"The GPU's memory does not hold {rows:,} rows at a time: run again with a smaller --batch-size (the captions "
        f"so far are kept)."
    )


def _asked(wish: Wish, captioner: Captioner) -> list[tuple[str, str | None]]:
    """Prompts, each with the language that its captions must be in, where that is known.

    Raises:
        UserError: The captioner has no prompt for a language.
    """
    if wish.prompts:
        return [(prompt.strip(), None) for prompt in wish.prompts]
    if strange := [language for language in wish.languages if language not in captioner.prompts]:
        raise UserError(
            f"--language {strange[0]}: {wish.captioner} is asked in {', '.join(captioner.prompts)} alone: leave it "
            f"out, or give a captioner that writes it, or a prompt of your own (--prompt)."
        )
    languages = wish.languages or list(captioner.prompts)[:1]
    return [(captioner.prompts[language], language if wish.languages else None) for language in languages]


def _wrong(text: str | RowError, language: str | None) -> str | None:
    """Why a caption that was made is dropped unseen."""
    if not str(text).strip():
        return EMPTY
    return OTHER if language is not None and language_of(str(text)) != language else None


def _each_once(captions: Sequence[Caption]) -> list[Caption]:
    """Captions of a picture, of which the same words count once."""
    said: set[str] = set()
    found = []
    for each in captions:
        words = each.text.casefold().strip(" .。")
        if not each.dropped and not words:
            each = each._replace(dropped=EMPTY)
        elif not each.dropped and words in said:
            each = each._replace(dropped=TWICE)
        elif not each.dropped:
            said.add(words)
        found.append(each)
    return found
