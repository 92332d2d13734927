"""The table of `make real`: of one run on the screen, of several seeds in the pages.

`python examples/real/report.py outputs/real/seed0.json outputs/real/seed1.json …` keeps what the table needs of these
runs in examples/real/results.json, and writes the table into docs/real.md and docs/real_zh.md; without files it writes
the table of the results that are there. So no number of the pages is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.json")
PAGES = {"en": ROOT / "docs/real.md", "zh": ROOT / "docs/real_zh.md"}
BETWEEN = re.compile(r"(<!-- table of make real -->\n).*?(<!-- end of the table -->)", re.DOTALL)
KINDS = ("kind", "whether", "which", "names")
LANGUAGES = ("en", "zh")
WORDS = {
    "en": {
        "head": "| | English | image blanked | Chinese | image blanked |",
        "kind": "what kind of thing is it, of four",
        "whether": "is it an animal, a vehicle, …",
        "which": "which of four names",
        "questions": "**the three together**",
        "names": "**its name**, of known things",
        "seconds": "minutes",
        "all": "all",
        "none": "No whole run of these recipes is recorded here yet.",
    },
    "zh": {
        "head": "| | 英文 | 遮住图像 | 中文 | 遮住图像 |",
        "kind": "属于哪一类（四选一）",
        "whether": "是不是动物、交通工具……",
        "which": "四个名称中的哪一个",
        "questions": "**以上三种合计**",
        "names": "**名称**（见过的事物）",
        "seconds": "分钟",
        "all": "全部",
        "none": "这里还没有记录这些配方的完整运行。",
    },
}


def kept(results: dict[str, Any]) -> dict[str, Any]:
    """What the table needs of a run."""
    evaluation = results["evaluation"]
    keys = ("answer_accuracy_by_kind", "answer_accuracy_blank_image_by_kind", "questions")
    return {
        "seed": results["seed"],
        "seconds": results["seconds"],
        "evaluation": {key: evaluation[key] for key in keys},
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
    for row in (*KINDS[:-1], "questions", "names"):
        kinds = KINDS[:-1] if row == "questions" else (row,)
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


def filled(page: str, runs: Sequence[dict[str, Any]], language: str) -> str:
    """A page with the table between its marks."""
    found, count = BETWEEN.subn(lambda marks: f"{marks[1]}{table(runs, language)}\n{marks[2]}", page)
    assert count == 1, "the page has one place for the table"
    return found


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
        if any(run["seconds"].keys() != runs[0]["seconds"].keys() for run in runs):
            parser.error("these runs took other steps (--quick, or another version); name runs of one kind.")
        RESULTS.write_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))
    for language, page in PAGES.items():
        page.write_text(filled(page.read_text(encoding="utf-8"), runs, language), encoding="utf-8")


if __name__ == "__main__":
    main()
