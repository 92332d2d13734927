"""What is looked at before a stranger's file is used: where it lies, how large it is, and what it would make of it.

No torch here. What is promised stands in docs/security.md, each promise with its test.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.errors import UserError
from ..base.limits import MEGABYTE, READERS, bounded, limits
from ..base.names import ADAPTER_CONFIG, CONFIG, MANIFEST, PARTS, RECIPE, TEMPLATE, WHOLES, Json, Values
from ..base.whole_files import check_entries, read_text

if TYPE_CHECKING:
    from .schema import Recipe
    from .sections import AnyPiece

# The limits of texts that need less than `limits.text_bytes`.
SHORTER = {
    **dict.fromkeys((RECIPE, TEMPLATE, ADAPTER_CONFIG), "recipe_bytes"),
    **dict.fromkeys((MANIFEST, CONFIG), "config_bytes"),
}
LONGEST_NAME = 255  # bytes of a part of a path; the system raises at a longer one
TEXTS = (".json", ".yaml", ".jinja", ".txt", ".md")
# The limits of what a configuration says of a model: more than any published one has, and little enough to be built
# without weights. A base of rotary positions, and how many there are, are no sizes of a tensor; such numbers are large.
_SIZES = {
    re.compile(r"layers?$|^depths?$|^n_layer|blocks$"): "model_layers",
    re.compile(r"^num_labels$"): "model_labels",
    re.compile(r"^image_size$"): "picture_side",
    re.compile(r"rope|theta|position|length"): None,
    re.compile(""): "model_size",
}
_TILES = ("max_patches", "min_patches", "pan_and_scan_max_num_crops", "max_slice_nums", "dense_max_patches",
          "max_image_tiles")  # fmt: skip
_SIDES = ("height", "width", "shortest_edge", "longest_edge", "patch_size", "merge_size", "temporal_patch_size",
          "scale_resolution", "tile_size")  # fmt: skip


def check_folder(folder: Path) -> None:
    """Looks at the files of a bundle before any is read.

    Raises:
        UserError: A link leads out of the folder, or a text is too large.
    """
    check_entries(folder)
    check_entries(folder / "qformer_tokenizer")
    root = folder.resolve()
    # In the cache of `huggingface_hub` every file is a link to a blob of the same repository.
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    inside = (path for name in ("qformer_tokenizer", "merged_*") for path in folder.glob(f"{name}/*"))
    for path in (*sorted(folder.iterdir()), *sorted(inside)):
        real = path.resolve()
        if not (real.is_relative_to(root) or real.is_relative_to(blobs)):
            raise UserError(f"{str(path)!r} leads out of its bundle; put the file itself there.")
        if path.suffix in TEXTS and path.is_file():
            check_length(path, most_bytes(path.name))


def most_bytes(name: str) -> int:
    """Bytes that a text file of this name may have."""
    found: int = getattr(limits(), SHORTER.get(name, "text_bytes"))
    return found


def check_length(path: str | Path, limit: int) -> None:
    """Raises a UserError when a file has more than so many bytes."""
    if (size := os.path.getsize(path)) > limit:
        raise UserError(f"{str(path)!r} has {size:,} bytes, more than the {limit:,} that such a file may have.")


def read_json(path: Path, whole: str = "bundle") -> Json:
    """A mapping in a JSON file of a bounded size.

    Args:
        path: The file.
        whole: What it belongs to, for messages.

    Raises:
        UserError: It is too large, cannot be read, or is no mapping.
    """
    try:
        check_length(path, most_bytes(path.name))
        content = json.loads(bounded(read_text(path)))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}; the {whole} is not whole.") from error
    if not isinstance(content, dict) or is_deep(content):
        raise UserError(f"{str(path)!r} holds no mapping, or one that is too deep; the {whole} is not whole.")
    return content


def is_deep(value: object) -> bool:
    """Whether mappings and lists lie too deep in each other: what walks through them would not end."""
    level = [value]
    for _ in range(READERS.settings_depth):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [entry for entries in inner for entry in entries if isinstance(entry, dict | list)]
        if not level:
            return False
    return True


def check_pieces(pieces: object, where: str) -> None:
    """Checks what a manifest says of its pieces, which becomes part of a recipe.

    Raises:
        UserError: A part or an entry is not what a bundle has.
    """
    for part, piece in pieces.items() if isinstance(pieces, dict) else [("pieces", None)]:
        entries = piece if isinstance(piece, dict) else {}
        must = all(isinstance(entries.get(key), str) for key in ("pretrained", "fingerprint"))
        may = all(isinstance(entries.get(key), str | None) for key in ("revision", "commit", "path", "init_from"))
        may = may and all(is_words(entries.get(key, [])) for key in ("more", "held"))
        named = "/".join(str(entries.get(key)) for key in ("pretrained", "path", "init_from"))
        may = may and all(len(name.encode(errors="replace")) <= LONGEST_NAME for name in named.split("/"))
        if part not in (*PARTS, *WHOLES) or not must or not may:
            raise UserError(f"{where!r}: what it says of {part!r} is not what a bundle has; the bundle is not whole.")


def is_words(value: object) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def check_config(config: Values, where: str, who: str = "its config.json") -> None:
    """Looks at the numbers of a `config.json` before a model is made of them.

    Args:
        config: What stands in the file.
        where: Named in the message.
        who: Says the numbers.

    Raises:
        UserError: A number is larger than that of any model.
    """
    for name, value in _numbers(config):
        if isinstance(value, float):
            continue  # no size
        limit = next(limit for pattern, limit in _SIZES.items() if pattern.search(name))
        if value > (most := getattr(limits(), limit) if limit else READERS.largest_position):
            raise UserError(f"{where}: {who} says {name}: {_more_than(value, most, limit)}.")


# Image processors whose edges are numbers of pixels.
_BY_PIXELS = ("Qwen2VL", "Glm4v", "Glm46V", "PaddleOCRVL", "Ernie4_5", "HunYuanVL", "VideoLlama3")


def check_picture(settings: Values, where: str, file: str = "preprocessor_config.json") -> None:
    """The same for the sizes in the file of an image processor, or of a processor with one in it.

    Args:
        settings: What stands in the file, or what `to_dict` gives.
        where: Named in the message.
        file: Its name.

    Raises:
        UserError: An image would become larger, or more tiles or tokens, than any tower takes.
    """
    inner = settings.get("image_processor")
    kinds = [each.get("image_processor_type") for each in (settings, inner) if isinstance(each, Mapping)]
    areas = any(str(kind).startswith(_BY_PIXELS) for kind in kinds)
    for name, value in _numbers(settings):
        if name in ("max_pixels", "min_pixels") or (areas and name in ("shortest_edge", "longest_edge")):
            limit = "picture_pixels"
        else:
            limit = "picture_tiles" if name in _TILES else "picture_side"
        if value > (most := getattr(limits(), limit)):
            raise UserError(f"{where}: its {file} says {name}: {_more_than(value, most, limit)}.")
        if name in _SIDES and (value < 1 or isinstance(value, float)):
            raise UserError(f"{where}: its {file} says {name}: {value:,}, which is no size.")
    for name, height, width in _areas(settings):
        if height * width > (pixels := limits().picture_pixels):
            raise UserError(
                f"{where}: its {file} says {name}: {height:,} x {width:,}; no model has more than {pixels:,} pixels "
                f"(`limits.picture_pixels`)."
            )


def _more_than(value: float, most: int, limit: str | None) -> str:
    return f"{value:,}; no model has more than {most:,}" + (f" (`limits.{limit}`)" if limit else "")


def _areas(value: object, name: str = "") -> Iterator[tuple[str, float, float]]:
    """(key, height, width) of every rectangle in mappings and lists."""
    if isinstance(value, Mapping):
        height, width = value.get("height"), value.get("width")
        if isinstance(height, int | float) and isinstance(width, int | float):
            yield name, height, width
        for key, entry in value.items():
            yield from _areas(entry, str(key))
    elif isinstance(value, list | tuple):
        if name == "image_grid_pinpoints" and len(value) == 2 and all(isinstance(side, int) for side in value):
            yield name, value[0], value[1]
        for entry in value:
            yield from _areas(entry, name)


def _numbers(value: object, name: str = "") -> Iterator[tuple[str, Any]]:
    """(key, number) of every number in mappings and lists."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _numbers(entry, str(key))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _numbers(entry, name)
    elif isinstance(value, int | float) and not isinstance(value, bool) and (value == value):
        yield name, value


