"""Programs as forks of one process that has imported everything once: importing costs seconds, a tiny run does not.

    forge.run(recipe, "sft.max_steps=3", kill_at=17)
    with forge.in_place_of_processes():
        subprocess.run([sys.executable, "-m", "vlm_sft.train", …])

A fork knows nothing of the test that asked for it, nor of other forks: its program begins as in a fresh Python, less
the imports. Moment 17 of a run is the 17th time that it touches a file of its `output_dir` or begins a step: so a run
can be killed between any two of them, inside a save above all, and at the same place again.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import itertools
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]  # not from `paths`: a stand-in for `python` is given other folders
TOUCHES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "step"}
LAUNCHER = "accelerate.commands.launch"
PROGRAMS = ("vlm_sft", "vlm_sft.train", "vlm_sft.recipe.left_out", LAUNCHER)
IMPORTS = (
    LAUNCHER, "matplotlib.backends.backend_agg", "torch._dynamo", "transformers.models.auto",
    "transformers.models.llama.modeling_llama", "vlm_sft.bundle.curves", "vlm_sft.bundle.handover",
    "vlm_sft.bundle.parity", "vlm_sft.cli.main", "vlm_sft.export.check", "vlm_sft.evaluation.evaluate", "vlm_sft.train",
    "vlm_sft.training.build_trainer",
)  # fmt: skip
# Libraries read these while they are imported, which a fork has behind it.
READ_ON_IMPORT = ("CUDA_", "HF_", "OMP_", "PYTHONHASHSEED", "TORCH_")  # torch sets TORCHINDUCTOR_CACHE_DIR itself
KNOWN_OPTIONS = {"args", "capture_output", "check", "cwd", "env", "input", "stderr", "stdout", "text", "timeout"}


class Forge:
    """Forks programs, of a process that starts when the first is asked for.

    Attributes:
        forks: Whether `in_place_of_processes` does anything; a test of a fresh Python says no.
    """

    def __init__(self, address: str | None = None) -> None:
        """With the `address` of another forge, it is that one's process that forks."""
        self.forks = True
        self.environment = dict(os.environ)
        self.folder = None if address else tempfile.mkdtemp(prefix="forge-")  # an address has 107 bytes at most
        self.address = address or f"{self.folder}/address"
        self.process: subprocess.Popen | None = None
        self.program = 0
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
            return self._ask(command, {"argv": command[1:]}, **options)

        with mock.patch.object(subprocess, "run", run):
            yield

    def stand_in(self, arguments: list[str]) -> None:
        """Is what `python` would be for a launcher: the fork's files, signals and end are those of this process."""

        def hand_on(number: int, frame: Any) -> None:
            os.kill(self.program, number) if self.program else os._exit(128 + number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, hand_on)
        code = self.carry_out({"argv": arguments}, [0, 1, 2]) or 0
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
        if self.folder and not self.process:
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
            code = self.carry_out(order, files, options.get("timeout"))
            if code is None:
                raise subprocess.TimeoutExpired(command, options["timeout"])
            read = [None if wanted != subprocess.PIPE else _content(file, options.get("text", False))
                    for wanted, file in ((out, stdout), (err, stderr))]  # fmt: skip
        done = subprocess.CompletedProcess(command, code, *read)
        if options.get("check"):
            done.check_returncode()
        return done

    def carry_out(self, order: dict[str, Any], files: list[int], timeout: float | None = None) -> int | None:
        """Sends an order with the three files of the program; returns how it ended, or None after the time."""
        order |= {"cwd": str(order.get("cwd") or os.getcwd()), "env": dict(order.get("env") or os.environ)}
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(self.address)
            client.settimeout(timeout)
            socket.send_fds(client, [b"\n"], files)
            client.sendall(json.dumps(order).encode() + b"\n")
            with client.makefile() as answers:
                self.program = int(answers.readline())
                try:
                    return int(answers.readline())
                except TimeoutError:
                    return None  # whoever hangs up ends the program

    def _start(self) -> None:
        paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(self.address)
            server.listen()
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(server.fileno())], stdin=subprocess.PIPE, pass_fds=[server.fileno()],
                env={**self.environment, "PYTHONPATH": paths}, cwd=ROOT,
            )  # fmt: skip


def _file(wanted: Any, held: Any, default: int) -> int:
    """The file descriptor that `subprocess.run` would give to a program."""
    if wanted is None:
        return default
    if wanted == subprocess.DEVNULL:
        return os.open(os.devnull, os.O_WRONLY)
    return held.fileno() if wanted == subprocess.PIPE else wanted.fileno()


