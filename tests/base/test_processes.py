"""Several processes: the first one's work reaches all, and so does its error."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from filelock import FileLock

from support.gloo import in_processes
from vlm_sft.base import processes
from vlm_sft.base.errors import UserError
from vlm_sft.base.names import RUN_LOCK
from vlm_sft.base.processes import cores_for_each, hold_folder, on_first_process, one_process_first, share_work


class Processes:
    """Stands in for accelerate's state and its broadcast: what the first process sends, the second receives."""

    num_processes = 2

    def __init__(self, monkeypatch):
        self.sent = None
        monkeypatch.setattr("accelerate.PartialState", lambda: self)
        monkeypatch.setattr("accelerate.utils.broadcast_object_list", self.broadcast)

    def broadcast(self, outcome):
        if self.is_main_process:
            self.sent = list(outcome)
        else:
            outcome[:] = self.sent


def test_every_process_gets_what_the_first_found_and_its_error_too(monkeypatch):
    state = Processes(monkeypatch)

    def everywhere(work):
        got = []
        for state.is_main_process in (True, False):
            try:
                got.append(on_first_process(work if state.is_main_process else pytest.fail))
            except UserError as error:
                got.append(str(error))
        return got

    def refuse():
        raise UserError("row 7 is bad.")

    assert everywhere(lambda: {"rows": 3}) == [{"rows": 3}, {"rows": 3}]
    assert everywhere(refuse) == ["row 7 is bad.", "row 7 is bad."]


def test_one_process_of_a_machine_goes_first_also_where_it_fails(monkeypatch):
    state, order = Processes(monkeypatch), []
    state.wait_for_everyone = lambda: order.append("meet")

    def refuse():
        order.append("work")
        raise UserError("row 7 is bad.")

    for state.is_local_main_process in (True, False):
        order.append("process")
        assert one_process_first(lambda: order.append("work") or 3) == 3
        with pytest.raises(UserError, match="row 7"):
            one_process_first(refuse)
    assert order == ["process", "work", "meet", "work", "meet", "process", "meet", "work", "meet", "work"]


def test_every_process_does_a_share_and_has_them_all(tmp_path):
    def work(rank):
        shares = share_work(lambda number, of: f"{number} of {of} 份")
        assert cores_for_each() >= 1
        return rank, shares

    assert in_processes(work, tmp_path) == [(rank, ["0 of 2 份", "1 of 2 份"]) for rank in range(2)]


@pytest.mark.parametrize(("wrong", "said"), [((1,), "row 1 is bad."), ((0, 1), "row 0 is bad.")])
def test_an_error_of_any_share_ends_all_with_the_first_sentence(tmp_path, wrong, said):
    def refuse(number, of):
        if number in wrong:
            raise UserError(f"row {number} is bad.")

    assert in_processes(lambda rank: share_work(refuse), tmp_path) == [said, said]


def test_one_process_does_all():
    assert share_work(lambda number, of: (number, of)) == [(0, 1)]


@pytest.mark.parametrize(("cores", "local", "each"), [(16, 4, 4), (16, 1, 16), (2, 8, 1), (7, 2, 3)])
def test_processes_of_a_machine_share_its_cores(monkeypatch, cores, local, each):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert cores_for_each() == each
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert cores_for_each() == cores, "this test is one process"


@pytest.mark.parametrize("own", [None, "ACTIVE"])
@pytest.mark.parametrize(
    ("module", "call"), [("vlm_sft.train", "main(['nothing.yaml'])"), ("vlm_sft.cli.main", "main()")]
)
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(module, call, own):
    """OpenMP reads it while torch is loaded, so it must be there before."""
    program = (
        f"import os, sys; import {module} as program; sys.argv = ['vlm-sft', '--version']\n"
        "seen = []\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch': seen.append(os.environ.get('OMP_WAIT_POLICY'))\n"
        "sys.meta_path.insert(0, Finder())\n"
        "try:\n"
        f"    program.{call}\n"
        "except SystemExit: pass\n"
        "import torch\n"
        "print(*set(seen), os.environ['OMP_WAIT_POLICY'])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": own} if own else {}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == " ".join([own or "PASSIVE"] * 2)


