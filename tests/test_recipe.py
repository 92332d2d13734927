"""Recipes: read, overridden, checked. Every message is tested by its text, because that is what a user sees."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from vlm_sft.assets import list_recipes, recipe_path
from vlm_sft.errors import UserError
from vlm_sft.recipe import Recipe, build_lora_config, build_sft_config, load_recipe, recipe_schema, validate_libraries
from vlm_sft.yaml_file import YamlFile, dump_yaml

TEXT = """\
# a comment
stack:
  vision_tower: {pretrained: some/tower}
  projector:
    type: linear
  language_model: {pretrained: some/llm}
chat_template: plain
train: {projector: 1e-3}
data:
  train:
    - {path: data/a.jsonl, format: caption, prompts: ["描述这张图片。"]}
    - {path: data/b.jsonl, format: caption}
sft:
  output_dir: outputs/x
  bf16: false
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write(tmp_path, TEXT)


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problem(path: Path, *overrides: str) -> str:
    """The message of the error that a recipe gives, checked against the libraries too."""
    with pytest.raises(UserError) as caught:
        validate_libraries(load_recipe(path, overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("-2e+4", -20000.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("3", 3),
        ("-1", -1),
        ("010", 10),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("'1e-3'", "1e-3"),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("null", None),
        ("", None),
    ],
)
def test_scalars_are_read_as_yaml_1_2(text: str, value: object) -> None:
    got = YamlFile("x", f"key: {text}").resolve()["key"]
    assert got == value
    assert type(got) is type(value)


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)


@example("a\x85b\u2028c")  # line breaks that only Unicode knows
@given(st.recursive(_SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text("abcxyz", min_size=1), inner)))
def test_dump_yaml_reads_back(value: object) -> None:
    assert YamlFile("x", dump_yaml({"key": value})).data == {"key": value}


def test_reading_a_recipe_imports_no_torch() -> None:
    program = (
        "import sys; from vlm_sft.recipe import load_recipe; load_recipe('quickstart_stage1');"
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
    assert "these ship: blip2_opt_stage2," in problem(Path("zzzzzz"))


def test_folder_instead_of_recipe(tmp_path: Path) -> None:
    assert problem(tmp_path) == f"{tmp_path} is a folder; name the recipe's YAML file in it."


def test_bare_name_is_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart_stage1").path == recipe_path("quickstart_stage1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "{path} is empty; a recipe starts with keys like `stack:`."),
        ("- a", "{path} is not a mapping of keys to values; a recipe starts with keys like `stack:`."),
        ("a: 1\nb: [1", "{path}, line 2 is not YAML: expected ',' or ']', but got '<stream end>'."),
        ("a: 1\nb: 2\na: 3", '{path}, line 3 is not YAML: the key "a" is written twice.'),
        (
            "a: 1\nb: !!python/object/apply:os.system [ls]",
            "{path}, line 2: the tag tag:yaml.org,2002:python/object/apply:os.system is not allowed; "
            "a recipe holds plain values only.",
        ),
        ("a: &x [*x]", "{path}, line 1: an alias refers to itself."),
        ("a: 1\n2: b", "{path}, line 2: a key must be a plain word."),
        ("a: ${b.c}", "{path}: \"a\" cannot be filled in: Interpolation key 'b.c' not found."),
        ("a: ???", '{path}: "a" cannot be filled in: Missing mandatory value: a.'),
    ],
)
def test_not_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    assert problem(path) == message.format(path=path)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes("a: 中".encode("gbk"))
    assert problem(path) == f"{path} is not UTF-8 text (byte 3); save it as UTF-8."


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
        "'vqa', 'cauldron', 'coco', 'cc_sbu_align', 'vqav2' or 'gqa', not 'captoin'."
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("b", 'override "b" is not understood; write key.path=value, like sft.max_steps=10.'),
        ("--sft.max_steps=1", 'override "--sft.max_steps=1" is not understood; write key.path=value,'),
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
            'override "zzz=1": unknown key "zzz"; these are valid here: stack, model, init_from, chat_template,',
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


