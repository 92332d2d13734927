"""The process of a `Forge`: imports everything once, then forks a program for each order."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import itertools
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.forge import LAUNCHER, PROGRAM, Forge

TOUCHES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "step"}
IMPORTS = (
    LAUNCHER, "matplotlib.backends.backend_agg", "torch._dynamo", "transformers.models.auto",
    "transformers.models.llama.modeling_llama", "vlm_sft.bundle.curves", "vlm_sft.bundle.handover",
    "vlm_sft.bundle.parity", "vlm_sft.cli.main", "vlm_sft.export.check", "vlm_sft.evaluation.evaluate", "vlm_sft.train",
    "vlm_sft.training.build_trainer",
)  # fmt: skip


def serve(server: socket.socket, imports: Sequence[str]) -> None:
    """Imports everything, then forks for each order, until whoever started it is gone."""
    from vlm_sft.base.console import quiet_libraries
    from vlm_sft.templates.literals import role_markers

    quiet_libraries()
    for name in imports:
        importlib.import_module(name)
    role_markers("plain")  # every start of a training compiles all templates that ship
    gc.collect()
    gc.freeze()  # no fork looks through a million objects of libraries for garbage, nor copies their pages by it
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
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {PROGRAM} {address} "$@"\n', encoding="utf-8")
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
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:] or IMPORTS)
