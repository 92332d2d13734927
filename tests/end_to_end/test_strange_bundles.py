"""Bundles and bases as a stranger would make them: what they ask for is refused, and no code of theirs runs."""

from __future__ import annotations

import json
import shutil
import zipfile

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from support.bundles import trained
from support.tiny_pieces import tiny_recipe
from vlm_sft import answer, load, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.base.limits import hold, limits
from vlm_sft.cli import main as cli
from vlm_sft.inference.settings import open_bundle
from vlm_sft.pieces.checkpoints import Checkpoint
from vlm_sft.pieces.load_parts import load_module
from vlm_sft.preflight.preflight import run_preflight
from vlm_sft.stack.build_stack import build_empty_stack
from vlm_sft.stack.lora import add_empty_adapter, lora_config
from vlm_sft.train import main as train_main


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
    with pytest.raises(UserError, match='no generation setting "custom_generate"'):
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


# -- bases -------------------------------------------------------------------------------------------------------------


def refused(bundle, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        load(bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("named", ["/elsewhere", "me/model", "ITSELF"])
def test_a_base_with_an_adapter_beside_it(named, bundle, tmp_path):
    base = other_base(bundle, tmp_path)
    adapter = json.loads((bundle / "adapter_config.json").read_text(encoding="utf-8"))
    adapter |= {"base_model_name_or_path": named, "megatron_config": {"a": 1}, "megatron_core": "strange"}
    (base / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    shutil.copy(bundle / "adapter_model.safetensors", base)
    refused(bundle, r"has an adapter_config\.json beside its weights, which would change them without a word; merge")


def shards(base, where="beside", more=None):
    """Cuts the base's weights into two files and an index, the second one where the index says."""
    state = load_file(base / "model.safetensors")
    names = sorted(state)
    (base / "model.safetensors").unlink()
    parts = {"model-00001.safetensors": names[::2], where: names[1::2]}
    for file, held in parts.items():
        save_file({name: state[name] for name in held} | (more or {}), base / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def test_shards_lie_beside_their_index(bundle, tmp_path):
    base = other_base(bundle, tmp_path)
    shards(base, "model-00002.safetensors")
    load(bundle)
    for named in ("../other.safetensors", str(tmp_path / "other.safetensors"), "a/b.safetensors", ".hidden.safetensors",
                  "weights.pkl", 5):  # fmt: skip
        index = json.loads((base / "model.safetensors.index.json").read_text(encoding="utf-8"))
        edit(base / "model.safetensors.index.json", weight_map=index["weight_map"] | {"model.norm.weight": named})
        refused(bundle, r"names .*, which is no weight file beside it; it is refused")
        edit(base / "model.safetensors.index.json", weight_map=index["weight_map"])


def test_what_a_shard_holds_beside_its_index_would_be_loaded_and_is_refused(bundle, tmp_path):
    base = other_base(bundle, tmp_path)
    shards(base, "model-00002.safetensors", more={"model.norm.weight": torch.full((32,), 9.0)})
    refused(bundle, r"model-0000\d\.safetensors of .* holds 'model\.norm\.weight', which its index does not say")


def as_bin(base, change):
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(change(state), base / "pytorch_model.bin")


BINS = {
    "strides of zero": (
        lambda state: state | {"model.norm.weight": torch.zeros(1).expand(10**12)},
        r"the tensor 'model\.norm\.weight' in .* is larger than what the file holds of it",
    ),
    "sparse": (
        lambda state: state | {"model.norm.weight": torch.sparse_coo_tensor([[0]], [1.0], (10**12,))},
        r"'model\.norm\.weight' in .* is larger than what the file holds of it",
    ),
    "two models": (lambda state: state | {"model": dict(state)}, "holds tensors beside `model`; only one of both"),
}


@pytest.mark.parametrize("name", BINS)
def test_bin_files_hold_what_they_say(name, bundle, tmp_path):
    change, sentence = BINS[name]
    as_bin(other_base(bundle, tmp_path), change)
    refused(bundle, sentence)


def test_a_bin_file_is_no_packed_archive(bundle, tmp_path):
    base = other_base(bundle, tmp_path)
    as_bin(base, lambda state: state)
    load(bundle)
    packed = tmp_path / "packed"
    with zipfile.ZipFile(base / "pytorch_model.bin") as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry) + b" " * 10**6)
    packed.replace(base / "pytorch_model.bin")
    refused(bundle, r"is a packed archive, which torch never writes; it is refused")


LONG = {"type": "Prepend", "prepend": "x" * 10**6}
FILES = {
    "half a quantisation": (
        "config.json",
        {"quantization_config": {"quant_method": "gptq"}},
        "says that its weights are quantised by 'gptq'",
    ),
    "kernels of a quantisation": (
        "config.json",
        {"quantization_config": {"quant_method": "mxfp4", "use_kernels": True}},
        "says that its weights are quantised by 'mxfp4'",
    ),
    "a quantisation of no name": (
        "config.json",
        {"quantization_config": {"quant_method": ["fp8"]}},
        r"says that its weights are quantised by \['fp8'\]",
    ),
    "kernel": (
        "config.json",
        {"attn_implementation": "me/kernel"},
        "says attn_implementation: ",
    ),
    "weights": ("config.json", {"transformers_weights": "other.safetensors"}, "says transformers_weights: "),
    "other config": ("config.json", {"configuration_files": ["config.1.0.0.json"]}, "says configuration_files: "),
    "normalizer": (
        "tokenizer.json",
        {"normalizer": LONG},
        "normalizer of its",
    ),
    "tokenizer": ("tokenizer_config.json", {"sp_model_kwargs": {"model_file": "/x"}}, "says sp_model_kwargs: "),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_a_base_that_ask_for_more(name, bundle, tmp_path):
    file, entries, sentence = FILES[name]
    edit(other_base(bundle, tmp_path) / file, **entries)
    refused(bundle, sentence)


OWN_FILES = {
    "another model": (
        "processor_config.json",
        {"audio_tokenizer": {"audio_tokenizer_class": "EncodecModel", "audio_tokenizer_name_or_path": "/elsewhere"}},
        "says audio_tokenizer: ",
    ),
    "normalizer": (
        "tokenizer.json",
        {"normalizer": LONG},
        "normalizer of its",
    ),
    "tokens": (
        "processor_config.json",
        {"num_image_tokens": 9999},
        "says that an image is 9,999 tokens",
    ),
    "more tokens": ("processor_config.json", {"num_image_tokens": 10**9}, "says num_image_tokens: 1,000,000,000; no"),
    "pixels": (
        "processor_config.json",
        {"image_processor": {"size": {"height": 10**7, "width": 1}}},
        "says height: 10,00",
    ),
}


@pytest.mark.parametrize("name", OWN_FILES)
def test_a_bundles_own_processor_is_looked_at_too(name, bundle):
    file, entries, sentence = OWN_FILES[name]
    edit(bundle / file, **entries)
    refused(bundle, sentence)


def test_tables_that_no_file_holds_are_counted(bundle):
    recipe = yaml.safe_load((bundle / "recipe.yaml").read_text(encoding="utf-8"))
    checkpoint = Checkpoint(recipe["stack"]["language_model"]["pretrained"])
    with torch.device("meta"):
        module = nn.Linear(2, 2)
        module.register_buffer("mask", torch.empty(40_000, 40_000, dtype=torch.bool))
    with pytest.raises(UserError, match=r"asks for tables of 1,600,000,000 bytes beside weights of [\d,]+; no model"):
        load_module(module, checkpoint, torch.float32)


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_takes_memory_for_the_tensors_that_it_has(dora, bundle):
    """One large A among small ones, and a rank as large for every layer: none is made."""
    state = load_file(bundle / "adapter_model.safetensors")
    name = next(name for name in sorted(state) if "lora_A" in name)
    state[name] = torch.zeros(200_000, state[name].shape[1])
    save_file(state, bundle / "adapter_model.safetensors", metadata={"format": "pt"})
    edit(bundle / "adapter_config.json", r=200_000, use_dora=dora)
    made = []
    with pytest.MonkeyPatch.context() as patch:
        plain = torch.zeros_like
        patch.setattr(torch, "zeros_like", lambda like, **kw: made.append(max(like.shape)) or plain(like, **kw))
        refused(bundle, r"adapter_model\.safetensors': tensor .* has the shape")
    assert max(made, default=0) < 200_000


def test_numbers_of_an_adapter_are_numbers(bundle):
    whole = (bundle / "adapter_config.json").read_text(encoding="utf-8")
    for entries in ({"r": "many"}, {"rank_pattern": {"q_proj": "many"}}, {"lora_alpha": [1]}, {"r": -1}):
        edit(bundle / "adapter_config.json", **entries)
        refused(bundle, r"adapter_(config\.json|model\.safetensors)'")
        (bundle / "adapter_config.json").write_text(whole, encoding="utf-8")


def test_a_dry_run_makes_no_adapter(bundle, tmp_path, capsys):
    recipe = yaml.safe_load((bundle / "recipe.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe | {"lora": {"r": 10**9}}), encoding="utf-8")
    with pytest.raises(SystemExit):
        train_main([str(path), "--dry-run"])
    assert "lora.r: the rank 1,000,000,000 is above" in capsys.readouterr().err
    stack = build_empty_stack(load_recipe(path, ["lora={r: 2}"]))
    model = add_empty_adapter(stack.model, lora_config(load_recipe(path, ["lora={r: 2}"]), stack.model))
    assert all(parameter.is_meta for name, parameter in model.named_parameters() if "lora_" in name)


NUMBERS = {
    "stack.vision_tower.image_size": (10**7, r"the recipe says image_size: 10,000,000; no model has more than 10,000"),
    "stack.vision_tower.config": ({"num_hidden_layers": 10**6}, r"num_hidden_layers: 1,000,000; no model has more"),
    "generation": ({"num_beams": 10**6}, r"`num_beams` is 1,000,000, but `limits\.beams` is 64"),
    "limits": ({"beams": 10**6}, None),
    "generation ": ({"num_beams": "9"}, r"`generation\.num_beams` must be a whole number from 1, not '9'"),
    "generation  ": (
        {"stop_strings": ["x" * 500_000]},
        r"`stop_strings` has more than 64 texts of 200 characters",
    ),
    "stack.vision_tower.config ": ({"patch_size": 0}, "no vision tower can be made of its configuration"),
    "stack.vision_tower.image_size ": (9996, r"9,996 x 9,996; no model has more than 16,777,216 pixels"),
}


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_of_a_recipe(key, bundle):
    value, sentence = NUMBERS[key]
    recipe = yaml.safe_load((bundle / "recipe.yaml").read_text(encoding="utf-8"))
    *parents, last = key.strip().split(".")
    here = recipe
    for parent in parents:
        here = here[parent]
    here[last] = value
    (bundle / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    if sentence:
        refused(bundle, sentence)
    else:
        load(bundle)


def test_a_bundle_cannot_raise_its_own_limits(bundle):
    asks = {"generation": {"num_beams": 1000}, "limits": {"beams": 10**6, "cache_tokens": 10**12}}
    edit(bundle / "recipe.yaml", **asks)
    refused(bundle, r"`num_beams` is 1,000, but `limits\.beams` is 64")
    load_recipe(bundle / "recipe.yaml", ["limits.beams=2000"])
    assert (limits().beams, limits().cache_tokens) == (2000, 1_048_576)


def test_a_base_asks_for_no_more_beams_than_a_recipe(bundle, tmp_path):
    base = other_base(bundle, tmp_path)
    (base / "generation_config.json").write_text('{"num_beams": 100000}', encoding="utf-8")
    refused(bundle, r"`num_beams` is 100,000, but `limits\.beams` is 64")


def test_a_thin_picture_in_a_question_is_refused(bundle, tmp_path):
    Image.new("RGB", (1, 100_000)).save(tmp_path / "thin.png")
    model, processor = load(bundle)
    processor.image_processor.size = {"shortest_edge": 336}
    question = [
        {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": [str(tmp_path / "thin.png")]}
    ]
    assert (tmp_path / "thin.png").stat().st_size < 1000
    with pytest.raises(
        UserError, match=r"has 1 x 100,000 pixels, of which the image processor would make 336 x 33,600"
    ):
        answer(model, processor, question)


SETTINGS = {
    "exponential_decay_length_penalty": [1],
    "forced_eos_token_id": True,
    "guidance_scale": 2,
    "prefill_chunk_size": 3,
    "encoder_no_repeat_ngram_size": 10**9,
    "cache_config": "x",
    "cache_implementation": "paged",
    "temperature": 1e-300,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_an_answer_are_judged_before_a_model_is_read(name, bundle, monkeypatch):
    edit(bundle / "recipe.yaml", generation={name: SETTINGS[name]})
    monkeypatch.setattr("vlm_sft.bundle.load.build_stack", pytest.fail)
    with pytest.raises(UserError, match=f"`(generation.)?{name}` (must be|is|reads a prompt)") as caught:
        open_bundle(str(bundle), {})
    assert "\n" not in str(caught.value)


def test_a_cache_of_fixed_length_is_counted_before_it_is_taken(bundle, photos):
    edit(bundle / "recipe.yaml", generation={"cache_implementation": "static", "max_cache_len": 2000})
    hold({"cache_bytes": 10**6})
    question = {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": [photos[0]]}
    model, processor, options = open_bundle(str(bundle), {})
    assert answer(model, processor, [question], **options | {"max_cache_len": 90, "max_new_tokens": 1})
    with pytest.raises(UserError, match=r"`cache_implementation: static` takes 2\.0 MiB before the first token, but"):
        answer(model, processor, [question] * 2, **options)
