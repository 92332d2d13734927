"""To add a kind is what CONTRIBUTING.md says: a copy of the package gets one of four kinds by its table, and trains."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from support.added_kinds import write_vip_llava
from support.paths import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TABLE = re.search(r"^\| to add a .*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
ROWS = {row.split("|")[1].strip(): row for row in TABLE[1].splitlines()} if TABLE else {}
CODE = re.compile(r"`((?:vlm_sft|chat_templates|recipes)/[\w./]+)`")

GATED = '''class GatedProjector(LinearProjector):
    """One linear layer and a gate of its own width."""

    def __init__(self, in_features: int, out_features: int, start: float) -> None:
        super().__init__(in_features, out_features)
        self.gate = nn.Parameter(torch.full((out_features,), start))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features) * self.gate


PROJECTORS: dict'''
GATED_SECTION = '''class Gated(_Projector):
    """One linear layer and a gate."""

    type: Literal["gated"]
    """One linear layer and a gate."""
    start: float = 1.0
    """Where the gate starts."""


AnyProjector = Gated | '''
RIDDLES = '''def _riddle(row: RowView, draw_prompt: Draw) -> Iterator[Example]:
    """A picture and what it might be: `image`, `hint`, `thing`."""
    asked = [{"type": "image", "text": None}, {"type": "text", "text": row.text(row.need("hint"), "hint")}]
    said = [{"type": "text", "text": row.text(row.need("thing"), "thing")}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    yield Example(messages, row.images("image", "images"))


FORMATS: dict'''
TEMPLATE = """{#-
parrot: nobody's; made by a test.
-#}
{%- for message in messages -%}
    {{- message['role'] + '> ' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}{{- eos_token -}}
        {%- endgeneration -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {{- image_token if part['type'] == 'image' else part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant> ' -}}{%- endif -%}
"""
VIP_LLAVA = 'Family("LlavaProcessor", {"": "vicuna_v1"})'
# What is written into which file; text that is replaced, and what takes its place.
EDITS = {
    "projector": {
        "vlm_sft/model/connectors.py": [
            ("PROJECTORS: dict", GATED),
            ('    "linear": LinearProjector,\n', '    "linear": LinearProjector,\n    "gated": GatedProjector,\n'),
        ],
        "vlm_sft/recipe/sections.py": [("AnyProjector = ", GATED_SECTION)],
    },
    "chat template": {"chat_templates/parrot.jinja": [("", TEMPLATE)]},
    "format": {
        "vlm_sft/rows/formats.py": [
            ("FORMATS: dict", RIDDLES),
            ('    "vqa": _VQA,\n', '    "vqa": _VQA,\n    "riddle": Format(_riddle, ("image", "hint", "thing")),\n'),
        ],
        "vlm_sft/recipe/sections.py": [('"vqa", "cauldron"', '"vqa", "riddle", "cauldron"')],
    },
    "family of existing VLMs": {
        "vlm_sft/families/table.py": [('    "llava": Family(', f'    "vipllava": {VIP_LLAVA},\n    "llava": Family(')]
    },
}


def test_the_table_is_there():
    assert set(EDITS) < set(ROWS) and len(ROWS) > 8


@pytest.mark.parametrize("kind", ROWS)
def test_files_and_names_of_the_table_are_there(kind):
    _, _, file, rest, _ = ROWS[kind].split("|")
    for cell in (file, rest):
        places = [path for path in re.findall(r"`([\w.]+/[\w./]*)`", cell) if "NAME" not in path]
        assert all((ROOT / path).exists() for path in places)
        said = "".join((ROOT / path).read_text(encoding="utf-8") for path in places if path.endswith(".py"))
        for name in re.findall(r"`([A-Z]\w+)`", cell):
            assert re.search(rf"^(?:class )?{name}\b", said, re.MULTILINE), name


@pytest.mark.parametrize("kind", EDITS)
def test_no_other_file_is_needed(kind):
    """What the test below writes is what the row says, and the first cell's file is among it."""
    named = {path.replace("NAME", "parrot") for path in CODE.findall(ROWS[kind])}
    first = CODE.findall(ROWS[kind].split("|")[2])[0].replace("NAME", "parrot")
    assert first in EDITS[kind] and set(EDITS[kind]) <= named


@pytest.fixture
def copy(tmp_path):
    """The package with what ships beside it, and a function that adds a kind to it."""
    root = tmp_path / "checkout"
    for folder in ("vlm_sft", "chat_templates", "recipes"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for edits in EDITS.values():
        for path, changes in edits.items():
            file = root / path
            text = file.read_text(encoding="utf-8") if file.exists() else ""
            for before, after in changes:
                assert text.count(before) == 1 or not before, f"{path}: {before}"
                text = text.replace(before, after, 1)
            file.write_text(text, encoding="utf-8")
    return root


@pytest.mark.slow
def test_four_kinds_added_by_the_table_train_and_answer(copy, recipe_file, pieces, photos, tmp_path):
    lines = [{"image": path, "hint": f"猜猜看 {n}", "thing": f"a {n}"} for n, path in enumerate(photos)]
    riddles = tmp_path / "riddles.jsonl"
    riddles.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    data = {"train": [{"path": str(riddles), "format": "riddle"}]}
    new = recipe_file("stack", chat_template="parrot", data=data)
    recipe = yaml.safe_load(new.read_text(encoding="utf-8"))
    recipe["stack"]["projector"] = {"type": "gated", "start": 0.5}
    new.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    family = recipe_file("family", data=data, lora={"r": 2})
    recipe = {**yaml.safe_load(family.read_text(encoding="utf-8")), "model": {"pretrained": write_vip_llava(tmp_path)}}
    recipe["sft"]["max_length"] = 512
    family.write_text(yaml.safe_dump({k: v for k, v in recipe.items() if k not in ("stack", "chat_template")}))
    done = subprocess.run(
        [sys.executable, "-m", "support.added_kinds", str(new), str(family), photos[0]],
        env={**os.environ, "PYTHONPATH": f"{copy}{os.pathsep}{ROOT / 'tests'}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    composed, existing = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    assert composed == {
        "package": str(copy / "vlm_sft"),
        "projector": "GatedProjector",
        "moved": ["model.projector.gate", "model.projector.linear.bias", "model.projector.linear.weight"],
        "learned": "a 0</s>",
    }
    assert existing["projector"] == "VipLlavaMultiModalProjector" and existing["learned"] == " a 0</s>"
    assert existing["moved"] and all("projector" in name or ".lora_" in name for name in existing["moved"])


@pytest.mark.slow
def test_the_schema_for_editors_follows(copy):
    program = [sys.executable, "-m", "vlm_sft.recipe.schema"]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    schema = subprocess.run(program, env=environment, cwd=copy, capture_output=True, text=True, check=True).stdout
    for kind in ("gated", "riddle"):
        assert f'"{kind}"' in schema
        assert f'"{kind}"' not in (ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8")
