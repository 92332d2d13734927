"""A recipe's collator and trainer: what the recipe says reaches them, and what it cannot have is one sentence."""

from __future__ import annotations

import math
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from support.bundles import log, weights
from support.conversations import make_processor
from support.tiny_pieces import tiny_stack
from vlm_sft import MultimodalCollator, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.recipe.libraries import build_sft_config
from vlm_sft.stack.build_stack import build_stack
from vlm_sft.train import train
from vlm_sft.training.build_trainer import (
    build_collator,
    compile_language_model,
    load_collator_class,
    use_liger_kernels,
)


class Louder(MultimodalCollator):
    """A collator with an argument of its own."""

    def __init__(self, processor, volume, **options):
        super().__init__(processor, **options)
        self.volume = volume


def test_urls_are_fetched_only_where_a_source_allows_it(recipe_file, caption_file, tmp_path):
    def fetch_of(**source):
        data = {"train": [{"path": caption_file, "format": "caption", **source}], "url_cache": str(tmp_path / "kept")}
        recipe = load_recipe(recipe_file(data=data))
        return build_collator(recipe, make_processor("plain"), build_sft_config(recipe)).fetch

    assert fetch_of() is None
    assert fetch_of(allow_urls=True).folder == tmp_path / "kept"


def test_a_collator_of_ones_own_gets_its_arguments_and_the_recipes(recipe_file):
    recipe = load_recipe(
        recipe_file(collator=f"{__name__}:Louder", collator_args={"volume": 11}), ["data.max_rejected=0.1"]
    )
    collator = build_collator(recipe, make_processor("plain"), build_sft_config(recipe))
    assert type(collator).__name__ == "Louder" and collator.volume == 11
    assert collator.max_length == recipe.sft["max_length"] and collator.drop_rejected


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"collator": f"{__name__}:Louder"}, r"collator_args: Louder does not take them: .*'volume'"),
        ({"collator_args": {"loud": 1}}, r"collator_args: MultimodalCollator does not take them: .*'loud'"),
        ({"collator": f"{__name__}:Gone"}, r"collator: the module .* has no 'Gone'\."),
        ({"collator": "json:JSONDecoder"}, r"collator: 'json:JSONDecoder' is not a subclass of vlm_sft"),
    ],
)
def test_a_collator_that_cannot_be_made_is_one_sentence(recipe_file, changes, sentence):
    recipe = load_recipe(recipe_file(**changes))
    with pytest.raises(UserError, match=sentence):
        build_collator(recipe, make_processor("plain"), build_sft_config(recipe))


