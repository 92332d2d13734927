"""The four questions of `init`: what to learn, on which model, in which language, within how many hours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base.errors import UserError
from ..base.names import CONFIG
from ..base.words import CHINESE
from ..machine.machine import Machine
from ..reading.locations import is_hub_id
from ..spoken.language import in_words, spoken_language
from .models import CANDIDATES, GB, Candidate, fits, plan, proposals
from .questions import Asker
from .recipe_text import Draft
from .rows_folder import Kind

HOURS = 8.0
MOST_WORKERS = 4


@dataclass(frozen=True)
class Answers:
    """What flags say; None for what is asked.

    Attributes:
        learn: caption, classify, answer or talk.
        model: Hub id or folder.
        language: en or zh.
        hours: That training may take.
    """

    learn: str | None = None
    model: str | None = None
    language: str | None = None
    hours: float | None = None


def draft_of(
    asker: Asker, kinds: Sequence[Kind], machine: Machine, answers: Answers, name: str, given: str, seed: int
) -> Draft:
    """Asks what no flag says.

    Raises:
        UserError: A flag says what cannot be.
    """
    choices = _learnable(kinds)
    learn = asker.choose(
        in_words("What should it learn?", "让它学什么？"), choices, next(iter(choices)), answers.learn, "--learn"
    )
    language = asker.choose(
        in_words("In which language is it asked, and the recipe explained?", "用哪种语言提问，并说明配方？"),
        {"en": "English", "zh": "中文"}, _language_of(kinds), answers.language, "--language",
    )  # fmt: skip
    rows = sum(len(kind.rows) for kind in kinds)
    fitting = proposals(machine, language == "zh", rows, answers.hours or HOURS)
    model = asker.text(
        in_words("On top of which model? A number, a Hub id or a folder.", "在哪个模型上训练？编号、Hub 名称或文件夹"),
        fitting[0].pretrained, answers.model, [(each.pretrained, _about(each, machine)) for each in fitting],
    )  # fmt: skip
    if not model.strip():
        raise UserError("--model is empty; give a Hub id or a folder, or leave it out.")
    _check_model(model)
    hours = asker.number(
        in_words("How many hours may training take, at most?", "训练最多几个小时？"), HOURS, answers.hours
    )
    if not 0 < hours < float("inf"):
        raise UserError(f"--hours must be a number above zero, not {hours:g}.")
    return Draft(
        name, given, language, learn, plan(model, rows, machine, hours), (), {}, seed, max(1, len(machine.gpus)),
        max(0, min(MOST_WORKERS, machine.cores - 1)), True, hours,
    )  # fmt: skip


def _learnable(kinds: Sequence[Kind]) -> dict[str, str]:
    """What rows can teach → in words; the first is what most of them look like."""
    most = max(kinds, key=lambda kind: len(kind.rows))
    count = f"{sum(len(kind.rows) for kind in kinds):,}"
    words: Mapping[str, str] = {
        "caption": in_words(f"to describe a picture ({count} texts)", f"描述图片（{count} 段文字）"),
        "classify": in_words(f"to name the class of a picture, of {len(most.labels):,} ({count} pictures)",
                             f"说出图片属于哪一类，共 {len(most.labels):,} 类（{count} 张）"),
        "answer": in_words(f"to answer questions about pictures ({count})", f"回答关于图片的问题（{count} 个）"),
        "talk": in_words(f"to talk as the conversations do ({count} of them)", f"像这些对话一样交谈（{count} 段）"),
    }  # fmt: skip
    form = most.meant.format
    if form != "caption":
        names = ["answer" if form == "vqa" else "talk"]
    else:
        names = ["classify", "caption"] if most.meant.labels else ["caption"]
    return {name: words[name] for name in names}


def _language_of(kinds: Sequence[Kind]) -> str:
    """Chinese where rows are, or where Chinese is spoken; class names and such say little."""
    languages = set().union(*(kind.languages for kind in kinds))
    return "zh" if languages == {CHINESE} or spoken_language() == "zh" else "en"


def _about(each: Candidate, machine: Machine) -> str:
    """What a person would want to know before choosing."""
    four = machine.gpus and fits(each, machine) is None
    size = each.takes(four_bits=bool(four)) / GB
    memory = in_words(f"{size:.0f} GiB{' in 4 bits' if four else ''}", f"{size:.0f} GiB{'（4 比特）' if four else ''}")
    speaks = in_words("English and Chinese", "中英文") if each.chinese else in_words("English", "英文")
    return f"{each.billions:g}B, {memory}, {speaks}, {each.license}"


def _check_model(model: str) -> None:
    """A folder that is none, and a name that is no Hub id, are said now and not after the pictures were looked at."""
    if (place := Path(model).expanduser()).exists():
        if not (place / CONFIG).is_file():
            raise UserError(f"--model {model} is a folder without {CONFIG}: give that of a model, or a Hub id.")
        return
    if model.count("/") == 1 and is_hub_id(model):
        return
    known = ", ".join(each.pretrained for each in CANDIDATES[:3])
    raise UserError(f"--model {model} is neither a folder nor a Hub id (owner/name), such as {known}.")
