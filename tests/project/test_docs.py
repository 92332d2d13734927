"""What the pages say is there: links, paths, commands, recipes and Python code, in both languages."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import pytest
import typer
import yaml
from PIL import Image

import vlm_sft
from support.conversations import make_processor, make_row, turn
from support.paths import ROOT
from vlm_sft.base.assets import list_recipes
from vlm_sft.bundle import run_folder
from vlm_sft.cli import main as cli
from vlm_sft.inference.settings import check_options
from vlm_sft.prepare import rows_of, scorer
from vlm_sft.recipe.libraries import validate_libraries
from vlm_sft.recipe.schema import load_recipe
from vlm_sft.serving import bundles  # noqa: F401  # the real one, before what it imports has a stand-in

PAGES = ["README.md", "README_zh.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
PROGRAMS = ("vlm-sft", "accelerate", "python", "make", "pip", "pytest", "bash")
VERBS = {"train", "chat", "serve", "generate", "evaluate", "export", "preflight", "push", "recipes", "apply-delta"}
VERBS |= {"data", "debug-batch", "answer", "match", "init", "watch", "doctor", "fit", "web", "cache"}
# What a user has and the checkout has not.
TOP = "vlm_sft|recipes|docs|tests|examples|chat_templates|accelerate_configs|benchmarks|.ci"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, *languages: str) -> list[Block]:
    text = read(page)
    return [
        Block(page, text[: found.start()].count("\n") + 1, found["language"], textwrap.dedent(found["text"]))
        for found in FENCE.finditer(text)
        if found["language"] in languages
    ]


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", read(page))


def commands(page: str) -> list[list[str]]:
    """The words of every command in the blocks of a page, comments and variables in front left out."""
    found = []
    for block in blocks(page, "", "bash", "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if not re.match(r"\s*(?:[A-Z_]+=\S+ +)*(?:" + "|".join(PROGRAMS) + r")(?: |$)", line):
                continue
            words = shlex.split(line, comments=True)
            while "=" in words[0]:
                words.pop(0)
            found.append(words)
    return found


COMMANDS = [pytest.param(page, words, id=f"{page}: {shlex.join(words)}") for page in PAGES for words in commands(page)]
PYTHON = [block for page in PAGES for block in blocks(page, "python")]
RECIPES = [b for page in PAGES for b in blocks(page, "yaml") if {"stack", "sft"} <= set(yaml.safe_load(b.text) or ())]


def test_there_is_something_to_test():
    assert len(COMMANDS) > 30 and len(PYTHON) > 10 and len(RECIPES) >= 6


# Links and paths


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", ""))
    return text.replace(" ", "-")


def headings(page: str) -> list[tuple[int, str]]:
    return [(len(marks), title) for marks, title in re.findall(r"^(#+) (.+)$", prose(page), re.MULTILINE)]


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), target
        if anchor:
            titles = [slug(title) for _, title in headings(str(there.resolve().relative_to(ROOT)))]
            assert anchor in titles, target


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_paths_in_the_text_exist(page):
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        if re.fullmatch(rf"(?:{TOP})/[\w./-]*", code):
            assert (ROOT / code).exists() or "/NAME." in code, code
        if found := re.fullmatch(r"make ([a-z-]+)\b.*", code):
            assert found[1] in make_targets(), code
        if found := re.fullmatch(r"vlm-sft ([a-z][a-z-]*).*", code):
            assert found[1] in VERBS, code


# Commands


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))


def check_make(words: list[str]) -> None:
    for word in words:
        name, setting, _ = word.partition("=")
        if setting:
            assert re.search(rf"^{name}\s*\?=", read("Makefile"), re.MULTILINE), word
        else:
            assert name in make_targets(), word


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    for word in words[1:]:
        found = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", word)
        pinned = word in read(".ci/lmms-eval.txt").replace("lmms_eval", "lmms-eval").splitlines()
        assert found or pinned or word in ("-e", "-c", "constraints.txt", "--no-deps"), word
        assert not found or not found[1] or set(found[1].split(",")) <= set(extras)


def check_training(page: str, words: list[str], folder: Path) -> None:
    """RECIPE [key.path=value …] [--resume] [--dry-run] [--json]: shipped or on the page; overrides fit."""
    words = [word for word in words if word not in ("--dry-run", "--resume", "--json")]
    if "--accelerate-config" in words:
        at = words.index("--accelerate-config")
        assert (ROOT / words[at + 1]).is_file(), words[at + 1]
        del words[at : at + 2]
    recipe, *overrides = words
    shown = {b.text.split("\n", 1)[0].removeprefix("# ").split(":")[0]: b.text for b in RECIPES if b.page == page}
    if recipe in shown:
        (folder / recipe).write_text(shown[recipe], encoding="utf-8")
        recipe = str(folder / recipe)
    elif recipe not in list_recipes():
        recipe = str(ROOT / recipe)
    load_recipe(recipe, overrides)


def check_python(page: str, words: list[str], folder: Path) -> None:
    if words[0] == "-m":
        name, *rooms = words[1].split(".")
        module = ROOT.joinpath("vlm_sft", *rooms).with_suffix(".py")
        assert name in ("pytest", "lmms_eval") or (name == "vlm_sft" and module.is_file()), words
        if words[1] == "vlm_sft.train":
            check_training(page, words[2:], folder)
        return
    source = (ROOT / words[0]).read_text(encoding="utf-8")
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in source, option


def check_accelerate(page: str, words: list[str], folder: Path) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    given = launch_command_parser().parse_args(words[1:])
    ours = ("vlm_sft.train", "vlm_sft.cache", "vlm_sft.evaluate")
    assert given.module and given.training_script in (*ours, "lmms_eval")
    assert given.config_file is None or (ROOT / given.config_file).is_file(), given.config_file
    if given.training_script == "lmms_eval":  # tests/harness runs it with these options
        options = [word for word in given.training_script_args if word.startswith("--")]
        assert set(options) <= {"--model", "--model_args", "--tasks", "--batch_size", "--force_simple"}
        return
    if given.training_script == "vlm_sft.evaluate":  # its arguments are those of `vlm-sft evaluate`
        return
    check_training(page, given.training_script_args, folder)


class ThreeRows(rows_of.RowsOf):
    """Rows in place of those of a file that the reader has and the checkout has not."""

    def __iter__(self):
        red = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(red, "PNG")
        for number in range(3):
            yield {
                "messages": turn("什么颜色？", "红色", images=1),
                "images": [{"path": None, "bytes": red.getvalue()}],
                "source": "s",
                "id": f"s/{number}",
            }

    def quietly(self, held_out=False):
        return [] if held_out else self


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, tuple, dict]]:
    """What is called of the modules that need a model, in whose places others stand: name, arguments, keywords."""
    found: list[tuple[str, tuple, dict]] = []
    stood_in: set[str] = set()

    def stand_in(module: str, function: str, result=None) -> None:
        def called(*args, **kwargs):
            found.append((function, args, kwargs))
            return result

        name = f"vlm_sft.{module}"
        made = sys.modules[name] if name in stood_in else types.ModuleType(name)
        stood_in.add(name)
        setattr(made, function, called)
        monkeypatch.setitem(sys.modules, name, made)

    stand_in("prepare.fill_cache", "fill_cache")
    stand_in("captions.command", "caption")
    for function in ("explain_one", "explain_many", "Scheme"):
        stand_in("captions.explained", function)
    stand_in("machine.fit_command", "run")
    nothing = types.SimpleNamespace(lines=list, findings=[], as_dict=dict, summary=str)
    stand_in("machine.doctor", "examine", nothing)
    written = {"recipe": "my_photos.yaml", "rows": "my_photos_rows", "train": 8, "validation": 1, "test": 1}
    stand_in("start.init", "init", {**written, "commands": []})
    stand_in("inference.chat", "chat")
    stand_in("inference.answer_file", "generate")
    for function in ("answer_one", "answer_many", "match_texts", "draw_text"):
        stand_in("inference.encoder", function)
    stand_in("serving.serve", "serve")
    stand_in("web.serve", "web")
    monkeypatch.setattr("vlm_sft.cli.serving.find_spec", lambda name: "found")  # the reader has Gradio
    stand_in("watching.live", "watch")
    stand_in("export.servers", "start", ())
    sys.modules["vlm_sft.export.servers"].ENGINES = ("own", "vllm", "transformers")
    stand_in("evaluation.evaluate", "run")
    stand_in("evaluation.benchmark", "run")
    stand_in("preflight.preflight", "run_preflight")
    stand_in("watching.debug_batch", "run")
    counts = dict.fromkeys(("tensors", "summed", "left_out", "bytes", "shards"), 1)
    stand_in("pieces.delta", "apply_delta", {"tables": "sum", "rows_added": {}, **counts})
    stand_in("bundle.hub", "push_bundle", "https://huggingface.co/my-name/mine/commit/1")
    stand_in("export.export", "export", {"positions": 1, "max_difference": 0.0, "tolerance": 1e-4})
    return found


@pytest.fixture
def check_vlm_sft(monkeypatch, tmp_path, calls):
    """Runs a command for real, with stand-ins for what needs a model."""
    monkeypatch.setattr(rows_of, "RowsOf", ThreeRows)
    monkeypatch.setenv("OPENAI_API_KEY", "x" * 20)  # the reader has one
    monkeypatch.setattr(scorer, "Scorer", lambda path: lambda images, texts: [0.5] * len(images))
    for look in ("find_manifest", "find_records"):  # the folders are the reader's
        monkeypatch.setattr(run_folder, look, lambda folder: folder)

    def check(page: str, words: list[str]) -> None:
        if words[0] == "train":  # parsed for real, and no further
            check_training(page, words[1:], tmp_path)
            monkeypatch.setattr("vlm_sft.recipe.opening.open_recipe", Mock(side_effect=typer.Exit))
        if words[:2] == ["cache", "build"]:
            check_training(page, words[2:], tmp_path)
        elif words[0] == "cache":
            (tmp_path / words[2]).mkdir()
        monkeypatch.setattr(sys, "argv", ["vlm-sft", *words])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        for name, args, kwargs in calls:
            if name == "run_preflight":
                check_training(page, [args[0], *args[1]], tmp_path)
            check_options(kwargs.get("options") or {})

    return check


@pytest.mark.parametrize(("page", "words"), COMMANDS)
def test_commands_are_understood(page, words, check_vlm_sft, tmp_path):
    program, *rest = words
    if program == "vlm-sft":
        check_vlm_sft(page, rest)
    elif rest[:3] == ["launch", "-m", "vlm_sft"]:  # its arguments are those of `vlm-sft`
        check_vlm_sft(page, rest[3:])
    elif program == "accelerate":
        check_accelerate(page, rest, tmp_path)
    elif program == "python":
        check_python(page, rest, tmp_path)
    elif program == "make":
        check_make(rest)
    elif program == "pip":
        check_pip(rest)
    else:
        assert all((ROOT / word).exists() for word in rest if "/" in word), rest


# Recipes and Python


@pytest.mark.parametrize("block", RECIPES, ids=str)
def test_recipes_in_the_pages_are_right(block, tmp_path):
    (tmp_path / "recipe.yaml").write_text(block.text, encoding="utf-8")
    validate_libraries(load_recipe(tmp_path / "recipe.yaml"))


def ours(tree: ast.Module) -> dict[str, object]:
    """What a block's imports from vlm_sft bind, by name; an import of what is not there fails."""
    bound: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vlm_sft":
            module = importlib.import_module(node.module)
            bound |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            bound |= {a.asname or a.name: vlm_sft for a in node.names if a.name == "vlm_sft"}
    return bound


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_in_the_pages_is_right(block):
    tree = ast.parse(block.text)
    bound = ours(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and bound.get(node.value.id) is vlm_sft:
            assert hasattr(vlm_sft, node.attr), f"vlm_sft.{node.attr}"
        if not isinstance(node, ast.Call):
            continue
        function = None
        if isinstance(node.func, ast.Name):
            function = bound.get(node.func.id)
        elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            function = getattr(vlm_sft, node.func.attr) if bound.get(node.func.value.id) is vlm_sft else None
        if function is None or not callable(function):
            continue
        parameters = inspect.signature(function).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            assert {k.arg for k in node.keywords if k.arg} <= set(parameters), ast.unparse(node)
        needed = [p for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if not any(k.arg is None for k in node.keywords):
            assert len(node.args) + len(node.keywords) >= len(needed), ast.unparse(node)


@pytest.mark.slow
def test_the_python_of_the_pages_runs(monkeypatch, tmp_path, capsys):
    """As it stands, after a small `make demo`, with fewer steps."""
    from vlm_sft.train import train

    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    world = [sys.executable, "examples/digitscenes/digitscenes.py", "--out", "data/digitscenes"]
    subprocess.run([*world, "--scenes", "60", "8", "8"], check=True)

    def shorter(path, overrides=()):
        return load_recipe(path, [*overrides, "sft.max_steps=2", "sft.warmup_steps=1"])

    monkeypatch.setattr(vlm_sft, "load_recipe", shorter, raising=False)
    for stage in ("quickstart_stage1", "quickstart_stage2"):
        train(shorter(stage))
    for page in ("docs/python_api.md", "docs/bundles.md", "docs/faq.md"):
        for block in blocks(page, "python"):
            exec(compile(block.text, str(block), "exec"), {"__name__": str(block)})


COLLATORS = [block for block in PYTHON if "(MultimodalCollator):" in block.text]


@pytest.mark.parametrize("block", COLLATORS, ids=str)
def test_collators_in_the_pages_work(block, photos):
    namespace: dict[str, object] = {}
    exec(compile(block.text, str(block), "exec"), namespace)
    (kind,) = [v for v in namespace.values() if inspect.isclass(v) and v is not vlm_sft.MultimodalCollator]
    arguments = {"trust": {"s": 0.3}} if kind.__name__ == "TrustedSources" else {}
    rows = [make_row(turn("这是什么？", "一只猫", images=1) + turn("a", "b"), photos), make_row(turn("c", "d"), photos)]
    processor = make_processor("vicuna_v1")
    plain, batch = vlm_sft.MultimodalCollator(processor)(rows), kind(processor, max_length=512, **arguments)(rows)
    assert set(batch) >= set(plain)
    same = all((plain[name] == batch[name]).all() for name in plain)
    assert not same or "loss_weights" in batch, "it changes nothing"


# Both languages


PAIRS = [(page.replace("_zh", ""), page) for page in PAGES if page.endswith("_zh.md")]


def without_comments(blocks_of_page: list[Block]) -> list[str]:
    return [ast.dump(ast.parse(block.text)) for block in blocks_of_page]


def test_newcomers_have_a_chinese_side():
    assert {"README.md", "docs/first_run.md", "docs/faq.md"} <= {english for english, _ in PAIRS}


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_say_the_same(english, chinese):
    assert commands(english) == commands(chinese)
    assert without_comments(blocks(english, "python")) == without_comments(blocks(chinese, "python"))
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(chinese)]
    links = [set(re.findall(r"\]\(([^):]+)\)", read(page).replace("_zh.md", ".md"))) for page in (english, chinese)]
    targets = [{link.partition("#")[0] for link in page} for page in links]
    assert targets[0] == targets[1]
    rows = [len(re.findall(r"^\|", read(page), re.MULTILINE)) for page in (english, chinese)]
    assert rows[0] == rows[1]
    for left, right in zip(blocks(english, "yaml"), blocks(chinese, "yaml"), strict=True):
        recipes = [yaml.safe_load(block.text) for block in (left, right)]
        for recipe in recipes:  # prompts are in the page's language
            for source in recipe["data"]["train"]:
                source.pop("prompts", None)
        assert recipes[0] == recipes[1]
    named = [re.findall(rf"`((?:{TOP})/[\w./-]*|[\w.]+_\w+)`", prose(page)) for page in (english, chinese)]
    assert set(named[0]) == set(named[1]), "files and keys"
    for page, other in ((english, chinese), (chinese, english)):
        assert f"]({Path(other).name})" in read(page).split("\n## ")[0], "each names the other at its head"


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_commands_and_code_have_chinese_too(page):
    assert re.search(r"[\u4e00-\u9fff]", "".join(block.text for block in blocks(page, "", "python")))


# The map


ROOMS = sorted(path.parent.name for path in (ROOT / "vlm_sft").glob("*/__init__.py"))
TOUR = ["vlm_sft/train.py", "vlm_sft/batch/collator.py", "vlm_sft/batch/processor.py", "vlm_sft/model/modeling.py"]
TOUR.append("vlm_sft/training/trainer.py")


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_readmes_are_read_in_two_minutes(page):
    assert len(read(page).encode()) <= 6_450  # about 6 KB; what would be more stands in docs/


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_ci_runs_the_test_command_of_the_readmes(page):
    assert "`make test`" in read(page) and "\nmake --jobs 2 test ||" in read(".ci/run")


def test_the_glossary_has_both_languages_and_the_words_that_mean_two_things():
    rows = [row for row in re.findall(r"^\|(.+)\|$", read("docs/glossary.md"), re.MULTILINE) if "---" not in row]
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    assert all(len(row) == 4 and all(row) and re.search(r"[\u4e00-\u9fff]", row[3]) for row in cells)
    words = {word for row in cells for word in row[0].split(", ")}
    assert {"part", "piece", "stack", "family", "tower", "bundle", "ledger", "hand-over", "question"} <= words


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_readmes_name_every_room_and_five_files(page):
    (heading,) = re.findall(r"^\| [^|\n]*`vlm_sft/`.*\n(?:\|.*\n)+", read(page), re.MULTILINE)
    assert sorted(re.findall(r"^\| `(\w+)` \| \S", heading, re.MULTILINE)) == ROOMS
    assert re.findall(r"`(vlm_sft/[\w/]+\.py)`", read(page)) == TOUR


def test_the_architecture_page_shows_the_contract_and_the_tour():
    settings = tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]
    (layers,) = (contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    (block,) = blocks("docs/architecture.md", "text")
    assert block.text.splitlines() == layers
    assert re.findall(r"`(vlm_sft/[\w/]+\.py)`", read("docs/architecture.md")) == TOUR


EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*.*") if path.suffix in (".py", ".sh", ".md", ".yaml"))


@pytest.mark.parametrize("page", [*PAGES, *(path.relative_to(ROOT).as_posix() for path in EXAMPLES)])
def test_no_page_names_a_module(page):
    """What a user needs is in `vlm_sft` itself; what `-m` starts is a program."""
    text = re.sub(r"""-m["',\s-]+vlm_sft\.\w+\b(?!\.)""", "", read(page))
    programs = {path.stem for path in (ROOT / "vlm_sft").glob("*.py")}
    assert set(re.findall(r"\bvlm_sft\.(\w+)", text)).isdisjoint({*ROOMS, *programs})
    for room in ROOMS:
        if page not in ("README.md", "README_zh.md", "docs/architecture.md"):
            assert f"vlm_sft/{room}/" not in text
    modules = {path.name for path in (ROOT / "vlm_sft").rglob("*.py")} - {"train.py"}
    assert set(re.findall(r"`(\w+\.py)`", text)).isdisjoint(modules)


@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="needs the git checkout")
def test_the_index_lists_what_lies_at_the_top():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for top in {f"{path.split('/')[0]}/" if "/" in path else path for path in files if path}:
        assert f"`{top}`" in read("docs/README.md") or top.startswith(".git"), top


