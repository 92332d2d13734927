"""`make docs`: the pages of this project as a site in both languages, English at `/` and Chinese at `/zh/`.

Pages are those of `docs/` and the READMEs as they stand; their links are turned to the pages of the site, and files of
the repository that they name come along. What is generated: the keys of a recipe, from its schema; the gallery, from
the pictures of the pages; and the navigation, from the list in `docs/README.md`. Zensical renders it strictly, and then
every link of every page must lead to a file and an anchor of the site, and nothing that it loads to another host.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

sys.path.insert(0, str(Path(__file__).parent))
from recipe_keys import recipe_keys

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("en", "zh")
FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
IMAGES = (".png", ".jpg", ".svg")
# Chinese has no spaces: each character is a word of the index and of what is looked for, in the same order.
SEPARATOR = r"""[\s\-_,:!=\[\]()\\"`/，。；：、！？“”（）《》]+|\.(?!\d)|(?<=[\u4e00-\u9fff])(?=[\u4e00-\u9fff])"""
FURTHER = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
TITLES = {
    "recipe_keys": ("Every key of a recipe", "配方的全部键"),
    "gallery": ("Gallery", "图集"),
    "pages": ("All pages", "全部页面"),
    "changelog": ("Changelog", "更新记录"),
    "contributing": ("Contributing", "参与开发"),
}
ONLY_ENGLISH = '!!! note ""\n\n    这一页目前只有英文。\n'


class BrokenError(Exception):
    """Something of the pages leads nowhere."""


def site_pages(language: str) -> dict[str, Path]:
    """Name of each page in the site of a language → the file it is made from."""
    chinese = language == "zh"
    pages = {"index.md": ROOT / ("README_zh.md" if chinese else "README.md"), "pages.md": ROOT / "docs" / "README.md"}
    for path in sorted((ROOT / "docs").glob("*.md")):
        if path.name == "README.md" or path.stem.endswith("_zh"):
            continue
        translated = path.with_name(f"{path.stem}_zh.md")
        pages[path.name] = translated if chinese and translated.exists() else path
    return pages | {name: ROOT / source for source, name in FURTHER.items()}


class Linker:
    """Turns the links of a page to the site.

    Args:
        language: Of the site.
        sources: Where its sources are written; files of the repository that pages name are copied there.
    """

    def __init__(self, language: str, sources: Path) -> None:
        self._language, self._sources = language, sources
        self._here = {path: name for name, path in site_pages(language).items()}
        self._there = {
            path: name for other in LANGUAGES if other != language for name, path in site_pages(other).items()
        }
        self.pictures: dict[str, list[tuple[str, str]]] = {}

    def page(self, name: str, path: Path) -> str:
        """The text of a page with its links turned.

        Raises:
            BrokenError: A link leads nowhere.
        """
        text, parts, end = path.read_text(encoding="utf-8"), [], 0
        for fence in [*FENCE.finditer(text), None]:
            start = fence.start() if fence else len(text)
            parts.append(LINK.sub(lambda found: self._link(found, name, path), text[end:start]))
            if fence:
                parts.append(fence[0])
                end = fence.end()
        return "".join(parts)

    def _link(self, found: re.Match[str], name: str, path: Path) -> str:
        mark, shown, target = found.groups()
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            return found[0]
        file, _, anchor = target.partition("#")
        wanted = (path.parent / file).resolve()
        behind = f"#{anchor}" if anchor else ""
        own = self._here.get(wanted)
        if own is None and self._language == "zh" and wanted in self._there and self._there[wanted] != name:
            own = self._there[wanted]  # a page with a Chinese side that is named by its English one
            behind = ""  # whose headings are other words
        if own is not None and (own != name or wanted == path):
            return f"[{shown}]({own}{behind})"
        if wanted in self._there:
            return f'<a href="{_url(self._language, self._there[wanted])}{behind}">{shown}</a>'
        if wanted.is_dir():
            return shown
        if not wanted.is_file() or not wanted.is_relative_to(ROOT):
            raise BrokenError(f"{path.relative_to(ROOT)}: {target} is not there.")
        inside = f"files/{wanted.relative_to(ROOT)}"
        copy = self._sources / inside
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wanted, copy)
        if mark:
            self.pictures.setdefault(name, []).append((shown, inside))
        return f"{mark}[{shown}]({inside})"


