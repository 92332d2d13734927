"""A stranger's bundle or recipe runs no code, reads nothing outside, and is refused before it fills the memory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from transformers import AutoConfig

from support.bundles import trained
from vlm_sft import load, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.families.build_family import load_processor
from vlm_sft.preflight.preflight import run_preflight
from vlm_sft.recipe.safety import check_config, check_folder, check_length, check_weights, read_json, refuse_code
from vlm_sft.recipe.sections import PretrainedModel
from vlm_sft.stack.build_stack import build_stack
from vlm_sft.train import main

CANARY = "import pathlib; pathlib.Path({path!r}).write_text('it ran')\n"


@pytest.fixture
def bundle(bundle_recipe, tmp_path) -> Path:
    """A bundle with LoRA."""
    trained(bundle_recipe(lora={"r": 2}), tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    """A file that appears when the module `strange` is imported; the module can be found."""
    mark = tmp_path / "ran"
    (tmp_path / "strange.py").write_text(CANARY.format(path=str(mark)), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "strange", raising=False)
    return mark


def change(path: Path, **entries) -> None:
    """Puts entries into a JSON or YAML mapping; `a.b` is `b` within `a`."""
    text = path.read_text(encoding="utf-8")
    content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    for key, value in entries.items():
        here = content
        *parents, last = key.split(".")
        for parent in parents:
            here = here[parent]
        here[last] = value
    path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content), encoding="utf-8")


# -- no code -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer_config.json", "processor_config.json", "config.json"])
def test_code_beside_the_files_of_a_bundle_is_not_run(name, bundle, canary):
    for module in ("strange.py", "modeling_strange.py"):
        (bundle / module).write_text(CANARY.format(path=str(canary)) + "class Strange: pass\n", encoding="utf-8")
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor"), "strange.Strange")
    change(bundle / name, auto_map={**auto, "AutoTokenizer": ["strange.Strange", "strange.Strange"]})
    with contextlib.suppress(UserError):
        load(bundle)
    assert not canary.exists()


def test_a_bundles_collator_is_never_imported(bundle, canary):
    change(bundle / "recipe.yaml", collator="strange:Strange")
    load(bundle)
    assert not canary.exists()


ADAPTERS = {
    "another kind": ({"peft_type": "XLORA", "adapters": {"0": "me/adapter"}}, "is no LoRA adapter"),
    "a module to import": ({"megatron_config": {"a": 1}, "megatron_core": "strange"}, "asks for `megatron_config`"),
    "layers many times": ({"layer_replication": [[0, 2]] * 100}, "asks for `layer_replication`"),
    "a rank that fills the memory": ({"r": 10**9}, r"has the rank 1,000,000,000, but its tensors"),
    "a rank for some": ({"rank_pattern": {"q_proj": 10**9}}, r"has the rank 1,000,000,000, but its tensors"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_that_ask_for_more(name, bundle, canary):
    entries, sentence = ADAPTERS[name]
    change(bundle / "adapter_config.json", **entries)
    with pytest.raises(UserError, match=sentence):
        load(bundle)
    assert not canary.exists()


def test_a_kernel_from_the_hub_is_code(bundle):
    change(bundle / "recipe.yaml", **{"stack.language_model.attn_implementation": "strange/kernel"})
    with pytest.raises(UserError, match=r"wants to run the kernel 'strange/kernel' from the Hub"):
        load(bundle)


def test_options_of_a_models_processor_cannot_allow_code(pieces):
    spec = PretrainedModel(pretrained=pieces["llama"], processor={"trust_remote_code": True})
    config = AutoConfig.for_model("llava")
    with pytest.raises(UserError, match=r"the processor of .* cannot be read: .*multiple values.*'trust_remote_code'"):
        load_processor(spec, config, "", None)


def test_a_recipe_alone_cannot_allow_code_but_its_user_can(recipe_file, capsys):
    path = recipe_file()
    change(path, **{"stack.language_model.trust_remote_code": True})
    for arguments in ([str(path)], [str(path), "--dry-run"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "wants to run Python code that" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"wants to run Python code that"):
        run_preflight(str(path), [])
    main([str(path), "--dry-run", "--trust-remote-code"])
    main([str(path), "stack.language_model.trust_remote_code=true", "--dry-run"])
    refuse_code(load_recipe(path, ["stack.language_model.trust_remote_code=true"]), "it")
    with pytest.raises(UserError, match=r"stack\.language_model\.trust_remote_code"):
        refuse_code(load_recipe(path, ["stack.language_model.revision=main"]), "it")


# -- nothing outside ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["recipe.yaml", "tokenizer.json", "trained.safetensors", "chat_template.jinja"])
def test_links_that_lead_out_of_a_bundle_are_refused(name, bundle, tmp_path):
    (bundle / name).rename(tmp_path / "elsewhere")
    (bundle / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"{name}' leads out of its bundle; put the file itself there"):
        load(bundle)


def test_a_link_to_a_bundle_and_links_within_it_are_fine(bundle, tmp_path):
    (bundle / "tokenizer.json").rename(bundle / "t.json")
    (bundle / "tokenizer.json").symlink_to("t.json")
    (tmp_path / "latest").symlink_to(bundle)
    load(tmp_path / "latest")


def test_a_repository_names_no_path_of_this_machine(bundle, tmp_path):
    fetched = tmp_path / "models--me--it" / "snapshots" / ("0" * 40)
    fetched.parent.mkdir(parents=True)
    bundle.rename(fetched)
    with pytest.raises(UserError, match=r"names a folder of the machine that it was trained on .*stack\.vision_t"):
        load(fetched)


def test_a_repository_may_name_a_folder_below_the_one_you_are_in(bundle, pieces, tmp_path, monkeypatch):
    fetched = tmp_path / "models--me--it" / "snapshots" / ("0" * 40)
    fetched.parent.mkdir(parents=True)
    bundle.rename(fetched)
    here = Path(pieces["llama"]).parents[2]
    monkeypatch.chdir(here)
    for name in ("recipe.yaml", "bundle.json"):
        text = (fetched / name).read_text(encoding="utf-8")
        (fetched / name).write_text(text.replace(f"{here}/", ""), encoding="utf-8")
    load(fetched)


STRANGE_PIECES = {
    "another part": {"language_model.trust_remote_code=true #": {"pretrained": "a", "fingerprint": "b"}},
    "no mapping": ["a"],
    "a number": {"language_model": {"pretrained": 5, "fingerprint": "b"}},
    "nothing": {"language_model": {}},
}


@pytest.mark.parametrize("name", STRANGE_PIECES)
def test_a_manifest_that_says_strange_things(name, bundle):
    change(bundle / "bundle.json", pieces=STRANGE_PIECES[name])
    with pytest.raises(UserError, match="is not what a bundle has; the bundle is not whole"):
        load(bundle)


# -- secrets -----------------------------------------------------------------------------------------------------------


def test_a_recipe_takes_no_secret_from_the_environment(recipe_file, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("DATA_ROOT", "/somewhere")
    path = recipe_file(system="${oc.env:DATA_ROOT}")
    assert load_recipe(path).system == "/somewhere"
    for text in (
        "${oc.env:WANDB_API_KEY}",
        "https://x/?${oc.env:WANDB_API_KEY}",
        "${oc.env:${oc.decode:WANDB_API_KEY}}",
    ):
        path = recipe_file(system=text)
        with pytest.raises(UserError, match="would hold the value of the environment variable WANDB_API_KEY") as caught:
            load_recipe(path)
        assert "0123456789abcdef" not in str(caught.value)


SECRETS = {
    "DATABASE_URL": "postgres://me:hunter22@db/x",
    "GITHUB_PAT": "ghp_" + "a1B2" * 9,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY12",
    "PIN": "4711471147114711",
}


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize(
    "text",
    [
        "system: ${oc.env:NAME}",
        'system: "\\x24{oc.env:NAME}"',
        "generation: {max_new_tokens: '${oc.decode:${oc.env:NAME}}'}",
        "collator_args: '${oc.create:{${oc.env:NAME}: 1}}'",
        "system: '${${oc.env:NAME}}'",
        "system: ${oc.env:${oc.decode:NAME},none}",
    ],
)
def test_a_recipe_reads_no_variable_but_those_of_folders_and_jobs(name, text, recipe_file, monkeypatch):
    """However its name is written, and wherever its value would stand: a value, a number, a key, an error."""
    monkeypatch.setenv(name, SECRETS[name])
    path = Path(recipe_file())
    path.write_text(path.read_text(encoding="utf-8") + text.replace("NAME", name) + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert SECRETS[name] not in str(caught.value)
    assert name in str(caught.value) or "cannot be filled in" in str(caught.value)
    assert "UserError" not in str(caught.value)


def test_a_variable_of_ours_that_is_a_secret_is_none_of_those(recipe_file, monkeypatch):
    monkeypatch.setenv("VLM_SFT_API_KEY", "/serve-key-1234")
    monkeypatch.setenv("VLM_SFT_RUN", "abend")
    assert load_recipe(recipe_file(system="${oc.env:VLM_SFT_RUN}")).system == "abend"
    with pytest.raises(UserError, match="would hold the value of the environment variable VLM_SFT_API_KEY"):
        load_recipe(recipe_file(system="${oc.env:VLM_SFT_API_KEY}"))


def test_the_user_allows_further_variables(recipe_file, monkeypatch):
    monkeypatch.setenv("MY_FOLDER", "/数据")
    with pytest.raises(UserError, match="or set VLM_SFT_RECIPE_ENV=MY_FOLDER"):
        load_recipe(recipe_file(system="${oc.env:MY_FOLDER}"))
    monkeypatch.setenv("VLM_SFT_RECIPE_ENV", "OTHER,MY_FOLDER")
    assert load_recipe(recipe_file(system="${oc.env:MY_FOLDER}")).system == "/数据"
    assert OmegaConf.create({"a": "${oc.env:HOME}", "b": "${oc.env:PATH}"}).b, "what others resolve is as it was"


@pytest.mark.parametrize("secret", [*SECRETS.values(), "AKIA" + "Q" * 16, "xoxb-123456789012-abcdefghijkl"])
def test_no_key_is_typed_into_a_recipe(secret, recipe_file, monkeypatch):
    """The shell has filled it in; the recipe would be saved with it."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS["AWS_SECRET_ACCESS_KEY"])
    monkeypatch.setenv("MY_PASSWORD", SECRETS["PIN"])
    for override in (f"system=see {secret}", f"collator_args={{{secret!r}: 1}}", f"collator_args={{a: [{secret!r}]}}"):
        with pytest.raises(UserError, match="a recipe is saved with the bundle and shared") as caught:
            load_recipe(recipe_file(), [override])
        assert secret not in str(caught.value)