def check_weights(parameters: int, size: int, where: str, buffers: int = 0) -> None:
    """Compares a model made without weights with the files that are to fill it.

    Args:
        parameters: How many it has.
        size: Bytes of the files.
        where: Named in the message.
        buffers: Bytes of its tables, which no file holds.

    Raises:
        UserError: The files hold less than one bit for each parameter, or the tables are larger than the weights.
    """
    if buffers > size + limits().table_bytes:
        raise UserError(
            f"{where}: its config.json asks for tables of {buffers:,} bytes beside weights of {size:,}; no model has "
            f"such."
        )
    if parameters > 8 * size + MEGABYTE:
        raise UserError(
            f"{where}: its config.json describes {parameters:,} parameters, but its weights have {size:,} bytes; is it "
            f"the right checkpoint, and whole?"
        )


def refuse_code(recipe: Recipe, where: str) -> None:
    """Refuses what runs code of others because a recipe alone says so; an override typed by the user is his own word.

    Args:
        recipe: The recipe.
        where: The bundle or file that it is from.

    Raises:
        UserError: It asks for `trust_remote_code`, or for an attention kernel from the Hub.
    """
    for key, piece in pieces_in(recipe).items():
        path = tuple(key.split("."))
        if getattr(piece, "trust_remote_code", False) and not recipe.is_typed((*path, "trust_remote_code")):
            raise UserError(
                f"{where!r} wants to run Python code that {piece.pretrained!r} brings along ({key}.trust_remote_code); "
                f"read that code, then allow it with --trust-remote-code (trust_remote_code=True)."
            )
        kernel = getattr(piece, "attn_implementation", None) or ""
        if "/" in kernel and not recipe.is_typed((*path, "attn_implementation")):
            raise UserError(
                f"{where!r} wants to run the kernel {kernel!r} from the Hub ({key}.attn_implementation); read its "
                f"code, then allow it with --trust-remote-code (trust_remote_code=True)."
            )


