"""`vlm-sft web` as a program, driven in a browser: pictures, a question, answers side by side, rows that are kept."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from support.browser import EVIL
from support.bundles import trained
from support.driven import browsing
from support.paths import ROOT
from vlm_sft import answer, load
from vlm_sft.evaluation.pictures import grey

PYTHON = ROOT / ".venv-web" / "bin" / "python"
KEY = "a-key-of-ours-1"
MOST = 60
SEEN = """window.seen = []; setInterval(() => {
    const text = document.querySelector('#answer-0 textarea').value;
    if (window.seen.at(-1) !== text) window.seen.push(text) }, 5)"""


@pytest.fixture
def program(tmp_path):
    """Starts the command beside Gradio; gives the process, its port, and the file of what it says."""
    if not PYTHON.exists():
        pytest.fail("Gradio has no environment here: run `make .venv-web/.setup-done` (`make test` does).")
    running = []

    def make(*arguments, **environment):
        log = tmp_path / "log"
        command = [str(PYTHON), "-m", "vlm_sft", "web", *map(str, arguments), "--port", "0"]
        with log.open("w") as output:
            surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), **environment}
            running.append(subprocess.Popen(command, stderr=output, stdout=output, env=surroundings))
        end = time.monotonic() + 120
        while "open http" not in (said := log.read_text()):
            assert time.monotonic() < end and running[-1].poll() is None, said
            time.sleep(0.1)
        port = int(said.partition("open http://127.0.0.1:")[2].partition("/")[0])
        while True:  # its address is taken before it listens
            try:
                status(port)
                return running[-1], port, log
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.1)

    yield make
    for process in running:
        process.kill()
        process.wait(20)


def status(port: int, **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/", headers=headers)
    return connection.getresponse().status


def said_alone(bundle, pictures, question: str) -> str:
    model, processor = load(bundle)
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
    row = {"messages": [{"role": "user", "content": content}], "images": pictures}
    (said,) = answer(model, processor, [row], max_new_tokens=MOST)
    return str(said)


def shown_as(text: str) -> str:
    """An answer as a field of a browser has it."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


@pytest.mark.slow
def test_a_person_asks_compares_and_keeps(program, bundle_recipe, photos, tmp_path) -> None:
    # What people see is judged by eye; here it is what they do, what they read, and which hosts their browser asks.
    recipe = bundle_recipe(chat_template="ziya", lora={"r": 2})
    bundles = [tmp_path / "鸟 <b>", tmp_path / "plants"]
    for bundle, moves in zip(bundles, (True, False), strict=True):
        trained(recipe, bundle, moves=moves)
    kept = tmp_path / "kept"
    process, port, log = program(
        *bundles, "--keep", kept, "--set", f"max_new_tokens={MOST}", "--max-images", 2, VLM_SFT_API_KEY=KEY
    )
    key = base64.b64encode(f"me:{KEY}".encode()).decode()
    assert [status(port), status(port, Authorization=f"Basic {key}")] == [401, 200]
    assert status(port, Authorization=f"Basic {key}", Host="evil.example") == 403
    page, question = f"http://127.0.0.1:{port}/", f"这是什么？ {EVIL}"
    with browsing(tmp_path) as browser:
        tab = browser.open(page, language="zh-CN", headers={"Authorization": f"Basic {key}"})
        tab.until("document.querySelector('#ask').innerText.includes('提问')", 60)
        assert "留作好答案" in tab.text() and "鸟 <b>" in tab.text() and "plants" in tab.text()
        tab.click("#ask")
        tab.until("document.querySelector('#note-1 textarea').value.includes('请写下问题')")
        tab.give("#pictures input[type=file]", photos[0], photos[1])
        tab.until("document.querySelectorAll('#pictures .grid-container img').length == 2")
        tab.type("#question textarea", question)
        tab.does(SEEN)
        tab.click("#ask")
        wanted = [said_alone(bundle, shown, question) for bundle in bundles for shown in (photos[:2], [grey(), grey()])]
        fields = [f"#{kind}-{number} textarea" for number in (0, 1) for kind in ("answer", "blank")]
        tab.until(f"document.querySelector('{fields[-1]}').value.length >= {len(shown_as(wanted[-1]))}")
        time.sleep(0.5)
        assert [tab.value(field).strip() for field in fields] == [shown_as(text) for text in wanted]
        assert len(tab.does("window.seen")) > 3, "the answer is seen as it is written"

        tab.click("#stop")
        time.sleep(0.5)
        assert tab.complaints() == []
        tab.click("#bad-0")
        tab.until("document.querySelector('#note-0 textarea').value.includes('已作为坏答案')")
        assert (kept / "bad.jsonl").exists() and not (kept / "rows.jsonl").exists()
        tab.click("#good-0")
        tab.until("document.querySelector('#note-0 textarea').value.includes('已存入')")
        tab.type("#answer-1 textarea", f"两朵花 {EVIL}")
        tab.click("#bad-1")
        tab.until("document.querySelector('#note-1 textarea').value.includes('共 2 行')")
        rows = [json.loads(line) for line in (kept / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [(row["bundle"], row["verdict"]) for row in rows] == [("鸟 <b>", "good"), ("plants", "bad")]
        assert [row["messages"][0]["content"][-1]["text"] for row in rows] == [question] * 2
        assert rows[1]["messages"][1]["content"][0]["text"] == f"两朵花 {EVIL}"
        copies = [[(kept / name).read_bytes() for name in row["images"]] for row in rows]
        assert copies == [[Path(photo).read_bytes() for photo in photos[:2]]] * 2

        # A camera, in a browser whose camera is a pattern: its picture comes behind the others.
        tab.click("#pictures button[aria-label*='摄像'], #pictures button[aria-label*='ebcam']")
        for button in ("b.innerText.includes('Access Webcam')", "b.ariaLabel === 'capture photo'"):
            found = f"[...document.querySelectorAll('#pictures button')].find(b => {button})"
            ready = "document.querySelector('#pictures video').videoWidth > 0" if "capture" in button else "true"
            tab.until(f"{ready} && ({found}.click(), true)")
        tab.until("document.querySelectorAll('#pictures .grid-container img').length == 3")
        hosts, complaints = tab.hosts(), tab.complaints()
        tab.close()

        english = browser.open(page, width=390, height=844, dark=True, headers={"Authorization": f"Basic {key}"})
        english.until("document.querySelector('#ask').innerText.includes('Ask')", 60)
        assert english.until("document.body.classList.contains('dark')")
        assert english.does("document.documentElement.scrollWidth") <= 390, "nothing is cut on a phone"
        english.give("#pictures input[type=file]", *photos[:3])
        english.until("document.querySelectorAll('#pictures .grid-container img').length == 3")
        english.click("#ask")
        english.until("document.querySelector('#note-0 textarea').value.includes('at most 2 are taken')")
        assert hosts | english.hosts() == {f"127.0.0.1:{port}"}
        assert complaints + english.complaints() == []
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, log.read_text()
    assert "Traceback" not in log.read_text() and KEY not in log.read_text()
    assert not list(tmp_path.glob("vlm-sft-web-*")), "uploads are removed"