@pytest.mark.parametrize("text", ['"\\x24{oc.env:HOME}"', "{'${oc.env:HOME}': 1}", "[{a: '${sft.seed}'}]"])
def test_a_bundles_recipe_holds_no_interpolation_however_it_is_written(text, bundle):
    recipe = bundle / "recipe.yaml"
    recipe.write_text(f"{recipe.read_text(encoding='utf-8')}\nstrange: {text}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds \$\{…\}, which no saved recipe does"):
        load(bundle)


def test_a_bundles_recipe_is_filled_in_already(bundle, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "/somewhere")
    change(bundle / "recipe.yaml", system="${oc.env:DATA_ROOT}")
    with pytest.raises(UserError, match=r"holds \$\{…\}, which no saved recipe does"):
        load(bundle)


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_texts_that_are_too_large_are_not_read(bundle, tmp_path):
    for name in ("bundle.json", "recipe.yaml", "tokenizer.json", "chat_template.jinja", "adapter_config.json"):
        whole = (bundle / name).read_bytes()
        with open(bundle / name, "r+b") as file:
            file.truncate(300 * 2**20)  # a hole: it takes no room on the disk
        with pytest.raises(UserError, match=rf"{name}' has 314,572,800 bytes, more than the"):
            check_folder(bundle)
        with pytest.raises(UserError, match="more than the"):
            load(bundle)
        (bundle / name).write_bytes(whole)
    (tmp_path / "x").write_bytes(b" " * 300)
    with pytest.raises(UserError, match="has 300 bytes, more than the 299"):
        check_length(tmp_path / "x", 299)


