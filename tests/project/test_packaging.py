"""What is built and installed is what works: wheel, editable install and checkout find recipes and templates alike."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Run elsewhere, against one form of the package: says where it was found and what it finds.
PROBE = """
import vlm_sft
from vlm_sft.base.assets import assets_root, list_recipes, list_templates, recipe_path, template_path
from vlm_sft.recipe.schema import load_recipe
print(vlm_sft.__file__)
print(assets_root())
print(*list_recipes())
print(*list_templates())
assert all(recipe_path(name).is_file() for name in list_recipes())
assert all(template_path(name).is_file() for name in list_templates())
load_recipe("ziya_stage2", ["sft.max_steps=1"])
"""


def stems(folder: str, suffix: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / folder).rglob(f"*{suffix}"))


def run(command: list[str], cwd: Path, path: Path | None) -> str:
    """Runs a program in another folder, with one folder on Python's path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    run(command, cwd=out, path=None)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed into, away from the checkout."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    run([*command, str(wheel)], cwd=target, path=None)
    return target


@pytest.mark.slow
def test_wheel_holds_what_ships_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        for folder in (
            "recipes",
            "chat_templates",
            "evaluation_tasks",
            "text_sets",
            "accelerate_configs",
            "examples/digitscenes",
        ):
            shipped = [p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
            assert shipped
            for path in shipped:
                inside = f"vlm_sft/_assets/{path.relative_to(ROOT).as_posix()}"
                assert archive.read(inside) == path.read_bytes()
    for ending, one in (("py", "vlm_sft/train.py"), ("jinja", "vlm_sft/preflight/page.html.jinja")):
        ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "vlm_sft").rglob(f"*.{ending}")}
        assert one in ours and ours <= files
    assert {name.split("/")[0] for name in files} == {"vlm_sft", f"vlm_sft-{PROJECT['version']}.dist-info"}
    assert not [name for name in files if "__pycache__" in name or "/tests/" in name]
    assert f"vlm_sft-{PROJECT['version']}.dist-info/licenses/LICENSE" in files
    assert wheel.stat().st_size < 10_000_000


@pytest.mark.slow
def test_installed_wheel_finds_its_recipes(site: Path, tmp_path: Path) -> None:
    package, assets, recipes, templates = run([sys.executable, "-c", PROBE], tmp_path, site).splitlines()
    assert Path(package) == site / "vlm_sft" / "__init__.py"
    assert Path(assets) == site / "vlm_sft" / "_assets"
    assert recipes.split() == stems("recipes", ".yaml")
    assert templates.split() == stems("chat_templates", ".jinja")


@pytest.mark.slow
def test_installed_command_lists_and_copies_recipes(site: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(site / "bin" / "vlm-sft")]
    listed = run([*command, "recipes", "list"], tmp_path, site)
    assert [line.split()[0] for line in listed.splitlines()] == stems("recipes", ".yaml")
    run([*command, "recipes", "copy", "quickstart_stage1"], tmp_path, site)
    assert (tmp_path / "quickstart_stage1.yaml").read_bytes() == (ROOT / "recipes/quickstart_stage1.yaml").read_bytes()
    assert (tmp_path / "examples" / "digitscenes" / "digitscenes.py").is_file()


@pytest.mark.slow
def test_editable_install_finds_the_checkout(tmp_path: Path) -> None:
    build = "import sys; from hatchling.build import build_editable; print(build_editable(sys.argv[1]))"
    built = run([sys.executable, "-c", build, str(tmp_path)], ROOT, None).strip()
    with zipfile.ZipFile(tmp_path / built) as archive:
        archive.extractall(tmp_path / "site")
    # As pip leaves it: the folder with the .pth file is a site folder, and nothing else knows the checkout.
    program = "import os, site, sys\n"
    program += "sys.path = [folder for folder in sys.path if not os.path.isfile(folder + '/vlm_sft/__init__.py')]\n"
    program += f"site.addsitedir({str(tmp_path / 'site')!r})\n{PROBE}"
    package, assets, recipes, templates = run([sys.executable, "-c", program], tmp_path, None).splitlines()
    assert Path(package) == ROOT / "vlm_sft" / "__init__.py"
    assert Path(assets) == ROOT
    assert recipes.split() == stems("recipes", ".yaml")
    assert templates.split() == stems("chat_templates", ".jinja")


