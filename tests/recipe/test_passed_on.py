"""Only judged names with plain values reach a library, whoever wrote the recipe."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from support.recipe_texts import TEXT, write
from vlm_sft.base.errors import UserError
from vlm_sft.recipe.libraries import build_lora_config, build_sft_config, validate_libraries
from vlm_sft.recipe.library_names import PASSED_ON
from vlm_sft.recipe.passed_on import flaw, names_that_pass
from vlm_sft.recipe.schema import load_recipe

REFUSED = {
    "generation={custom_generate: strange, trust_remote_code: true}": 'unknown key "generation.custom_generate"',
    "generation={trust_remote_code: true}": 'unknown key "generation.trust_remote_code"',
    "generation={assistant_model: me/model}": 'unknown key "generation.assistant_model"',
    "generation={logits_processor: [a.b]}": 'unknown key "generation.logits_processor"',
    "generation={_from_model_config: true}": "`generation._from_model_config` cannot be used",
    "generation={penalty_alpha: 0.6, top_k: 4}": "fetches the code for it from the Hub",
    "generation={compile_config: {backend: a.b}}": "it names code that compiles",
    "generation={temperature: {auto_map: a.b}}": "`generation.temperature` takes no mapping",
    "generation={stop_strings: [{a: b}]}": "takes numbers and words",
    "generation={cache_config: {backend: hqq, config: a.b}}": 'unknown key "generation.cache_config.config"',
    "lora={auto_mapping: {base_model_class: X, parent_library: strange}}": "it names a module to import",
    "lora={megatron_core: strange}": "it names a module to import",
    "lora={corda_config: {cache_file: /tmp/x}}": "weights that a bundle does not hold",
    "lora={rank_pattern: {q_proj: {auto_map: a.b}}}": "takes numbers and words",
    "lora={r: {a: b}}": "`lora.r` takes no mapping",
    "sft.trust_remote_code=true": "code that a piece brings is allowed at that piece",
    "sft.gradient_checkpointing_kwargs={context_fn: a.b}": 'unknown key "sft.gradient_checkpointing_kwargs.context_fn"',
    "sft.lr_scheduler_kwargs={a: {b: c}}": "takes numbers and words",
    "quantization={load_in_4bit: true, device_map: auto}": 'unknown key "quantization.device_map"',
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_is_on_no_list_is_refused_when_a_recipe_is_read(override, tmp_path):
    with pytest.raises(UserError, match=r"^override ") as caught:
        load_recipe(write(tmp_path, TEXT), [override, *(["lora={r: 2}"] if "quant" in override else [])])
    assert REFUSED[override] in str(caught.value) and "\n" not in str(caught.value)


PROCESSOR = {
    "subfolder: elsewhere": 'unknown key "model.processor.subfolder"',
    "tokenizer_file: /etc/passwd": 'unknown key "model.processor.tokenizer_file"',
    "trust_remote_code: true": 'unknown key "model.processor.trust_remote_code"',
    "cache_dir: /tmp": 'unknown key "model.processor.cache_dir"',
    "chat_template: x": 'unknown key "model.processor.chat_template"',
    "size: {height: {a: 1}}": "takes numbers and words",
    "size: {auto_map: 1}": 'unknown key "model.processor.size.auto_map"',
}


@pytest.mark.parametrize("entry", PROCESSOR)
def test_a_processor_gets_settings_alone(entry, tmp_path):
    recipe = yaml.safe_load(TEXT)
    del recipe["stack"]
    recipe["train"] = {"projector": 1e-3}
    recipe["model"] = {"pretrained": "org/model", "processor": yaml.safe_load(entry)}
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, yaml.safe_dump(recipe)))
    assert PROCESSOR[entry] in str(caught.value)


def test_what_a_user_may_say_passes(tmp_path):
    path = write(tmp_path, TEXT)
    validate_libraries(load_recipe(path, ["sft.report_to=none", "sft.accelerator_config={split_batches: false}"]))
    load_recipe(path, ["sft.loss_type=nll", "sft.packing=false", "lora={r: 4, rank_pattern: {q_proj: 8}}"])
    load_recipe(path, ["generation={num_beams: 4, bad_words_ids: [[1, 2], [3]], watermarking_config: {bias: 2.0}}"])
    with pytest.raises(UserError, match=r'"generation.max_newtokens"; did you mean "max_new_tokens"\?'):
        load_recipe(path, ["generation={max_newtokens: 3}"])


SPECIAL = ["custom_generate", "trust_remote_code", "auto_map", "token", "subfolder", "用", "__class__", "validate"]
WORDS = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=24) | st.sampled_from(SPECIAL)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(PASSED_ON)), WORDS, VALUES)
def test_no_other_name_and_no_nested_mapping_ever_passes(section, name, value):
    passed_on = PASSED_ON[section]
    mapping = {section: {name: value}}
    recipe = SimpleNamespace(
        **{key: mapping.get(key) for key in ("sft", "lora", "quantization", "generation")},
        model=SimpleNamespace(processor=mapping.get("model.processor", {})),
    )
    passes = not list(names_that_pass(recipe))
    assert passes == (flaw(passed_on, name, value) is None)
    if passes:
        assert name in passed_on.names
        if name not in {*passed_on.own, *passed_on.never} and isinstance(value, dict):
            assert name in passed_on.mappings
            assert not any(isinstance(entry, dict) for entry in value.values())


OWN = {
    "sft": {"report_to": "wandb"},
    "sft ": {"report_to": ["tensorboard", "wandb"]},
    "sft  ": {"resume_from_checkpoint": "elsewhere"},
    "sft   ": {"accelerator_config": "/etc/passwd"},
    "sft    ": {"torch_compile_backend": "strange"},
    "sft     ": {"output_dir": "/etc/cron.d"},
    "sft      ": {"output_dir": "out/../../elsewhere"},
    "lora": {"r": 2, "base_model_name_or_path": "/elsewhere"},
}


@pytest.mark.parametrize("key", OWN)
def test_only_the_users_own_recipe_names_files_servers_and_code(key, tmp_path):
    section, given = key.strip(), OWN[key]
    recipe = yaml.safe_load(TEXT)
    recipe[section] = {**recipe.get(section, {}), "bf16": False, **given} if section == "sft" else given
    build = build_sft_config if section == "sft" else build_lora_config
    recipe.pop("quantization", None)
    path = write(tmp_path, yaml.safe_dump(recipe))
    assert not load_recipe(path).strange
    if section == "lora":
        build(load_recipe(path))
    (tmp_path / "bundle.json").write_text("{}")
    name = list(given)[-1]
    with pytest.raises(UserError, match=rf"`{section}\.{name}` names .*in a bundle, which may be a stranger's"):
        build(load_recipe(path))
    if section == "lora":
        build(load_recipe(path, [f"{section}.{name}={given[name]}"]))


def test_a_recipe_of_a_bundle_may_keep_what_names_nothing(tmp_path):
    (tmp_path / "bundle.json").write_text("{}")
    path = write(tmp_path, TEXT)
    overrides = ["sft.bf16=false", "sft.report_to=[tensorboard]"]
    assert load_recipe(path, overrides).strange
    build_sft_config(load_recipe(path, overrides))