def test_json_within_json_within_json(tmp_path):
    (tmp_path / "bundle.json").write_text("[" * 500_000)
    with pytest.raises(UserError, match=r"bundle\.json' cannot be read: .*; the bundle is not whole"):
        read_json(tmp_path / "bundle.json")


HEADERS = {
    "a header longer than the file": struct.pack("<Q", 2**60) + b"{}",
    "a shape larger than the file": {"w": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}},
    "offsets behind the end": {"w": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}},
    "a product that overflows": {"w": {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 4]}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_tensor_files_that_promise_more_than_they_hold(name, bundle):
    header = HEADERS[name]
    if isinstance(header, dict):
        text = json.dumps(header).encode()
        header = struct.pack("<Q", len(text)) + text + b"\0" * 4
    (bundle / "trained.safetensors").write_bytes(header)
    with pytest.raises(UserError, match=r"trained\.safetensors' is no whole safetensors file"):
        load(bundle)


CONFIGS = {
    "hidden_size": (10**12, r"says hidden_size: 1,000,000,000,000; no model has more than 100,000,000"),
    "num_hidden_layers": (10**6, r"says num_hidden_layers: 1,000,000; no model has more than 1,000"),
    "num_labels": (10**9, r"says num_labels: 1,000,000,000; no model has more than 100,000"),
    "intermediate_size": (10**8, r"describes [\d,]+ parameters, but its weights have [\d,]+ bytes"),
    "vocab_size": (10**8, r"describes [\d,]+ parameters, but its weights have [\d,]+ bytes"),
}


