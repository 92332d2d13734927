"""Weights written in the layouts that they are published in."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file


def write_single(folder, state):
    save_file(state, folder / "model.safetensors")


def _write_two(folder, state, cut, save, stem, ending):
    shards = {
        f"{stem}-0000{n}-of-00002.{ending}": names for n, names in ((1, list(state)[:cut]), (2, list(state)[cut:]))
    }
    for file, held in shards.items():
        save({name: state[name] for name in held}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def write_shards(folder, state, cut=2):
    _write_two(folder, state, cut, save_file, "model", "safetensors")


def write_bin(folder, state):
    torch.save(state, folder / "pytorch_model.bin")


def write_old_bin(folder, state):
    """As torch wrote it before 1.6; cannot be memory-mapped."""
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_bin_shards(folder, state, cut=2):
    _write_two(folder, state, cut, torch.save, "pytorch_model", "bin")


def write_nested_bin(folder, state):
    """As LAVIS and MiniGPT-4 publish: the tensors under "model", beside what the training left."""
    torch.save({"model": state, "epoch": 3, "config": {"lr": 0.1}}, folder / "pytorch_model.bin")