# -- one run in a folder ----------------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")


def hold(folder, pipe):
    """A run with a worker, until it is killed."""
    with hold_folder(folder):
        worker = FORK.Process(target=time.sleep, args=(600,))
        worker.start()
        pipe.send(worker.pid)
        time.sleep(600)


@pytest.fixture
def other(tmp_path):
    """Another process that holds `tmp_path/运行`, and the number of its worker."""
    here, there = multiprocessing.Pipe()
    process = FORK.Process(target=hold, args=(tmp_path / "运行", there))
    process.start()
    worker = here.recv()
    yield process
    process.kill()
    process.join()
    os.kill(worker, signal.SIGKILL)


def test_the_second_run_is_refused_at_once_with_the_others_process(other, tmp_path):
    began = time.monotonic()
    with pytest.raises(UserError) as refused, hold_folder(tmp_path / "运行"):
        pass
    said = str(refused.value)
    assert f"'{tmp_path / '运行'}' is in use: another run, process {other.pid} on " in said
    assert said.endswith("; wait for its end, stop it, or choose another folder.")
    assert time.monotonic() - began < 5


def test_what_a_killed_run_left_is_taken_over_while_its_worker_still_lives(other, tmp_path):
    other.kill()
    other.join()
    assert (tmp_path / "运行" / RUN_LOCK).is_file()
    with hold_folder(tmp_path / "运行"):
        assert json.loads((tmp_path / "运行" / RUN_LOCK).read_text())["process"] == os.getpid()


def test_nothing_is_left_where_nothing_was_written(tmp_path):
    for _ in range(2):
        with hold_folder(tmp_path / "a" / "b"):
            assert os.listdir(tmp_path / "a" / "b") == [RUN_LOCK]
        assert os.listdir(tmp_path) == []

    @hold_folder(tmp_path / "a")
    def fail():
        (tmp_path / "a" / "kept").touch()
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.listdir(tmp_path / "a") == ["kept"]


def leave(folder, machine: str):
    folder.mkdir()
    holder = {"process": 7, "host": "节点3", "machine": machine, "since": "2026-01-02 03:04:05"}
    (folder / RUN_LOCK).write_text(json.dumps(holder), encoding="utf-8")
    os.utime(folder / RUN_LOCK, (1, 1))


@pytest.mark.parametrize("locks", [True, False])
def test_a_run_on_another_machine_is_refused_as_long_as_its_heart_beats(tmp_path, monkeypatch, locks):
    monkeypatch.setattr(processes, "BEAT", 0.1)
    if not locks:
        failing = OSError(errno.ENOLCK, "no locks available")
        monkeypatch.setattr(FileLock, "acquire", lambda self: (_ for _ in ()).throw(failing))
    leave(tmp_path / "out", "elsewhere")
    done, told = threading.Event(), []
    heart = threading.Thread(target=processes._beat, args=(tmp_path / "out" / RUN_LOCK, done))
    heart.start()
    with pytest.raises(UserError, match="process 7 on 节点3 since 2026-01-02"), hold_folder(tmp_path / "out"):
        pass
    done.set()
    heart.join()
    with hold_folder(tmp_path / "out", told.append):
        assert json.loads((tmp_path / "out" / RUN_LOCK).read_text())["process"] == os.getpid()
    assert len(told) == 1 and "process 7 on 节点3" in told[0]


def test_a_folder_that_cannot_be_made_is_left_to_who_says_so(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with hold_folder(folder):
            pass
    assert os.listdir(tmp_path) == ["file"]


def test_a_second_training_is_refused_before_anything_is_read(other, recipe_file, refused, tmp_path):
    path = recipe_file()
    for flags in ([], ["--resume"]):
        said = refused(path, f"sft.output_dir={tmp_path / '运行'}", *flags)
        assert f"is in use: another run, process {other.pid} on " in said


def test_a_dry_run_is_not_hindered(other, recipe_file, tmp_path, capsys):
    from vlm_sft.train import main

    main([str(recipe_file()), f"sft.output_dir={tmp_path / '运行'}", "--dry-run"])
    assert "projector" in capsys.readouterr().out
