"""Training runs as forks of one process that has imported everything once, killed at chosen moments.

    forge.run(recipe, "sft.max_steps=3", kill_at=17)

Moment 17 is the 17th time that the run touches a file of its `output_dir` or begins a step: so a run can be killed
between any two of them, inside a save above all, and at the same place again. `forge.said` is what it printed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from support.paths import ROOT

TOUCHES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "step"}


class Forge:
    """Holds the process that forks."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "forge.log"
        paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(self.log)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip

    def run(self, recipe: Path, *overrides: str, **options: Any) -> int:
        """Runs a recipe with `--resume`; returns the exit code, or minus the signal that ended it.

        Args:
            recipe: Its file.
            *overrides: As on the command line.
            **options: `kill_at`: the moment to die. `after`: milliseconds after which it is killed from outside.
                `send`: (micro-batch, signal, times=1) that the run gets at its start. `limit`: bytes that a file may
                have, as if the disk were full. `resume`: False to start without `--resume`.
        """
        order = {"recipe": str(recipe), "overrides": overrides, **options}
        assert self.process.stdin and self.process.stdout
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def said(self) -> str:
        """What the last run printed."""
        return self.log.read_text(encoding="utf-8")

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve(log: str) -> None:
    """Imports everything, then forks a run for each line that comes."""
    import vlm_sft.bundle.handover
    import vlm_sft.training.trainer  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            play(order, log)
        if "after" in order:
            signal.signal(signal.SIGALRM, lambda number, frame, child=child: os.kill(child, signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, order["after"] / 1000)
        status = os.waitpid(child, 0)[1]
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def play(order: dict[str, Any], log: str) -> None:
    """The life of a fork."""
    out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 1
    try:
        code = train(order)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train(order: dict[str, Any]) -> int:
    """Runs the program, less the fresh process and the picture at the end, which take most of the time."""
    import resource

    import vlm_sft.bundle.curves
    import vlm_sft.bundle.parity
    from vlm_sft.recipe.schema import load_recipe
    from vlm_sft.train import main
    from vlm_sft.training.trainer import VLMSFTTrainer

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
    try:
        main([order["recipe"], *order["overrides"], *(["--resume"] if order.get("resume", True) else [])])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def count_moments(folder: str, kill_at: int | None, send: list[int] | None) -> None:
    """Counts touches of a folder and micro-batches, and dies, or gets a signal, at one of them."""
    moments, batches = 0, 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal moments, batches
        if event not in TOUCHES or (event != "step" and not str(arguments[0]).startswith(folder)):
            return
        moments += 1
        if moments == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        batches += event == "step"
        if send and event == "step" and batches == send[0]:
            for _ in range(send[2] if len(send) > 2 else 1):
                os.kill(os.getpid(), send[1])

    sys.addaudithook(hook)


if __name__ == "__main__":
    serve(sys.argv[1])
