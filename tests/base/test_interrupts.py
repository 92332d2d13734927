"""Ctrl-C once saves and stops, twice stops at once; SIGTERM saves and stops; data-loader workers live on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.bundles import assert_same
from support.paths import ROOT, accelerate_config
from vlm_sft import load
from vlm_sft.base.interrupts import Interrupts, end_workers, shield_worker, workers_end_with_errors
from vlm_sft.bundle import run_folder

STOPS = [(signal.SIGINT, 130, 3, 2), (signal.SIGTERM, 143, 7, 4), (signal.SIGTERM, 143, 11, 6)]
FOREVER = {"max_steps": 100_000, "per_device_train_batch_size": 2, "learning_rate": 1e-4, "bf16": False,
           "gradient_checkpointing": False, "report_to": "none", "logging_steps": 1, "save_strategy": "no",
           "max_length": 128}  # fmt: skip


def test_the_first_signal_is_remembered_and_a_second_ctrl_c_stops_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.signal == signal.SIGINT and interrupts.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
    assert capfd.readouterr().err == "\nCtrl-C: saving after this step, then stopping; Ctrl-C again stops at once.\n"


def test_a_second_ctrl_c_that_a_launcher_passes_on_as_sigterm_stops_at_once():
    with Interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_comes_several_times_and_counts_once(capfd):
    with Interrupts() as interrupts:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.signal == signal.SIGTERM and interrupts.exit_code == 143
    assert capfd.readouterr().err == "\nSIGTERM: saving after this step, then stopping.\n"


def ask_worker(pipe):
    """A worker that answers after it was told to stop."""
    shield_worker()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    pipe.send("alive")
    os.kill(os.getpid(), signal.SIGTERM)
    pipe.send("still alive")


def test_a_worker_ignores_ctrl_c_and_the_first_sigterm():
    here, there = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=ask_worker, args=(there,))
    worker.start()
    worker.join()
    there.close()
    assert here.recv() == "alive" and worker.exitcode == -signal.SIGTERM
    with pytest.raises(EOFError):
        here.recv()


def sleep_shielded(pipe):
    """A worker that nobody can end with words."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe.send("asleep")
    time.sleep(600)


@pytest.fixture
def start_worker():
    """Starts a worker that only SIGKILL ends, and none outlives the test."""

    def start(daemon: bool = True):
        here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        worker = context.Process(target=sleep_shielded, args=(there,), daemon=daemon)
        worker.start()
        started.append(worker)
        assert here.recv() == "asleep"
        return worker

    started: list = []
    yield start
    for worker in started:
        worker.kill()
        worker.join()


def test_an_error_ends_the_workers_that_were_started_since(start_worker):
    seen, worker = [], None
    handler = signal.signal(signal.SIGCHLD, lambda number, frame: seen.append(number))  # torch's would raise
    try:
        before = start_worker()

        @workers_end_with_errors()
        def fail():
            nonlocal worker
            worker = start_worker()
            raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert worker.exitcode == -signal.SIGKILL and before.is_alive() and not seen
        with workers_end_with_errors():
            pass
        assert before.is_alive(), "what went well ends nobody"
        before.kill()
        before.join()
        assert seen, "the handler is back"
    finally:
        signal.signal(signal.SIGCHLD, handler)


def test_at_the_end_all_workers_are_killed_and_nothing_else(start_worker):
    worker, other = start_worker(), start_worker(daemon=False)
    end_workers()
    assert worker.exitcode == -signal.SIGKILL and other.is_alive()


@pytest.mark.parametrize("ending", ["", "sys.exit(3)", "raise KeyError"])
def test_python_does_not_wait_for_a_worker_that_will_not_end(ending, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, signal, sys, time\n"
        "from vlm_sft.base.interrupts import workers_end_with_errors\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "with workers_end_with_errors():\n"
        "    multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,), daemon=True).start()\n"
        f"{ending}\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(program)], timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == {"": 0, "sys.exit(3)": 3, "raise KeyError": 1}[ending]


@pytest.mark.slow
def test_a_stopped_run_saves_and_goes_on_to_the_same_end(forge, mixed_recipe):
    whole, calm = mixed_recipe("whole", save_strategy="no", max_steps=6)
    assert forge.run(whole) == 0, forge.said()
    # Of seven micro-batches an epoch: in the middle of an epoch, in its last step, and in the last step of all.
    for number, code, batch, step in STOPS:
        path, out = mixed_recipe(f"stopped-{batch}", save_strategy="no", max_steps=6)
        assert forge.run(path, send=[batch, number]) == code, forge.said()
        assert f"Saved at step {step}; go on with --resume." in forge.said() and "Traceback" not in forge.said()
        assert [path.name for path in run_folder.checkpoints(out)] == [f"checkpoint-{step}"]
        assert forge.run(path) == 0, forge.said()
        assert_same(out, calm)


@pytest.mark.slow
def test_ctrl_c_twice_leaves_what_was_saved(forge, mixed_recipe):
    path, out = mixed_recipe("twice", max_steps=6)
    assert forge.run(path, send=[5, signal.SIGINT, 2]) == 130, forge.said()
    said = forge.said()
    assert "Stopped at once; what was saved before is whole: go on with --resume." in said and "Traceback" not in said
    newest = run_folder.newest(out)
    assert newest is not None and newest.name == "checkpoint-2", "the third step was not finished"


@pytest.fixture
def two(recipe_file, forge):
    """Two processes that train until Ctrl-C comes, so often, after so many steps → what they said, the folder."""

    def run(presses: int, steps: int = 1, **sft):
        folder = recipe_file().parent / "two"
        path = recipe_file(sft={**FOREVER, "output_dir": str(folder), **sft})
        launcher = forge.start(
            [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate_config("cpu_2")),
             "--main_process_port", "0", "-m", "vlm_sft.train", str(path), "sft.use_cpu=true"],
            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert launcher.stderr is not None
        said = ""
        for words, times in [(": loss", steps), *[("Ctrl-C: saving", 1)] * (presses - 1)]:
            while said.count(words) < times:
                line = launcher.stderr.readline()
                assert line, said
                said += line
            launcher.send_signal(signal.SIGINT)
        said += launcher.communicate(timeout=120)[1]
        assert launcher.returncode != 0
        left = [file.parent for file in Path("/proc").glob("[0-9]*/cmdline") if str(path) in text_of(file)]
        assert not left, "no process outlives the launcher"
        return said, folder

    return run


def text_of(file: Path) -> str:
    """A file's text, or nothing where the process is gone."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step(two):
    said, folder = two(1)
    (checkpoint,) = run_folder.checkpoints(folder)
    assert run_folder.flaw_of(checkpoint) is None and f"Saved at step {run_folder.step_of(checkpoint):,};" in said
    assert {f"counters_{rank}.json" for rank in (0, 1)} <= {file.name for file in checkpoint.iterdir()}
    load(checkpoint)


@pytest.mark.slow
def test_two_processes_stop_at_once(two):
    # A step takes long, so that the second Ctrl-C comes before it is done.
    said, folder = two(2, steps=2, gradient_accumulation_steps=40, save_strategy="steps", save_steps=1)
    assert said.count("Stopped at once; what was saved before is whole: go on with --resume.") == 1, said
    assert "Saved at step" not in said
    kept = run_folder.checkpoints(folder)
    assert kept and [run_folder.flaw_of(path) for path in kept] == [None] * len(kept)