def linked(page: str) -> set[str]:
    there = [(ROOT / page).parent / target for target in re.findall(r"\]\(([^)#:]+\.md)", read(page))]
    return {path.resolve().relative_to(ROOT).as_posix() for path in there}


def test_every_page_is_linked():
    assert linked("docs/README.md") == {*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"} - {"docs/README.md"}
    reached, new = set(), {"README.md"}
    while new:
        reached |= new
        new = {page for last in new for page in linked(last)} - reached
    assert set(PAGES) <= reached and "docs/README.md" in linked("README.md")


def test_the_freeze_plan_shown_is_the_one_printed(monkeypatch):
    from peft import get_peft_model

    from vlm_sft.stack.build_stack import build_empty_stack

    monkeypatch.chdir(ROOT)
    recipe = load_recipe("quickstart_stage2")
    stack = build_empty_stack(recipe)
    model = get_peft_model(stack.model, vlm_sft.lora_config(recipe, stack.model), autocast_adapter_dtype=False)
    stack.plan.apply(model)  # PEFT froze all but its own
    table = stack.plan.table(model)
    header = "| " + " | ".join(str(column.header) for column in table.columns) + " |"
    rows = zip(*(column.cells for column in table.columns), strict=True)
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    assert "\n".join([header, "|" + "---|" * len(table.columns), *lines]) in read("docs/bundles.md")


def test_the_python_page_names_every_public_name():
    assert {name for name in vlm_sft.__all__ if f"`{name}`" not in read("docs/python_api.md")} == set()
