"""Bundles under lmms-eval: `accelerate launch -m lmms_eval --model vlm_sft --model_args pretrained=BUNDLE --tasks …`.

lmms-eval finds `manifest` by this package's entry point. Its chat model, which is the default, gives the messages of a
task to the bundle's own chat template; its simple model (`--force_simple`) puts the pictures before the text, and tasks
of the type `multiple_choice` can be asked of it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from transformers import set_seed

from ..base.console import make_console, quiet_libraries, say
from ..base.errors import RowError, UserError, exit_on_user_error
from ..base.names import Options, Row
from ..base.progress import RowProgress
from ..base.words import counted
from ..inference.generation import answer_each, cut_at
from ..inference.likelihood import likelihoods
from ..inference.questions import frames_of_file
from ..inference.settings import SAMPLING, check_options, open_bundle
from ..recipe.library_names import GENERATION
from ..rows.messages import Message, Part, answer_message, image_part, text_part

Conversation = Row
SEED = 42  # transformers' and the trainer's own, for tasks that draw their answers


def manifest() -> ModelManifest:
    """What lmms-eval's registry takes: the model's name, and where its two classes are."""
    return ModelManifest("vlm_sft", f"{__name__}.SimpleModel", f"{__name__}.ChatModel")


class SimpleModel(lmms):  # type: ignore[misc]
    """A bundle that lmms-eval asks with pictures and a text.

    Args:
        pretrained: Folder of the bundle, or `name/repository` on the Hub.
        batch_size: Questions answered at a time.
        device: Where the model runs; under `accelerate launch` each process has its own.
        trust_remote_code: See `vlm_sft.load`.
        max_batch_size, **unknown: What lmms-eval gives all models, and what this one does not have.
    """

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str | None = 1,
        device: str | None = None,
        trust_remote_code: bool = False,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        quiet_libraries()
        with exit_on_user_error():
            if unknown or not pretrained:
                wrong = f"there is no {min(unknown)!r}" if unknown else "the bundle is missing"
                raise UserError(f"--model_args: {wrong}; give pretrained=BUNDLE and maybe trust_remote_code=True.")
            if not str(batch_size or 1).isdecimal() or int(batch_size or 1) < 1:
                raise UserError(f"--batch_size must be a whole number from 1, not {batch_size!r}.")
            self.accelerator = Accelerator()
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            own = self.accelerator.device if self._world_size > 1 else device
            self._model, self._processor, self._settings = open_bundle(pretrained, {}, trust_remote_code, own)
        self._batch_size = int(batch_size or 1)
        self._left_out: set[str] = set()
        self._console = make_console()

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers counts there."""
        return self._model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One answer a request, in order; where its pictures cannot be read the answer is empty, which is said."""
        answers = [""] * len(requests)
        refused: list[RowError] = []
        alike: dict[str, list[int]] = {}  # what is asked for of the answers → numbers of requests
        for number, request in enumerate(requests):
            alike.setdefault(repr(self._given(request)), []).append(number)
        with exit_on_user_error(), RowProgress(self._console, "lmms-eval") as progress:
            tick = progress.counter("answered", len(requests), "questions")
            for numbers in alike.values():
                options, ends = self._options(self._given(requests[numbers[0]]))
                set_seed(SEED)
                for batch in self._batches(numbers, requests):
                    rows = [self._row(self._messages(requests[number]), requests[number]) for number in batch]
                    found = answer_each(self._model, self._processor, rows, **options)
                    refused += [each for each in found if isinstance(each, RowError)]
                    for number, text in zip(batch, found, strict=True):
                        answers[number] = "" if isinstance(text, RowError) else _before_all(ends, text)
                    tick(len(batch))
        if refused:
            what = counted(len(refused), "question")
            say(self._console, f"{what} could not be asked and the answer is taken as empty; the first: {refused[0]}")
        return answers

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of all rounds, a request; each round is a conversation of its own, as lmms-eval has it."""
        told: list[list[str]] = []
        with exit_on_user_error(), RowProgress(self._console, "lmms-eval") as progress:
            tick = progress.counter("answered", len(requests), "questions of several rounds")
            for request in requests:
                options, ends = self._options(self._given(request))
                told.append([])
                for row in self._rounds(request, told[-1]):
                    [found] = answer_each(self._model, self._processor, [row], **options)
                    if isinstance(found, RowError):
                        raise found
                    told[-1].append(_before_all(ends, found))
                tick(1)
        return told

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(negative log-likelihood of the answer, whether it is what the model would write), a request.

        The sign is lmms-eval's: its tasks of the type `multiple_choice` take the option with the smallest number. It
        makes text of everything but a `GenerationResult`, so the two stand in one.
        """
        found: list[Any] = [None] * len(requests)
        with exit_on_user_error(), RowProgress(self._console, "lmms-eval") as progress:
            tick = progress.counter("scored", len(requests), "options")
            for batch in self._batches(range(len(requests)), requests):
                rows = []
                for number in batch:
                    request = requests[number]
                    # Without the rest it is an option by itself, with nothing shown or asked.
                    text, answer, *rest = request.args
                    said = answer if isinstance(answer, str) else str(answer(self._doc(request)))
                    row = self._row([_turn(rest[0](self._doc(request)) if rest else [], text)], request)
                    rows.append({**row, "messages": [*row["messages"], answer_message(said.strip())]})
                for number, each in zip(batch, likelihoods(self._model, self._processor, rows), strict=True):
                    found[number] = GenerationResult((-each.log, each.greedy))
                tick(len(batch))
        return found

    def _given(self, request: Instance) -> Options:
        """What a task asks for of its answers."""
        return request.args[1]  # type: ignore[no-any-return]

    def _messages(self, request: Instance) -> list[Message]:
        """What is asked first."""
        text, _, visual, *_ = request.args
        return [_turn(visual(self._doc(request)), text)]

    def _next(self, request: Instance, so_far: Options) -> tuple[Any, ...] | None:
        """(messages, whether all is told, answers, what the task wants to be told again) of a later round."""
        given = request.args[3](self._doc(request), **so_far)
        if not (isinstance(given, tuple) and len(given) == 5):
            return None
        visuals, text, *more = given
        return [_turn(visuals, text)], *more

    def _rounds(self, request: Instance, told: list[str]) -> Iterator[Conversation]:
        messages, is_over, before = self._messages(request), False, None
        while not is_over:
            yield self._row(messages, request)
            so_far = {"round_idx": len(told), "previous_output": list(told), "previous_round_info": before}
            if (given := self._next(request, so_far)) is None:
                return
            messages, is_over, _, before = given

    def _doc(self, request: Instance) -> Any:
        """The row that a request is about; the last three of its arguments say where it is."""
        number, task, split = request.args[-3:]
        return self.task_dict[task][split][number]

    def _row(self, messages: Sequence[Any], request: Instance) -> Conversation:
        """lmms-eval's messages as ours, whose pictures stand beside them."""
        row = f"{request.task_name} {request.doc_id}"
        told: list[Message] = []
        images: list[Any] = []
        for message in messages:
            parts: list[Part] = []
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    parts.append(text_part(part["text"]))
                elif part["type"] == "image":
                    parts.append(image_part())
                    images.append(part["url"])  # it is decoded when it is asked about
                elif part["type"] == "video" and isinstance(part["url"], str):
                    for said, frame in frames_of_file(part["url"], self._processor):
                        parts += [*([text_part(said)] if said else []), image_part()]
                        images.append(frame)
                else:
                    raise UserError(f"{row}: this task shows {part['type']!r}, which no bundle reads: choose another.")
            told.append({"role": message["role"], "content": parts})
        return {"messages": told, "images": images, "id": row}

    def _batches(self, numbers: Sequence[int], requests: Sequence[Instance]) -> Iterator[list[int]]:
        """Numbers of requests whose texts are about as long, the longest first: what does not fit is known early."""
        ordered = sorted(numbers, key=lambda number: -len(str(requests[number].args[0])))
        for start in range(0, len(ordered), self._batch_size):
            yield ordered[start : start + self._batch_size]

    def _options(self, given: Options) -> tuple[Options, list[str]]:
        """Settings for `answer`, those of a task over those of the bundle's recipe, and texts that end an answer."""
        asked = {name: value for name, value in given.items() if value is not None and name != "until"}
        until = given.get("until") or []
        ends = [end for end in ([until] if isinstance(until, str) else until) if end]
        for name in sorted(asked.keys() - (GENERATION.names - set(GENERATION.never)) - self._left_out):
            self._left_out.add(name)
            say(self._console, f"The task's setting {name}={asked[name]!r} is none of `generate` and is left out.")
        asked = {name: value for name, value in asked.items() if name not in self._left_out}
        if asked.get("do_sample") is False or asked.get("temperature") == 0:
            asked = {name: value for name, value in asked.items() if name not in SAMPLING} | {"do_sample": False}
        own = {
            name: value for name, value in self._settings.items() if "do_sample" not in asked or name not in SAMPLING
        }
        options = own | asked | ({"stop_strings": ends} if ends else {})
        check_options(options)
        return options, ends


class ChatModel(SimpleModel):
    """A bundle that lmms-eval asks with messages; see `SimpleModel`."""

    is_simple = False

    def _given(self, request: Instance) -> Options:
        return request.args[2]  # type: ignore[no-any-return]

    def _messages(self, request: Instance) -> list[Message]:
        return request.args[1](self._doc(request))  # type: ignore[no-any-return]

    def _next(self, request: Instance, so_far: Options) -> tuple[Any, ...] | None:
        given = request.args[1](self._doc(request), **so_far)
        return given if isinstance(given, tuple) and len(given) == 4 else None


def _turn(visuals: object, text: str) -> Message:
    """A user's message: pictures and films, then the text; a file is a film unless its name ends as a picture's."""
    shown = visuals if isinstance(visuals, (list, tuple)) else [visuals] if visuals else []
    films = [isinstance(each, str) and Path(each).suffix.lower() not in Image.registered_extensions() for each in shown]
    parts = [{"type": "video" if film else "image", "url": each} for film, each in zip(films, shown, strict=True)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _before_all(ends: Sequence[str], text: str) -> str:
    for end in ends:
        text = cut_at(text, end)
    return text
