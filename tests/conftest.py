"""Tiny pieces, written to disk in the layouts of the real ones, and rows to train on. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
# These files take minutes: begun last, one of them would run alone while the other worker has nothing left to do.
LONGEST = ("test_learning", "test_resumable", "test_distributed", "test_family_stack", "test_recipe_runs")
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
          "image_size": 28, "patch_size": 7}  # fmt: skip
GOLDENS = Path(os.environ.get("VLM_SFT_GOLDENS", ROOT / "tests" / "goldens"))

TEXT = [
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT: What is this?",
    "<human>:这是什么？\n<bot>:这是一只猫。", "a red 3 at the top left and a blue 7 at the bottom right",
    "左上角是红色的3，右下角是蓝色的7", "###Human: <Img></Img> describe the image ###Assistant: two dogs###",
    "Question: how many cats are there? Short answer: two", "[INST] What colour is the bus? [/INST] It is yellow.",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def make_tokenizer():
    """A byte-level BPE of 300 pieces with <s>, </s> and <unk>, but neither a pad nor an image token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


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


def write_blip2(folder: Path, text_config) -> None:
    """Tower, Q-Former, queries and projector of a BLIP-2, without its language model."""
    from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, BlipImageProcessorPil
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2VisionModel

    vision = Blip2VisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                               image_size=28, patch_size=7, initializer_range=0.1)  # fmt: skip
    qformer = Blip2QFormerConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                 intermediate_size=32, max_position_embeddings=16, encoder_hidden_size=24,
                                 initializer_range=0.1)  # fmt: skip
    config = Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text_config, num_query_tokens=4)
    state = {f"vision_model.{n}": t for n, t in Blip2VisionModel(vision).state_dict().items()}
    state |= {f"qformer.{n}": t for n, t in Blip2QFormerModel(qformer).state_dict().items()}
    state |= {"query_tokens": torch.randn(1, 4, 16) * 0.1, "language_projection.weight": torch.randn(32, 16),
              "language_projection.bias": torch.randn(32)}  # fmt: skip
    save_checkpoint(folder, config, state)
    BlipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)


def write_clip(folder: Path) -> None:
    """A whole CLIP, text side and all, as published."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    clip = CLIPConfig(
        vision_config={**VISION, "projection_dim": 16},
        text_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "vocab_size": 50, "projection_dim": 16}, projection_dim=16,
    )  # fmt: skip
    save_checkpoint(folder, clip, CLIPModel(clip).state_dict())
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)


def save_checkpoint(folder: Path, config, state: dict[str, torch.Tensor]) -> None:
    """Writes a checkpoint as the Hub has it: config.json and model.safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> list[str]:
    """Eight small PNG files, each of one colour."""
    folder = tmp_path_factory.mktemp("photos")
    paths = []
    for i in range(8):
        path = folder / f"{i}.png"
        Image.new("RGB", (40, 30), (30 * i, 255 - 30 * i, 90)).save(path)
        paths.append(str(path))
    return paths


@pytest.fixture(scope="session")
def caption_file(tmp_path_factory, photos) -> str:
    """Captions of the photos, English and Chinese, as JSONL."""
    path = tmp_path_factory.mktemp("captions") / "captions.jsonl"
    captions = ["a red 3", "a blue 7", "左上角是红色的3", "two dogs", "a cat", "这是一只猫", "a bus", "three birds"]
    lines = [json.dumps({"image": p, "caption": c}, ensure_ascii=False) for p, c in zip(photos, captions, strict=True)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@contextlib.contextmanager
def parity_in_this_process() -> Iterator[None]:
    """The parity gate without its fresh process, whose imports take longer than a tiny run.

    The same program loads the same files and compares the same logits, but here. That a fresh process does so is what
    test_parity, test_train, test_quantization, test_family_stack and test_recipe_runs prove.
    """
    from vlm_sft import parity

    real = subprocess.run

    def run(command, **options):
        if "vlm_sft.parity" not in command:
            return real(command, **options)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            parity.main(command[command.index("vlm_sft.parity") + 1 :])
        return subprocess.CompletedProcess(command, 0, said.getvalue(), "")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        yield


@pytest.fixture
def in_process_parity():
    """See `parity_in_this_process`."""
    with parity_in_this_process():
        yield


def tiny_stack(
    pieces, tower="blip2", resampler="blip2", lm="llama", projector=None, vision=None, language=None
) -> dict:
    """The `stack:` of a recipe by the names of its pieces, or by their paths."""

    def of(piece):
        return {"pretrained": pieces.get(piece, piece)}

    return {
        "vision_tower": {**of(tower), **(vision or {})},
        **({"resampler": {"type": "qformer", **of(resampler)}} if resampler else {}),
        "projector": projector or {"type": "linear"},
        "language_model": {**of(lm), **(language or {})},
    }


def tiny_recipe(pieces, caption_file, output_dir, **changes) -> dict:
    """A recipe of tiny pieces that trains two steps on a CPU; keyword arguments replace top-level keys."""
    return {
        "stack": tiny_stack(pieces),
        "chat_template": "plain",
        "train": {"projector": 1.0e-2},
        "data": {"train": [{"path": caption_file, "format": "caption"}]},
        "sft": {
            "output_dir": str(output_dir), "max_steps": 2, "per_device_train_batch_size": 4,
            "learning_rate": 1.0e-3, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
            "logging_steps": 1, "save_strategy": "no", "max_length": 128, "dataloader_num_workers": 0,
        },
        **changes,
    }  # fmt: skip


@pytest.fixture
def recipe_file(tmp_path, pieces, caption_file):
    """Writes a recipe of tiny pieces; keyword arguments replace top-level keys. Returns its path."""
    import yaml

    def write(name: str = "recipe", **changes) -> Path:
        recipe = tiny_recipe(pieces, caption_file, tmp_path / "out" / name, **changes)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
        return path

    return write


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
    from vlm_sft.stack import build_empty_stack, build_stack

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
def data(tmp_path, photos):
    """Writes rows as JSONL and returns a recipe's `data`; the image `photo.png` lies beside them."""

    def write(*rows, kind="messages", **source) -> dict:
        shutil.copy(photos[1], tmp_path / "photo.png")
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return {"train": [{"path": str(path), "format": kind, **source}]}

    return write
