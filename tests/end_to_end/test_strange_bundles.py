"""Bundles and bases as a stranger would make them: what they ask for is refused, and no code of theirs runs."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from typer.testing import CliRunner

from support.bundles import trained
from support.tiny_pieces import tiny_recipe
from vlm_sft import answer, load, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.cli import main as cli
from vlm_sft.inference.settings import open_bundle
from vlm_sft.preflight.preflight import run_preflight


def edit(path, **entries):
    """Puts entries into a JSON or YAML mapping."""
    read, dump = (json.loads, json.dumps) if path.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    content = read(path.read_text(encoding="utf-8")) | entries
    path.write_text(dump(content), encoding="utf-8")


@pytest.fixture(scope="module")
def whole(pieces, caption_file, tmp_path_factory):
    """A bundle with LoRA; never changed."""
    folder = tmp_path_factory.mktemp("whole")
    captions = {"path": caption_file, "format": "caption"}
    recipe = tiny_recipe(
        pieces, caption_file, folder / "out", lora={"r": 2}, data={"train": [captions], "test": [captions]}
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    trained(load_recipe(folder / "recipe.yaml"), folder / "bundle")
    return folder / "bundle"


@pytest.fixture
def bundle(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def code(tmp_path):
    """A repository with code for `generate`, and the file that appears when it is imported."""
    (tmp_path / "repo" / "custom_generate").mkdir(parents=True)
    mark = tmp_path / "ran"
    text = f"open({str(mark)!r}, 'w').close()\ndef generate(model, **inputs):\n    return inputs['input_ids']\n"
    (tmp_path / "repo" / "custom_generate" / "generate.py").write_text(text, encoding="utf-8")
    return tmp_path / "repo", mark


COMMANDS = {
    "chat": ["chat", "BUNDLE", "这是什么？", "--image", "PHOTO"],
    "generate": ["generate", "BUNDLE", "QUESTIONS", "--output", "OUT"],
    "evaluate": ["evaluate", "BUNDLE"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bundle_cannot_bring_its_own_generate(command, bundle, code, photos, tmp_path):
    repo, mark = code
    row = {"id": 1, "question": "what?", "image": photos[0]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    edit(bundle / "recipe.yaml", generation={"custom_generate": str(repo), "trust_remote_code": True})
    places = {"BUNDLE": bundle, "QUESTIONS": tmp_path / "questions.jsonl", "OUT": tmp_path / "out", "PHOTO": photos[0]}
    result = CliRunner().invoke(cli.app, [str(places.get(word, word)) for word in COMMANDS[command]])
    assert result.exit_code != 0 and not mark.exists()
    assert 'unknown key "generation.custom_generate"' in f"{result.output}{result.exception}"


def test_python_hands_on_no_code_that_a_file_could_name(bundle, code, photos):
    repo, mark = code
    model, processor, _ = open_bundle(str(bundle), {})
    question = [{"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": [photos[0]]}]
    with pytest.raises(UserError, match="generation has no setting 'custom_generate'"):
        answer(model, processor, question, custom_generate=str(repo), trust_remote_code=True)
    assert not mark.exists()


ADAPTERS = {
    "auto_mapping": {"base_model_class": "X", "parent_library": "strange"},
    "corda_config": {"cache_file": "/elsewhere"},
    "arrow_config": {"task_adapter_names": ["me/adapter"]},
    "velora_config": {"num_groups": {"auto_map": 1}},
    "r": {"auto_map": 1},
    "use_something_new": True,
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_asks_for_what_is_listed_alone(name, bundle):
    edit(bundle / "adapter_config.json", **{name: ADAPTERS[name]})
    with pytest.raises(UserError, match=rf"adapter_config\.json' asks for `{name}`, which is refused: "):
        load(bundle)


def other_base(bundle, tmp_path, part="language_model"):
    """A copy of a base of the bundle that the bundle names in place of the first."""
    recipe = yaml.safe_load((bundle / "recipe.yaml").read_text(encoding="utf-8"))
    named = recipe["stack"][part]["pretrained"]
    shutil.copytree(named, tmp_path / "base")
    for name in ("recipe.yaml", "bundle.json"):
        text = (bundle / name).read_text(encoding="utf-8")
        (bundle / name).write_text(text.replace(named, str(tmp_path / "base")), encoding="utf-8")
    return tmp_path / "base"


BASE_SETTINGS = {
    "penalty_alpha": (0.6, "`penalty_alpha` cannot be used: transformers fetches the code for it from the Hub"),
    "constraints": ([1], "`constraints` cannot be used: transformers fetches the code"),
    "cache_config": ({"config": "a.b"}, 'unknown key "cache_config.config"'),
    "temperature": ({"auto_map": "a.b"}, "`temperature` takes no mapping"),
}


@pytest.mark.parametrize("name", BASE_SETTINGS)
def test_a_base_says_for_generating_what_a_recipe_may(name, bundle, tmp_path):
    value, sentence = BASE_SETTINGS[name]
    base = other_base(bundle, tmp_path)
    (base / "generation_config.json").write_text(json.dumps({name: value}), encoding="utf-8")
    with pytest.raises(UserError, match=r"its generation_config\.json is refused: ") as caught:
        load(bundle)
    assert sentence in str(caught.value)


def test_settings_of_a_bases_own_code_are_not_handed_on(bundle, code, tmp_path):
    base = other_base(bundle, tmp_path)
    settings = {"custom_generate": str(code[0]), "chat_format": "chatml", "num_beam_groups": 1, "top_p": 0.5}
    (base / "generation_config.json").write_text(json.dumps(settings | {"do_sample": True}), encoding="utf-8")
    model, _ = load(bundle)
    kept = vars(model.get_base_model().generation_config)
    assert kept["top_p"] == 0.5 and kept["num_beam_groups"] is None
    assert not {"custom_generate", "chat_format"} & kept.keys()


SIZES = {
    "_attn_implementation": "me/kernel",
    "auto_map": {"AutoModel": "a.B"},
    "dtype": "float64",
    "architectures": ["X"],
    "to_dict": 1,
    "num_hidden_layers": {"a": 1},
}


@pytest.mark.parametrize("name", SIZES)
def test_what_a_recipe_states_of_a_part_is_its_sizes(name, bundle):
    recipe = yaml.safe_load((bundle / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["stack"]["vision_tower"]["config"] = {name: SIZES[name]}
    (bundle / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.raises(UserError, match=rf"stack\.vision_tower\.config: .*{name}"):
        load(bundle)


def test_the_collator_of_a_bundles_recipe_is_imported_when_its_user_types_it(bundle, tmp_path, monkeypatch, capsys):
    mark = tmp_path / "ran"
    (tmp_path / "strange.py").write_text(f"open({str(mark)!r}, 'w').close()\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(bundle / "recipe.yaml", collator="strange:Strange")
    path = str(bundle / "recipe.yaml")
    with pytest.raises(UserError, match=r"runs the code of strange:Strange, and this recipe lies in a bundle"):
        run_preflight(path, ["sft.output_dir=out"])
    assert not mark.exists()
    with pytest.raises(UserError, match="strange"):
        run_preflight(path, ["collator=strange:Strange", "sft.output_dir=out"])
    assert mark.exists()
