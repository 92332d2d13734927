"""Fixtures: tiny pieces and rows on disk, recipes of them, and what is made with those. Nothing is downloaded."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import sys
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from support.forge import Forge
from support.tiny_pieces import (
    VISION,
    make_tokenizer,
    save_checkpoint,
    tiny_recipe,
    tiny_stack,
    write_blip2,
    write_clip,
)

# These files take minutes: begun last, one of them would run alone while the other worker has nothing left to do.
LONGEST = ("test_learning", "test_checkpointing", "test_distributed", "test_build_family", "test_recipe_runs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws does not hang on the tests before it in its process; fixtures of modules come behind this."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """Garbage is looked for among what tests make, not among a million objects of what they import."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _usual_limits(monkeypatch) -> None:
    """Limits that a recipe of one test raised do not hold in the next."""
    monkeypatch.setenv("VLM_SFT_LIMITS", "")


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_files):
    """A fresh copy: processors add tokens to it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_files)


@pytest.fixture(scope="session")
def pieces(tmp_path_factory, tokenizer_files) -> dict[str, str]:
    """Folders of tiny pieces: `blip2` (tower + Q-Former), `clip` (as published), `llama`, `opt`."""
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    root = tmp_path_factory.mktemp("pieces")
    torch.manual_seed(0)
    llama = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=4, initializer_range=0.1, max_position_embeddings=512)  # fmt: skip
    opt = OPTConfig(vocab_size=300, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                    max_position_embeddings=512, word_embed_proj_dim=32, init_std=0.1, pad_token_id=0, bos_token_id=1,
                    eos_token_id=2)  # fmt: skip
    write_blip2(root / "blip2", llama)
    write_clip(root / "clip")
    for name, model in (("llama", LlamaForCausalLM(llama)), ("opt", OPTForCausalLM(opt))):
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return {folder.name: str(folder) for folder in root.iterdir()}


@pytest.fixture(scope="session")
def shared_photos(tmp_path_factory) -> list[str]:
    """Eight small PNG files, each of one colour."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    folder.mkdir()
    paths = []
    for i in range(8):
        path = folder / f"{i}.png"
        Image.new("RGB", (40, 30), (30 * i, 255 - 30 * i, 90)).save(path)
        paths.append(str(path))
    return paths


@pytest.fixture
def photos(tmp_path, shared_photos) -> list[str]:
    """The same beside what a test writes: rows may name pictures in the folder of their file alone."""
    folder = shutil.copytree(Path(shared_photos[0]).parent, tmp_path / "photos")
    return [str(folder / Path(photo).name) for photo in shared_photos]


