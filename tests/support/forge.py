"""Programs as forks of one process that has imported everything once: importing costs seconds, a tiny run does not.

    forge.run(recipe, "sft.max_steps=3", kill_at=17)
    with forge.in_place_of_processes():
        subprocess.run([sys.executable, "-m", "vlm_sft.train", …])

A fork knows nothing of the test that asked for it, nor of other forks: its program begins as in a fresh Python, less
the imports. Moment 17 of a run is the 17th time that it touches a file of its `output_dir` or begins a step: so a run
can be killed between any two of them, inside a save above all, and at the same place again.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

PROGRAM = Path(__file__).resolve()
ROOT = PROGRAM.parents[2]  # not from `paths`: a stand-in for `python` is given other folders
LAUNCHER = "accelerate.commands.launch"
PROGRAMS = (
    "vlm_sft", "vlm_sft.train", "vlm_sft.recipe.left_out", LAUNCHER,
    *(f"vlm_sft.llama_cpp.{name}" for name in ("ask", "convert", "quantize")),
)  # fmt: skip
COMMAND = str(Path(sys.executable).with_name("vlm-sft"))  # does what `python -m vlm_sft` does
# Libraries read these while they are imported, which a fork has behind it.
READ_ON_IMPORT = ("CUDA_", "HF_", "OMP_", "PYTHONHASHSEED", "TORCH_")  # torch sets TORCHINDUCTOR_CACHE_DIR itself
KNOWN_OPTIONS = {
    "args",
    "capture_output",
    "check",
    "cwd",
    "env",
    "errors",
    "input",
    "stderr",
    "stdout",
    "text",
    "timeout",
}


class Started:
    """A program that was forked: as much of a `subprocess.Popen` as tests ask for.

    Attributes:
        pid: The fork's; whoever hangs up ends it.
        returncode: The exit code, or minus the signal that ended it; None before.
        stderr: What it says, where that was to be read here.
    """

    def __init__(self, address: str, order: dict[str, Any], files: list[int], stderr: TextIO | None = None) -> None:
        """Sends an order with the three files of the program."""
        order |= {"cwd": str(order.get("cwd") or os.getcwd()), "env": dict(order.get("env") or os.environ)}
        self.args = order.get("argv") or [order["recipe"]]
        self.stderr = stderr
        self.returncode: int | None = None
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(address)
        socket.send_fds(self._connection, [b"\n"], files)
        self._connection.sendall(json.dumps(order).encode() + b"\n")
        self._answers = self._connection.makefile("rb", buffering=0)  # `poll` and `wait` look whether there is more
        self.pid = int(self._answers.readline())

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code; a program that takes longer than it may is ended."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                self.close()
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._answers.readline())
            self.close()
        return self.returncode

    def poll(self) -> int | None:
        """Its exit code, or None where it goes on."""
        gone = self.returncode is not None or select.select([self._connection], [], [], 0)[0]
        return self.wait() if gone else None

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        """Nothing, and all that it says until it ends."""
        said = self.stderr.read() if self.stderr else ""
        self.wait(timeout)
        return None, said

    def send_signal(self, number: int) -> None:
        """A signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Hangs up."""
        self._answers.close()
        self._connection.close()


class Forge:
    """Forks programs, of a process that starts when the first is asked for.

    Attributes:
        forks: Whether `in_place_of_processes` does anything; a test of a fresh Python says no.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        environment: dict[str, str] | None = None,
        python: str = sys.executable,
        imports: tuple[str, ...] = (),
    ) -> None:
        """With the `address` of another forge, it is that one's process that forks.

        Args:
            address: Of the other's socket.
            environment: What its process imports everything in; None for this one.
            python: Of another environment, which sees this one's packages too.
            imports: What its process imports, in place of all that a training needs.
        """
        self.forks = True
        self._program = [python, str(PROGRAM.with_name("forks.py"))]
        self._imports = imports
        self.environment = dict(os.environ if environment is None else environment)
        self.folder = None if address else tempfile.mkdtemp(prefix="forge-")  # an address has 107 bytes at most
        self.address = address or f"{self.folder}/address"
        self.process: subprocess.Popen | None = None
        self.printed = ""

    def run(self, recipe: Path, *overrides: str, timeout: float | None = None, **options: Any) -> int:
        """Runs a recipe with `--resume`; returns the exit code, or minus the signal that ended it.

        Args:
            recipe: Its file.
            *overrides: As on the command line.
            timeout: Seconds that it may take.
            **options: `kill_at`: the moment to die. `send`: (micro-batch, signal, times=1) that the run gets at its
                start. `limit`: bytes that a file may have, as if the disk were full. `resume`: False to start without
                `--resume`.
        """
        order = {"recipe": str(recipe), "overrides": overrides, **options}
        files = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = self._ask([str(recipe)], order, text=True, timeout=timeout, **files)
        self.printed = done.stdout
        return done.returncode

    def said(self) -> str:
        """What the last run printed."""
        return self.printed

    @contextlib.contextmanager
    def in_place_of_processes(self) -> Iterator[None]:
        """Forks what `subprocess.run` is asked to start, where it is one of `PROGRAMS` in this Python."""
        real = subprocess.run

        def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess:
            command = arguments[0] if arguments else options["args"]
            if not (self.forks and options.keys() <= KNOWN_OPTIONS and self._can_fork(command, options.get("env"))):
                return real(*arguments, **options)
            return self.fork(command, **options)

        with mock.patch.object(subprocess, "run", run):
            yield

    def fork(self, command: list[str], **options: Any) -> subprocess.CompletedProcess:
        """As `subprocess.run` any module or file of its Python, less what that says of what it imports and holds."""
        return self._ask(command, {"argv": command[1:]}, **options)

    def start(
        self, command: list[str], *, env: dict[str, str] | None = None, stdout: Any = None, stderr: Any = None
    ) -> Started:
        """Forks what `subprocess.Popen` would start, and does not wait for its end.

        Args:
            command: One of `PROGRAMS` in this Python, or the console command.
            env: Its environment; nothing in it may be another than here that libraries read while they are imported.
            stdout: As of `Popen`, less `PIPE`.
            stderr: As of `Popen`; through a `PIPE` comes text.
        """
        if command[0] == COMMAND:
            command = [sys.executable, "-m", "vlm_sft", *command[1:]]
        assert self._can_fork(command, env), f"{command}: it or its environment is none of a fork"
        self._start()
        files = [0, _file(stdout, None, 1), 2]
        if stderr != subprocess.PIPE:
            files[2] = files[1] if stderr == subprocess.STDOUT else _file(stderr, None, 2)
            return Started(self.address, {"argv": command[1:], "env": env}, files)
        read, files[2] = os.pipe()
        said = open(read, encoding="utf-8")  # noqa: SIM115 (whoever asked for it reads it)
        try:
            return Started(self.address, {"argv": command[1:], "env": env}, files, said)
        finally:
            os.close(files[2])

    def stand_in(self, arguments: list[str]) -> None:
        """Is what `python` would be for a launcher: the fork's files, signals and end are those of this process."""
        program: Started | None = None

        def hand_on(number: int, frame: Any) -> None:
            os.kill(program.pid, number) if program else os._exit(128 + number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, hand_on)
        program = Started(self.address, {"argv": arguments}, [0, 1, 2])
        code = program.wait()
        if code < 0:
            os.kill(os.getpid(), -code)
        os._exit(code)

    def close(self) -> None:
        """Ends the process."""
        if self.process:
            assert self.process.stdin
            self.process.stdin.close()
            self.process.wait()
        if self.folder:
            shutil.rmtree(self.folder)

    def _can_fork(self, command: list[str], environment: dict[str, str] | None) -> bool:
        asked = os.environ if environment is None else environment
        names = {name for name in [*asked, *self.environment] if name.startswith(READ_ON_IMPORT)}
        same = all(asked.get(name) == self.environment.get(name) for name in names)
        paths = map(Path, asked.get("PYTHONPATH", "").split(os.pathsep))
        same &= all(path.samefile(ROOT) for path in paths if (path / "vlm_sft").is_dir())
        return same and list(command[:2]) == [sys.executable, "-m"] and command[2] in PROGRAMS

    def _ask(self, command: list[str], order: dict[str, Any], **options: Any) -> subprocess.CompletedProcess:
        """Has an order carried out; takes the options of `subprocess.run`, and returns or raises what it would."""
        self._start()
        pipe = subprocess.PIPE if options.get("capture_output") else None
        out, err = options.get("stdout", pipe), options.get("stderr", pipe)
        order |= {"cwd": options.get("cwd"), "env": options.get("env")}
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            text = options.get("input", b"")
            given.write(text.encode() if isinstance(text, str) else text)
            given.seek(0)
            files = [given.fileno(), _file(out, stdout, 1), stdout.fileno()]
            files[2] = files[1] if err == subprocess.STDOUT else _file(err, stderr, 2)
            code = Started(self.address, order, files).wait(options.get("timeout"))
            read = [None if wanted != subprocess.PIPE else _content(file, options)
                    for wanted, file in ((out, stdout), (err, stderr))]  # fmt: skip
        done = subprocess.CompletedProcess(command, code, *read)
        if options.get("check"):
            done.check_returncode()
        return done

    def _start(self) -> None:
        if self.process or not self.folder:
            return
        paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(self.address)
            server.listen()
            self.process = subprocess.Popen(
                [*self._program, str(server.fileno()), *self._imports],
                stdin=subprocess.PIPE, pass_fds=[server.fileno()],
                env={**self.environment, "PYTHONPATH": paths}, cwd=ROOT,
            )  # fmt: skip


def _file(wanted: Any, held: Any, default: int) -> int:
    """The file descriptor that `subprocess.run` would give to a program."""
    if wanted is None:
        return default
    if wanted == subprocess.DEVNULL:
        return os.open(os.devnull, os.O_WRONLY)
    return held.fileno() if wanted == subprocess.PIPE else wanted.fileno()


def _content(file: Any, options: dict[str, Any]) -> str | bytes:
    file.seek(0)
    return file.read().decode(errors=options.get("errors", "strict")) if options.get("text") else file.read()


if __name__ == "__main__":
    Forge(sys.argv[1]).stand_in(sys.argv[2:])