@pytest.mark.slow
def test_checkout_finds_itself_from_anywhere(tmp_path: Path) -> None:
    _, assets, recipes, _ = run([sys.executable, "-c", PROBE], tmp_path, ROOT).splitlines()
    assert Path(assets) == ROOT
    assert recipes.split() == stems("recipes", ".yaml")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {normal(name): version for name, version in (x.split("==") for x in lines if x and not x.startswith("#"))}


def needed() -> dict[str, list[Requirement]]:
    """Every distribution that `.[dev]` brings, with what is asked of it, read from what is installed."""
    asked: dict[str, list[Requirement]] = {}
    queue = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
    seen: set[tuple[str, frozenset[str]]] = set()
    while queue:
        requirement = queue.pop()
        key = (normal(requirement.name), frozenset(requirement.extras))
        asked.setdefault(key[0], []).append(requirement)
        if key in seen:
            continue
        seen.add(key)
        try:
            below = map(Requirement, distribution(requirement.name).requires or [])
        except PackageNotFoundError:
            continue
        extras = {"", *requirement.extras}
        queue += [r for r in below if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)]
    # torch pins its own CUDA packages, which a CPU build does not have.
    return {name: asks for name, asks in asked.items() if not name.startswith(("nvidia-", "cuda-", "triton"))}


def test_constraints_pin_all_that_is_needed_and_nothing_else() -> None:
    assert set(pins()) == set(needed())


def test_constraints_lie_within_the_ranges() -> None:
    pinned = pins()
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[normal(requirement.name)]), text
        assert any(spec.operator.startswith(">") for spec in requirement.specifier), f"{text} has no lower bound"


def test_tests_run_on_the_pinned_versions() -> None:
    """A CPU build calls itself 2.13.0+cpu; the constraint is 2.13.0, which either build satisfies."""
    pinned = pins()
    for name in ("torch", "transformers", "trl", "peft", "datasets", "accelerate"):
        assert distribution(name).version.split("+")[0] == pinned[name]


def test_every_import_is_a_declared_dependency() -> None:
    homes = {
        "PIL": "pillow",
        "yaml": "pyyaml",
        "google": "protobuf",
        "pydantic_core": "pydantic",
        "markupsafe": "jinja2",
    }
    declared = {normal(Requirement(text).name) for text in PROJECT["dependencies"]}
    # Extras: where DeepSpeed's launcher has started us, inside functions; where lmms-eval or VLMEvalKit imports us; and
    # Liger's kernels, which a recipe asks for and a check of the recipe misses.
    declared |= {"deepspeed", "lmms-eval", "vlmeval", "liger-kernel"}
    declared |= {normal(Requirement(text).name) for text in PROJECT["optional-dependencies"]["eval"]}  # likewise
    declared |= {"starlette", "uvicorn"}  # with transformers[serving], the extra `serve`
    declared |= {normal(Requirement(text).name) for text in PROJECT["optional-dependencies"]["gguf"]}  # an export's
    declared |= {"fastapi", "gradio"}  # the extra `web`
    for path in (ROOT / "vlm_sft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in (name.split(".")[0] for name in names):
                if name not in sys.stdlib_module_names and name != "vlm_sft":
                    assert normal(homes.get(name, name)) in declared, f"{path.name} imports {name}"


def test_extras_are_those_promised() -> None:
    assert {"dev", "eval", "gguf", "serve", "web", "docs", "deepspeed"} <= set(PROJECT["optional-dependencies"])


def test_ci_runs_the_readme_s_test_command() -> None:
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    assert re.search(r"^make (--jobs 2 )?test\b", ci.read_text(encoding="utf-8"), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    verbs = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert {"setup", "test", "test-fast", "demo", "lint", "clean"} <= verbs