def _content(file: Any, text: bool) -> str | bytes:
    file.seek(0)
    return file.read().decode() if text else file.read()


# ------------------------------------------------------------------------------------------ the process and its forks


def serve(server: socket.socket) -> None:
    """Imports everything, then forks for each order, until whoever started it is gone."""
    from vlm_sft.base.console import quiet_libraries

    quiet_libraries()
    for name in IMPORTS:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while server in select.select([server, sys.stdin], [], [])[0]:
        connection, _ = server.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with contextlib.suppress(BrokenPipeError):  # whoever asked is gone
                answer(connection, server.getsockname())
            os._exit(0)
        connection.close()
    os._exit(0)  # taking down all that was imported takes seconds


def answer(connection: socket.socket, address: str) -> None:
    """Forks the program of an order, and tells its process and how it ended."""
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rw") as stream:
        order = json.loads(stream.readline())
        program = os.fork()
        if program == 0:
            for number, file in enumerate(files):
                os.dup2(file, number)
            play(order, address)
        print(program, file=stream, flush=True)
        if connection in select.select([connection, os.pidfd_open(program)], [], [])[0]:
            os.kill(program, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]), file=stream, flush=True)


def play(order: dict[str, Any], address: str) -> None:
    """The life of a fork."""
    code = 1
    try:
        sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115 (it lives as long as the process)
        os.chdir(order["cwd"])
        os.environ.clear()
        os.environ.update(order["env"])
        with Forge(address).in_place_of_processes():
            train(order) if "recipe" in order else run(order["argv"], address)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # what Python does at a program's end, less taking down all that was imported
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(arguments: list[str], address: str) -> None:
    """`python -m module …` or `python script …`"""
    flags = list(itertools.takewhile(lambda word: word in ("-u", "-m"), arguments))
    sys.argv = arguments[len(flags) :]
    program = sys.argv[0]
    if "-m" not in flags:
        sys.path.insert(0, str(Path(program).resolve().parent))
        runpy.run_path(program, run_name="__main__")
        return
    if program == LAUNCHER:
        python = Path(address).with_name("python")
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {address} "$@"\n', encoding="utf-8")
        python.chmod(0o700)
        os.environ["PYTHON_EXEC"] = str(python)  # what torch's launcher starts
    sys.path.insert(0, os.getcwd())
    for name in sys.argv[:2]:  # `vlm_sft.recipe.left_out` runs the module that it is given
        if not hasattr(sys.modules.get(name), "__path__"):
            sys.modules.pop(name, None)  # it runs as `__main__`, and Python warns where it was imported before
    runpy.run_module(program, run_name="__main__", alter_sys=True)


def train(order: dict[str, Any]) -> None:
    """Runs the program, less the fresh process and the picture at the end, which take most of the time."""
    import resource

    import torch

    import vlm_sft.bundle.curves
    import vlm_sft.bundle.parity
    from vlm_sft.recipe.schema import load_recipe
    from vlm_sft.train import main
    from vlm_sft.training.trainer import VLMSFTTrainer

    torch.set_num_threads(1)
    vlm_sft.bundle.parity.check_parity = lambda *args: {"positions": 1, "max_difference": 0.0, "equal": True}
    vlm_sft.bundle.curves.draw_curves = lambda history, path, **kwargs: path
    step = VLMSFTTrainer.training_step

    def counted_step(self, *args, **kwargs):
        sys.audit("step", "")
        return step(self, *args, **kwargs)

    VLMSFTTrainer.training_step = counted_step
    recipe = load_recipe(order["recipe"], order["overrides"])
    count_moments(str(recipe.sft["output_dir"]), order.get("kill_at"), order.get("send"))
    if "limit" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    main([order["recipe"], *order["overrides"], *(["--resume"] if order.get("resume", True) else [])])


def count_moments(folder: str, kill_at: int | None, send: list[int] | None) -> None:
    """Counts touches of a folder and micro-batches, and dies, or gets a signal, at one of them."""
    from vlm_sft.base.names import RUN_LOCK

    moments, batches = 0, 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal moments, batches
        if event not in TOUCHES or (event != "step" and not str(arguments[0]).startswith(folder)):
            return
        if str(arguments[0]).endswith(RUN_LOCK):
            return  # a file of its own, whatever it is opened for
        moments += 1
        if moments == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        batches += event == "step"
        if send and event == "step" and batches == send[0]:
            for _ in range(send[2] if len(send) > 2 else 1):
                os.kill(os.getpid(), send[1])

    sys.addaudithook(hook)


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        serve(socket.socket(fileno=int(sys.argv[1])))
    else:
        Forge(sys.argv[1]).stand_in(sys.argv[2:])