# Rules between keys


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train={}"], "nothing would be trained; name a part under `train` (part: learning rate) or add `lora`."),
        (["train.projecter=1e-3"], 'unknown part "projecter" under `train`; did you mean "projector"?'),
        (["train.xyz=1e-3"], "the parts are vision_tower, resampler, projector, language_model."),
        (["train.projector=0"], "the learning rate of projector must be above zero, not 0; left out, it is frozen."),
        (["train.projector=-1e-3"], "the learning rate of projector must be above zero, not -0.001;"),
        (["train.projector=.inf"], "the learning rate of projector must be above zero, not inf;"),
        (["train.resampler=1e-4"], "`train.resampler` is set but the stack has no resampler; remove it or add one."),
        (
            ["train.language_model=1e-5", "lora={r: 8}"],
            "the language model cannot be trained whole and by LoRA at once; remove `train.language_model` or `lora`.",
        ),
        (["lora.r=0"], "the rank `lora.r` must be above zero, not 0; to do without LoRA, remove `lora`."),
        (["lora.modules_to_save=[projector]"], "to train projector beside LoRA, write `train: {projector: <learning"),
        (["stack.resampler={type: qformer}"], "type qformer needs `pretrained`: the Hub id or folder of a checkpoint"),
        (["stack.projector.depth=3"], "`depth` belongs to a projector of type mlp, not linear."),
        (
            ["stack.projector.scale_factor=4"],
            "`scale_factor` belongs to a projector of type pixel_shuffle, not linear.",
        ),
        (
            ["stack.projector.init=match_embeddings", "stack.projector.pretrained=x"],
            "a pretrained projector is not initialised; remove `init` or `pretrained`.",
        ),
        (["chat_template=zia"], 'there is no chat template "zia"; the closest that ships is "ziya".'),
        (["chat_template=my/own.jinja"], 'the chat template file "my/own.jinja" does not exist'),
        (["data.train.1.name=a"], 'two sources of data.train are called "a"; give one of them another `name`.'),
        (["data.sampling=weights"], '`sampling: weights` needs a `weight` for source "a" too.'),
        (["data.sampling=weights", "data.train.0.weight=1"], 'needs a `weight` for source "b" too.'),
        (["collator=MyCollator"], '`collator` must look like my_package.my_module:MyCollator, not "MyCollator".'),
        (["sft.output_dir=null"], "`sft.output_dir` is missing: the folder that checkpoints and the bundle go to."),
        (["sft.packing=true"], "`sft.packing` cannot be used: rows with images cannot be packed by TRL; remove it."),
        (["sft.padding_free=true"], "`sft.padding_free` cannot be used"),
        (
            ["sft.assistant_only_loss=true"],
            "`sft.assistant_only_loss` cannot be used: the loss is already on the answers",
        ),
        (["sft.completion_only_loss=true"], "`sft.completion_only_loss` cannot be used"),
        (["sft.chat_template_path=x"], "the template is the recipe's own key `chat_template`"),
        (["sft.model_init_kwargs={a: 1}"], "how the parts are loaded is said in `stack`"),
        (["sft.dataset_kwargs={a: 1}"], "rows are read by the sources in `data`"),
        (["sft.remove_unused_columns=true"], "the collator needs the columns `messages` and `images`"),
        (["sft.learning_rate=0"], "`sft.learning_rate` must be a number above zero, not 0."),
        (["sft.learning_rate=fast"], "`sft.learning_rate` must be a number above zero, not 'fast'."),
        (["sft.bf16=true", "sft.fp16=true"], "`sft.bf16` and `sft.fp16` cannot both be true; keep one."),
        (["sft.eval_strategy=steps"], "`sft.eval_strategy` asks for evaluations but `data.eval` has no source."),
    ],
)
def test_rules(recipe_file: Path, overrides: list[str], message: str) -> None:
    assert message in problem(recipe_file, *overrides)


def test_rule_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT + "  packing: true\n")
    assert problem(path).startswith(f"{path}, line 16: `sft.packing` cannot be used")


def test_reserved_keys_may_say_what_they_would_be_anyway(recipe_file: Path) -> None:
    load_recipe(recipe_file, ["sft.packing=false", "sft.chat_template_path=null", "sft.remove_unused_columns=false"])


