"""A stranger's template takes no more memory and time than it is given, whoever asks and however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest

from vlm_sft.base.assets import list_templates, template_path
from vlm_sft.base.errors import UserError
from vlm_sft.templates import process
from vlm_sft.templates.render import render
from vlm_sft.templates.template import load_template

TURN = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "这是什么？\ud800 🙂"}]},
    {"role": "assistant", "content": "一只猫。"},
]
PLAIN = (
    "{% for m in messages %}{% if m.role == 'user' %}{% for p in m.content %}{{ image_token if p.type == 'image' else "
    "p.text }}{% endfor %}{% else %}{% generation %}{{ m.content[0].text }}{% endgeneration %}{% endif %}{% endfor %}"
)
GREEDY = {
    "kept values": "{% set ns = namespace(x=0) %}{% for i in range(99000) %}"
    "{% set ns.x = [ns.x, range(99000) | list] %}{% endfor %}",
    "maps": "{% set r = range(99000) | list %}{% for i in range(9000) %}"
    "{% set x = r | map('string') | map('upper') | map('lower') | list | sort %}{% endfor %}",
    "divisions": "{% set n = (10 ** 2900) * (10 ** 90) %}{% for i in range(300) %}{% for j in range(300) %}"
    "{% set x = [n // (n - i), n % (n // 7), n // 3, (n ~ '') | int] %}{% endfor %}{% endfor %}"
    "{% set y = range(99000) | list %}{% for i in range(9000) %}{% set z = y | sum %}{% endfor %}",
    "nested lists": "{% set ns = namespace(x=['a']) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x | tojson | length }}",
}


@pytest.fixture(autouse=True)
def own_process(monkeypatch):
    """Little memory and time, and a process that is made with them."""
    if process._CHILD is not None:
        process._CHILD.end()
    monkeypatch.setenv("VLM_SFT_LIMITS", f"template_seconds=1,template_bytes={2**28}")
    yield
    if process._CHILD is not None:
        process._CHILD.end()


@pytest.mark.parametrize("name", GREEDY)
def test_what_gets_past_the_counters_is_ended(name):
    start = time.monotonic()
    with pytest.raises(UserError) as refused:
        render(TURN, GREEDY[name] + PLAIN)
    assert "\n" not in str(refused.value) and str(refused.value).endswith("do not use templates like it.")
    assert time.monotonic() - start < 60
    assert render(TURN, PLAIN).text == "<image>这是什么？\ud800 🙂一只猫。", "the next is rendered by another process"


def test_templates_that_ship_are_rendered_here_and_others_are_not(monkeypatch):
    def started() -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(process, "_Child", started)
    for name in list_templates():
        load_template(name)
        load_template(template_path(name).read_text(encoding="utf-8"))
    with pytest.raises(AssertionError, match="a process was started"):
        load_template(template_path("ziya").read_text(encoding="utf-8") + "{# mine #}")


def test_both_ways_give_the_same():
    for name in ("ziya", "qwen2_5_vl", "llava_llama_2"):
        source = template_path(name).read_text(encoding="utf-8")
        assert render(TURN, source + "{# mine #}") == render(TURN, source)


def test_it_sees_no_environment_and_writes_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("GITHUB_PAT", "geheim")
    render(TURN, PLAIN)
    proc = Path(f"/proc/{process._CHILD.process.pid}")
    assert b"geheim" not in (proc / "environ").read_bytes()
    limits = (proc / "limits").read_text(encoding="ascii")
    assert "Max file size             0 " in limits and f"Max address space         {2**28} " in limits


def test_a_forked_process_has_one_of_its_own():
    """As workers of a data loader are; the parent's goes on answering the parent."""
    render(TURN, PLAIN)
    before = process._CHILD.process.pid
    with get_context("fork").Pool(2) as pool:
        pids = pool.map(_rendered_by, range(4))
    assert before not in pids and _rendered_by(0) == before


def _rendered_by(number: int) -> int:
    assert render(TURN, PLAIN).spans
    return process._CHILD.process.pid


def test_threads_take_turns():
    found = []
    threads = [threading.Thread(target=lambda: found.append(render(TURN, PLAIN).text)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1


ASKER = """
import os, sys, time
from vlm_sft.templates import process
from vlm_sft.templates.render import render
render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], sys.argv[1])
print(process._CHILD.process.pid, flush=True)
if sys.argv[2]:
    os.environ["VLM_SFT_LIMITS"] = "template_seconds=100"
    print("begins", flush=True)
    render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], sys.argv[2])
time.sleep(60)
"""
SIMPLE = "{% generation %}{{ messages[1].content[0].text }}{% endgeneration %}"


@pytest.mark.parametrize(("end", "rendering"), [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGINT, True)])
def test_it_ends_with_the_one_that_asks_however_that_ends(end, rendering):
    """Also in the middle of a template that would go on for minutes."""
    greedy = GREEDY["maps"] + SIMPLE if rendering else ""
    asker = subprocess.Popen(
        [sys.executable, "-c", ASKER, SIMPLE, greedy], stdout=subprocess.PIPE, text=True,
        # Tests that run in the background ignore interrupts, and programs inherit that; at a terminal none does.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    child = int(asker.stdout.readline())
    if rendering:
        assert asker.stdout.readline() == "begins\n"
        time.sleep(0.3)
    asker.send_signal(end)
    assert asker.wait(20) != 0
    for _ in range(200):
        if not _runs(child):
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("it goes on")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").split(")")[1].split()[0] != "Z"
    except OSError:
        return False