def _url(language: str, other: str) -> str:
    """From any page of one language to one of the other, as seen from its source: Zensical turns it to the page."""
    target = "" if other == "index.md" else f"{other.removesuffix('.md')}/"
    return f"zh/{target}" if language == "en" else f"../{target}"


def gallery(linker: Linker, chinese: bool) -> str:
    """The pictures of all pages as a page."""
    lines = [f"# {TITLES['gallery'][chinese]}", ""]
    for name, pictures in linker.pictures.items():
        lines += [f"## [{name.removesuffix('.md').replace('_', ' ')}]({name})", ""]
        for shown, inside in dict.fromkeys(pictures):
            lines += [f"![{shown}]({inside})" + ("{ .small }" if "/gallery/" in inside else "\n")]
        lines.append("")
    return "\n".join(lines)


def navigation(language: str, pages: dict[str, Path]) -> list[dict[str, object]]:
    """The list in `docs/README.md` as Zensical's navigation.

    Raises:
        BrokenError: A page is not in the list.
    """
    chinese = language == "zh"
    nav: list[dict[str, object]] = [{"首页" if chinese else "Home": "index.md"}]
    entries: list[dict[str, str]] = []
    listed = {"index.md", "pages.md"}
    for line in (ROOT / "docs" / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if found := re.fullmatch(r"\*\*(.+?) · (.+?)\*\*", cells[0]):
            entries = []
            nav.append({found[2 if chinese else 1]: entries})
        elif (found := LINK.fullmatch(cells[0])) and entries is not None and not found[3].startswith("../README"):
            name = FURTHER.get(found[3].removeprefix("../"), found[3])
            translated = LINK.fullmatch(cells[-1])
            entries.append({(translated[2] if chinese and translated else found[2]): name})
            listed.add(name)
    further = [f"{name}.md" for name in TITLES if f"{name}.md" not in listed or name == "pages"]
    nav.append({"参考" if chinese else "Reference": [{TITLES[name[:-3]][chinese]: name} for name in further]})
    if missing := sorted(set(pages) - listed - set(FURTHER.values())):
        raise BrokenError(f"docs/README.md does not list {', '.join(missing)}: give each a row.")
    return nav


def toml(value: object) -> str:
    """A value as TOML has it, in one line."""
    if isinstance(value, dict):
        return (
            "{ "
            + ", ".join(f"{json.dumps(key, ensure_ascii=False)} = {toml(each)}" for key, each in value.items())
            + " }"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def settings(language: str, pages: dict[str, Path]) -> str:
    """Zensical's settings of the site of a language."""
    chinese = language == "zh"
    toggles = ("切换到深色", "切换到浅色", "跟随系统") if chinese else ("Dark", "Light", "As the system")
    media = ("(prefers-color-scheme)", "(prefers-color-scheme: light)", "(prefers-color-scheme: dark)")
    looks = [{"media": media[0], "toggle": {"icon": "lucide/sun-moon", "name": toggles[1]}},
             {"media": media[1], "scheme": "default", "toggle": {"icon": "lucide/sun", "name": toggles[0]}},
             {"media": media[2], "scheme": "slate", "toggle": {"icon": "lucide/moon", "name": toggles[2]}}]  # fmt: skip
    theme = {
        "language": language, "font": False, "palette": looks,
        "features": ["navigation.sections", "navigation.top", "search.highlight", "content.code.copy"],
    }  # fmt: skip
    project = {
        "site_name": "vlm_sft", "docs_dir": language, "site_dir": "site/zh" if chinese else "site", "theme": theme,
        "site_description": "视觉语言模型的指令微调" if chinese else "Instruction tuning for vision-language models",
        "extra": {"generator": False, "alternate": [
            {"name": "English", "link": "../" if chinese else "./", "lang": "en"},
            {"name": "中文", "link": "./" if chinese else "./zh/", "lang": "zh"},
        ]},
        "extra_css": ["style.css"], "plugins": {"search": {"separator": SEPARATOR}},
        "nav": navigation(language, pages),
        "markdown_extensions": {
            "admonition": {}, "attr_list": {}, "md_in_html": {}, "tables": {},
            "toc": {"permalink": True, "slugify": {"object": "pymdownx.slugs.slugify", "kwds": {"case": "lower"}}},
            "pymdownx": {"highlight": {}, "superfences": {}},
        },
    }  # fmt: skip
    return "[project]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in project.items())


def write_sources(language: str, work: Path) -> Path:
    """Writes the sources of the site of a language; returns Zensical's settings, below which it wants all else.

    Raises:
        BrokenError: A link of a page leads nowhere, or a page is not listed.
    """
    sources, chinese = work / language, language == "zh"
    sources.mkdir(parents=True)
    pages, linker = site_pages(language), Linker(language, sources)
    for name, path in pages.items():
        text = linker.page(name, path)
        if chinese and not path.stem.endswith("_zh") and name not in ("pages.md",):
            text = re.sub(r"^# .+$", lambda found: f"{found[0]}\n\n{ONLY_ENGLISH}", text, count=1, flags=re.MULTILINE)
        (sources / name).write_text(text, encoding="utf-8")
    (sources / "recipe_keys.md").write_text(recipe_keys(TITLES["recipe_keys"][chinese], chinese), encoding="utf-8")
    (sources / "gallery.md").write_text(gallery(linker, chinese), encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("style.css"), sources / "style.css")
    config = work / f"{language}.toml"
    config.write_text(settings(language, pages), encoding="utf-8")
    return config


class Page(HTMLParser):
    """What a rendered page leads to, what it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Notes what the tag names."""
        given = dict(attributes)
        if named := given.get("id") or given.get("name"):
            self.anchors.add(named)
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        source = given.get("href") if tag == "link" and given.get("rel") in ("stylesheet", "icon") else given.get("src")
        if source:
            self.loads.append(source)


def check(site: Path) -> list[str]:
    """What of the rendered pages leads nowhere, or is loaded from another host."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    wrong = []
    for path, page in pages.items():
        where = path.relative_to(site)
        for target in [*page.links, *page.loads]:
            split = urlsplit(target)
            if split.scheme or split.netloc:
                if target in page.loads and split.scheme != "data":
                    wrong.append(f"{where}: {target} is loaded from another host")
                continue
            if where.name == "404.html":  # its addresses start at the root of whatever host it is on
                continue
            there = (path.parent / unquote(split.path)).resolve() if split.path else path
            there = there / "index.html" if there.is_dir() else there
            if not there.is_file():
                wrong.append(f"{where}: {target} is not there")
            elif split.fragment and there in pages and unquote(split.fragment) not in pages[there].anchors:
                wrong.append(f"{where}: {target} has no such anchor")
    return wrong


def main(work: Path) -> int:
    """Builds both sites into `work/site`; the exit code says whether all is well."""
    shutil.rmtree(work, ignore_errors=True)
    try:
        configs = [write_sources(language, work) for language in LANGUAGES]
    except BrokenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for config in configs:
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=work)
        if done.returncode:
            print(done.stdout, *done.stderr.splitlines()[-3:], sep="\n", file=sys.stderr)
            return 1
    site = work / "site"
    if wrong := check(site):
        print(*(f"error: {each}" for each in wrong), sep="\n", file=sys.stderr)
        return 1
    print(f"{len(list(site.rglob('*.html')))} pages in {site}; to read them: python -m http.server -d {site}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs").resolve()))
