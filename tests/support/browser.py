"""Pages opened in a real browser, and read tag by tag."""

from __future__ import annotations

import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EVIL = """<script>document.title='pwned'</script>"><img src=x onerror="document.title='pwned'">'&lt;猫 {{ 7*7 }}"""


def opened(page: str, folder: Path, width: int = 1280) -> str:
    """The page as a browser has it after its scripts, if any, have run.

    In CI a browser must be there. Without one the page is given back as it is, and the tests read that.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        assert not os.environ.get("CI"), "CI must have a browser: see .ci/run"
        return page
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --user-data-dir={folder / 'profile'} --dump-dom"
    flags += f" --window-size={width},900"
    done = subprocess.run([browser, *flags.split(), path.as_uri()], capture_output=True, timeout=120, check=True)
    return done.stdout.decode()


class Elements(HTMLParser):
    """Tags with their attributes, and the text of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data
