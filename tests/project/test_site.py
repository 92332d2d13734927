"""`make docs`: the site is built strictly, in both languages, searched in a browser, and asks no other host."""

from __future__ import annotations

import http.server
import importlib.util
import json
import subprocess
import threading
from functools import partial

import pytest

from support.driven import browsing
from support.paths import ROOT

PYTHON = ROOT / ".venv-docs" / "bin" / "python"
FOUND = """(() => { const found = []; const walk = root => {
    for (const e of root.querySelectorAll('*')) if (e.shadowRoot) {
        found.push(...[...e.shadowRoot.querySelectorAll('li a')].map(a => a.href)); walk(e.shadowRoot) } };
    walk(document); return found })()"""
FIELD = """(() => { for (const e of document.querySelectorAll('*')) if (e.shadowRoot) {
    const field = e.shadowRoot.querySelector('input'); if (field) { field.focus(); field.select(); return true }
} })()"""


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs" / "site" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def served():
    """Serves a folder; gives its address."""
    servers = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

    def serve(folder) -> str:
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_the_site_is_built_and_searched_in_both_languages(served, tmp_path) -> None:
    if not PYTHON.exists():
        pytest.fail("Zensical has no environment here: run `make .venv-docs/.setup-done` (`make test` does).")
    done = subprocess.run(
        [PYTHON, ROOT / "docs/site/build.py", tmp_path / "docs"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    site = tmp_path / "docs" / "site"
    address = served(site)
    with browsing(tmp_path) as browser:
        for start, question, wanted in (
            ("", "image seam preflight", "preflight/"),
            ("", "sft.output_dir", ""),
            ("zh/", "留作好答案", "zh/web/"),
            ("zh/", "显存", "zh/faq/"),
        ):
            tab = browser.open(address + start, dark=start == "zh/")
            tab.until("!!document.querySelector('.md-search__button')")
            tab.until("(document.querySelector('.md-search__button').click(), true)")
            tab.until(FIELD)
            tab.call("Input.insertText", text=question)
            found = tab.until(f"{FOUND}.length && {FOUND}")
            assert any(each.startswith(address + wanted) for each in found), (question, found)
            assert tab.hosts() == {address.split("/")[2]} and tab.complaints() == []
            tab.close()
        narrow = browser.open(address + "zh/recipe_keys/", width=390, height=844)
        narrow.until("document.title.includes('配方')")
        assert narrow.does("document.documentElement.scrollWidth") <= 390
    schema = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))
    for page in ("recipe_keys", "zh/recipe_keys"):
        text = (site / page / "index.html").read_text(encoding="utf-8")
        for name, section in [("", schema), *schema["$defs"].items()]:
            for key in section.get("properties", ()):
                assert f".{key}</code>" in text or f">{key}</code>" in text, (page, name, key)


def test_a_page_that_leads_nowhere_ends_the_build(build, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    for page, text in (("README.md", "# 首 [there](docs/b.md)\n"), ("README_zh.md", "# 首 [去](docs/b.md#c)\n")):
        (tmp_path / page).write_text(text, encoding="utf-8")
    listed = "| **Start · 入门** | | | |\n| [b](b.md) | x | y | |\n"
    (tmp_path / "docs" / "README.md").write_text(f"# All\n\n{listed}", encoding="utf-8")
    for page in ("CONTRIBUTING.md", "CHANGELOG.md"):
        (tmp_path / page).write_text("# x\n")
    page = tmp_path / "docs" / "b.md"
    page.write_text("# b\n\n[x](../README.md) `[y](gone.md)`\n\n```\n[z](gone.md)\n```\n", encoding="utf-8")
    linker = build.Linker("en", tmp_path / "out")
    assert linker.page("index.md", tmp_path / "README.md") == "# 首 [there](b.md)\n"
    page.write_text("# b\n\n[x](gone.md)\n", encoding="utf-8")
    with pytest.raises(build.BrokenError, match=r"docs/b\.md: gone\.md is not there"):
        linker.page("b.md", page)
    page.write_text("# b\n\n[x](../../../etc/passwd)\n", encoding="utf-8")
    with pytest.raises(build.BrokenError):
        linker.page("b.md", page)
    assert build.navigation("en", build.site_pages("en"))[1] == {"Start": [{"b": "b.md"}]}
    (tmp_path / "docs" / "c.md").write_text("# c\n", encoding="utf-8")
    with pytest.raises(build.BrokenError, match=r"does not list c\.md"):
        build.navigation("en", build.site_pages("en"))


def test_links_anchors_and_hosts_of_rendered_pages_are_checked(build, tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "index.html").write_text(
        '<a href="a/#一">1</a><a href="a/#二">2</a><a href="b/">3</a><a href="https://x.example/">4</a>'
        '<script src="https://cdn.example/x.js"></script><link rel="stylesheet" href="//fonts.example/y.css">'
        '<img src="data:image/png;base64,AA"><h1 id="top">',
        encoding="utf-8",
    )
    (tmp_path / "a" / "index.html").write_text('<h2 id="一"><a href="..#top">up</a>', encoding="utf-8")
    assert build.check(tmp_path) == [
        "index.html: a/#二 has no such anchor",
        "index.html: b/ is not there",
        "index.html: https://cdn.example/x.js is loaded from another host",
        "index.html: //fonts.example/y.css is loaded from another host",
    ]
