"""Weights written in the layouts that they are published in."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file


def write_single(folder, state):
    save_file(state, folder / "model.safetensors")


def write_shards(folder, state, cut=2):
    names = list(state)
    shards = {"model-00001-of-00002.safetensors": names[:cut], "model-00002-of-00002.safetensors": names[cut:]}
    for file, held in shards.items():
        save_file({n: state[n] for n in held}, folder / file)
    index = {"metadata": {}, "weight_map": {n: file for file, held in shards.items() for n in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_bin(folder, state):
    torch.save(state, folder / "pytorch_model.bin")


def write_old_bin(folder, state):
    """As torch wrote it before 1.6; cannot be memory-mapped."""
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_bin_shards(folder, state):
    names = list(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[:2], "pytorch_model-00002-of-00002.bin": names[2:]}
    for file, held in shards.items():
        torch.save({n: state[n] for n in held}, folder / file)
    index = {"weight_map": {n: file for file, held in shards.items() for n in held}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_nested_bin(folder, state):
    """As LAVIS and MiniGPT-4 publish: the tensors under "model", beside what the training left."""
    torch.save({"model": state, "epoch": 3, "config": {"lr": 0.1}}, folder / "pytorch_model.bin")
