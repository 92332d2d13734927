"""A stranger's template takes no more memory and time than it is given, whoever asks and however that ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import psutil
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


BOMBS = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "a text many times": "{{ 'a' * 10**9 }}",
    "a list many times": "{{ ([1] * 10**9)|length }}",
    "from the right": "{{ (10**9 * 'a')|length }}",
    "a power": "{{ 10 ** (10 ** 8) }}",
    "squares": "{% set n = namespace(x=9) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling with +": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling with ~": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "~ within ~": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = '' ~ (n.x ~ n.x) %}{% endfor %}",
    "doubling in blocks": "{% set n = namespace(x='aa') %}{% for i in range(60) %}"
                          "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "doubling macros": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='aa') %}"
                       "{% for i in range(60) %}{% set n.x = m(n.x) %}{% endfor %}",
    "percent": "{{ '%999999999d' % 1 }}",
    "percent with a star": "{{ '%*d' % (999999999, 1) }}",
    "percent, precise": "{{ '%.999999999f' % 1 }}",
    "the format filter": "{{ '%999999999d'|format(1) }}",
    "str.format, wide": "{{ '{:999999999}'.format(1) }}",
    "str.format, nested": "{{ '{:{}}'.format(1, 999999999) }}",
    "center": "{{ 'a'|center(999999999) }}",
    "indent": "{{ 'a\nb'|indent(999999999) }}",
    "ljust": "{{ 'a'.ljust(999999999) }}",
    "zfill": "{{ 'a'.zfill(999999999) }}",
    "expandtabs": "{{ '\t'.expandtabs(999999999) }}",
    "replace": "{% set x = 'a' * 1000000 %}{{ x.replace('a', x) }}",
    "replace, the filter": "{% set x = 'a' * 1000000 %}{{ x|replace('a', x) }}",
    "join": "{% set x = 'a' * 1000000 %}{{ x.join(x) }}",
    "join, the filter": "{% set x = 'a' * 1000000 %}{{ x|join(x) }}",
    "tojson": "{{ [[1]]|tojson(indent=999999999) }}",
    "slices": "{{ [1]|slice(999999999)|list }}",
    "batches": "{{ [1]|batch(999999999, 0)|list }}",
    "loops within loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over texts": "{% set x = 'a' * 99999 %}{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
                                       "{{ m(60) }}",
    "much is printed": "{% set x = '猫' * 1000 %}{% for a in range(99999) %}{{ x }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_one_sentence(name):
    """Whatever they do, what asks for them stays small and gets its answer soon."""
    before, start = psutil.Process().memory_info().rss, time.monotonic()
    with pytest.raises(UserError) as refused:
        render(TURN, BOMBS[name] + PLAIN)
    said = str(refused.value)
    assert "\n" not in said and len(said) < 300
    assert re.search("do not use templates like it|fails with (Overflow|Recursion|Value)Error|sandbox", said)
    assert psutil.Process().memory_info().rss - before < 2**28
    assert time.monotonic() - start < 90


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


PICKY = (
    "{% set said = messages[0].content[0].text %}{% if said == 'bomb' %}{% set x = 'a' * 10 ** 9 %}"
    "{% elif said == 'no' %}{{ raise_exception('not this') }}{% endif %}" + PLAIN
)


def test_many_are_asked_in_one_message_and_each_has_its_own_error(monkeypatch):
    said = [f"row {number} \ud800 🙂 \ud83d\ude42" for number in range(300)]
    said += ["no", said[1], "bomb", "row 2"]
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "好"}] for text in said]
    wanted = [_or_error(chat) for chat in chats]
    asked = []
    own = process._Child.ask
    monkeypatch.setattr(process._Child, "ask", lambda child, asks: (asked.append(len(asks)), own(child, asks))[1])
    with process.asked_ahead(partial(render, chat, PICKY) for chat in [[], *chats[:-2]]):
        found = [_or_error(chat) for chat in chats[:-2]]
    assert found == wanted[:-2] and asked == [128, 128, 45], "what two rows ask is asked once"
    asked.clear()
    with process.asked_ahead(partial(render, chat, PICKY) for chat in chats[-4:]):
        assert [_or_error(chat) for chat in chats[-4:]] == wanted[-4:]
    assert asked == [4, 1, 1, 1, 1] and "not this" in wanted[-4] and "MiB for one conversation" in wanted[-2]
    assert not process._ANSWERS


def _or_error(chat):
    try:
        return render(chat, PICKY)
    except UserError as error:
        return str(error)


def test_of_what_ships_nothing_is_asked_ahead(monkeypatch):
    monkeypatch.setattr(process, "_child", lambda: pytest.fail("a process was asked"))
    ran = []
    with process.asked_ahead(partial(lambda n: ran.append(n) or render(TURN, "ziya"), number) for number in range(9)):
        assert render(TURN, "ziya").spans
    assert ran == [0]


def test_a_process_that_no_limit_holds_is_looked_at(monkeypatch):
    """As on a system that limits no process's addresses."""
    monkeypatch.setenv("VLM_SFT_LIMITS", f"template_seconds=60,template_bytes={2**36}")
    child = process._child()
    child.memory = 2**27
    source = GREEDY["kept values"] + "{% generation %}a{% endgeneration %}"
    start = time.monotonic()
    assert child.ask([process._Question("render", source, "it", '{"generation_marks": ["", ""]}')]) is None
    assert child.process.poll() is not None and time.monotonic() - start < 90


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
