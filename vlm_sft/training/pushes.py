"""Pushes to the Hub while training goes on: at every save in the background, and at the end. None of them stops it."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..base.errors import UserError, without_tokens
from ..base.hub import TRIES
from ..base.names import Options
from ..bundle.hub import push_bundle

# How long a stopped run waits for the Hub: launchers and schedulers give it thirty seconds, and it has saved in them.
AFTER_A_SIGNAL = 15.0


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
        self.options: Options = {"private": private, "revision": revision}
        self.message = message
        self._running: Future[str] | None = None
        self._folder: Path | None = None  # the folder that is being pushed

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Starts to push the checkpoint that was just written, on the first process."""
        if not self.every_save or not state.is_world_process_zero:
            return
        if self._running is not None and not self._running.done():
            self.say(f"Step {state.global_step} is not pushed: an earlier checkpoint is still on its way to the Hub.")
            return
        self._report()
        self._start(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", state.global_step)

    def stop(self, checkpoint: Path, step: int, seconds: float = AFTER_A_SIGNAL) -> None:
        """After a signal: gives the last checkpoint some seconds to be pushed; if it is not, says what pushes it."""
        if not self.every_save:
            self.say(
                f"The run is not finished, so nothing was pushed; to push what is there: {self._command(checkpoint)}"
            )
            return
        self.say(f"Pushing step {step} for at most {seconds:g} seconds.")
        end = time.monotonic() + seconds
        if self._ended(end):
            own = self._folder == checkpoint
            if self._report("it is tried once more.") and own:
                return
            self._start(checkpoint, step, TRIES)
        why = f"The Hub did not take it within {seconds:g} seconds."
        if self._folder == checkpoint and self._ended(end):
            assert self._running is not None
            try:
                self.say(f"Pushed: {self._running.result()}")
                return
            except Exception as error:
                why = _why(error)
        self.say(f"The checkpoint is whole but was not pushed. {why} Then: {self._command(checkpoint)}")

    def finish(self, folder: str | Path) -> str | None:
        """Waits for what is on its way, then pushes the finished bundle.

        Returns:
            The address of the commit, or None when the Hub could not be had; why, and what to do, was said.
        """
        self._report()
        try:
            address = push_bundle(folder, self.repo_id, message=self.message, **self.options)
        except Exception as error:  # hours of training must not end because a push fails, however it does
            self.say(f"The bundle is whole but was not pushed. {_why(error)} Then: {self._command(folder)}")
            return None
        self.say(f"Pushed: {address}")
        return address

    def _start(self, folder: Path, step: int, max_tries: int = 1) -> None:
        """Begins to push in the background."""
        running: Future[str] = Future()
        message = f"Step {step}" + (f": {self.message}" if self.message else "")

        def push() -> None:
            try:
                address = push_bundle(folder, self.repo_id, message=message, max_tries=max_tries, **self.options)
                running.set_result(address)
            except BaseException as error:
                running.set_exception(error)

        self._running, self._folder = running, folder
        # A daemon: a run that is stopped at once does not wait for the Hub, as it would for a thread of HfApi's own
        # `run_as_future`, which Python joins at its end.
        threading.Thread(target=push, name="push", daemon=True).start()

    def _ended(self, end: float) -> bool:
        """Waits, until a time, for the push in the background; says whether there is none any more."""
        return self._running is None or bool(wait([self._running], max(end - time.monotonic(), 0)).done)

    def _report(self, then: str = "training goes on, and the end will try again.") -> bool:
        """Says how the push in the background went, waiting for its end; returns whether there was one and it did."""
        running, self._running = self._running, None
        if running is None:
            return False
        try:
            self.say(f"Pushed: {running.result()}")
        except Exception as error:
            self.say(f"A checkpoint was not pushed; {then} {_why(error)}")
            return False
        return True

    def _command(self, folder: str | Path) -> str:
        private, revision = self.options["private"], self.options["revision"]
        flags = [] if private is None else ["--private" if private else "--public"]
        flags += ["--revision", revision] if revision else []
        return shlex.join(["vlm-sft", "push", str(folder), self.repo_id, *flags])


def _why(error: Exception) -> str:
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return without_tokens(f"{kind}{error}")
