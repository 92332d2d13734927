"""A browser that is driven as a person would: it opens pages, types, gives files, and tells which hosts were asked."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from support.browser import BROWSERS

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe "
    "--use-fake-device-for-media-stream --use-fake-ui-for-media-stream"
)


class Browser:
    """Chromium, told what to do through its pipe."""

    def __init__(self, folder: Path, *flags: str) -> None:
        found = next(filter(None, map(shutil.which, BROWSERS)), None)
        assert found is not None, "these tests need a browser: see .ci/run"
        told, self._tell = os.pipe()
        self._hear, says = os.pipe()
        told, says = (fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (told, says))  # so that neither is 3 or 4

        def place() -> None:
            os.dup2(told, 3)
            os.dup2(says, 4)

        command = [found, *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", *flags, "about:blank"]
        self.process = subprocess.Popen(
            command, preexec_fn=place, pass_fds=(3, 4), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(told)
        os.close(says)
        self._rest, self._number, self.events = b"", 0, []

    def call(self, method: str, session: str | None = None, **parameters) -> dict:
        """Tells it to do something, and waits until it has."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._tell, json.dumps(message).encode() + b"\0")
        while True:
            heard = self._next(60)
            if heard.get("id") == self._number:
                assert "error" not in heard, (method, heard["error"])
                return heard["result"]
            self.events.append(heard)

    def listen(self) -> None:
        """Takes what has been said meanwhile."""
        while select.select([self._hear], [], [], 0)[0] or b"\0" in self._rest:
            self.events.append(self._next(1))

    def _next(self, seconds: float) -> dict:
        while b"\0" not in self._rest:
            assert select.select([self._hear], [], [], seconds)[0], "the browser says nothing"
            data = os.read(self._hear, 2**20)
            assert data, "the browser has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(
        self,
        url: str,
        width: int = 1280,
        height: int = 900,
        dark: bool = False,
        language: str = "en-US",
        headers: dict[str, str] | None = None,
    ) -> Tab:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session, target)
        for domain in ("Page", "Network", "DOM", "Runtime", "Log"):
            tab.call(f"{domain}.enable")
        tab.resize(width, height)
        tab.light(dark)
        agent = tab.does("navigator.userAgent").replace("Headless", "")
        tab.call("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
        tab.call("Network.setExtraHTTPHeaders", headers=headers or {})
        tab.call("Page.navigate", url=url)
        return tab

    def close(self) -> None:
        self.process.kill()
        self.process.wait(20)
        os.close(self._tell)
        os.close(self._hear)


class Tab:
    """A page that is open."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def call(self, method: str, **parameters) -> dict:
        return self._browser.call(method, self._session, **parameters)

    def does(self, script: str):
        """The value of an expression in the page."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, script: str, seconds: float = 30.0):
        """Waits until an expression is true, and gives its value."""
        end = time.monotonic() + seconds
        while not (value := self.does(f"(() => {{ try {{ return {script} }} catch (e) {{ return null }} }})()")):
            assert time.monotonic() < end, f"never true: {script}; the page says {self.text()}; {self.complaints()}"
            time.sleep(0.1)
        return value

    def text(self, selector: str = "body") -> str:
        return self.does(f"document.querySelector({json.dumps(selector)}).innerText")

    def value(self, selector: str) -> str:
        """What stands in a field."""
        return self.does(f"document.querySelector({json.dumps(selector)}).value")

    def click(self, selector: str) -> None:
        """Clicks in the middle of an element, as a hand would."""
        place = f"""(() => {{ const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();
            return [r.x + r.width / 2, r.y + r.height / 2] }})()"""
        x, y = self.does(place)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Writes a text into a field in place of what stands there."""
        self.does(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.focus(); e.select() }})()")
        self.call("Input.insertText", text=text)

    def give(self, selector: str, *files: str | Path) -> None:
        """Chooses files in an element for files."""
        root = self.call("DOM.getDocument", depth=0)["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def light(self, dark: bool) -> None:
        wanted = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=wanted)

    def picture(self, path: Path, whole: bool = True) -> None:
        """A picture of the page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def _events(self, method: str) -> list[dict]:
        self.does("0")
        self._browser.listen()
        mine = [each for each in self._browser.events if each.get("sessionId") == self._session]
        return [each["params"] for each in mine if each.get("method") == method]

    def hosts(self) -> set[str]:
        """The hosts that were asked for anything."""
        asked = [each["request"]["url"] for each in self._events("Network.requestWillBeSent")]
        return {urlsplit(url).netloc for url in asked if url.startswith(("http", "ws"))}

    def complaints(self) -> list[str]:
        """Errors that the browser has written down."""
        said = [each["entry"] for each in self._events("Log.entryAdded")]
        thrown = [str(each["exceptionDetails"]) for each in self._events("Runtime.exceptionThrown")]
        return [f"{each['text']} {each.get('url', '')}" for each in said if each["level"] == "error"] + thrown

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)


@contextmanager
def browsing(folder: Path, *flags: str) -> Iterator[Browser]:
    """A browser that ends with the block."""
    browser = Browser(folder, *flags)
    try:
        yield browser
    finally:
        browser.close()
