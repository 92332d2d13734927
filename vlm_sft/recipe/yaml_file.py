"""Reads a YAML file keeping the line of every key, and puts command-line overrides on top of it.

The dialect is YAML 1.2's core schema, as editors check it: `1e-3` is a number, and `no`, `on` and `2024-01-01` are
strings. PyYAML's own dialect (YAML 1.1) reads the first as a string and `save_strategy: no` as false.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from ..base.errors import SECRET_NAME, UserError, find_secrets, without_tokens
from ..base.limits import READERS, limits
from ..base.names import Json
from ..base.whole_files import read_text
from ..base.words import whole_number
from .interpolations import check_expansion

KeyPath = tuple[str | int, ...]

# Environment variables that a recipe may read: it is saved with the bundle and shared, and a stranger's asks for any.
MAY_BE_READ = re.compile(
    r"HOME|PWD|TMPDIR|SCRATCH|WORK|HOSTNAME|HF_HOME|(?:DATA|DATASETS?|IMAGES?|MODELS?|OUTPUTS?|CHECKPOINTS?)(?:_DIR|_ROOT|_HOME|_PATH)?"
    r"|SLURM_(?:JOB_ID|JOB_NAME|ARRAY_TASK_ID|TMPDIR|NNODES|NTASKS)|(?:LOCAL_)?(?:RANK|WORLD_SIZE)|VLM_SFT_\w+"
)
ALLOW = "VLM_SFT_RECIPE_ENV"
"""The environment variable in which the user names further ones, with commas between."""

_HALF = re.compile("[\ud800-\udfff]")
_INT = re.compile(r"^[-+]?[0-9]+$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_NOT_KEYS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float")}
_NOT_VALUES = {f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "binary", "set", "omap", "pairs")}
_OVERRIDE = re.compile(r"^(?P<key>[A-Za-z_][\w-]*(?:\.[\w-]+|\[\d+\])*)=(?P<value>.*)$", re.DOTALL)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    # A recipe holds no dates, bytes and sets, so their tags are refused as unknown ones are.
    yaml_constructors = {tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag not in _NOT_VALUES}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f'the key "{key_node.value}" is written twice', key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


class _Dumper(yaml.SafeDumper):
    """Quotes what either dialect would misread, so that any YAML reader gets the same values back."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Unicode's other line breaks would be read back as a blank; between double quotes they are escaped.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


_FIRST = {"recipe": "stack", "task": "about"}  # what a file starts with


