"""What stands on a terminal of any width and in a log file while a run goes on."""

from __future__ import annotations

import io
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from vlm_sft.training import progress
from vlm_sft.training.progress import RichProgress, describe

STEP = {"loss": 0.3561, "token_accuracy": 0.885, "tokens_per_second": 8835.4, "data_wait_share": 0.174}
EVALUATION = {"eval_loss": 0.328, "eval_token_accuracy": 0.892, "eval_image_use": 1.12, "eval_loss_own_image": 0.33,
              "eval_loss_other_image": 1.45}  # fmt: skip
END = {"train_runtime": 3723.0, "train_loss": 0.664}


class Run:
    """Plays a trainer of `steps` steps to a callback, ten seconds a step."""

    def __init__(self, monkeypatch, width=80, terminal=True, steps=40, zero=True):
        self.out = io.StringIO()
        self.clock = 0.0
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: self.clock))
        console = Console(file=self.out, width=width, force_terminal=terminal, color_system=None, legacy_windows=False)
        self.bar = RichProgress(console)
        self.state = TrainerState(max_steps=steps, is_world_process_zero=zero)
        self.call("on_train_begin")

    def call(self, name, **kwargs):
        getattr(self.bar, name)(None, self.state, TrainerControl(), **kwargs)

    def step(self, **logs):
        self.clock += 10
        self.state.global_step += 1
        self.call("on_step_end")
        if logs:
            self.call("on_log", logs=logs)

    def live(self):
        """The lines that stand at the bottom of the terminal now."""
        console = Console(file=io.StringIO(), width=self.bar.console.width, color_system=None)
        console.print(self.bar._bar.get_renderable())
        return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_two_lines_stand_on_a_terminal_and_none_is_wider(monkeypatch, width):
    run = Run(monkeypatch, width, steps=20_000)
    for _ in range(5):
        run.step(**STEP)
    bar, numbers = run.live()
    assert "training" in bar and "5/20000" in bar and "2d 7h left" in bar
    assert numbers.strip().startswith("loss 0.356 · accuracy 88.5% · 8,835 tokens/s")
    assert len(bar) <= width and len(numbers) <= width
    if width >= 80:
        assert numbers.strip() == "loss 0.356 · accuracy 88.5% · 8,835 tokens/s · data wait 17%"
    run.bar.close()


def test_evaluations_stand_above_the_bar_and_the_end_below_all(monkeypatch):
    run = Run(monkeypatch, width=80, steps=2)
    run.step(**STEP)
    run.call("on_prediction_step", eval_dataloader=[1, 2, 3])
    run.call("on_prediction_step", eval_dataloader=[1, 2, 3])
    assert run.live()[1].strip() == "validation: batch 2 of 3"
    run.call("on_log", logs=EVALUATION)
    run.call("on_evaluate", metrics=EVALUATION)
    assert run.live()[1].strip().startswith("loss 0.356"), "back to the numbers of the training"
    run.step(**STEP)
    run.call("on_log", logs=END)
    run.call("on_train_end")
    assert run.bar._bar is None
    said = run.out.getvalue()
    line = "step 1: validation loss 0.328 · accuracy 89.2% · image use +1.120"
    assert said.count(line) == 1 and len(line) < 80
    assert said.endswith(f"step 2: {describe(STEP)}\ntrained for 1:02:03, mean loss 0.664\n")
    assert "\x1b[?25h" in said, "the cursor is shown again"


def test_a_log_file_gets_plain_whole_lines(monkeypatch):
    run = Run(monkeypatch, width=40, terminal=False)
    run.step(**STEP)
    run.call("on_prediction_step", eval_dataloader=[1])
    run.call("on_log", logs=EVALUATION)
    run.call("on_log", logs=END)
    run.call("on_train_end")
    assert run.out.getvalue().splitlines() == [
        "step 1/40: loss 0.356 · accuracy 88.5% · 8,835 tokens/s · data wait 17% · 0:06:30 left",
        "step 1: validation loss 0.328 · accuracy 89.2% · image use +1.120",
        "step 1: trained for 1:02:03, mean loss 0.664",
    ]


def test_other_processes_say_nothing(monkeypatch):
    run = Run(monkeypatch, zero=False)
    run.step(**STEP)
    run.call("on_log", logs=END)
    run.call("on_train_end")
    assert run.out.getvalue() == ""


def test_time_left_counts_from_where_a_run_was_resumed(monkeypatch):
    run = Run(monkeypatch, terminal=False, steps=30)
    run.state.global_step = 20
    run.call("on_train_begin")
    run.step(**STEP)
    assert "step 21/30" in run.out.getvalue() and "0:01:30 left" in run.out.getvalue()


def test_close_may_come_at_any_time(monkeypatch):
    run = Run(monkeypatch)
    run.bar.close()
    run.bar.close()
    run.step(**STEP)
    assert "step 1/40" in run.out.getvalue(), "what comes later is still said"


def test_unknown_numbers_are_said_as_they_are():
    assert describe({"epoch": 1.0, "speed": 3}) == "epoch 1.0, speed 3"


def test_a_long_step_shows_that_it_goes_on(monkeypatch):
    run = Run(monkeypatch, terminal=False)
    run.step()
    run.clock += 130
    assert run.bar.pulse(run.state) == "step 1/40 done, the next runs for 0:02:10, 0:02:20 in all"
    run.bar.close()


def test_the_heart_beats_where_there_is_no_terminal_until_the_end():
    beats = threading.Event()

    class Log(io.StringIO):
        def write(self, text):
            beats.set()
            return super().write(text)

    bar = RichProgress(Console(file=Log(), force_terminal=False), heartbeat=0.01)
    bar.on_train_begin(None, TrainerState(max_steps=3, is_world_process_zero=True), TrainerControl())
    assert beats.wait(60)
    bar.close()
    said = bar.console.file.getvalue()
    assert said.startswith("step 0/3 done, the next runs for 0:00:00")
