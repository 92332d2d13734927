"""The page of every key of a recipe, made of the schema."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def recipe_keys(title: str, chinese: bool) -> str:
    """The keys of a recipe as a page, from its schema."""
    schema = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))
    lines = [f"# {title}", ""]
    lines += [
        "由 `recipes/recipe.schema.json` 生成，它与代码一致由测试保证；说明是英文的。怎样使用见[配方](recipes.md)。"
        if chinese
        else "Made from `recipes/recipe.schema.json`, which a test holds equal to the code. How they are used: "
        "[recipes](recipes.md)."
    ]
    heads = ("键", "值", "默认", "说明") if chinese else ("key", "value", "default", "what it does")
    done: set[str] = set()
    queue = [("", schema)]
    while queue:
        prefix, section = queue.pop(0)
        required = section.get("required", ())
        kinds = section.get("properties", {}).get("type", {})
        kind = ", ".join(map(str, kinds.get("enum", [kinds["const"]] if "const" in kinds else [])))
        head = f"## `{prefix}`" if prefix else "## 顶层" if chinese else "## At the top"
        lines += ["", f"{head} ({kind})" if kind else head, ""]
        if prefix and section.get("description"):
            lines += [_one_line(section["description"]), ""]
        lines += ["| " + " | ".join(heads) + " |", "|---|---|---|---|"]
        for key, value in section.get("properties", {}).items():
            path = f"{prefix}.{key}" if prefix else key
            default = "**required**" if key in required else _default(value)
            told = _one_line(value.get("description", ""))
            lines.append(f"| `{key}` | {_kind(value, schema)} | {default} | {told} |")
            for name in _sections(value):
                if name not in done and "properties" in schema["$defs"][name]:
                    done.add(name)
                    queue.append((path, schema["$defs"][name]))
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    text = re.sub(r"docs/(\w+)\.md", r"[\1](\1.md)", " ".join(text.split()))
    return text.replace("|", "\\|")


def _sections(value: object) -> list[str]:
    """The names of the sections that a value of the schema leads to."""
    if isinstance(value, list):
        return [name for each in value for name in _sections(each)]
    if not isinstance(value, dict):
        return []
    own = [value["$ref"].rpartition("/")[2]] if isinstance(value.get("$ref"), str) else []
    return own + [name for key, each in value.items() if key != "default" for name in _sections(each)]


def _kind(value: dict, schema: dict) -> str:
    """What may stand at a key, in words of the table."""
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return "section" if "properties" in schema["$defs"][name] else _kind(schema["$defs"][name], schema)
    for many in ("anyOf", "oneOf"):
        if many in value:
            kinds = [_kind(each, schema) for each in value[many]]
            return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "null"))
    if "enum" in value or "const" in value:
        return ", ".join(f"`{each}`" for each in value.get("enum", [value.get("const")]))
    if value.get("type") == "array":
        return f"list of {_kind(value['items'], schema)}" if "items" in value else "list"
    bounds = [f"{sign} {value[key]:g}" for key, sign in BOUNDS.items() if key in value]
    return " ".join([WORDS.get(value.get("type", ""), value.get("type", "any")), *bounds])


BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
WORDS = {"string": "text", "integer": "whole number", "boolean": "true or false", "object": "keys and values"}


def _default(value: dict) -> str:
    given = value.get("default")
    return "" if given is None or given in ({}, []) else f"`{json.dumps(given, ensure_ascii=False)}`"