def test_rules_hold_for_recipes_made_in_python(recipe_file: Path) -> None:
    data = load_recipe(recipe_file).resolved()
    assert Recipe.model_validate(data).where(("train",)) == "the recipe"
    with pytest.raises(ValidationError, match="nothing would be trained"):
        Recipe.model_validate({**data, "train": {}})


# The libraries' own configs


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft.max_step=3", 'override "sft.max_step=3": unknown key "sft.max_step"; did you mean "max_steps"?'),
        ("sft.zzzzzz=3", 'unknown key "sft.zzzzzz"; trl.SFTConfig has nothing like it.'),
        ("sft.max_steps=1e3", 'override "sft.max_steps=1e3": "sft.max_steps" must be a valid integer, not 1000.0.'),
        ("sft.bf16=yes", "\"sft.bf16\" must be a valid boolean, not 'yes'."),
        ("sft.lr_scheduler_type=cosin", "trl.SFTConfig refuses `sft`: cosin is not a valid SchedulerType"),
        ("sft.optim=adam", "trl.SFTConfig refuses `sft`: adam is not a valid OptimizerNames"),
        ("lora.alpha=3", 'override "lora.alpha=3": unknown key "lora.alpha"; did you mean'),
        ("lora.r=x", "\"lora.r\" must be a valid integer, not 'x'."),
        ("lora.bias=some", "\"lora.bias\" must be 'none', 'all' or 'lora_only', not 'some'."),
        ("generation.max_newtokens=4", 'unknown key "generation.max_newtokens"; did you mean "max_new_tokens"?'),
    ],
)
def test_library_keys_and_types(recipe_file: Path, override: str, message: str) -> None:
    assert message in problem(recipe_file, override)


def test_library_key_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT + "  max_step: 3\n")
    assert problem(path) == f'{path}, line 16: unknown key "sft.max_step"; did you mean "max_steps"?'


def test_configs_are_the_libraries_own(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["lora={r: 4, lora_alpha: 8}", "sft.max_steps=3", "sft.save_strategy=no"])
    args, lora = build_sft_config(recipe), build_lora_config(recipe)
    assert (args.max_steps, args.save_strategy, args.remove_unused_columns) == (3, "no", False)
    assert lora is not None
    assert (lora.r, lora.lora_alpha) == (4, 8)
    assert build_lora_config(load_recipe(recipe_file)) is None


def test_resume_may_be_true_or_a_folder(recipe_file: Path) -> None:
    for value in ("true", "outputs/x/checkpoint-3"):
        validate_libraries(load_recipe(recipe_file, [f"sft.resume_from_checkpoint={value}"]))


def test_recipe_for_a_gpu_is_valid_on_a_laptop_but_says_so_when_it_runs(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = load_recipe(recipe_file, ["sft.bf16=true", "sft.tf32=true"])
    validate_libraries(recipe)
    assert recipe.sft["bf16"] is True
    if not torch.backends.cuda.is_built():
        with pytest.raises(UserError, match=r"sft\.bf16=true.*cannot compute in bf16.*set sft\.bf16=false"):
            build_sft_config(recipe)


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


def test_a_token_in_a_recipe_is_refused_and_not_repeated(recipe_file: Path) -> None:
    token = "hf_" + "SecretThatNobodyMaySee"
    with pytest.raises(
        UserError, match=r"`sft\.hub_token` cannot be used: a token does not belong in a file"
    ) as caught:
        load_recipe(recipe_file, [f"sft.hub_token={token}"])
    assert token not in str(caught.value)


@pytest.mark.parametrize("name", ["a/b/c", "me/x y", "../x", "", "me/" + "x" * 97, "https://hf.co/me/x"])
def test_a_repository_that_cannot_be_is_named_with_its_line(recipe_file: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"cannot be a repository of the Hub; write name/repository"):
        load_recipe(recipe_file, [f'hub={{repo_id: "{name}"}}'])


def test_an_unknown_key_of_hub_is_named(recipe_file: Path) -> None:
    with pytest.raises(UserError, match=r'unknown key "hub\.repo"; did you mean "repo_id"\?'):
        load_recipe(recipe_file, ["hub={repo: me/x}"])
    with pytest.raises(UserError, match=r"`sft\.push_to_hub` cannot be used: the bundle is pushed by the recipe's own"):
        load_recipe(recipe_file, ["sft.push_to_hub=true"])
