"""A benchmark as a YAML file says it: where its rows are, what is asked, how the answer is read and measured."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePath
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, field_validator

from ..base.assets import list_tasks, task_path
from ..base.errors import UserError
from ..base.limits import READERS, limits
from ..base.names import Json, Options
from ..base.words import closest, short
from ..metrics.measures import MEASURES, NEEDS_CHOICES
from ..recipe.library_names import GENERATION
from ..recipe.passed_on import flaw, flaw_of_answers
from ..recipe.sections import RecipeModel
from ..recipe.yaml_file import YamlFile
from ..templates.process import ask
from ..templates.sandbox import fill_prompt

LONGEST_ID = 193  # characters of an id of the Hub: two names of 96
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
FIELD = re.compile(r"\{(\w+)(?::0?(\d{1,2}))?\}")  # a column in the name of a picture's file
Column = str | list[str]
"""A column of a row (`answers[].answer` goes into a list of objects), or several."""


class Hub(RecipeModel):
    """A data set of the Hub."""

    path: str
    """Its id."""
    name: str | None = None
    """Its configuration."""
    split: str = "test"
    """Its split."""
    revision: str | None = None
    """Branch, tag or commit."""


class Join(RecipeModel):
    """Rows that lie elsewhere and belong to these: pictures or answers in a file of their own."""

    files: list[str] = Field(default_factory=list)
    """Patterns of files in the benchmark's folder."""
    hub: Hub | None = None
    """Where they are on the Hub."""
    rows: str | None = None
    """As a layout's."""
    on: str
    """Column of a row that names the other."""
    key: str
    """Column of the other that is named."""
    into: str | None = None
    """The other's columns go into one column of this name (`gpt4` → `gpt4.text`); unset: beside the row's own."""


