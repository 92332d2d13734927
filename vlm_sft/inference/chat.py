"""`vlm-sft chat`: a conversation about images at the terminal, or one question and its answer."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import torch
from PIL import Image
from transformers import PreTrainedModel

from ..base.console import make_console, tell
from ..base.errors import UserError
from ..base.names import Options, Row
from ..base.progress import waiting
from ..base.words import closest, counted
from ..batch.pictures import PictureError, read_pictures
from ..batch.processor import VLMProcessor
from ..reading.images import load_image
from ..reading.tar_shards import VIDEO_ENDINGS
from ..reading.video import Films
from ..rows.boxes import place_boxes
from ..rows.messages import Message, Part, image_part, text_part
from ..rows.raw_row import RowView
from .generation import PromptTooLongError
from .questions import frames_of_file
from .settings import check_options, ignores_text, open_bundle
from .streaming import stream_answer
from .typed_line import split_paths, use_readline

if TYPE_CHECKING:
    from rich.console import Console

COMMANDS = {
    "/image": "/image PATH   add an image to the next question    给下一个问题加图片",
    "/video": "/video PATH   add a video to the next question     给下一个问题加视频",
    "/reset": "/reset        forget the conversation              清空对话",
    "/help": "/help         show this                            显示帮助",
    "/quit": "/quit         leave; Ctrl-D does too               退出",
}
Shown = tuple[str, Image.Image]  # what stands before an image: "", or of a frame its time

CAPTIONS_ONLY = "This bundle's template shows the model images only: words are ignored, and Enter asks for a caption."


def chat(
    bundle: str,
    images: list[str],
    question: str | None = None,
    options: Options | None = None,
    trust_remote_code: bool = False,
    boxes: str | None = None,
    videos: Sequence[str] = (),
) -> str:
    """Talks about images and videos.

    Args:
        bundle: Folder of a trained model.
        images: Image files that belong to the first question.
        question: Asked once, and only the answer is printed; without it a conversation is held over standard input.
        options: For transformers' `generate`, over the recipe's `generation`.
        trust_remote_code: See `vlm_sft.load`.
        boxes: What the numbers of boxes in questions count, as a source's `boxes`; None: they are text.
        videos: Video files, likewise; of each the frames are shown that the recipe says.

    Returns:
        The answer to `question`.

    Raises:
        UserError: The bundle, an image or an option is wrong; within a conversation errors are said and it goes on.
    """
    check_options(options or {})
    loaded = [load_image(os.path.expanduser(path)) for path in images]
    with Films() as films:
        for path in videos:
            films.open({"path": os.path.expanduser(path), "bytes": None}, "")
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of another encoding must not end the conversation
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")
    console = make_console(highlight=False, soft_wrap=True)
    with waiting(console, f"Loading {bundle}"):
        model, processor, settings = open_bundle(bundle, options or {}, trust_remote_code)
        shown: list[Shown] = [("", image) for image in read_pictures(processor, loaded, images)]
        talk = Conversation(model, processor, settings, shown, boxes)
    for path in videos:
        talk.waiting += frames_of_file(path, talk.processor)
    if question is None:
        Prompt(talk, console).run()
        return ""
    if talk.captions_only and question:
        console.print(CAPTIONS_ONLY)
    if not (answer := _write_answer(talk.ask(question))):
        tell()
    return answer


class Conversation:
    """What was said, and the images of it.

    Args:
        model: The model.
        processor: Its processor.
        options: For `generate`.
        waiting: Images of the next question, and what stands before each.
        boxes: What the numbers of boxes in questions count; None: they are text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: VLMProcessor,
        options: Options,
        waiting: list[Shown],
        boxes: str | None = None,
    ) -> None:
        self.model, self.processor, self.options, self.boxes = model, processor, options, boxes
        self.captions_only = ignores_text(processor)
        self.messages: list[Message] = []
        self.images: list[Image.Image] = []
        self.waiting = waiting

    def reset(self) -> None:
        """Forgets everything."""
        self.messages, self.images, self.waiting = [], [], []

    def ask(self, text: str) -> Answer:
        """Begins to answer; what is said becomes part of the conversation when the answer is closed.

        Raises:
            UserError: There is nothing to ask.
        """
        if self.captions_only:  # the model was trained on one caption each, so every caption stands for itself
            self.waiting = self.waiting or [("", image) for image in self.images]
            self.messages, self.images = [], []
            if not self.waiting:
                raise UserError("There is no image to describe: give one.")
        elif not text.strip():
            raise UserError("The question is empty: write one.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError("The question is not UTF-8 text: set the terminal to UTF-8 (LANG=zh_CN.UTF-8).") from None
        content: list[Part] = []
        for said, _ in self.waiting:
            content += [*([text_part(said)] if said else []), image_part()]
        content += [{"type": "text", "text": text}] if text.strip() else []
        question = {"role": "user", "content": content}
        images = len(self.images) + len(self.waiting)
        (question,) = place_boxes(RowView({}, "the question", {}), [question], images, self.boxes)
        return Answer(self, question)


class Answer:
    """An answer as it is written: iterate over its pieces, then close it."""

    def __init__(self, talk: Conversation, question: Row) -> None:
        self._talk, self._question = talk, question
        self._said = ""
        self._images = [*talk.images, *(image for _, image in talk.waiting)]
        messages = [*talk.messages, question]
        self._pieces = stream_answer(talk.model, talk.processor, messages, self._images, **talk.options)

    def __iter__(self) -> Iterator[str]:
        try:
            for piece in self._pieces:
                self._said += piece
                yield piece
        except Exception:  # half an answer is kept where somebody stopped it, not where it failed
            self._said = ""
            raise

    def close(self) -> None:
        """Stops the model. A question without an answer was never asked: its images wait for the next one."""
        self._pieces.close()  # type: ignore[attr-defined]
        if self._said.strip():
            talk = self._talk
            answer = {"role": "assistant", "content": [{"type": "text", "text": self._said}]}
            talk.messages += [self._question, answer]
            talk.images = self._images
            talk.waiting = []


class Prompt:
    """Reads lines, obeys commands, writes answers.

    Answers go to standard output, everything else to standard error.

    Args:
        talk: The conversation.
        console: Standard error.
    """

    def __init__(self, talk: Conversation, console: Console) -> None:
        self.talk, self.console = talk, console
        self.at_terminal = sys.stdin.isatty()
        if self.at_terminal:
            use_readline(COMMANDS)

    def run(self) -> None:
        """Holds the conversation until it is left."""
        if self.at_terminal:
            self.console.print("Ask about images; /help lists the commands.  输入问题，/help 显示命令。")
        if self.talk.captions_only:
            self.console.print(CAPTIONS_ONLY)
        while True:
            try:
                line = self.read().strip()
            except EOFError:
                if self.at_terminal:
                    self.console.print()
                return
            except KeyboardInterrupt:
                self.console.print("\nTo leave, type /quit or press Ctrl-D.")
                continue
            if line.startswith("／"):  # a slash as Chinese input methods write it
                line = "/" + line[1:]
            if line == "/quit":
                return
            self.obey(line)

    def read(self) -> str:
        """One line of standard input, edited with readline at a terminal."""
        if not self.at_terminal:
            return input()
        count = len(self.talk.waiting)
        prompt = f"[{counted(count, 'image')}] > " if count else "> "
        if not sys.stdout.isatty():  # `input` would write the prompt among the answers
            tell(prompt, end="", stderr=True)
            prompt = ""
        return input(prompt)

    def obey(self, line: str) -> None:
        """Does what a line says: a command or a question; an error is said, not raised."""
        try:
            if line.startswith("/"):
                self.command(line)
            elif line or (self.talk.captions_only and (self.talk.waiting or self.talk.images)):
                self.answer(line)
        except KeyboardInterrupt:
            self.console.print("(stopped)")
        except PromptTooLongError as error:
            self.console.print(
                f"The conversation takes {error.length:,} tokens with its images, but the language model reads at most "
                f"{error.limit:,}: type /reset to start anew."
            )
        except UserError as error:
            self.console.print(str(error)[:1].upper() + str(error)[1:])
        except torch.OutOfMemoryError:
            self.console.print("The GPU's memory does not hold the conversation: type /reset to start anew.")

    def command(self, line: str) -> None:
        """Does what a line beginning with a slash says.

        Raises:
            UserError: There is no such command, or an image cannot be read.
        """
        word, *rest = line.split(maxsplit=1)  # also at the wide space of Chinese input methods
        if word in ("/image", "/video"):
            self.add(word, *rest)
        elif word == "/reset":
            self.talk.reset()
            self.console.print("The conversation and its images are forgotten.")
        elif word == "/help":
            self.console.print("\n".join(COMMANDS.values()))
        elif os.path.exists(line):
            film = line.rpartition(".")[2].lower() in VIDEO_ENDINGS
            raise UserError(f"To add {'a video, type /video' if film else 'an image, type /image'} {line}")
        else:
            near = closest(word, COMMANDS)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(COMMANDS)}."
            raise UserError(f"There is no command {word}; {hint}")

    def answer(self, question: str) -> None:
        """Asks the model.

        Raises:
            UserError: There is nothing to ask, or the model fails on a picture; that would fail again, and is dropped.
        """
        try:
            if not _write_answer(self.talk.ask(question)):
                self.console.print("The model gave no answer; the question is forgotten.")
        except PictureError as error:
            self.talk.waiting = []
            raise UserError(f"{error} The question and its images are forgotten.") from error

    def add(self, command: str, given: str = "") -> None:
        """Adds images (`/image`) or videos (`/video`) to the next question.

        Raises:
            UserError: No path is given, or one cannot be read or is refused by the model's image processor; then none
                of them is added.
        """
        if not given:
            raise UserError(f"Say which {command[1:]}: {command} PATH.")
        paths, processor = split_paths(given), self.talk.processor
        if command == "/image":
            shown = [("", image) for image in read_pictures(processor, paths, paths)]
            added = ", ".join(f"{image.width} x {image.height}" for _, image in shown)
        else:
            shown = [frame for path in paths for frame in frames_of_file(path, processor)]
            added = f"{len(shown)} frames"
        self.talk.waiting += shown
        if self.at_terminal:
            self.console.print(f"Added ({added}); now ask about it.")


def _write_answer(answer: Answer) -> str:
    """Writes an answer to standard output as it comes; returns it."""
    at_terminal, wrote = sys.stdout.isatty(), ""
    try:
        with closing(answer):
            for piece in answer:
                tell(piece, end="") if at_terminal else print(piece, end="", flush=True)  # a file gets what was said
                wrote += piece
    finally:
        if wrote:
            tell()
    return wrote
