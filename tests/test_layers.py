"""Imports point to a lower layer only, and what must be quick to import stays so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.paths import ROOT

PACKAGE = ROOT / "vlm_sft"

# A module may import modules of the rows above its own, never of its own row or below.
LAYERS: tuple[tuple[str, ...], ...] = (
    # Layer 1, no torch: what a recipe says.
    ("errors", "quiet", "terminal"),
    ("assets", "metrics", "yaml_file"),
    ("configs", "families", "recipe_data", "recipe_rules"),
    ("recipe_stack",),
    ("recipe",),
    # Layer 2: small things that know one subject each.
    ("reach", "sharded", "weightless"),
    ("checkpoints", "configuration", "fetch", "freeze", "image_refs", "json_text", "languages", "losses", "mixture"),
    ("launch", "ledger", "quantization", "resumption", "run_folder", "hub_errors", "safety", "template_limits"),
    ("image_use", "images", "mplug_owl", "positions", "row_view", "tar_shards", "template_sandbox"),
    ("chat_template", "conversation", "coverage", "data_stats", "file_readers", "published", "qwen_vl"),
    ("connectors", "delta", "formats", "layouts", "leaks", "markers", "readers"),
    ("convert", "sources"),
    ("blank_parts", "kept_rows", "sizes"),
    ("interrupts", "row_progress"),
    # Layer 3: the model, the processor, the data.
    ("data", "modeling", "processor"),
    ("family_model", "family_processor"),
    # Layer 4: they are put together.
    (
        "activations",
        "adapters",
        "answer_options",
        "card",
        "collator",
        "curves",
        "export_check",
        "parts",
        "processors",
        "streaming",
    ),
    ("measure", "memory", "question_file", "resumable", "token_view"),
    ("watch",),
    ("generation",),
    ("family_stack",),
    ("compose",),
    ("pieces",),
    ("stack",),
    ("bundle",),
    ("hub",),
    ("loading",),
    ("handover",),
    # Layer 5: what is done with them.
    ("filtering", "parity", "proof", "pushes", "progress", "rows", "scoring", "trainer"),
    ("answer_file", "checks", "native"),
    ("inspection", "native_processors"),
    ("vllm_form",),
    ("export_forms",),
    ("merged",),
    ("export", "preflight_page"),
    ("assemble",),
    ("debug_batch",),
    # Layer 6: parse and call.
    ("dry_run",),
    ("chat", "data_cli", "evaluate", "recipes_cli", "train"),
    ("preflight",),
    ("cli",),
    ("__main__",),
)
ROW = {module: row for row, modules in enumerate(LAYERS) for module in modules}

# DESIGN: models take plain ints and strings, so that they can be used without recipes.
READS_RECIPES = {"adapters", "bundle", "chat", "configs", "data", "data_cli", "dry_run", "evaluate", "loading"}
READS_RECIPES |= {"merged", "pieces", "processors", "recipes_cli", "recipe_rules", "rows", "scoring", "stack", "train"}
READS_RECIPES |= {"assemble", "compose", "debug_batch", "family_stack", "preflight", "resumption", "safety"}

HEAVY = {"accelerate", "bitsandbytes", "datasets", "matplotlib", "peft", "tokenizers", "torch", "transformers", "trl"}
LIGHT = {module for row in LAYERS[:5] for module in row} | {
    "chat_template",
    "template_sandbox",
    "interrupts",
    "run_folder",
    "launch",
    "dry_run",
    "train",
    "preflight",
    "cli",
    "__main__",
    "recipes_cli",
}

FILES = sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports(tree: ast.AST, *, typing_too: bool = False, inside_functions: bool = True) -> Iterator[tuple[str, int]]:
    """Yields (module, line) of every import; modules of this package as `.name`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not typing_too:
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not inside_functions:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.replace("vlm_sft.", "."), node.lineno
        elif isinstance(node, ast.ImportFrom):
            module = ("." * node.level + (node.module or "")).replace("vlm_sft.", ".")
            if module in (".", "vlm_sft"):
                yield from ((f".{alias.name}", node.lineno) for alias in node.names)
            else:
                yield module, node.lineno
        else:
            yield from imports(node, typing_too=typing_too, inside_functions=inside_functions)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_every_module_has_a_layer() -> None:
    modules = {path.stem for path in FILES}
    assert modules - set(ROW) == set(), "give each new module a row in LAYERS"
    assert set(ROW) - modules == set(), "LAYERS names modules that do not exist"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_point_down(path: Path) -> None:
    wrong = [
        f"{path.name}:{line} imports {name}"
        for name, line in imports(parse(path))
        if name[1:] in ROW and name.startswith(".") and ROW[name[1:]] >= ROW.get(path.stem, 0)
    ]
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_only_a_few_modules_read_recipes(path: Path) -> None:
    reads = any(name == ".recipe" for name, _ in imports(parse(path), typing_too=True))
    assert not reads or path.stem in READS_RECIPES


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_light_modules_import_nothing_heavy(module: str) -> None:
    found = imports(parse(PACKAGE / f"{module}.py"), inside_functions=False)
    assert [name for name, _ in found if name.split(".")[0] in HEAVY] == []


def test_finder_sees_what_it_must() -> None:
    tree = ast.parse(
        "from .a import x\nfrom . import b\nimport vlm_sft.c\nfrom vlm_sft.d import y\nfrom vlm_sft import e\n"
        "if TYPE_CHECKING:\n    from .f import z\n"
        "def function():\n    import torch.nn\n"
    )
    assert [name for name, _ in imports(tree)] == [".a", ".b", ".c", ".d", ".e", "torch.nn"]
    assert ".f" in [name for name, _ in imports(tree, typing_too=True)]
    assert "torch.nn" not in [name for name, _ in imports(tree, inside_functions=False)]
