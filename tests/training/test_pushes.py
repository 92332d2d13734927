"""Pushes while training: what fails is said and tried again at the end; nothing is raised."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from vlm_sft.base.errors import UserError
from vlm_sft.training import pushes
from vlm_sft.training.pushes import PushCallback


@pytest.fixture
def asked(monkeypatch):
    """What `push_bundle` was asked; `asked.fails` names folders that it refuses."""

    class Asked(list):
        fails: tuple[str, ...] = ()
        go_on = threading.Event()

    found = Asked()
    found.go_on.set()

    def push(folder, repo_id, **options):
        found.append((str(folder), repo_id, options))
        assert found.go_on.wait(30)
        if str(folder) == "full":
            raise OSError("No space left on device")
        if str(folder) in found.fails:
            raise UserError("The Hub is in trouble (503); try again later.")
        return f"https://hub/{repo_id}/commit/{len(found)}"

    monkeypatch.setattr(pushes, "push_bundle", push)
    return found


def save(callback, step, first=True):
    state = TrainerState(global_step=step, is_world_process_zero=first)
    callback.on_save(TrainingArguments("out", report_to="none", use_cpu=True), state, TrainerControl())


def test_saves_are_pushed_only_where_asked_and_by_the_first_process(asked):
    said = []
    callback = PushCallback("me/x", said.append)
    save(callback, 1)
    other = PushCallback("me/x", said.append, every_save=True)
    save(other, 1, first=False)
    assert asked == [] and said == []
    assert callback.finish("out") == "https://hub/me/x/commit/1"
    assert said == ["Pushed: https://hub/me/x/commit/1"]


def test_a_save_that_comes_while_another_is_on_its_way_is_left_out_and_said(asked):
    said = []
    callback = PushCallback("me/x", said.append, every_save=True, private=True, revision="v1", message="Tiny")
    asked.go_on.clear()
    save(callback, 1)
    save(callback, 2)
    assert said == ["Step 2 is not pushed: an earlier checkpoint is still on its way to the Hub."]
    asked.go_on.set()
    callback.finish("out")
    options = {"private": True, "revision": "v1"}
    assert asked == [
        ("out/checkpoint-1", "me/x", {**options, "message": "Step 1: Tiny", "max_tries": 1}),
        ("out", "me/x", {**options, "message": "Tiny"}),
    ]
    assert said[1:] == ["Pushed: https://hub/me/x/commit/1", "Pushed: https://hub/me/x/commit/2"]


def test_a_failed_push_is_said_and_the_end_tries_again(asked):
    said = []
    asked.fails = ("out/checkpoint-1",)
    callback = PushCallback("me/x", said.append, every_save=True)
    save(callback, 1)
    assert callback.finish("out") == "https://hub/me/x/commit/2"
    assert said[0].startswith("A checkpoint was not pushed; training goes on, and the end will try again. The Hub is")
    assert said[1] == "Pushed: https://hub/me/x/commit/2"


def test_an_end_that_cannot_be_pushed_says_the_command(asked):
    said = []
    asked.fails = ("my out",)
    callback = PushCallback("me/x", said.append, private=False, revision="v 1")
    assert callback.finish("my out") is None
    assert said == [
        "The bundle is whole but was not pushed. The Hub is in trouble (503); try again later. "
        "Then: vlm-sft push 'my out' me/x --public --revision 'v 1'"
    ]


def test_not_even_an_error_that_nobody_thought_of_ends_the_run(asked):
    said = []
    assert PushCallback("me/x", said.append).finish("full") is None
    assert said[0].startswith("The bundle is whole but was not pushed. OSError: No space left on device Then: vlm-sft ")


def test_after_a_signal_nothing_unfinished_is_pushed_unasked_but_the_command_is_said(asked):
    said = []
    PushCallback("me/x", said.append, revision="v1").stop("out/checkpoint-3", 3)
    assert asked == []
    assert said == [
        "The run is not finished, so nothing was pushed; to push what is there: "
        "vlm-sft push out/checkpoint-3 me/x --revision v1"
    ]


def test_after_a_signal_the_last_checkpoint_is_waited_for(asked):
    said = []
    callback = PushCallback("me/x", said.append, every_save=True)
    save(callback, 3)
    callback.stop(Path("out/checkpoint-3"), 3)
    assert [folder for folder, *_ in asked] == ["out/checkpoint-3"]
    assert said == ["Pushing step 3 for at most 15 seconds.", "Pushed: https://hub/me/x/commit/1"]


def test_after_a_signal_a_checkpoint_that_failed_or_was_left_out_is_tried_again(asked):
    said = []
    asked.fails = ("out/checkpoint-2",)
    callback = PushCallback("me/x", said.append, every_save=True, message="Tiny")
    save(callback, 2)
    callback.stop(Path("out/checkpoint-3"), 3)
    assert [(folder, options["message"]) for folder, _, options in asked] == [
        ("out/checkpoint-2", "Step 2: Tiny"),
        ("out/checkpoint-3", "Step 3: Tiny"),
    ]
    assert said[1].startswith("A checkpoint was not pushed; it is tried once more. The Hub is in trouble (503)")
    assert said[2:] == ["Pushed: https://hub/me/x/commit/2"]


@pytest.mark.parametrize("running", ["out/checkpoint-2", "out/checkpoint-3"])
def test_after_a_signal_a_slow_hub_is_left_in_time_with_the_command(asked, running):
    said = []
    callback = PushCallback("me/x", said.append, every_save=True)
    asked.go_on.clear()
    save(callback, int(running[-1]))
    start = time.monotonic()
    callback.stop(Path("out/checkpoint-3"), 3, seconds=0.1)
    assert time.monotonic() - start < 5
    assert said[1:] == [
        "The checkpoint is whole but was not pushed. The Hub did not take it within 0.1 seconds. "
        "Then: vlm-sft push out/checkpoint-3 me/x"
    ]
    asked.go_on.set()


def test_the_end_of_the_program_waits_for_no_push(asked):
    asked.go_on.clear()
    save(PushCallback("me/x", print, every_save=True), 1)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "push" and thread.is_alive())
    assert thread.daemon, "Python joins all others"
    asked.go_on.set()
    thread.join(30)


def test_after_a_signal_a_hub_that_refuses_is_said_with_the_command(asked):
    said = []
    asked.fails = ("out/checkpoint-3",)
    PushCallback("me/x", said.append, every_save=True).stop(Path("out/checkpoint-3"), 3)
    assert said[-1] == (
        "The checkpoint is whole but was not pushed. The Hub is in trouble (503); try again later. "
        "Then: vlm-sft push out/checkpoint-3 me/x"
    )
