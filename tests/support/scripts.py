"""Programs of the checkout that are no modules of a package, and the tables of docs/systems.md that they make."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

from support.paths import ROOT


def script(path: str) -> ModuleType:
    """A file of the checkout, such as `benchmarks/families.py`, as a module."""
    spec = importlib.util.spec_from_file_location(path.rpartition("/")[2].removesuffix(".py"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def systems_table(heading: str) -> dict[str, str]:
    """Model type → `works…` or `no: …`, of the table below a heading of docs/systems.md."""
    page = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8").partition(f"## {heading}")[2]
    return dict(re.findall(r"^\| `([\w.-]+)` \| ((?:works|no): .*) \|$", page.partition("\n## ")[0], re.MULTILINE))
