"""The README.md of a bundle: what it is, how it was made, how well it does, how to load it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from shlex import quote
from typing import Any

import yaml
from huggingface_hub import CardData, ModelCard
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..base.console import harmless, harmless_json
from ..base.errors import refused_by_library
from ..base.names import CARD, CURVES, MANIFEST, METRICS, RECIPE, SCORES, Json, Values
from ..base.whole_files import read_text
from ..recipe.yaml_file import dump_yaml


def write_card(folder: str | Path, repo_id: str | None = None) -> Path:
    """Writes the card of a bundle from what lies in the bundle; called again when an evaluation was added.

    Args:
        folder: The bundle.
        repo_id: What it is called on the Hub; default the folder's name.

    Returns:
        The path of the card.
    """
    folder = Path(folder)
    with refused_by_library(f"The card of {str(folder)!r} cannot be written from what its files say; mend them"):
        manifest, recipe = _read(folder / MANIFEST), yaml.safe_load(read_text(folder / RECIPE))
        lora, told = manifest["adapter"], recipe.get("hub") or {}
        task = "visual-question-answering" if "encoder" in manifest["pieces"] else "image-text-to-text"
        head: Json = {"pipeline_tag": task, "library_name": "vlm_sft"}
        head |= {"tags": ["vlm_sft", "trl", *(["lora"] if lora else [])], **bases_of(manifest["pieces"], "adapter")}
        head |= {key: told[key] for key in ("license", "language") if told.get(key)}
        written = harmless(dump_yaml(without_folders(recipe))).rstrip()
        return render_card(
            folder,
            "bundle/card.md.jinja",
            head,
            name=repo_id or folder.resolve().name,
            address=repo_id or shown(folder),
            manifest=manifest,
            pieces=manifest["pieces"],
            trained=[*manifest["trained"], *(["LoRA on the language model"] if lora else [])],
            # An existing VLM has a template of its own where the recipe names none.
            chat_template=Path(recipe["chat_template"]).stem if recipe["chat_template"] else None,
            start=recipe.get("init_from"),
            row_counts={key.removesuffix("_rows"): counts for key, counts in manifest.items() if key.endswith("_rows")},
            results=_read(folder / SCORES),
            evaluation=next((row for row in reversed(_read(folder / METRICS) or []) if "eval_loss" in row), None),
            curves=(folder / CURVES).is_file(),
            recipe=written,
            # A fence ends at one as long: that of a prompt in the recipe must not end ours.
            fence="`" * max([3, *(len(run) + 1 for run in re.findall("`+", written))]),
        )


def render_card(folder: Path, template: str, head: Values, **values: Any) -> Path:
    """Fills a template of the package and writes it as a folder's card, with `head` for the Hub; gives its path."""
    environment = Environment(  # noqa: S701  # a card is Markdown, in which `quoted` and `in_code` escape
        loader=FileSystemLoader(Path(__file__).parents[1]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # A literal is a text as Python, and a shell, read it: between quotation marks, on one line.
    filters = {"shown": shown, "cell": quoted, "code": in_code, "shell": _for_a_shell}
    environment.filters.update(filters, literal=lambda value: harmless_json(str(value)))
    text = environment.get_template(template).render(head=CardData(**head).to_yaml(), **values)
    path = folder / CARD
    ModelCard(text.rstrip() + "\n").save(path)
    return path


def _for_a_shell(name: str) -> str:
    return name if re.fullmatch(r"[\w ./-]+", name) else quote(harmless(name))


def bases_of(pieces: Mapping[str, Values], relation: str) -> Json:
    """What a head says of the base models, so that the Hub lists the model under each of them."""
    # Pieces that lay in a folder have a path; the Hub takes ids alone.
    bases = sorted({piece["pretrained"] for piece in pieces.values() if "path" not in piece})
    return {"base_model": bases, "base_model_relation": relation} if bases else {}


def shown(path: str | Path) -> str:
    """A path or Hub id as a card names it: without the folders of this machine."""
    path = Path(path)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return path.name if path.is_absolute() else str(path)


@cache
def _folders() -> re.Pattern[str]:
    """Absolute paths within a text, and those that begin in somebody's home or on a drive.

    A text may hold `/no_think` or `yes/no`: a path begins in a folder that machines have, or that this one has.
    """
    usual = (
        "home users root mnt media data scratch tmp var workspace nfs srv opt gpfs lustre volumes work projects storage"
    )
    here = {entry.name for entry in os.scandir("/") if entry.is_dir()} if os.path.isdir("/") else set()
    roots = "|".join(sorted({*usual.split(), *map(re.escape, here)}))
    end = r"[^\s/\\:,;'\"()]"
    return re.compile(
        rf"(?<![\w/.:-])(?:file://(?:localhost)?)?(?:/(?:{roots})\d*|~\w*|[A-Za-z]:(?=\\)|\\\\{end}+)"
        rf"(?:[/\\]+{end}+)*[/\\]+(?={end})",
        re.IGNORECASE,
    )


def without_folders(value: object) -> Any:
    """The same mappings and lists, but of an absolute path the last part alone."""
    if isinstance(value, dict):
        return {without_folders(key): without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_folders(entry) for entry in value]
    if not isinstance(value, str):
        return value
    whole = "\n" not in value and (Path(value).is_absolute() or Path(value).parts[:1] == ("..",))
    return Path(value).name if whole else _folders().sub("", value)


# What Markdown takes for more than text: its marks where they can begin or end something, and what it makes links of.
_MARKS = re.compile(r"[\\`|\[\]$]|[*~]+(?=\S)|(?<=\S)[*~]+|(?<![^\W_])_+(?=\S)|(?<=\S)_+(?![^\W_])")
_LINKS = re.compile(r"(?<=\w)://|(?<=www)\.|@(?=\w)", re.IGNORECASE)
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def quoted(value: object) -> str:
    """A stranger's words on a card as text: no Markdown, no HTML, no link, on one line, in its cell of a table."""
    text = " ".join(harmless(str(value)).split())
    text = re.sub(r"[<>&]", lambda found: _ENTITIES[found[0]], text)
    text = _MARKS.sub(lambda found: "".join(f"\\{mark}" for mark in found[0]), text)
    text = _LINKS.sub(lambda found: "".join(f"&#{ord(mark)};" if mark in ":.@" else mark for mark in found[0]), text)
    return re.sub(r"^([#+*-]+|\d+(?=[.)]))(?=\s|$|[.)])", r"\\\1", text)


def in_code(value: object) -> str:
    """A stranger's words as code on a card, with as many backticks around them as they need."""
    text = " ".join(harmless(str(value)).split()).replace("|", r"\|") or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in (text[0], text[-1]) else ""
    return f"{fence}{space}{text}{space}{fence}"


def _read(path: Path) -> Any:
    """What a JSON file holds; None where there is no such file."""
    return json.loads(read_text(path)) if path.is_file() else None