class YamlFile:
    """A YAML mapping, where each of its keys stands, and the overrides put on it.

    Attributes:
        name: what error messages call it, usually its path.
        data: the content; after `resolve()` with interpolations filled in.
    """

    def __init__(self, name: str, text: str, kind: Literal["recipe", "task"] = "recipe") -> None:
        self.name = name
        self.data: dict[Any, Any] = {}
        self._lines: dict[KeyPath, int] = {}
        self._overrides: list[tuple[KeyPath, str]] = []
        self._entries = 0
        loader = None
        try:
            loader = _Loader(text)  # which refuses control characters
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                what = "is empty" if node is None else "is not a mapping of keys to values"
                raise UserError(f"{name} {what}; a {kind} starts with keys like `{_FIRST[kind]}:`.")
            self._note_lines(node, (), [])
            self.data = loader.construct_document(node)
            if any(_HALF.search(text) for text in texts_in(self.data)):
                raise UserError(f"{name} holds half a character (a surrogate without its other half); write it whole.")
        except yaml.YAMLError as error:
            raise UserError(_yaml_sentence(name, error, text, kind)) from error
        except RecursionError as error:
            raise UserError(f"{name} is nested too deeply; it is refused.") from error
        except KeyError as error:  # `!!bool` before another word
            raise UserError(f"{name} is not YAML: {error} is neither true nor false.") from error
        except ValueError as error:  # a number of thousands of digits
            raise error if isinstance(error, UserError) else UserError(f"{name} is not YAML: {error}.") from error
        finally:
            if loader is not None:
                loader.dispose()

    @classmethod
    def read(cls, path: Path, kind: Literal["recipe", "task"] = "recipe") -> YamlFile:
        """Reads a file (UTF-8).

        Raises:
            UserError: it cannot be read, is not YAML (with the line), or is not a mapping.
        """
        try:
            if (size := path.stat().st_size) > (most := limits().recipe_bytes):
                raise UserError(f"{path} has {size:,} bytes, more than the {most:,} that a {kind} may have.")
            text = read_text(path, "utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8, for instance with `iconv -f GB18030 "
                f"-t UTF-8` if it was written as GB18030."
            ) from error
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        return cls(str(path), text, kind)

    def resolve(self, overrides: Sequence[str] = ()) -> Json:
        """Puts the overrides on top, fills in `${...}` and returns plain dicts and lists.

        Args:
            overrides: `key.path=value` each, the value in YAML; a list index is a number (`data.train.0.max_rows=10`).
                A mapping or a list replaces what was there.

        Raises:
            UserError: an override that is not understood or points nowhere, or an interpolation that fails.
        """
        try:
            config = OmegaConf.create(self.data)
            for override in overrides:
                path, value = parse_assignment(override)
                self._overrides.append((path, override))
                self._check_parents(config, path, override)
                OmegaConf.update(config, ".".join(map(str, path)), value, merge=False, force_add=True)
            written = OmegaConf.to_container(config)
            assert isinstance(written, dict)
            check_expansion(written, self.name)
            with _own_environment(self.name):
                resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            if (ours := _own_error(error)) is not None:
                raise ours from error
            sentence = f'{self.name}: "{error.full_key}" cannot be filled in: {_why_unfilled(error)}.'
            raise UserError(sentence) from error
        assert isinstance(resolved, dict)
        if found := next(find_secrets(texts_in(resolved)), None):
            raise UserError(
                f"{self.name} would hold {found[0]}; a recipe is saved with the bundle and shared, so it holds no "
                f"secrets: remove it."
            )
        self.data = {str(key): value for key, value in resolved.items()}
        return self.data

    def is_overridden(self, path: KeyPath) -> bool:
        """Whether an override set this key, or a mapping that it is in."""
        return any(path[: len(key)] == key for key, _ in self._overrides)

    def where(self, path: KeyPath) -> str:
        """Says where a key was set: the override, or file and line (of the closest key above it that is there)."""
        for key, override in reversed(self._overrides):
            if path[: len(key)] == key or (path not in self._lines and key[: len(path)] == path and path):
                return without_tokens(f'override "{override}"')
        for length in range(len(path), 0, -1):
            if path[:length] in self._lines:
                return f"{self.name}, line {self._lines[path[:length]]}"
        return self.name

    def _note_lines(self, node: yaml.Node, path: KeyPath, parents: list[yaml.Node]) -> None:
        self._entries += 1
        if self._entries > READERS.yaml_entries:  # a few lines of aliases of aliases make so many
            raise UserError(f"{self.name} has more than {READERS.yaml_entries:,} entries; it is refused.")
        if any(node is parent for parent in parents):
            raise UserError(f"{self.name}, line {node.start_mark.line + 1}: an alias refers to itself.")
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                if not isinstance(key_node, yaml.ScalarNode) or key_node.tag in _NOT_KEYS:
                    raise UserError(f"{self.name}, line {key_node.start_mark.line + 1}: a key must be a plain word.")
                self._lines[(*path, key_node.value)] = key_node.start_mark.line + 1
                self._note_lines(value_node, (*path, key_node.value), [*parents, node])
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._lines[(*path, index)] = item.start_mark.line + 1
                self._note_lines(item, (*path, index), [*parents, node])

    def _check_parents(self, config: DictConfig, path: KeyPath, override: str) -> None:
        """OmegaConf would quietly replace a number by a mapping, and says of a bad index only its type."""
        here: Any = OmegaConf.to_container(config)
        for depth, key in enumerate(path):
            dotted = ".".join(map(str, path[:depth]))
            if isinstance(here, list):
                if not isinstance(key, int) or key >= len(here):
                    raise UserError(
                        f'override "{override}": "{dotted}" is a list of {len(here)}, so the next part of the key is a '
                        f"number from 0 to {len(here) - 1}."
                    )
                here = here[key]
            elif isinstance(here, dict):
                here = here.get(key)
            elif here is None:
                return
            else:
                raise UserError(f'override "{override}": "{dotted}" is {here!r}, which has no keys below it.')


