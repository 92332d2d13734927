"""Measures a bundle on held-out rows: captions and answers exactly right, and how much of that needs the image."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.console import make_console, quiet_libraries, say
from ..base.errors import UserError, refused_by_library
from ..base.names import METRICS, SCORES
from ..base.whole_files import read_text
from .scoring import collect, score

if TYPE_CHECKING:
    from ..recipe.schema import Recipe
    from ..recipe.sections import Source


def run(
    bundle: str,
    split: str = "test",
    batch_size: int = 32,
    output: str | None = None,
    max_rows: int | None = None,
    recipe: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Evaluates a bundle, prints a table, writes `eval.json` and the bundle's card.

    Args:
        bundle: Folder of the bundle, or `name/repository` on the Hub.
        split: `test` or `eval`: which sources of the recipe's `data`.
        batch_size: Questions answered at a time.
        output: Where the results go; default `eval.json` in the bundle, or `NAME-eval.json` here for one on the Hub.
        max_rows: Only the first so many rows of each source.
        trust_remote_code: See `vlm_sft.load`.
        recipe: A recipe whose `data` is used in place of the bundle's own.

    Returns:
        What `scoring.score` gives, and `train_seconds`, `split`, `evaluate_seconds`.

    Raises:
        UserError: No bundle, no such split, no rows, or a row that cannot be read; once all is written, also where
            questions could not be asked because of their pictures.
    """
    quiet_libraries()

    from transformers import set_seed

    from ..bundle.card import write_card
    from ..bundle.hub import find_bundle, is_fetched
    from ..bundle.load import load, recipe_of
    from ..bundle.manifest import read_manifest
    from ..recipe.schema import load_recipe

    folder = find_bundle(bundle)
    own = recipe_of(folder, read_manifest(folder))
    sources = sources_of(load_recipe(recipe) if recipe else own, split)
    fetched = is_fetched(folder)
    # What lies in the Hub's cache is not ours to change.
    default = Path(f"{bundle.partition('@')[0].rpartition('/')[2]}-{SCORES}") if fetched else folder / SCORES
    target = Path(output) if output else default
    if target.is_dir():
        raise UserError(f"--output {str(target)!r} is a folder; name a file.")
    questions = collect(sources, max_rows)
    model, processor = load(folder, trust_remote_code=trust_remote_code)
    start = time.perf_counter()
    set_seed(int(own.sft.get("seed", 42)))  # some recipes sample, as Ziya's card does
    results = score(model, processor, questions, batch_size, dict(own.generation))
    seconds = round(time.perf_counter() - start, 1)
    results |= {"train_seconds": train_seconds(folder), "split": split, "evaluate_seconds": seconds}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not output and not fetched:
        write_card(folder)
    _print(results, target)
    _check_all_were_asked(results)
    return results


def _check_all_were_asked(results: dict[str, Any]) -> None:
    if refused := results.get("refused"):
        count = results["questions"]["captions"] + sum(results["questions"]["answers"].values())
        raise UserError(
            f"{refused['questions']:,} of {count:,} questions could not be asked and count as wrong; the first: "
            f"{refused['first']}"
        )


def sources_of(recipe: Recipe, split: str) -> list[Source]:
    """The sources of a split.

    Raises:
        UserError: The split is not `test` or `eval`, or the recipe names no source for it.
    """
    if split not in ("test", "eval"):
        raise UserError(f"--split must be test or eval, not {split!r}.")
    sources = getattr(recipe.data, split)
    if not sources:
        raise UserError(
            f"{recipe.path or 'the recipe'} has no data.{split}; add sources there, or name another recipe with "
            f"--recipe."
        )
    return list(sources)


def train_seconds(folder: Path) -> float | None:
    """Seconds that the bundle's stage was trained for, or None where that was not written down."""
    path = folder / METRICS
    if not path.is_file():
        return None
    with refused_by_library(f"{str(path)!r} holds no list of numbers; remove it"):
        runtimes = [row["train_runtime"] for row in json.loads(read_text(path)) if "train_runtime" in row]
        return round(sum(runtimes), 1) if runtimes else None


def _print(results: dict[str, Any], target: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    own = results["metrics_by_kind"]
    title = f"{'Right' if own else 'Exactly right'} on the {results['split']} set"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    table.add_column("what")
    table.add_column("share", justify="right")
    table.add_column("questions", justify="right")
    counts = results["questions"]
    lines = [("captions", results["caption_exact_match"], counts["captions"])]
    by_kind = results["answer_accuracy_by_kind"]
    for kind, accuracy in by_kind.items():
        shares = own.get(kind) or {"": accuracy}
        lines += [
            (f"answers: {kind}{metric and ', ' + metric.replace('_', ' ')}", share, counts["answers"][kind])
            for metric, share in shares.items()
        ]
    answers = sum(counts["answers"].values())
    lines += [
        ("answers", results["answer_accuracy"], answers),
        ("answers, image blanked", results["answer_accuracy_blank_image"], answers),
    ]
    for name, share, count in lines:
        if share is not None:
            table.add_row(name, f"{share:.1%}", f"{count:,}")
    console = make_console(stderr=False, quiet=False)
    console.print(table)
    say(console, f"Written to {target}.")
