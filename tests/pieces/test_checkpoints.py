"""Every layout that weights are published in, and files that are not what they say."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.weight_files import (
    write_bin,
    write_bin_shards,
    write_nested_bin,
    write_old_bin,
    write_shards,
    write_single,
)
from vlm_sft.base.errors import UserError
from vlm_sft.pieces import checkpoints
from vlm_sft.pieces.checkpoints import Checkpoint, fetch_file

KEY = "stack.language_model.pretrained"


@pytest.fixture
def state():
    torch.manual_seed(0)
    names = ("embed.weight", "layer.0.weight", "layer.1.weight", "norm.weight")
    return {**{n: torch.randn(6, 4) for n in names[:3]}, names[3]: torch.randn(4), "scale": torch.tensor(2.5)}


LAYOUTS = [write_single, write_shards, write_bin, write_old_bin, write_bin_shards, write_nested_bin]


@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout_lists_and_reads_the_same_tensors(write, state, tmp_path):
    write(tmp_path, state)
    checkpoint = Checkpoint(str(tmp_path), key=KEY)
    assert set(checkpoint.files) == set(state)
    read = checkpoint.read(["layer.1.weight", "scale"])
    assert set(read) == {"layer.1.weight", "scale"}, "what was not asked for is not read"
    assert torch.equal(read["layer.1.weight"], state["layer.1.weight"])
    assert torch.equal(read["scale"], state["scale"])


def test_the_fingerprint_says_what_the_weights_are_and_not_how_they_are_stored(state, tmp_path):
    prints = set()
    for i, write in enumerate([*LAYOUTS, lambda f, s: write_shards(f, s, cut=4)]):
        (tmp_path / str(i)).mkdir()
        write(tmp_path / str(i), state)
        prints.add(Checkpoint(str(tmp_path / str(i))).fingerprint())
    assert len(prints) == 1, "Hub repositories are cut into other shards and converted to safetensors"


@pytest.mark.parametrize("change", ["value", "shape", "dtype", "name", "fewer"])
def test_the_fingerprint_changes_with_the_weights(change, state, tmp_path):
    write_single(tmp_path, state)
    before = Checkpoint(str(tmp_path)).fingerprint()
    if change == "value":
        state["layer.1.weight"][0, 0] += 1e-3
    elif change == "shape":
        state["layer.1.weight"] = state["layer.1.weight"][:, :3].contiguous()
    elif change == "dtype":
        state["layer.1.weight"] = state["layer.1.weight"].bfloat16()
    elif change == "name":
        state["layer.2.weight"] = state.pop("layer.1.weight")
    else:
        del state["norm.weight"]
    write_single(tmp_path, state)
    assert Checkpoint(str(tmp_path)).fingerprint() != before


def test_a_fingerprint_of_some_tensors_does_not_see_the_others(state, tmp_path):
    write_single(tmp_path, state)
    before = Checkpoint(str(tmp_path)).fingerprint(["embed.weight"])
    state["norm.weight"] += 1
    write_single(tmp_path, state)
    assert Checkpoint(str(tmp_path)).fingerprint(["embed.weight"]) == before


def test_the_fingerprint_of_many_weights_reads_one_row_of_each(state, tmp_path):
    state["embed.weight"] = torch.randn(5000, 300)
    write_single(tmp_path, state)
    checkpoint = Checkpoint(str(tmp_path))
    for name, shape, tensor in checkpoint._walk(checkpoint.files, sample=True):
        assert shape == tuple(state[name].shape)
        assert tensor.shape[:1] == (1,) or tensor.dim() < 2


def test_a_single_file_is_a_checkpoint(state, tmp_path):
    torch.save(state, tmp_path / "mm_projector.bin")
    save_file(state, tmp_path / "part.safetensors")
    for name in ("mm_projector.bin", "part.safetensors"):
        checkpoint = Checkpoint(str(tmp_path / name))
        assert torch.equal(checkpoint.read(["norm.weight"])["norm.weight"], state["norm.weight"])


def test_the_file_that_transformers_reads_is_read(state, tmp_path):
    """A folder that has one file and the index of shards: transformers takes the one file."""
    write_single(tmp_path, state)
    write_shards(tmp_path, {name: tensor + 1 for name, tensor in state.items()})
    assert torch.equal(Checkpoint(str(tmp_path)).read(["norm.weight"])["norm.weight"], state["norm.weight"])


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (os.environ["BOMB"],))


def test_a_pickle_that_would_run_code_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "ran"))
    torch.save({"weight": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"could run code: it is refused; use a checkpoint in safetensors\.$") as error:
        Checkpoint(str(tmp_path), key=KEY)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{KEY}: ")
    assert not (tmp_path / "ran").exists()


def test_broken_files_are_named(state, tmp_path):
    write_single(tmp_path, state)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors' is no whole safetensors file"):
        Checkpoint(str(tmp_path), key=KEY)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pytorch_model\.bin' cannot be read as weights"):
        Checkpoint(str(tmp_path), key=KEY)
    torch.save(torch.zeros(2), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds no tensors by name"):
        Checkpoint(str(tmp_path), key=KEY)


def test_a_missing_shard_and_an_index_that_lies_are_named(state, tmp_path):
    write_shards(tmp_path, state)
    second = tmp_path / "model-00002-of-00002.safetensors"
    rest = load_file(second)
    rest.pop("norm.weight")
    save_file(rest, second)
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors of .* lacks 'norm\.weight'"):
        Checkpoint(str(tmp_path), key=KEY).read(["norm.weight"])
    second.unlink()
    with pytest.raises(UserError, match=r"has no file model-00002-of-00002\.safetensors"):
        Checkpoint(str(tmp_path), key=KEY).read(["norm.weight"])
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index\.json of .* is no index of weight files"):
        Checkpoint(str(tmp_path), key=KEY)


def test_a_folder_without_weights_says_which_files_were_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"has no weights that can be read here \(model\.safetensors, .*\); check the"):
        Checkpoint(str(tmp_path), key=KEY)


@pytest.mark.parametrize("name", ["nobody/nothing", "../no/such/folder", "no spaces allowed"])
def test_what_is_neither_folder_nor_to_be_had_from_the_hub_is_one_sentence(name):
    for read in (lambda: Checkpoint(name, key=KEY), lambda: fetch_file(name, "config.json", None, KEY)):
        with pytest.raises(UserError, match="is no folder here and could not be had from the Hub") as error:
            read()
        assert name in str(error.value) and str(error.value).startswith(KEY)


def test_the_hub_is_asked_for_the_revision(monkeypatch, state, tmp_path):
    write_single(tmp_path, state)
    asked = []

    def cached_file(pretrained, name, revision=None, **options):
        asked.append((pretrained, revision))
        return str(tmp_path / name) if (tmp_path / name).exists() else None

    monkeypatch.setattr(checkpoints, "cached_file", cached_file)
    Checkpoint("someone/model", "v1.1").fingerprint()
    assert set(asked) == {("someone/model", "v1.1")}


def test_a_file_that_may_not_be_read_is_said_as_that(pieces, monkeypatch):
    def refuse(path, framework):
        raise FileNotFoundError(f"No such file or directory: {path}")  # as safetensors says it

    monkeypatch.setattr("vlm_sft.pieces.checkpoints.safe_open", refuse)
    monkeypatch.setattr("vlm_sft.pieces.checkpoints.os.access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"model\.safetensors' may not be read by this user; change its permissions"):
        Checkpoint(pieces["llama"], None, "stack.language_model").fingerprint()