def texts_in(value: object) -> Iterator[str]:
    """Every text in mappings and lists, keys and numbers too."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield str(key)
            yield from texts_in(entry)
    elif isinstance(value, list):
        yield from (text for entry in value for text in texts_in(entry))
    elif value is not None:
        yield str(value)


@contextmanager
def _own_environment(name: str) -> Iterator[None]:
    """Lets `${oc.env:…}` read what `MAY_BE_READ` names and the user allows, however the name was put together."""

    def read(key: str, *default: Any) -> Any:
        known = MAY_BE_READ.fullmatch(key) and not SECRET_NAME.search(key)
        if not known and key not in os.environ.get(ALLOW, "").split(","):
            raise UserError(
                f"{name} would hold the value of the environment variable {key}; a recipe is saved with the bundle and "
                f"shared, so it reads none but those of folders and jobs: write the value itself, or set {ALLOW}={key}."
            )
        return oc.env(key, *default)

    with _ONE_AT_A_TIME:
        OmegaConf.register_resolver("oc.env", read, replace=True, annotation_validation="off")
        try:
            yield
        finally:
            OmegaConf.register_resolver("oc.env", oc.env, replace=True, annotation_validation="off")


_ONE_AT_A_TIME = RLock()  # what `oc.env` means holds for the whole process


def parse_assignment(text: str) -> tuple[KeyPath, Any]:
    """Splits `key.path=value` into the path (numbers for list indices) and the value read as YAML.

    Raises:
        UserError: there is no `=`, the key is not a dotted path, or the value is not YAML.
    """
    match = _OVERRIDE.match(text)
    if match is None:
        raise UserError(f'override "{text}" is not understood; write key.path=value, like sft.max_steps=10.')
    parts = match["key"].replace("[", ".").replace("]", "").split(".")
    path = tuple(part if (place := whole_number(part)) is None else place for part in parts)
    try:
        return path, yaml.load(match["value"], Loader=_Loader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, ValueError, KeyError, RecursionError) as error:
        raise UserError(f'override "{text}": the value is not YAML; put quotes around it.') from error


def dump_yaml(data: object) -> str:
    """Writes plain dicts and lists as YAML, in their own order, Chinese as it is."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _own_error(error: BaseException | None) -> UserError | None:
    """The error of ours that an error of OmegaConf was made of, perhaps by way of others."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _why_unfilled(error: OmegaConfBaseException) -> str:
    reason = str(error).splitlines()[0]
    if unset := re.search(r"Environment variable '(.+?)' not found", reason):
        return f"the environment variable {unset[1]} is not set; set it, or write a default: ${{oc.env:{unset[1]},…}}"
    if missing := re.search(r"Interpolation key '(.+?)' not found", reason):
        return f"the recipe has no key {missing[1]}; name one that it has, or an environment variable: ${{oc.env:…}}"
    return reason


def _yaml_sentence(name: str, error: yaml.YAMLError, text: str, kind: str) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = f", line {mark.line + 1}" if mark is not None else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if r"'\t'" in problem:
        return f"{name}{line} is not YAML: it holds a tab; use spaces, two for each level."
    tag = re.search(r"constructor for the tag '(?P<tag>[^']+)'", problem)
    if tag:
        return f"{name}{line}: the tag {tag['tag']} is not allowed; a {kind} holds plain values only."
    if mark is not None and (wide := _wide_mark(text.splitlines(), mark.line)):
        return f"{name}, line {wide[0]} is not YAML: it holds the full-width {wide[1]}; write `{_WIDE[wide[1]]}`."
    opened = getattr(error, "context_mark", None)
    if opened is not None and "flow" in (getattr(error, "context", None) or ""):
        problem += f"; the bracket of line {opened.line + 1} may not be closed"
    return f"{name}{line} is not YAML: {problem}."


# What a Chinese input method writes in place of the marks that YAML knows.
_WIDE = {"：": ": ", "，": ", ", "｛": "{", "｝": "}", "［": "[", "］": "]", "【": "[", "】": "]", "“": '"', "”": '"'}


def _wide_mark(lines: list[str], at: int) -> tuple[int, str] | None:
    """The full-width mark nearest above a line that is no YAML: its line, counted from 1, and the mark.

    Looked for in the line and the one before, because YAML notices a missing colon one line later.
    """
    for number in (at, at - 1):
        code = lines[number].partition("#")[0] if 0 <= number < len(lines) else ""
        if found := next((mark for mark in code if mark in _WIDE), None):
            return number + 1, found
    return None
