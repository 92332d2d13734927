"""The tables of `make real`: of one run on the screen, of several seeds and of the variants in the pages.

`python examples/real/report.py outputs/real/seed0.json outputs/real/seed1.json …` keeps what the tables need of these
runs, in place of those of the same seed or variant, in examples/real/results.json, and writes the tables into
docs/real.md and docs/real_zh.md; without files it writes those of the results that are there. So no number of the pages
is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.json")
PAGES = {"en": ROOT / "docs/real.md", "zh": ROOT / "docs/real_zh.md"}
BETWEEN = re.compile(r"(<!-- (table|variants|gallery) of make real -->\n).*?(<!-- end of the table -->)", re.DOTALL)
THREE = ("kind", "whether", "which")
ROWS = {"kind": THREE[:1], "whether": THREE[1:2], "which": THREE[2:], "questions": THREE}
ROWS |= {"names": ("names",), "describe": ("describe",)}
LANGUAGES = ("en", "zh")
WORDS = {
    "en": {
        "head": "| | English | image blanked | Chinese | image blanked |",
        "kind": "what kind of thing is it, of four",
        "whether": "is it an animal, a vehicle, …",
        "which": "which of four names",
        "questions": "**the three together**",
        "names": "**its name**, of known things",
        "describe": "describe it: kind and name, of known things",
        "seconds": "minutes",
        "all": "all",
        "none": "No whole run of these recipes is recorded here yet.",
        "variants": "| | English: the three | blank | name | describe | Chinese: the three | blank | name | describe |",
        "whole": "as the recipes are, the same seed",
        "untried": "None of these has been run yet.",
        "gallery": "| picture | question | answer | |",
    },
    "zh": {
        "head": "| | 英文 | 遮住图像 | 中文 | 遮住图像 |",
        "kind": "属于哪一类（四选一）",
        "whether": "是不是动物、交通工具……",
        "which": "四个名称中的哪一个",
        "questions": "**以上三种合计**",
        "names": "**名称**（见过的事物）",
        "describe": "描述：类别和名称（见过的事物）",
        "seconds": "分钟",
        "all": "全部",
        "none": "这里还没有记录这些配方的完整运行。",
        "variants": "| | 英文：三种合计 | 遮住图像 | 名称 | 描述 | 中文：三种合计 | 遮住图像 | 名称 | 描述 |",
        "whole": "按配方，同一个种子",
        "untried": "这些还都没有运行过。",
        "gallery": "| 图片 | 问题 | 回答 | |",
    },
}

VARIANTS = {
    "no_stage1": {"en": "without stage 1", "zh": "没有第一阶段"},
    "random_tower": {"en": "a tower of random weights", "zh": "随机权重的视觉塔"},
    "projector_alone": {"en": "the projector alone, without LoRA", "zh": "只训练投影层，没有 LoRA"},
    "lora_alone": {"en": "LoRA alone, the projector as it was solved for", "zh": "只训练 LoRA，投影层保持求解结果"},
    "three_times": {"en": "three times the steps of stage 2", "zh": "第二阶段三倍的步数"},
    "no_names": {"en": "neither names nor descriptions in stage 2", "zh": "第二阶段不问名称，也不要描述"},
}


def kept(results: dict[str, Any]) -> dict[str, Any]:
    """What the table needs of a run."""
    evaluation = results["evaluation"]
    keys = ("answer_accuracy_by_kind", "answer_accuracy_blank_image_by_kind", "questions")
    return {
        "seed": results["seed"],
        "variant": results["variant"],
        "seconds": results["seconds"],
        "evaluation": {key: evaluation[key] for key in keys},
        "shown": results["shown"] if results["seed"] == 0 and not results["variant"] else [],
    }


def share(run: dict[str, Any], kinds: Sequence[str], language: str, blank: bool) -> float:
    """Share of right answers to these kinds of questions, each question counting once."""
    evaluation = run["evaluation"]
    right = evaluation[f"answer_accuracy{'_blank_image' if blank else ''}_by_kind"]
    counts = {kind: evaluation["questions"]["answers"][f"{kind}_{language}"] for kind in kinds}
    return sum(right[f"{kind}_{language}"] * count for kind, count in counts.items()) / sum(counts.values())


def spread(values: Sequence[float], scale: float, places: int) -> str:
    """The mean, and of several values the smallest and the largest."""
    shown = [f"{value * scale:.{places}f}" for value in (mean(values), min(values), max(values))]
    return shown[0] if len(values) == 1 else f"{shown[0]} ({shown[1]} – {shown[2]})"


def table(runs: Sequence[dict[str, Any]], language: str = "en") -> str:
    """Shares in percent and minutes of each step, in Markdown; of several runs the mean (smallest – largest)."""
    words = WORDS[language]
    if not runs:
        return words["none"]
    lines = [words["head"], "|---|---|---|---|---|"]
    for row, kinds in ROWS.items():
        cells = [
            spread([share(run, kinds, each, blank) for run in runs], 100, 1) + " %"
            for each in LANGUAGES
            for blank in (False, True)
        ]
        lines.append(f"| {words[row]} | {' | '.join(cells)} |")
    lines += ["", f"| | {words['seconds']} |", "|---|---|"]
    for step in runs[0]["seconds"]:
        own = step.split("  ")[0 if language == "en" else 1]
        lines.append(f"| {own} | {spread([run['seconds'][step] for run in runs], 1 / 60, 1)} |")
    whole = spread([sum(run["seconds"].values()) for run in runs], 1 / 60, 1)
    return "\n".join([*lines, f"| {words['all']} | {whole} |"])


def variants(runs: Sequence[dict[str, Any]], language: str = "en") -> str:
    """What each variant gives beside the whole run of its seed, in Markdown."""
    words, lines = WORDS[language], []
    for run in runs:
        cells = [
            f"{100 * share(run, kinds, each, blank):.1f} %"
            for each in LANGUAGES
            for kinds, blank in ((THREE, False), (THREE, True), (("names",), False), (("describe",), False))
        ]
        name = VARIANTS[run["variant"]][language] if run["variant"] else words["whole"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([words["variants"], f"|{'---|' * 9}", *lines]) if lines else words["untried"]


def gallery(runs: Sequence[dict[str, Any]], language: str = "en") -> str:
    """Pictures, questions and answers of the run that keeps some, in Markdown."""
    words, lines = WORDS[language], []
    for row in (row for run in runs for row in run["shown"]):
        name = Path(row["image"]).name
        verdict = "✓" if row["right"] else f"✗ {row['expected']}"
        answer = row["answer"].replace("|", "\\|").replace("\n", " ")
        lines.append(f"| ![{Path(name).stem}](gallery/{name}) | {row['question']} | {answer} | {verdict} |")
    return "\n".join([words["gallery"], "|---|---|---|---|", *lines]) if lines else words["none"]


def copy_pictures(runs: Sequence[dict[str, Any]], things: Path) -> None:
    """Puts the gallery's pictures beside the pages."""
    folder = PAGES["en"].parent / "gallery"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for row in (row for run in runs for row in run["shown"]):
        shutil.copyfile(things / row["image"], folder / Path(row["image"]).name)


