"""The page: pictures and a question on one side, each bundle's answers on the other, and what is kept of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from ..base.errors import UserError
from ..base.words import counted
from ..serving.app import Server
from ..spoken.catalogue import translated
from .asking import Said, ask
from .kept import Judged, Kept
from .words import is_chinese, sentence, translations

LONGEST = 8_000  # characters of a question, and of an answer that a person has corrected
HOUR = 3600
FONTS = ["system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
STYLE = """
main.fillable { max-width: 1600px !important; }
#title p { font-size: 1.5em; font-weight: 600; }
#pictures .grid-wrap { padding-top: 40px; }
footer { display: none !important; }
.note, .note * { background: transparent !important; border: none !important; box-shadow: none !important; }
.note textarea { padding: 0 4px !important; font-size: 0.9em; }
.answers { gap: 16px; }
"""


@dataclass
class Asked:
    """What a person has asked, and what was answered: what the buttons keep.

    Attributes:
        question: Text.
        pictures: Files.
        said: Answers with the pictures, by bundle.
        ended: Whether all have ended.
    """

    question: str = ""
    pictures: tuple[Path, ...] = ()
    said: dict[str, str] = field(default_factory=dict)
    ended: bool = True


class Boxes(NamedTuple):
    """What one bundle has on the page."""

    answer: gr.Textbox
    blank: gr.Textbox
    note: gr.Textbox
    good: gr.Button
    bad: gr.Button


def make_page(server: Server, kept: Kept, at_a_time: int, queue: int) -> tuple[gr.Blocks, gr.I18n]:
    """The page and its words.

    Args:
        server: Bundles, pool and bounds.
        kept: Where rows go.
        at_a_time: Questions that are answered at a time.
        queue: Questions that may wait.
    """
    words = gr.I18n(**translations())
    with gr.Blocks(title="vlm_sft", analytics_enabled=False, delete_cache=(600, HOUR), fill_width=True) as page:
        asked = gr.State(None, time_to_live=HOUR)
        gr.Markdown(words("title"), elem_id="title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                pictures = gr.Gallery(
                    label=words("pictures"), sources=["upload", "webcam", "clipboard"], file_types=["image"],
                    type="filepath", interactive=True, columns=3, height=300, object_fit="contain",
                    buttons=["fullscreen"], elem_id="pictures",
                )  # fmt: skip
                question = gr.Textbox(
                    label=words("question"), placeholder=words("example"), lines=3, max_length=LONGEST,
                    elem_id="question",
                )  # fmt: skip
                blank = gr.Checkbox(True, label=words("blank"), info=words("blank_info"), elem_id="blank")
                with gr.Row():
                    begin = gr.Button(words("ask"), variant="primary", scale=2, min_width=100, elem_id="ask")
                    stop = gr.Button(words("stop"), scale=1, min_width=80, elem_id="stop")
            with gr.Column(scale=4, min_width=300):
                with gr.Row(elem_classes="answers", equal_height=False):
                    boxes = {name: _boxes(name, number, words) for number, name in enumerate(server.served)}
                gr.Markdown(words("correct"))
        shown = [box for each in boxes.values() for box in each[:3]]
        hidden: Any = {"api_visibility": "private", "show_progress": "hidden"}
        asking = gr.on(
            [begin.click, question.submit], Asking(server).answers, [pictures, question, blank], [asked, *shown],
            concurrency_limit=at_a_time, trigger_mode="once", **hidden,
        )  # fmt: skip
        stop.click(_stopped, [asked], [asked], cancels=[asking], **hidden)
        for name, each in boxes.items():
            for button, good in ((each.good, True), (each.bad, False)):
                button.click(Keeping(kept, name, good).keep, [asked, each.answer], [each.note], **hidden)
    page.queue(max_size=queue, api_open=False)
    return page, words


def _boxes(name: str, number: int, words: gr.I18n) -> Boxes:
    with gr.Column(min_width=300, elem_id=f"bundle-{number}"):
        with gr.Row():
            answer = gr.Textbox(
                label=name, lines=5, max_lines=20, interactive=True, max_length=LONGEST, scale=3, min_width=260,
                elem_id=f"answer-{number}",
            )  # fmt: skip
            blank = gr.Textbox(
                label=words("answer_blank"), lines=3, max_lines=20, interactive=False, scale=2, min_width=220,
                elem_id=f"blank-{number}",
            )  # fmt: skip
        with gr.Row():
            good = gr.Button(words("good"), size="sm", min_width=100, elem_id=f"good-{number}")
            bad = gr.Button(words("bad"), size="sm", min_width=100, elem_id=f"bad-{number}")
        note = gr.Textbox(
            label=words("note"), show_label=False, container=False, interactive=False, lines=2, max_lines=8,
            elem_classes="note", elem_id=f"note-{number}",
        )  # fmt: skip
    return Boxes(answer, blank, note, good, bad)


class Asking:
    """The button that asks.

    Args:
        server: Bundles, pool and bounds.
    """

    def __init__(self, server: Server) -> None:
        self._server = server

    async def answers(
        self,
        pictures: Sequence[tuple[str, str | None]] | None,
        question: str | None,
        blank: bool,
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, ...]]:
        """The answers as they are written: the state, then answer, blank answer and note of each bundle."""
        server, chinese, text = self._server, is_chinese(request.headers), (question or "").strip()
        files = tuple(Path(path) for path, _ in pictures or [])
        wrong = ""
        if not text and not files:
            wrong = sentence("no_question", chinese)
        elif len(text) > LONGEST:
            wrong = sentence("too_long", chinese, len(text), LONGEST)
        if wrong:
            yield (None, *(box for _ in server.served for box in ("", "", _note(wrong))))
            return
        state = Asked(text, files, ended=False)
        async for said in ask(server, text, files, bool(blank)):
            state.said = {each.name: each.text for each in said if not each.blank}
            state.ended = all(each.reason is not None for each in said)
            yield (state, *_shown(server, said, chinese))


def _shown(server: Server, said: Sequence[Said], chinese: bool) -> list[str]:
    found = {(each.name, each.blank): each for each in said}
    boxes = []
    for name in server.served:
        seeing, blind = found[name, False], found.get((name, True))
        faults = list(dict.fromkeys(each.fault for each in (seeing, blind) if each is not None and each.fault))
        notes = [_note(translated(fault, "zh" if chinese else "en")) for fault in faults]
        if seeing.reason == "length":
            notes.append(sentence("length", chinese))
        boxes += [seeing.text, blind.text if blind is not None else "", "\n".join(notes)]
    return boxes


def _stopped(asked: Asked | None) -> Asked | None:
    """What is written so far may be kept."""
    if asked is not None:
        asked.ended = True
    return asked


class Keeping:
    """A button that keeps an answer.

    Args:
        kept: Where rows go.
        name: Of the bundle whose answer it is.
        good: What the button calls the answer.
    """

    def __init__(self, kept: Kept, name: str, good: bool) -> None:
        self._kept, self._name, self._good = kept, name, good

    def keep(self, asked: Asked | None, text: str | None, request: gr.Request) -> str:
        """What was done, in a sentence; `text` is the answer as the person left it."""
        chinese, text = is_chinese(request.headers), (text or "").strip()
        if asked is None or self._name not in asked.said:
            return _note(sentence("nothing", chinese))
        if not asked.ended:
            return _note(sentence("unfinished", chinese))
        said = asked.said[self._name].strip()
        if text == said.replace("\r\n", "\n").replace("\r", "\n"):  # as a browser's field has line breaks
            text = said
        if len(text) > LONGEST:
            return _note(sentence("too_long", chinese, len(text), LONGEST))
        if not text and (self._good or not said):
            return _note(sentence("no_answer", chinese))
        try:
            judged = Judged(asked.question, asked.pictures, self._name, said, text or said, self._good)
            target, count, new = self._kept.keep(judged)
        except UserError as error:
            return _note(translated(str(error), "zh" if chinese else "en"))
        said_of_it = "again" if not new else "kept_good" if judged.teaches else "kept_bad"
        rows = f"{count:,} 行" if chinese else counted(count, "row")
        return sentence(said_of_it, chinese, target, rows)


def _note(text: str) -> str:
    """A sentence that says why something was not done."""
    return f"⚠ {text}"
