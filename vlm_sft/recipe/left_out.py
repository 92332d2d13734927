"""What a process does not import because neither its recipe nor its bundle uses it: bitsandbytes.

PEFT imports it as soon as it is there, and with it torch's compiler, which takes more than a second. Here it is made to
look as if it were not installed, for the rest of the process. Libraries remember what is installed, so nothing is done
in a process that has imported torch before: it may be anyone's.

`python -m vlm_sft.recipe.left_out MODULE FOLDER …` runs a module so on a bundle or an export.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import UserError
from ..base.names import CONFIG, MANIFEST, RECIPE, Values
from ..base.whole_files import read_text
from .safety import check_pieces, pieces_in, read_json
from .yaml_file import YamlFile

if TYPE_CHECKING:
    from .schema import Recipe


def leave_out_bitsandbytes(recipe: Recipe) -> None:
    """Leaves bitsandbytes out of a process that trains a recipe, unless its model or its optimizer needs it."""
    optimizer = str(recipe.sft.get("optim"))
    if not (recipe.quantization or any(word in optimizer for word in ("bit", "ademamix", "bnb"))):
        named = ((piece.pretrained, piece.revision) for piece in pieces_in(recipe).values())
        _leave_out((name, revision) for name, revision in named if name is not None)


def leave_out_bitsandbytes_of(bundle: str | Path) -> None:
    """Leaves bitsandbytes out of a process that loads a bundle, unless the bundle or a piece of it has 4 or 8 bits.

    Args:
        bundle: Its folder, or `name/repository[@revision]`, of which nothing is fetched here; or an export. What cannot
            be read changes nothing, and is said where the bundle is loaded.
    """
    repo, _, revision = str(bundle).partition("@")
    folder = Path(bundle) if Path(bundle).exists() else _cached(repo, MANIFEST, revision or None).parent
    try:
        if not (folder / MANIFEST).is_file():
            _leave_out([(str(folder), None)])
        elif not YamlFile.read(folder / RECIPE).data.get("quantization"):
            pieces = read_json(folder / MANIFEST).get("pieces") or {}
            check_pieces(pieces, MANIFEST)
            _leave_out(map(_named, pieces.values()))
    except UserError:
        return


def _named(piece: Values) -> tuple[str, str | None]:
    """Where a piece of a manifest is looked for, and its revision: its name, or the folder that it had in training."""
    name = piece["pretrained"]
    return name if Path(name).exists() else piece.get("path") or name, piece.get("commit") or piece.get("revision")


def _leave_out(pieces: Iterable[tuple[str, str | None]]) -> None:
    """Does it, unless one of the pieces, by name and revision, has few bits or nobody can say so yet."""
    if not {"bitsandbytes", "torch"} & sys.modules.keys() and not any(_may_have_few_bits(*piece) for piece in pieces):
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # to Python, a module that is not there


def _may_have_few_bits(name: str, revision: str | None) -> bool:
    """Whether the configuration of a checkpoint says that it is quantised, or is not here yet."""
    if Path(name).is_file():
        return False
    config = Path(name) / CONFIG if Path(name).is_dir() else _cached(name, CONFIG, revision)
    return not config.is_file() or "quantization_config" in read_text(config, errors="replace")


def _cached(repo: str, file: str, revision: str | None) -> Path:
    """Where the cache of `huggingface_hub` has a file of a repository; a path that is not there where it has none."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repo, file, revision=revision)
    except ValueError:  # no name of a repository, which is said where it is loaded
        found = None
    return Path(found if isinstance(found, str) else f"{repo}/{file}")


if __name__ == "__main__":
    del sys.argv[0]
    leave_out_bitsandbytes_of(sys.argv[1])
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