@pytest.fixture(scope="session")
def caption_file(shared_photos) -> str:
    """Captions of the photos, English and Chinese, as JSONL, above their folder."""
    path = Path(shared_photos[0]).parents[1] / "captions.jsonl"
    captions = ["a red 3", "a blue 7", "左上角是红色的3", "two dogs", "a cat", "这是一只猫", "a bus", "three birds"]
    lines = [
        json.dumps({"image": p, "caption": c}, ensure_ascii=False) for p, c in zip(shared_photos, captions, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def recipe_file(tmp_path, pieces, caption_file):
    """Writes a recipe of tiny pieces; keyword arguments replace top-level keys. Returns its path."""

    def write(name: str = "recipe", **changes) -> Path:
        recipe = tiny_recipe(pieces, caption_file, tmp_path / "out" / name, **changes)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
        return path

    return write


@pytest.fixture
def open_recipe(recipe_file):
    """A recipe that does not say whether activations are kept."""
    path = recipe_file()
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    del text["sft"]["gradient_checkpointing"]
    path.write_text(yaml.safe_dump(text), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def more_pieces(pieces, tmp_path_factory):
    """`siglip` (no class token), `dino` (made for 56 pixels, given 28), `wide` (a tower of width 32), `gpt2`."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        Dinov2Config,
        Dinov2Model,
        GPT2Config,
        GPT2LMHeadModel,
        SiglipImageProcessorPil,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    root = tmp_path_factory.mktemp("more")
    torch.manual_seed(0)
    towers = {
        "siglip": SiglipVisionModel(SiglipVisionConfig(**VISION)),
        "dino": Dinov2Model(Dinov2Config(**{**VISION, "image_size": 56})),
        "wide": CLIPVisionModel(CLIPVisionConfig(**{**VISION, "hidden_size": 32})),
    }
    for name, tower in towers.items():
        tower.save_pretrained(root / name)
        SiglipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(root / name)
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4)).save_pretrained(root / "gpt2")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{pieces['llama']}/{file}", root / "gpt2" / file)
    return {**pieces, **{folder.name: str(folder) for folder in root.iterdir()}}


@pytest.fixture
def stack_recipe(recipe_file, more_pieces):
    """A recipe of a tower and a language model by their names; other top-level keys by keyword."""
    from vlm_sft import load_recipe

    def make(tower="clip", lm="llama", resampler=None, projector="linear", *, projector_options=None, **changes):
        stack = tiny_stack(
            more_pieces, tower, resampler, lm, {"type": projector, **(projector_options or {})},
            changes.pop("vision", None), changes.pop("language", None),
        )  # fmt: skip
        sft = {"output_dir": "out", "bf16": False, **changes.pop("sft", {})}
        return load_recipe(recipe_file(stack=stack, sft=sft, **changes))

    return make


@pytest.fixture
def bundle_recipe(recipe_file, pieces):
    """A recipe of the parts of `pieces` by their names; other top-level keys by keyword."""
    from vlm_sft import load_recipe

    def make(tower="blip2", resampler="blip2", lm="llama", projector=None, vision=None, name="recipe", **changes):
        stack = tiny_stack(pieces, tower, resampler, lm, projector, vision)
        return load_recipe(recipe_file(name, stack=stack, **changes))

    return make


@pytest.fixture
def save_llm(tmp_path):
    """Writes the folder of a LLaMA; its tokenizer is only there to be found."""

    from transformers import LlamaConfig, LlamaForCausalLM

    def save(config, state=None):
        config = LlamaConfig(**config)
        state = state or LlamaForCausalLM(config).state_dict()
        save_checkpoint(tmp_path / "llm", config, {n: t for n, t in state.items() if "inv_freq" not in n})
        make_tokenizer().save_pretrained(tmp_path / "llm")
        return {"pretrained": str(tmp_path / "llm")}

    return save


@pytest.fixture
def golden_stack(recipe_file):
    """A stack for evaluation, by the parts of its recipe; `empty` has no weights."""
    from vlm_sft import load_recipe
    from vlm_sft.stack.build_stack import build_empty_stack, build_stack

    def make(name="recipe", *, empty=False, **stack):
        built = (build_empty_stack if empty else build_stack)(load_recipe(recipe_file(name, stack=stack)))
        built.model.eval().requires_grad_(False)
        return built

    return make


@pytest.fixture
def refused(capsys):
    """Runs `python -m vlm_sft.train` with these arguments in this process; returns the one sentence it ends with."""

    from vlm_sft.train import main

    def run(*arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and "Traceback" not in said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and said.splitlines()[-1] == errors[0], said
        return errors[0]

    return run


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the console command with these arguments in this process; returns the one error that it ends with."""
    from vlm_sft.cli import main as cli

    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["vlm-sft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and [line for line in said if line.startswith("error")] == said[-1:], said
        return said[-1]

    return run


@pytest.fixture
def data(tmp_path, photos):
    """Writes rows as JSONL and returns a recipe's `data`; the image `photo.png` lies beside them."""

    def write(*rows, kind="messages", **source) -> dict:
        shutil.copy(photos[1], tmp_path / "photo.png")
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return {"train": [{"path": str(path), "format": kind, **source}]}

    return write


@pytest.fixture
def make_trainer(recipe_file, photos):
    """A trainer of a recipe of tiny pieces, on its rows or on these."""
    from datasets import Dataset

    from vlm_sft import MultimodalCollator, VLMSFTTrainer, build_stack, load_recipe, lora_config
    from vlm_sft.data.dataset import load_mixture
    from vlm_sft.recipe.libraries import build_sft_config

    def make(rows=None, eval_rows=None, sft=None, **changes):
        recipe = load_recipe(recipe_file(**changes), [f"sft.{k}={v}" for k, v in (sft or {}).items()])
        stack = build_stack(recipe)
        rows = load_mixture(recipe.data.train) if rows is None else Dataset.from_list(rows)
        return VLMSFTTrainer(
            stack.model, build_sft_config(recipe), MultimodalCollator(stack.processor), rows, stack.processor,
            lora_config(recipe, stack.model), plan=stack.plan,
            eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def instructblip(tmp_path_factory, pieces):
    """InstructBLIP as Salesforce publishes it: one folder, the Q-Former's tokenizer in a folder of its own."""
    from support.shrink import write_instructblip

    return write_instructblip(pieces, tmp_path_factory.mktemp("instructblip"))


@pytest.fixture
def instruct_bundle(recipe_file, instructblip, tmp_path):
    """A bundle of an InstructBLIP whose Q-Former, projector and LoRA have moved."""
    from support.bundles import trained
    from vlm_sft import load_recipe

    def make(template):
        piece = {"pretrained": instructblip}
        stack = {"vision_tower": piece, "resampler": {"type": "instruct_qformer", **piece},
                 "projector": {"type": "linear", **piece}, "language_model": piece}  # fmt: skip
        rates = {"projector": 1e-3, "resampler": 1e-4}
        recipe = load_recipe(recipe_file(stack=stack, chat_template=template, train=rates, lora={"r": 2}))
        trained(recipe, tmp_path / template)
        return tmp_path / template

    return make


@pytest.fixture(scope="session")
def forge():
    forge = Forge()
    yield forge
    forge.close()


@pytest.fixture(scope="session", autouse=True)
def forked_processes(forge):
    """What tests and the code under test start by `subprocess.run` is forked, not imported anew; see `Forge`."""
    with forge.in_place_of_processes():
        yield


@pytest.fixture(scope="session", autouse=True)
def curves():
    """An empty picture in place of a run's curves, which take a second; a test of just them asks for `drawn_curves`."""
    from vlm_sft.bundle.curves import draw_curves

    def draw(history, path, **kwargs):
        Image.new("RGB", (1, 1)).save(path)
        return Path(path)

    with mock.patch("vlm_sft.bundle.curves.draw_curves", draw):
        yield draw_curves


@pytest.fixture
def drawn_curves(curves, monkeypatch):
    """Curves are drawn at the end of a run."""
    monkeypatch.setattr("vlm_sft.bundle.curves.draw_curves", curves)


@pytest.fixture
def fresh_python(forge, monkeypatch):
    """Processes that a test starts are fresh ones, for a test of just that."""
    monkeypatch.setattr(forge, "forks", False)


@pytest.fixture
def mixed_recipe(recipe_file, caption_file, tmp_path):
    """Two sources, two micro-batches a step, LoRA with dropout, a log and an evaluation out of step with the saves.

    13 rows of 2 in 7 micro-batches are 4 steps an epoch, the last of one micro-batch.
    """
    few = {"path": caption_file, "format": "caption", "name": "few", "max_rows": 5}
    data = {"train": [{"path": caption_file, "format": "caption"}, few], "eval": [few], "sampling": "proportional"}
    short = {"max_new_tokens": 4}  # what the rows that a run shows are answered, four times
    path = recipe_file(data=data, chat_template="ziya", lora={"r": 2, "lora_dropout": 0.2}, generation=short)
    recipe = yaml.safe_load(path.read_text())
    recipe["sft"] |= {
        "max_steps": 11, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 3,
        "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine",
        "save_total_limit": 2,
    }  # fmt: skip

    def write(name, **sft):
        out = tmp_path / "runs" / name
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**recipe, "sft": {**recipe["sft"], "output_dir": str(out), **sft}}))
        return file, out

    return write