def filled(page: str, runs: Sequence[dict[str, Any]], language: str) -> str:
    """A page with the tables between their marks."""
    whole, changed = ([run for run in runs if bool(run["variant"]) == wanted] for wanted in (False, True))
    beside = [run for run in whole if run["seed"] in {other["seed"] for other in changed}]
    tables = {
        "table": table(whole, language),
        "variants": variants([*beside, *changed], language),
        "gallery": gallery(whole, language),
    }
    found, count = BETWEEN.subn(lambda marks: f"{marks[1]}{tables[marks[2]]}\n{marks[3]}", page)
    assert count == len(tables), "the page has one place for each table"
    return found


def together(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of both, a new one in the place of an old one of its seed and variant; seeds first, then variants."""
    runs = {(run["variant"] or "", run["seed"]): run for run in [*old, *new]}
    names = ["", *VARIANTS]
    return [runs[key] for key in sorted(runs, key=lambda key: (names.index(key[0]), key[1]))]


def mixed(runs: Sequence[dict[str, Any]]) -> str | None:
    """What keeps these runs out of one table, if anything does."""
    steps = [run["seconds"].keys() for run in runs if not run["variant"]]
    asked = [run["evaluation"]["questions"]["answers"] for run in runs]
    if any(each != steps[0] for each in steps):
        return "took other steps"
    return "were asked other questions" if any(each != asked[0] for each in asked) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="files that examples/real/run.py wrote, one a seed")
    if files := parser.parse_args().runs:
        runs = []
        for file in files:
            try:
                runs.append(kept(json.loads(file.read_text(encoding="utf-8"))))
            except (OSError, ValueError, KeyError, TypeError) as error:
                parser.error(f"{file} is no result of examples/real/run.py ({error}); name outputs/real/seed0.json.")
        runs = together(json.loads(RESULTS.read_text(encoding="utf-8")), runs)
        if other := mixed(runs):
            parser.error(
                f"these runs {other} than some that are kept (another version?): name all anew, or take the older ones "
                f"out of {RESULTS}."
            )
        copy_pictures(runs, ROOT / "data/real/things")
        RESULTS.write_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))
    for language, page in PAGES.items():
        page.write_text(filled(page.read_text(encoding="utf-8"), runs, language), encoding="utf-8")


if __name__ == "__main__":
    main()