# What a benchmark's file may say to the judge's server: how it answers, and no tool, file or account there.
JUDGE_SETTINGS = (
    *("temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "presence_penalty"),
    *("frequency_penalty", "reasoning_effort"),
)


class Judging(RecipeModel):
    """How a judge is asked of an answer; who judges, and where, is said by the command alone."""

    prompt: str
    """Jinja. It has what the benchmark's prompt has, `kind`, `reference` and `answer`, and, to show both in either
    order, `first` and `second`."""
    system: str | None = None
    """Its system message."""
    compare: bool = True
    """Its first line gives two scores, of the first answer and of the second, and both orders are asked; else one, of
    the answer alone, which is measured against the top of the scale."""
    scale: list[float] = Field(default=[1, 10], min_length=2, max_length=2)
    """Lowest and highest score."""
    settings: Options = Field(default_factory=lambda: {"temperature": 0.2, "max_tokens": 1024})
    """For the judge's server, of `JUDGE_SETTINGS`."""

    @field_validator("settings")
    @classmethod
    def _of_the_list(cls, settings: Json) -> Json:
        for name, value in settings.items():
            if name not in JUDGE_SETTINGS or isinstance(value, bool) or not isinstance(value, int | float | str | None):
                raise ValueError(f"{name} is no setting of a judge's answer; they are {', '.join(JUDGE_SETTINGS)}")
        return settings


class Layout(RecipeModel):
    """How the rows are written."""

    files: list[str] = Field(default_factory=list)
    """Patterns of files in the benchmark's folder; none: any data file there is."""
    rows: str | None = None
    """Key of a JSON document under which its list of rows stands; `*` where it maps ids to rows (the column `_key`)."""
    join: Annotated[list[Join], BeforeValidator(lambda given: [given] if isinstance(given, dict) else given)] = Field(
        default_factory=list
    )
    """Columns that come from other rows, of one place or of several."""
    only: dict[str, str | int | bool] = Field(default_factory=dict)
    """Rows are those whose columns have these values."""
    id: str | None = None
    """Column of the id; unset: the row's number."""
    images: Column = "image"
    """Columns of pictures, of which empty ones are passed over; or a file's name with columns in it:
    `val2014/COCO_val2014_{image_id:012}.jpg`."""
    question: str | None = "question"
    """Column of the question; null where the prompt says all there is."""
    answers: Column = "answer"
    """Column of the right answer or answers."""
    choices: Column | None = None
    """Column of the list of options, or the columns that each hold one."""
    answer_is: Literal["text", "letter", "number"] = "text"
    """Of choices: what names the right one: its text, its letter, or its number from 0."""
    kind: str | None = None
    """Column of the benchmark's own category. `_file` is the name of the row's file."""
    group: str | None = None
    """Column of what questions belong together by (MME: the two about one picture)."""

    def named_columns(self) -> dict[str, str]:
        """Every column that its file names → the key that names it; what a file leaves unsaid is not looked for."""
        found: dict[str, str] = {}
        for key in ("id", "question", "answers", "choices", "kind", "group", "images"):
            said = getattr(self, key) if key in self.model_fields_set else None
            for column in said if isinstance(said, list) else [said] if said else []:
                within = [each[1] for each in FIELD.finditer(column)] if key == "images" else []
                found |= dict.fromkeys(within or [column], key)
        return found


class Task(Layout):
    """A benchmark."""

    about: str
    """What it is, in a sentence."""
    sources: list[str] = Field(min_length=1)
    """Where layout, prompt and metric are from."""
    language: Literal["en", "zh"] = "en"
    """Of its questions."""
    hub: Hub | None = None
    """Where it is on the Hub. Unset: it must be on this machine."""
    path: str | None = None
    """Its folder or file, beside this file. Unset: `--benchmark-data` says it."""
    prompt: str = "{{ question }}"
    """Jinja: what is asked. It has `question`, `options` (lines of "A. text"), `choices` and the row's columns."""
    metric: str
    """A key of `metrics.measures.MEASURES`."""
    judge: Judging | None = None
    """How answers are judged, of `metric: judge`."""
    circular: bool = False
    """Ask each question once for every rotation of its options, unless the data has them."""
    options: list[str] = Field(default_factory=list)
    """Answers that `--likelihood` compares where the rows have no choices: `[Yes, No]`."""
    generation: Options = Field(default_factory=dict)
    """Arguments of `transformers.GenerationConfig`, over those of the bundle's recipe."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Only the first so many rows."""
    layouts: list[Layout] = Field(default_factory=list)
    """Other layouts in which it is published, each with its `files`; the first whose files are there is read."""
    _own: bool = PrivateAttr(default=False)

    @property
    def own(self) -> bool:
        """Whether it is somebody's own file: those that ship name columns that not every split has."""
        return self._own


def load_task(name: str, prompt: str | None = None) -> tuple[str, Task]:
    """A benchmark that ships, by its name, or one's own, by its file.

    Args:
        name: Its name or file.
        prompt: What is asked in place of its own prompt.

    Returns:
        Its name and what it is.

    Raises:
        UserError: There is none, or its file is wrong; the message names file and line.
    """
    own = name.endswith((".yaml", ".yml")) or "/" in name
    path = Path(name).expanduser() if own else task_path(name)
    if not path.is_file():
        raise UserError(
            f'--benchmark: the file "{name}" does not exist; benchmarks that ship: {", ".join(list_tasks())}.'
        )
    file = YamlFile.read(path, "task")
    try:
        task = Task.model_validate(file.data)
    except ValidationError as error:
        raise UserError(_sentence(error, file)) from None
    if flaw := _flaw(task):
        raise UserError(f"{file.where(flaw[:1])}: {flaw[1]}")
    if own:
        ask("check_prompt", task.prompt, file.where(("prompt",)))
        if task.judge is not None:
            ask("check_prompt", task.judge.prompt, file.where(("judge", "prompt")))
        task.path = task.path and str(path.parent / Path(task.path).expanduser())
        task._own = True
    if prompt is not None:
        ask("check_prompt", prompt, "--prompt")
        task.prompt = prompt
    return path.stem, task


def check_judge(tasks: Sequence[Task], judge: object = None) -> None:
    """Looks whether there is a judge where one is wanted, and only there.

    Raises:
        UserError: There is none, or it has nothing to do.
    """
    judged = any(task.judge is not None for task in tasks)
    if judged and judge is None:
        raise UserError(
            "A judge scores one of the benchmarks: ask it by `vlm-sft evaluate … --judge URL --judge-model NAME`."
        )
    if judge is not None and not judged:
        raise UserError("--judge belongs to benchmarks that a judge scores, as llava_bench: name one, or leave it out.")


def _flaw(task: Task) -> tuple[str, str] | None:
    """The first key that does not go with the others, and a sentence on it."""
    if task.metric not in MEASURES:
        near = closest(task.metric, MEASURES)
        hint = f'did you mean "{near}"?' if near else f"there are {', '.join(MEASURES)}."
        return "metric", f'the metric "{task.metric}" is none; {hint}'
    if task.metric in NEEDS_CHOICES and not all(layout.choices for layout in (task, *task.layouts)):
        return "metric", f'the metric "{task.metric}" needs `choices`; name the columns of the options.'
    if (task.judge is None) == (task.metric == "judge"):
        return "metric", "`metric: judge` and `judge` belong together; write both, or leave both out."
    shown = ("first", "second") if task.judge is not None and task.judge.compare else ("answer",)
    if task.judge is not None and (lacks := [name for name in shown if name not in task.judge.prompt]):
        return "judge", f"its prompt shows no `{lacks[0]}`; show it, or write `compare` as it is meant."
    if task.judge is not None and not 0 <= task.judge.scale[0] < task.judge.scale[1] < 1000:
        return "judge", "`scale` is the lowest and the highest score, such as [1, 10]; correct it."
    if task.judge is not None and task.judge.compare and not task.judge.scale[0]:
        return "judge", "`scale` begins above 0 where answers are compared: a share of nothing is none; correct it."
    if task.circular and task.metric != "choice_circular":
        return "circular", "`circular` is measured by `metric: choice_circular` alone; write that."
    patterns = [name for layout in (task, *task.layouts) for name in _patterns(layout)]
    named = [*patterns, *([task.path] if task.path else [])]
    if outside := next((name for name in named if PurePath(name).is_absolute() or ".." in PurePath(name).parts), None):
        mend = "name files beside the YAML file, or give another folder with --benchmark-data"
        return "path" if outside == task.path else "files", f'"{outside}" leads elsewhere; {mend}.'
    if (odd := next((name for name in named if not (_is_pattern(name) or name == task.path == ".")), None)) is not None:
        what = f'"{short(odd)}" is no name or pattern of files; write one like data/*.parquet.'
        return "path" if odd == task.path else "files", what
    hubs = [task.hub, *(join.hub for layout in (task, *task.layouts) for join in layout.join)]
    if strange := next((hub.path for hub in hubs if hub is not None and not _is_hub_id(hub.path)), None):
        return "hub", f'"{strange}" is no data set of the Hub; write name/data-set.'
    said = (flaw(GENERATION, name, value, "generation.") for name, value in task.generation.items())
    if sentence := next(filter(None, said), None):
        return "generation", sentence
    return ("generation", found[1]) if (found := flaw_of_answers(task.generation, limits())) else None


def _is_pattern(text: str) -> bool:
    """Whether it names files a few folders below: `**` walks through all of them, and is alone in its place."""
    parts = PurePath(text).parts
    short_ones = all("**" not in part and len(part) <= READERS.pattern_characters for part in parts)
    return 0 < len(parts) <= READERS.pattern_folders and short_ones


def _is_hub_id(text: str) -> bool:
    """Not a folder here, which `datasets` would read in place of a data set, and no pattern or address."""
    return len(text) <= LONGEST_ID and bool(_HUB_ID.fullmatch(text)) and not Path(text).exists()


def _patterns(layout: Layout) -> list[str]:
    return [*layout.files, *(name for join in layout.join for name in join.files)]


def _sentence(error: ValidationError, file: YamlFile) -> str:
    first = error.errors()[0]
    path = tuple(first["loc"])
    # A column is a text or a list of them, and pydantic says of which it speaks.
    key, where = ".".join(str(part) for part in path if part not in ("str", "list[str]")), file.where(path)
    if first["type"] == "extra_forbidden":
        parts: dict[str, type[RecipeModel]] = {"hub": Hub, "judge": Judging, "join": Join}
        of = next((parts[str(part)] for part in reversed(path[:-1]) if part in parts), Layout)
        fields = Task.model_fields if len(path) == 1 else of.model_fields
        near = closest(str(path[-1]), fields)
        hint = f'; did you mean "{near}"?' if near else f"; there are {', '.join(fields)}."
        return f'{where}: there is no key "{key}"{hint}'
    if first["type"] == "missing":
        return f'{where}: "{key}" is missing; see docs/evaluation.md for what a task says.'
    said = first["msg"].rstrip(".")
    return f"{where}: {key + ': ' if key else ''}{said}."


@cache
def _shipped() -> frozenset[str]:
    """Prompts of the benchmarks that ship."""
    shipped = [YamlFile.read(task_path(name)).data for name in list_tasks()]
    return frozenset(str(each["prompt"]) for data in shipped for each in (data, data.get("judge")) if each)


def render_prompt(prompt: str, where: str, values: Json) -> str:
    """What is asked of a row; the prompt of somebody else's task is rendered in a process with bounds.

    Raises:
        UserError: The prompt asks for a column that the row lacks, takes too much memory or time, or fails otherwise.
    """
    if prompt in _shipped():
        return fill_prompt(prompt, where, values)
    return str(ask("prompt", prompt, where, **plain(values)))


def plain(values: Json) -> Json:
    """Values as JSON has them: a picture's bytes are nothing to print."""
    return dict(json.loads(json.dumps(values, default=lambda value: "")))
