"""Steps of a run: each gives its commands once, and a run that was cut off goes on behind its last whole step."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def fingerprint(commands: list[list[str]]) -> str:
    """SHA-256 of commands and of the scripts and recipes that they name."""
    digest = hashlib.sha256(json.dumps(commands).encode())
    for word in (word for command in commands for word in command):
        if word.endswith((".py", ".yaml")) and Path(word).is_file():
            digest.update(Path(word).read_bytes())
    return digest.hexdigest()


class Steps:
    """Runs steps one after the other, knows how long each took, and leaves out those that are done.

    A step is done if `record` says that it ended well with the same commands, the same scripts and recipes, and so did
    all before it.

    Attributes:
        seconds: Step → how long its commands took, in this run or in the one that was cut off.
    """

    def __init__(self, record: Path) -> None:
        self.record = record
        self.seconds: dict[str, float] = {}
        self._before: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        self._done: dict[str, Any] = {}
        self._environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        }  # fmt: skip

    def run(
        self,
        step: str,
        *commands: list[str | Path],
        capture: bool = False,
        writes: Path | None = None,
        there: bool = True,
    ) -> list[str]:
        """Gives the commands of a step; the run ends where one fails.

        Args:
            step: Its name, in English and, behind two spaces, in Chinese.
            commands: Each a program and its arguments.
            capture: Take what they write to standard output.
            writes: The folder that the step makes. One of a step that was cut off, or of other commands, is removed:
                training never writes over a run.
            there: Whether what the step makes is there as this run needs it. If not, it is made again; steps behind it
                that are done stay so, because the same commands make the same.

        Returns:
            What each command wrote, if that is captured.
        """
        words = [[str(word) for word in command] for command in commands]
        key, before = fingerprint(words), self._before.get(step)
        there = there and (writes is None or writes.is_dir())
        if there and before and before["key"] == key:
            print(f"\n== {step}: done before.", flush=True)
        else:
            if before is None or before["key"] != key:
                self._before = {}  # what follows was made of something else
            if writes is not None:
                shutil.rmtree(writes, ignore_errors=True)
            print(f"\n== {step}", flush=True)
            start = time.perf_counter()
            said = [self._give(command, capture) for command in words]
            before = {"key": key, "seconds": round(time.perf_counter() - start, 1), "said": said}
        self._done[step] = before
        self.seconds[step] = before["seconds"]
        self.record.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.record.with_suffix(".tmp")
        unfinished.write_text(
            json.dumps({**self._before, **self._done}, ensure_ascii=False, indent=1), encoding="utf-8"
        )
        unfinished.replace(self.record)
        return before["said"]

    def _give(self, command: list[str], capture: bool) -> str:
        print(f"$ {shlex.join(word if len(word) < 200 else '…' for word in command)}", flush=True)
        done = subprocess.run(command, env=self._environment, stdout=subprocess.PIPE if capture else None, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        if capture:
            print(done.stdout, end="", flush=True)
        return (done.stdout or "").strip()
