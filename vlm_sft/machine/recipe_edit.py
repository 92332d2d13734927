"""Keys of a recipe's text set to other values, everything else as it was: comments, order and the way it is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..base.errors import UserError
from ..base.names import Json
from ..base.whole_files import read_text, write_whole
from ..base.words import reason_of

KeyPath = tuple[str, ...]


def set_keys(path: Path, changes: Mapping[KeyPath, Any]) -> None:
    """Writes keys into a recipe's file; a value of None takes the key away.

    Args:
        path: The file, which holds a recipe.
        changes: Path of a key → its value: text, a number, true or false, or a mapping of those.

    Raises:
        UserError: The file says the key through a reference, or cannot be written; it is as before then.
    """
    text = read_text(path)
    wanted = _unshared(yaml.safe_load(text))
    try:
        for key, value in changes.items():
            text = _set(text, key, value, path)
            _put(wanted, key, value)
        done = yaml.safe_load(text)
    except yaml.YAMLError:
        done = None
    if done != wanted:
        raise UserError(f"{path} is written in a way that cannot be changed here; set the keys by hand.")
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({reason_of(error)}); set the keys by hand.") from None


def _unshared(value: object) -> Any:
    """A copy in which what aliases repeat stands for itself each time."""
    if isinstance(value, dict):
        return {key: _unshared(each) for key, each in value.items()}
    return [_unshared(each) for each in value] if isinstance(value, list) else value


def _put(data: Json, key: KeyPath, value: object) -> None:
    for name in key[:-1]:
        data = data.setdefault(name, {})
    if value is None:
        data.pop(key[-1], None)
    else:
        data[key[-1]] = value


def _set(text: str, key: KeyPath, value: object, path: Path) -> str:
    node: Any = yaml.compose(text)
    for depth, name in enumerate(key):
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}: `{'.'.join(key[:depth])}` is no mapping; set `{'.'.join(key)}` by hand.")
        found = next(((k, v) for k, v in node.value if k.value == name), None)
        if found is None:
            rest: Any = value
            for above in reversed(key[depth + 1 :]):
                rest = {above: rest}
            return text if value is None else _insert(text, node, name, rest)
        name_node, node = found
    start, end = name_node.start_mark.index, node.end_mark.index
    if value is None:
        return _removed(text, start, end)
    written = _flow(value)
    if isinstance(node, yaml.ScalarNode) or node.flow_style:
        return text[: node.start_mark.index] + written + text[end:]
    return text[:start] + f"{name}: {written}\n" + text[end:].lstrip("\n")


def _removed(text: str, start: int, end: int) -> str:
    """Without a key: its lines where it stands alone on them, else its place in the braces."""
    line = text.rfind("\n", 0, start) + 1
    if not text[line:start].strip():
        after = text.find("\n", max(start, end - 1))
        return text[:line] + (text[after + 1 :] if after >= 0 else "")
    rest = text[end:].lstrip()
    if rest.startswith(","):
        return text[:start] + rest[1:].lstrip()
    return text[:start].rstrip().removesuffix(",") + text[end:]


def _insert(text: str, node: yaml.MappingNode, name: str, value: object) -> str:
    written = f"{name}: {_flow(value)}"
    if node.flow_style:
        close = node.end_mark.index - 1
        before = text[:close].rstrip()
        comma = "" if before.endswith(("{", ",")) else ","
        return f"{before}{comma}{'' if before.endswith('{') else ' '}{written}{text[close:]}"
    _, last = node.value[-1]
    end = last.end_mark.index
    if not isinstance(last, yaml.ScalarNode) and not last.flow_style:  # the node ends where the next key begins
        end = len(text[:end].rstrip())
    line = text.find("\n", end)
    line = len(text) if line < 0 else line
    indent = " " * node.value[0][0].start_mark.column
    return f"{text[:line]}\n{indent}{written}{text[line:]}"


def _flow(value: object) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
        .strip()
        .removesuffix("...")
        .strip()
    )