@pytest.mark.parametrize("key", CONFIGS)
def test_a_base_that_would_fill_the_memory(key, stack_recipe, pieces, tmp_path):
    value, sentence = CONFIGS[key]
    base = tmp_path / "base"
    shutil.copytree(pieces["llama"], base)
    change(base / "config.json", **{key: value})
    with pytest.raises(UserError, match=sentence):
        build_stack(stack_recipe(lm=str(base)))


def test_a_tower_that_would_fill_the_memory(stack_recipe, pieces, tmp_path):
    for key, value, sentence in (
        ("vision_config.num_hidden_layers", 10**6, r"says num_hidden_layers: 1,000,000"),
        ("vision_config.image_size", 10**7, r"says image_size: 10,000,000; no model has more than 10,000"),
        ("vision_config.intermediate_size", 10**8, r"describes [\d,]+ parameters, but its weights have [\d,]+ bytes"),
    ):
        base = tmp_path / key
        shutil.copytree(pieces["clip"], base)
        change(base / "config.json", **{key: value})
        with pytest.raises(UserError, match=sentence):
            build_stack(stack_recipe(tower=str(base)))
    base = tmp_path / "pixels"
    shutil.copytree(pieces["clip"], base)
    change(
        base / "preprocessor_config.json", size={"shortest_edge": 10**7}, crop_size={"height": 10**7, "width": 10**7}
    )
    with pytest.raises(
        UserError, match=r"preprocessor_config\.json says \w+: 10,000,000; no model has more than 10,000"
    ):
        build_stack(stack_recipe(tower=str(base)))


def test_what_published_models_say_passes():
    config = {"hidden_size": 16384, "num_hidden_layers": 126, "vocab_size": 262144, "max_position_embeddings": 10**7}
    check_config({**config, "vision_config": {"image_size": [1024, 1024], "depths": [2, 2, 18]}}, "it")
    check_weights(405 * 10**9, 405 * 10**9 // 2, "it")  # in 4 bits
    with pytest.raises(UserError, match=r"it: its config\.json describes"):
        check_weights(405 * 10**9, 10**9, "it")


LETTERS = ("abcdefgh", "bcdefghi")
YAML_BOMBS = {
    "laughs": "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
              + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in zip(*LETTERS, strict=True)),
    "merges": "a: &a {x: 1}\n"
              + "".join(f"{b}: &{b} {{<<: *{a}, y: [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]}}\n"
                        for a, b in zip(*LETTERS, strict=True)),
    "nested": "a: " + "[" * 20_000,
    "a long number": "a: " + "9" * 100_000,
    "long": "a: b\n" * 400_000,
}  # fmt: skip


@pytest.mark.parametrize("name", YAML_BOMBS)
def test_yaml_bombs(name, tmp_path):
    (tmp_path / "recipe.yaml").write_text(YAML_BOMBS[name], encoding="utf-8")
    sentence = r"(has more than 100,000 entries|is nested too deeply|is not YAML|has [\d,]+ bytes, more than)"
    with pytest.raises(UserError, match=sentence):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!binary aGk="]
)
def test_yaml_tags(tag, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"a: {tag}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"is not allowed; a recipe holds plain values only|unknown key"):
        load_recipe(tmp_path / "recipe.yaml")


# -- what is no file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "merges.txt", "qformer_tokenizer/vocab.txt", "recipe.yaml"]
)
def test_a_pipe_in_a_bundle_is_refused_and_not_waited_for(name, bundle):
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).unlink(missing_ok=True)
    os.mkfifo(bundle / name)
    with pytest.raises(UserError, match="is a named pipe"):
        load(bundle)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "spiece.model"])
def test_a_pipe_in_a_base_is_refused_and_not_waited_for(name, pieces, recipe_file, tmp_path):
    base = shutil.copytree(pieces["llama"], tmp_path / "llama")
    (base / name).unlink(missing_ok=True)
    os.mkfifo(base / name)
    with pytest.raises(UserError, match="is a named pipe"):
        build_stack(load_recipe(recipe_file(), [f"stack.language_model.pretrained={base}"]))


def test_a_pipe_as_recipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match="is a named pipe"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("unit", ["[],", "{},", "0,"])
def test_a_file_of_endless_values_is_refused_before_it_is_read(unit, tmp_path):
    path = tmp_path / "special_tokens_map.json"
    path.write_text('{"a": [' + unit * (16_100_000 if unit == "0," else 4_100_000) + "0]}")
    with pytest.raises(UserError, match="cannot be read: it holds more lists, mappings or values than any such file"):
        read_json(path)
