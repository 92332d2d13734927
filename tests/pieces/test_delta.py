"""Deltas as FastChat and Fengshenbang make them, in every layout, and pairs that do not belong together."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from support.paths import ROOT
from support.tiny_pieces import make_tokenizer
from support.weight_files import write_bin, write_bin_shards, write_old_bin, write_shards, write_single
from vlm_sft.base.errors import UserError
from vlm_sft.pieces import delta as module
from vlm_sft.pieces.checkpoints import Checkpoint
from vlm_sft.pieces.delta import apply_delta, plan_shards

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "rms_norm_eps": 1e-6, "initializer_range": 0.1, "dtype": "float16"}  # fmt: skip
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
EMBED = TABLES[0]


def config(rows: int, **changes) -> LlamaConfig:
    return LlamaConfig(vocab_size=rows, **{**SIZES, **changes})


def weights(rows: int, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: tensor.half() for name, tensor in LlamaForCausalLM(config(rows)).state_dict().items()}


def write(folder, state, rows, how=write_single, **changes):
    folder.mkdir()
    config(rows, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    how(folder, state)
    return str(folder)


@pytest.fixture(scope="module")
def llama():
    return weights(300, 0)


@pytest.fixture(scope="module")
def tuned(llama):
    """A model that was trained a little further, with 16 tokens more."""
    torch.manual_seed(1)
    state = {name: (t + 0.01 * torch.randn_like(t)).half() for name, t in llama.items()}
    more = 0.1 * torch.randn(16, 32)
    return {name: torch.cat([t, more.half()]) if name in TABLES else t for name, t in state.items()}


def vicuna(llama, tuned):
    """A difference in every tensor; rows beyond the base's are the model's own."""
    delta = {}
    for name, tensor in tuned.items():
        delta[name] = tensor.clone()
        delta[name][: len(llama[name])] -= llama[name]
    return delta


def ziya(llama, tuned):
    """Whole tables, differences elsewhere, and what old files hold beside weights (Fengshenbang, make_delta.py)."""
    delta = {name: t.clone() if name in TABLES else t - llama[name] for name, t in tuned.items()}
    return {**delta, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0)}


MAKERS = {"sum": vicuna, "whole": ziya}
EITHER = [(write_shards, write_bin_shards), (write_bin, write_single), (write_old_bin, write_shards)]


@pytest.mark.parametrize("how", EITHER, ids=lambda pair: " and ".join(f.__name__ for f in pair))
@pytest.mark.parametrize("tables", MAKERS)
def test_the_model_comes_back(tables, how, llama, tuned, tmp_path):
    base = write(tmp_path / "base", llama, 300, how[0])
    delta = write(tmp_path / "delta", MAKERS[tables](llama, tuned), 316, how[1])
    out, said = tmp_path / "out", []
    done = apply_delta(base, delta, out, shard_bytes=20_000, say=said.append)
    assert (done["tables"], done["tensors"], done["left_out"]) == (tables, len(tuned), int(tables == "whole"))
    assert done["rows_added"] == dict.fromkeys(sorted(TABLES), 16)
    assert done["summed"] == len(tuned) - 2 * (tables == "whole")
    assert done["shards"] == len(said) == len(list(out.glob("*.safetensors"))) > 3

    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {file: load_file(out / file) for file in set(index["weight_map"].values())}
    held = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    assert sum(map(len, files.values())) == len(held) == len(tuned), "each tensor stands in one file"
    assert index["metadata"]["total_size"] == done["bytes"] == sum(t.nbytes for t in held.values())
    for name, tensor in tuned.items():
        assert held[name].dtype == torch.float16
        torch.testing.assert_close(held[name], tensor, atol=2e-4, rtol=0)
    assert torch.equal(held[EMBED][300:], tuned[EMBED][300:]), "new rows are the delta's own"
    if tables == "whole":
        assert torch.equal(held[EMBED], tuned[EMBED])
    model, found = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and model.config.vocab_size == 316
    assert len(AutoTokenizer.from_pretrained(out)) == len(make_tokenizer())
    assert json.loads((out / "apply_delta.json").read_text()) == done
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "out"]


def test_a_base_of_another_type_is_rounded_first(llama, tuned, tmp_path):
    """As when the delta was made: both projects load the base in float16, whatever it is stored in."""
    exact = {name: tensor.float() + 1e-5 for name, tensor in llama.items()}
    rounded = {name: tensor.half() for name, tensor in exact.items()}
    base = write(tmp_path / "base", exact, 300)
    delta = write(tmp_path / "delta", vicuna(rounded, tuned), 316)
    apply_delta(base, delta, tmp_path / "out", "sum")
    name = "model.norm.weight"
    got = Checkpoint(str(tmp_path / "out")).read([name])[name]
    assert torch.equal(got, rounded[name] + (tuned[name] - rounded[name]))


def test_shards_follow_the_delta_s_files_and_their_size():
    half = torch.float16
    kinds = {"a": ((10,), half), "b": ((100,), half), "c": ((10,), half)}
    files = {"a": "2", "b": "1", "c": "1"}
    assert list(plan_shards(kinds, files, 1000).values()) == [["b", "c", "a"]]
    assert plan_shards(kinds, files, 30) == {
        "model-00001-of-00003.safetensors": ["b"],
        "model-00002-of-00003.safetensors": ["c"],
        "model-00003-of-00003.safetensors": ["a"],
    }


def halved(state):
    return {**state, EMBED: torch.randn_like(state[EMBED]) * 0.2}


def without(state, name="model.norm.weight"):
    return {n: t for n, t in state.items() if n != name}


# name → (base's tensors, delta's tensors, settings of the base, sentence), made of the base and its Vicuna delta
WRONG = {
    "another shape": (
        lambda base, delta: {**base, "model.norm.weight": torch.ones(16, dtype=torch.float16)},
        lambda base, delta: delta, {}, r"'model.norm.weight' of .* has the shape \(16,\), the delta's has \(32,\)",
    ),
    "other names": (
        lambda base, delta: without(base), lambda base, delta: delta, {},
        "BASE: .* lacks 1 tensors that DELTA has, for instance 'model.norm.weight'",
    ),
    "half a delta": (
        lambda base, delta: base, lambda base, delta: without(delta), {}, "DELTA: .* lacks 1 tensors that BASE has",
    ),
    "swapped": (lambda base, delta: delta, lambda base, delta: base, {}, "are BASE and DELTA swapped"),
    "other settings": (
        lambda base, delta: base, lambda base, delta: delta, {"rms_norm_eps": 1e-5},
        "has rms_norm_eps 1e-05 in its config.json, the delta 1e-06",
    ),
    "no delta": (
        lambda base, delta: base, lambda base, delta: {**base, **{n: delta[n] for n in TABLES}}, {},
        "holds a whole model and no differences",
    ),
    "a table of one number": (
        lambda base, delta: {**base, EMBED: torch.tensor(1.0)}, lambda base, delta: {**delta, EMBED: torch.tensor(1.0)},
        {}, r"tensor '.*embed_tokens.weight' of .* has the shape \(\), which is no table",
    ),
    "a type that is not added": (
        lambda base, delta: base, lambda base, delta: {**delta, EMBED: delta[EMBED].to(torch.float8_e4m3fn)}, {},
        "has the type torch.float8_e4m3fn, which is not added; name the checkpoint in bf16",
    ),
    "tables of another model": (
        lambda base, delta: base, lambda base, delta: halved(delta), {}, "is neither like the base's .* --tables whole",
    ),
    "not finite": (
        lambda base, delta: {**base, "model.norm.weight": torch.full((32,), 6e4).half()},
        lambda base, delta: {**delta, "model.norm.weight": torch.full((32,), 6e4).half()}, {},
        "The sum of 'model.norm.weight' is not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_belong_together_is_named(case, llama, tuned, tmp_path):
    of_base, of_delta, settings, sentence = WRONG[case]
    whole = vicuna(llama, tuned)
    base = write(tmp_path / "base", of_base(llama, whole), 300, **settings)
    delta = write(tmp_path / "delta", of_delta(llama, whole), 316)
    with pytest.raises(UserError, match=sentence):
        apply_delta(base, delta, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta"]


@pytest.fixture
def pair(llama, tuned, tmp_path):
    delta = write(tmp_path / "delta", ziya(llama, tuned), 316)
    return write(tmp_path / "base", llama, 300), delta


def test_a_full_disk_is_named_before_and_while_writing(pair, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
        with pytest.raises(UserError, match=r"The result needs 0.0 GB, but .* has 0.0 GB free; make room"):
            apply_delta(*pair, tmp_path / "out")
    calls = []

    def full(tensors, path, **options):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        with pytest.raises(UserError, match=r"cannot be written: No space left on device; nothing was left there"):
            apply_delta(*pair, tmp_path / "out", shard_bytes=20_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta"]
    (tmp_path / ".unfinished-out-x1y2").mkdir()  # a run that was killed left something behind
    (tmp_path / ".unfinished-out-x1y2" / "model-00009-of-00009.safetensors").write_bytes(b"half")
    assert apply_delta(*pair, tmp_path / "out")["shards"] == 1
    assert not (tmp_path / ".unfinished-out-x1y2").exists()
    with pytest.raises(UserError, match="is there already and not empty"):
        apply_delta(*pair, tmp_path / "out")


def test_what_the_disk_changes_is_noticed(pair, tmp_path, monkeypatch):
    def flip(tensors, path, **options):
        name = min(tensors)
        save_file({**tensors, name: tensors[name] + 1}, path, **options)

    monkeypatch.setattr(module, "save_file", flip)
    with pytest.raises(UserError, match="differs when it is read back; check the disk"):
        apply_delta(*pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_paths_that_are_no_models(pair, tmp_path):
    with pytest.raises(UserError, match=r"BASE: '.*/none' is no folder here and could not be had from the Hub"):
        apply_delta(str(tmp_path / "none"), pair[1], tmp_path / "out")
    (tmp_path / "delta" / "tokenizer.json").unlink()
    (tmp_path / "delta" / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"DELTA: .* has no tokenizer"):
        apply_delta(*pair, tmp_path / "out")
    with pytest.raises(UserError, match="--tables 'half' is unknown"):
        apply_delta(*pair, tmp_path / "out", "half")


PEAK = r"""
import re, sys
from pathlib import Path
from vlm_sft.pieces.delta import apply_delta
peak = lambda: int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
apply_delta(*sys.argv[1:4], shard_bytes=16_000_000)
print(peak() - before)
"""


@pytest.mark.slow
def test_one_shard_at_a_time_is_in_memory(tmp_path):
    """A model of 200 MB in shards of 16 MB: the memory that is taken stays far below the model's size."""
    state = {f"model.layers.{i}.mlp.weight": torch.randn(1000).half().repeat(4000, 1) for i in range(25)}
    base = write(tmp_path / "base", state, 300)
    delta = write(tmp_path / "delta", {n: t.flip(1) * 0.01 for n, t in state.items()}, 300, write_bin)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, base, delta, str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    taken = int(done.stdout)
    print(f"{taken / 1e6:.0f} MB for a model of 200 MB")
    assert taken < 100_000_000


@pytest.mark.parametrize("text", ['{"a": ' + "[" * 100_000, "[]", "\xff", '{"a": ' + "[" * 200 + "]" * 200 + "}", ""])
def test_settings_that_are_none_are_one_sentence(pair, tmp_path, text):
    (tmp_path / "delta" / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="the checkpoint is not whole"):
        apply_delta(*pair, tmp_path / "out")


def test_what_a_delta_says_of_itself_is_not_repeated_without_end(pair, tmp_path):
    (tmp_path / "delta" / "config.json").write_text(json.dumps({"hidden_act": "x" * 100_000}))
    with pytest.raises(UserError, match=r"has hidden_act silu in its config.json, the delta x+\.\.\.;") as caught:
        apply_delta(*pair, tmp_path / "out")
    assert len(str(caught.value)) < 600


def test_no_file_elsewhere_is_copied_beside_the_model(pair, tmp_path):
    (tmp_path / "secret").write_text("of mine")
    (tmp_path / "delta" / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"DELTA: '.*merges.txt' leads out of its checkpoint; put the file"):
        apply_delta(*pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()
