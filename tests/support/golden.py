"""References made with upstream code, and the checkpoints and stacks to read them with."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

from support.paths import GOLDENS
from support.tiny_pieces import make_tokenizer
from support.weight_files import write_bin_shards
from vlm_sft.bundle.load import load
from vlm_sft.stack.build_stack import build_stack
from vlm_sft.train import train

ATOL = 1e-5
RATES = {"vision_tower": 1e-3, "resampler": 1e-3, "projector": 1e-3}


class Golden:
    """One folder of references; every size comes from its `meta.json`."""

    def __init__(self, name):
        self.folder = GOLDENS / name
        self.config = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))["config"]
        self.inputs, self.outputs = self.tensors("inputs"), self.tensors("outputs")

    def tensors(self, name="weights"):
        return load_file(self.folder / f"{name}.safetensors")


def save_pth(state, path):
    """As LAVIS and MiniGPT-4 write it."""
    torch.save({"model": state, "epoch": 0}, path)
    return str(path)


def strip(state, prefix):
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def assert_close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=ATOL)


def small_llama(width):
    return {"vocab_size": 300, "hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 1}  # fmt: skip


def save_shards(folder, state, config):
    """Two `.bin` shards with an index, and a configuration that transformers has no class for."""
    folder.mkdir()
    write_bin_shards(folder, state)
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def check_learning(recipe):
    """Every trained tensor moves and the bundle reloads; that it gives the same logits is checked by `train` itself."""
    before = {n: t.clone() for n, t in build_stack(recipe).model.named_parameters()}
    train(recipe)
    model, _ = load(recipe.sft["output_dir"], device="cpu")
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n]) and "language_model" not in n]
    # A bias on the keys shifts all scores of a query alike; Adam may still move it by rounding.
    assert [n for n in still if n != "lm_head.weight" and "key.bias" not in n] == []
