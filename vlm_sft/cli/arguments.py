"""Arguments and options that several commands take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.errors import UserError


def bundle_of(value: str) -> str:
    """Says that a folder is no bundle, and leaves out what it does not use, before the imports, which take seconds."""
    from ..recipe.left_out import leave_out_bitsandbytes_of

    if Path(value).exists() or value.partition("@")[0].count("/") != 1:  # `name/repository` may be on the Hub
        _local_bundle(value)
    leave_out_bitsandbytes_of(value)
    return value


def _local_bundle(value: str) -> str:
    from ..bundle.run_folder import find_manifest

    find_manifest(value)
    return value


def _run(value: str) -> str:
    from ..bundle.run_folder import find_records

    find_records(value)
    return value


def _folders(given: list[str] | None) -> list[str] | None:
    for each in given or ():
        if not os.path.isdir(os.path.expanduser(each)):
            raise UserError(f"--image-folder {each} is no folder: correct it.")
    return given


def _scale(given: str | None) -> str | None:
    from ..rows.box import SCALES

    if given is not None and given not in SCALES:
        raise UserError(f"--boxes must be one of {', '.join(SCALES)}, not {given}.")
    return given


Bundle = Annotated[
    str,
    typer.Argument(
        metavar="BUNDLE",
        callback=bundle_of,
        help="Folder that a training run wrote, or name/repository[@revision] on the Hub.",
        show_default=False,
    ),
]
LocalBundle = Annotated[
    str,
    typer.Argument(
        metavar="BUNDLE", callback=_local_bundle, help="Folder that a training run wrote.", show_default=False
    ),
]
RunFolder = Annotated[
    str, typer.Argument(metavar="FOLDER", callback=_run, help="A run's output_dir.", show_default=False)
]
ImageFolders = Annotated[
    list[str] | None,
    typer.Option(
        "--image-folder",
        metavar="DIR",
        callback=_folders,
        help="Further folder in which images may lie; may be repeated.",
    ),
]
Boxes = Annotated[
    str | None,
    typer.Option(
        metavar="SCALE",
        callback=_scale,
        help="What numbers of boxes in questions count: pixels, unit (0 to 1) or thousand; else they are text.",
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Generation setting, like max_new_tokens=64; may be repeated."),
]


def settings_of(assignments: list[str] | None, option: str = "--set") -> dict[str, Any]:
    """`["max_new_tokens=64"]` → `{"max_new_tokens": 64}`, values read as in a recipe."""
    from ..recipe.yaml_file import parse_assignment

    settings = {}
    for assignment in assignments or []:
        if "=" not in assignment:
            example = "max_new_tokens=64" if option == "--set" else "temperature=0"
            raise UserError(f"{option} {assignment} is not understood; write KEY=VALUE, like {option} {example}.")
        path, value = parse_assignment(assignment)
        settings[".".join(map(str, path))] = value
    return settings
