"""Pushes to the Hub while training goes on: at every save in the background, and at the end. None of them stops it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .errors import UserError, without_tokens
from .hub import push_bundle


class PushCallback(TrainerCallback):
    """Pushes checkpoints, if asked to, and the bundle at the end.

    Args:
        repo_id: Repository on the Hub.
        say: Told what was pushed and what was not.
        every_save: Whether each checkpoint is pushed too; one that comes while another is on its way is left out.
        private: See `push_bundle`.
        revision: See `push_bundle`.
        message: See `push_bundle`.
    """

    def __init__(
        self,
        repo_id: str,
        say: Callable[[str], None],
        *,
        every_save: bool = False,
        private: bool | None = None,
        revision: str | None = None,
        message: str | None = None,
    ) -> None:
        self.repo_id, self.say, self.every_save = repo_id, say, every_save
        self.options: dict[str, Any] = {"private": private, "revision": revision}
        self.message = message
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        self._running: Future[str] | None = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Starts to push the checkpoint that was just written, on the first process."""
        if not self.every_save or not state.is_world_process_zero:
            return
        if self._running is not None and not self._running.done():
            self.say(f"Step {state.global_step} is not pushed: an earlier checkpoint is still on its way to the Hub.")
            return
        self._report()
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        message = f"Step {state.global_step}" + (f": {self.message}" if self.message else "")
        self._running = self._worker.submit(
            push_bundle, folder, self.repo_id, message=message, max_tries=1, **self.options
        )

    def finish(self, folder: str | Path) -> str | None:
        """Waits for what is on its way, then pushes the finished bundle.

        Args:
            folder: The bundle.

        Returns:
            The address of the commit, or None when the Hub could not be had; why, and what to do, was said.
        """
        self._report()
        self._worker.shutdown()
        try:
            address = push_bundle(folder, self.repo_id, message=self.message, **self.options)
        except Exception as error:  # whatever it is, hours of training must not end on it
            again = shlex.join(["vlm-sft", "push", str(folder), self.repo_id, *self._flags()])
            self.say(f"The bundle is whole but was not pushed. {_why(error)} Then: {again}")
            return None
        self.say(f"Pushed: {address}")
        return address

    def _report(self) -> None:
        """Says how the push in the background went, waiting for its end."""
        if self._running is None:
            return
        try:
            self.say(f"Pushed: {self._running.result()}")
        except Exception as error:
            self.say(f"A checkpoint was not pushed; training goes on, and the end will try again. {_why(error)}")
        self._running = None

    def _flags(self) -> list[str]:
        private = self.options["private"]
        shown = [] if private is None else ["--private" if private else "--public"]
        return shown + (["--revision", self.options["revision"]] if self.options["revision"] else [])


def _why(error: Exception) -> str:
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return without_tokens(f"{kind}{error}")
