"""Recipes: read, overridden, checked. Every message is tested by its text, because that is what a user sees."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from support.recipe_texts import TEXT, problem, write
from vlm_sft.base.assets import list_recipes, recipe_path
from vlm_sft.recipe.schema import load_recipe, recipe_schema
from vlm_sft.recipe.yaml_file import YamlFile


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write(tmp_path, TEXT)


# Reading


def test_reads_values_defaults_and_chinese(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.path == recipe_file
    assert recipe.stack.resampler is None
    assert recipe.stack.vision_tower.feature_layer == -1
    assert recipe.train == {"projector": 0.001}
    assert recipe.data.train[0].prompts == ["描述这张图片。"]
    assert [source.name for source in recipe.data.train] == ["a", "b"]


def test_resolved_recipe_reads_back_equal(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        recipe_file, ["system=你好：世界", "sft.save_strategy=no", "collator_args={a: '1e-3', b: 1e-5}"]
    )
    text = recipe.to_yaml()
    assert "描述这张图片。" in text
    (tmp_path / "resolved.yaml").write_text(text, encoding="utf-8")
    assert load_recipe(tmp_path / "resolved.yaml").resolved() == recipe.resolved()


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_survives_resolving(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert load_recipe(write(tmp_path, recipe.to_yaml())).resolved() == recipe.resolved()


def test_interpolation_and_overrides(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            "data.train.0.max_rows=10",
            "data.train[1].weight=2.5",
            "sft.learning_rate=${train.projector}",
            "sft.max_steps=7",
            "generation={max_new_tokens: 5}",
            "lora.r=4",
            "system=Answer briefly.",
        ],
    )
    assert recipe.data.train[0].max_rows == 10
    assert recipe.data.train[1].weight == 2.5
    assert recipe.sft["learning_rate"] == 0.001
    assert recipe.sft["output_dir"] == "outputs/x", "a dotted override leaves its neighbours alone"
    assert recipe.lora == {"r": 4}
    assert recipe.system == "Answer briefly."


def test_override_with_a_mapping_replaces_the_old_one(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["train={vision_tower: 1e-5}"])
    assert recipe.train == {"vision_tower": 1e-5}


def test_reading_a_recipe_imports_no_torch() -> None:
    program = (
        "import sys; from vlm_sft.recipe.schema import load_recipe; load_recipe('quickstart_stage1');"
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# A file that is missing or not YAML


def test_missing_recipe_names_the_closest(recipe_file: Path) -> None:
    assert problem(recipe_file.with_name("mina.yaml")) == (
        f"the recipe {recipe_file.with_name('mina.yaml')} does not exist; did you mean {recipe_file}?"
    )
    assert problem(Path("elsewhere/quikstart_stage1.yaml")) == (
        "the recipe elsewhere/quikstart_stage1.yaml does not exist; "
        '"quickstart_stage1" ships with vlm_sft and can be named like that.'
    )
    assert "these ship: blip2_flant5," in problem(Path("zzzzzz"))


def test_folder_instead_of_recipe(tmp_path: Path) -> None:
    assert problem(tmp_path) == f"{tmp_path} is a folder; name the recipe's YAML file in it."


def test_bare_name_is_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart_stage1").path == recipe_path("quickstart_stage1")


# Wrong keys and values: where they stand


def test_unknown_key_names_the_closest_with_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT.replace("    type: linear", "    type: linear\n    dept: 2"))
    assert problem(path) == f'{path}, line 6: unknown key "stack.projector.dept"; did you mean "depth"?'


def test_misspelt_required_key_is_unknown_rather_than_missing(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT.replace("chat_template:", "chat_templat:"))
    assert problem(path) == f'{path}, line 7: unknown key "chat_templat"; did you mean "chat_template"?'


def test_missing_key_names_the_line_of_its_section(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT.replace("{pretrained: some/llm}", "{}"))
    assert problem(path) == f'{path}, line 6: the key "stack.language_model.pretrained" is missing.'
    path = write(tmp_path, TEXT.replace("chat_template: plain\n", ""))
    assert problem(path) == f'{path}: the key "chat_template" is missing.'


@pytest.mark.parametrize("prompts", ["hello", "[1]", "{zh: x}", "{zh: []}"])
def test_prompts_are_lists(tmp_path: Path, prompts: str) -> None:
    message = problem(write(tmp_path, TEXT), f"data.train.0.prompts={prompts}")
    assert '"data.train.0.prompts" must be a list of instructions, or one for each language such as {en:' in message


def test_key_in_a_list_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT.replace("data/b.jsonl, format: caption", "data/b.jsonl, format: captoin"))
    assert problem(path) == (
        f"{path}, line 12: \"data.train.1.format\" must be 'messages', 'llava', 'caption', "
        "'vqa', 'cauldron', 'vcr', 'vcr_q2a', 'vcr_qa2r', 'coco', 'cc_sbu_align', 'vqav2' or 'gqa', not 'captoin'."
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("b", 'override "b" is not understood; write key.path=value, like sft.max_steps=10.'),
        ("--sft.max_steps=1", 'override "--sft.max_steps=1" is not understood; write key.path=value,'),
        ("system=!!int 中", 'override "system=!!int 中": the value is not YAML; put quotes around it.'),
        ("system=[a", 'override "system=[a": the value is not YAML; put quotes around it.'),
        (
            "data.train.2.max_rows=1",
            'override "data.train.2.max_rows=1": "data.train" is a list of 2, so the next part of the key is a number '
            "from 0 to 1.",
        ),
        ("data.train.x.max_rows=1", '"data.train" is a list of 2, so the next part of the key is a number'),
        ("chat_template.x=1", 'override "chat_template.x=1": "chat_template" is \'plain\', which has no keys below'),
        (
            "zzz=1",
            'override "zzz=1": unknown key "zzz"; these are valid here: stack, model, encoder, init_from,',
        ),
        ("data.train.0.max_row=1", 'unknown key "data.train.0.max_row"; did you mean "max_rows"?'),
        ("stack.resampler={type: qformr}", "\"stack.resampler.type\" must be 'qformer',"),
        ("train.projector=true", '"train.projector" must be a valid number, not True.'),
        ("train.projector=fast", "\"train.projector\" must be a valid number, not 'fast'."),
        ("data.train.0.max_rows=0", '"data.train.0.max_rows" must be greater than or equal to 1, not 0.'),
        ("data.train=[]", 'override "data.train=[]": "data.train" must not be empty.'),
        ("init_from=3", '"init_from" must be a valid string, not 3.'),
    ],
)
def test_bad_overrides(recipe_file: Path, override: str, message: str) -> None:
    assert message in problem(recipe_file, override)


# The JSON schema


def test_committed_schema_is_current() -> None:
    committed = json.loads((recipe_path("quickstart_stage1").parent / "recipe.schema.json").read_text(encoding="utf-8"))
    assert committed == recipe_schema(), "run `make schema`"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("chat_template: plain", "chat_templat: plain"),
        ("type: linear", "type: linaer"),
        ("projector: 1e-3", "projecter: 1e-3"),
        ("output_dir: outputs/x", "output: outputs/x"),
    ],
)
def test_schema_catches_what_editors_should_mark(recipe_file: Path, old: str, new: str) -> None:
    jsonschema.validate(YamlFile("x", TEXT).data, recipe_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(YamlFile("x", TEXT.replace(old, new)).data, recipe_schema())


def test_schema_describes_every_key() -> None:
    schema = recipe_schema()
    for definition in (schema, *schema["$defs"].values()):
        for key, value in definition["properties"].items():
            assert value.get("description"), f"{definition['title']}.{key} has no description"