def test_a_users_class_is_found_by_name():
    assert load_collator_class("vlm_sft.batch.collator:MultimodalCollator") is MultimodalCollator
    for path, sentence in (
        ("no_such_module:X", "cannot be imported"),
        ("vlm_sft.batch.collator:Nothing", "has no 'Nothing'"),
        ("vlm_sft.batch.collator:Sample", "not a subclass"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_collator_class(path)


def test_ligers_kernels_reach_the_language_model_inside_a_stack_or_a_sentence_says_why_not(stack_recipe, monkeypatch):
    """Liger itself needs a GPU: what it is called with is looked at."""
    calls, said = [], []
    there = {name: ModuleType(name) for name in ("liger_kernel", "liger_kernel.transformers")}
    patches = ModuleType("liger_kernel.transformers.monkey_patch")
    there["liger_kernel.transformers"]._apply_liger_kernel_to_instance = lambda **given: calls.append(given)
    for name, module in {**there, patches.__name__: patches}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    model = build_stack(stack_recipe("clip")).model
    kind = model.model.language_model.config.model_type
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {kind: None}
    args = SimpleNamespace(
        use_liger_kernel=True,
        device=torch.device("cuda"),
        liger_kernel_config={"rope": False, "cross_entropy": True},
    )
    use_liger_kernels(model, args, said.append)
    (call,) = calls
    assert call.pop("model") is model.model.language_model and not said
    assert call == {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {}
    use_liger_kernels(model, args, said.append)
    assert len(calls) == 1 and f"no kernels for a {kind} language model" in said[0]
    with pytest.raises(UserError, match="for a GPU, and this run is on a CPU"):
        use_liger_kernels(model, SimpleNamespace(use_liger_kernel=True, device=torch.device("cpu")), said.append)
    use_liger_kernels(model, SimpleNamespace(use_liger_kernel=False), said.append)
    assert len(calls) == len(said) == 1


@pytest.mark.parametrize("packing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_with_compiled_layers_is_the_run_without(recipe_file, tmp_path, monkeypatch, capsys, packing):
    monkeypatch.setattr("vlm_sft.bundle.parity.check_parity", lambda *args: {"positions": 0, "max_difference": 0.0})
    recipe = recipe_file(lora={"r": 2}, chat_template="ziya")
    usual = [f"sft.packing={packing}", "sft.max_steps=2", "sft.max_length=48", "sft.activation_checkpointing=true"]

    def run(name, *more):
        folder = train(load_recipe(recipe, [f"sft.output_dir={tmp_path / name}", *usual, *more]))
        return weights(folder), [row["loss"] for row in log(folder) if "loss" in row]

    alone, losses = run("alone")
    torch._dynamo.reset()
    counters.clear()
    compiled, theirs = run("compiled", "sft.torch_compile=true", "sft.torch_compile_backend=eager")
    assert "sft.torch_compile: LlamaDecoderLayer compiled when first used" in " ".join(capsys.readouterr().err.split())
    assert theirs == pytest.approx(losses, rel=1e-5) and alone.keys() == compiled.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(compiled[name], tensor, atol=2e-5, rtol=0)
    # With a mask, without and of one row, each with a first layer and others; packed ones break around their attention.
    assert 0 < counters["stats"]["unique_graphs"] <= 12


def test_a_run_reads_every_weight_of_its_pieces_once(recipe_file, pieces, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_sft.bundle.parity.check_parity", lambda *args: {"positions": 0, "max_difference": 0.0})
    shards = tmp_path / "shards"
    shutil.copytree(pieces["llama"], shards, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(pieces["llama"]).save_pretrained(shards, max_shard_size="50KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    read: Counter[tuple[str, str]] = Counter()
    sizes = {}

    class Slice:
        """Counts the numbers that are taken."""

        def __init__(self, whole, name):
            self.whole, self.name = whole, name

        def __getitem__(self, places):
            found = self.whole[places]
            read[self.name] += found.numel()
            return found

        def __getattr__(self, name):
            return getattr(self.whole, name)

    class Counted:
        """A file of weights that counts likewise."""

        def __init__(self, path, *args, **options):
            self.path, self.file = str(path), safe_open(path, *args, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *ended):
            return self.file.__exit__(*ended)

        def get_tensor(self, name):
            found = self.file.get_tensor(name)
            read[Path(self.path).name, name] += found.numel()
            return found

        def get_slice(self, name):
            whole = self.file.get_slice(name)
            sizes[Path(self.path).name, name] = math.prod(whole.get_shape()) * (whole.get_shape()[0] > 1)
            return Slice(whole, (Path(self.path).name, name))

        def __getattr__(self, name):
            return getattr(self.file, name)

    for module in ("vlm_sft.pieces.checkpoints", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.safe_open", Counted)
    stack = tiny_stack({**pieces, "llama": str(shards)})
    train(load_recipe(recipe_file(stack=stack), ["sft.max_steps=1", f"sft.output_dir={tmp_path / 'out'}"]))
    language = {key: size for key, size in sizes.items() if key[0].startswith("model-0")}
    assert len({file for file, _ in language}) > 2 and sum(language.values()) > 30_000
    for key, size in sizes.items():
        if size > 256:  # beside it, the first row of each is looked at to tell checkpoints apart
            assert read[key] < 1.5 * size, f"{key}: {read[key]:,} numbers read of {size:,}"


def test_without_a_compiler_one_sentence_says_so(monkeypatch):
    args = SimpleNamespace(torch_compile=True, torch_compile_backend="inductor", torch_compile_mode=None,
                           device=torch.device("cpu"))  # fmt: skip
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(
        UserError, match=r"sft.torch_compile: torch compiles with a C\+\+ compiler \(g\+\+\), which is not"
    ):
        compile_language_model(torch.nn.Linear(1, 1), args, print)
    args = SimpleNamespace(**{**vars(args), "device": torch.device("cuda")})
    with pytest.raises(UserError, match="compiles with Triton"):
        compile_language_model(torch.nn.Linear(1, 1), args, print)