def refuse_strange_collator(recipe: Recipe) -> None:
    """Refuses to import the collator of a recipe that came with a bundle, unless its user typed it.

    Raises:
        UserError: It names the class.
    """
    if recipe.strange and not recipe.is_typed(("collator",)):
        raise UserError(
            f"{recipe.where(('collator',))}: `collator` runs the code of {recipe.collator}, and this recipe lies in a "
            f"bundle, which may be a stranger's; read that code, then allow it by typing collator={recipe.collator}."
        )


def refuse_revisions(recipe: Recipe) -> None:
    """Refuses a revision of a folder, which has none: another version than the one asked for would be trained on.

    Raises:
        UserError: A piece that is a folder here has a `revision`.
    """
    for key, piece in pieces_in(recipe).items():
        named = piece.pretrained
        if named and piece.revision and Path(named).exists():
            raise UserError(
                f"{recipe.where((*key.split('.'), 'revision'))}: {named!r} is a folder here and has no revisions; "
                f"remove {key}.revision, or rename the folder to have the Hub's."
            )


def pieces_in(recipe: Recipe) -> dict[str, AnyPiece]:
    """Key → what a recipe says of a base piece: the parts of its stack, or the model that it starts from."""
    pieces = {f"stack.{part}": getattr(recipe.stack, part, None) for part in PARTS}
    pieces |= {name: getattr(recipe, name) for name in WHOLES}
    return {key: piece for key, piece in pieces.items() if piece is not None}
