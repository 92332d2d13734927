"""How every page is made: one file, every text escaped, nothing loaded, and no script run but the page's own."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..base.whole_files import read_text
from ..base.words import counted, gib, short_count


def label(english: str, chinese: str) -> Markup:
    """A word of the page in both languages."""
    return Markup('{}<span lang="zh">{}</span>').format(english, chinese)


def render(template: Path, script: Path | None = None, **values: Any) -> str:
    """A page as text.

    Args:
        template: Extends `base.html.jinja`.
        script: The one script that the page may run: the browser compares it with its hash.
        **values: For the template.
    """
    # Everything is escaped: rows are strangers' words.
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals["label"] = label
    environment.filters.update(
        count=short_count,
        counted=counted,
        gib=gib,
        percent=lambda share: "–" if share is None else f"{share:.1%}",
        number=lambda value: f"{value:,}",
    )
    code = "" if script is None else read_text(script)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    # The script is the package's own, and no value is put into it.
    own = {"script": Markup(code), "script_hash": f"sha256-{digest}" if code else ""}  # noqa: S704
    return environment.get_template(template.name).render(**own, **values)
