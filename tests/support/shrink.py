"""A recipe that ships, made small: tiny checkpoints in the layouts of its pieces, a few rows, three steps.

What comes out is a list of overrides, so a tiny run takes the one way through: `train(load_recipe(name, overrides))`.
Parts and their kinds, freeze plan, LoRA, quantization, template, schedule and accumulation stay the recipe's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.flant5 import write_flant5, write_instructblip_flant5
from support.mplug import GOLDENS, save_words
from support.tiny_families import tiny
from support.tiny_pieces import make_tokenizer
from support.visualglm import write_visualglm
from support.vle import save_vle
from vlm_sft import load_recipe
from vlm_sft.recipe.sections import Source

# What a run of a few seconds on a CPU needs in place of a run of hours on GPUs. A warm-up of 1000 steps would begin at
# rates that are too small to be added to a weight in fp32.
SMALL_RUN = {
    "max_steps": 3, "per_device_train_batch_size": 2, "bf16": False, "tf32": None, "dataloader_num_workers": 0,
    "warmup_steps": 1, "dataloader_pin_memory": False, "logging_steps": 1, "report_to": "none",
}  # fmt: skip

ANSWERS = ["a red 3", "a blue 7", "左上角是红色的3", "two dogs", "a cat", "这是一只猫", "a bus", "three birds"]
QUESTION = "What is this?"

# A Q-Former that reads the instruction has a vocabulary of its own.
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] what is this ? are you sure a the image cat describe 猫 这 是".split()
SMALL = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def write_instructblip(pieces: dict[str, str], folder: Path) -> str:
    """All four parts in one folder, the Q-Former's tokenizer in a folder of its own."""
    from transformers import (
        BertTokenizerFast,
        BlipImageProcessorPil,
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipQFormerConfig,
        InstructBlipVisionConfig,
        LlamaConfig,
    )

    torch.manual_seed(0)
    sizes = {**SMALL, "initializer_range": 0.1}
    qformer = InstructBlipQFormerConfig(**{**sizes, "hidden_size": 16}, vocab_size=len(WORDS), encoder_hidden_size=24)
    model = InstructBlipForConditionalGeneration(
        InstructBlipConfig(
            vision_config=InstructBlipVisionConfig(**sizes, image_size=28, patch_size=7),
            qformer_config=qformer,
            text_config=LlamaConfig.from_pretrained(pieces["llama"]),
            num_query_tokens=4,
            image_token_index=300,
        )
    )
    torch.nn.init.normal_(model.query_tokens)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)
    BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder / "qformer_tokenizer")
    return str(folder)


def write_eva(pieces: dict[str, str], folder: Path) -> str:
    """EVA ViT-g's own file: no norm behind the tower, a block and a head that BLIP-2 leaves out. Heads are 88 wide."""
    width, hidden, patch, tokens = 88, 96, 7, 17
    block = {
        "norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
        "attn.qkv.weight": (3 * width, width), "attn.q_bias": (width,), "attn.v_bias": (width,),
        "attn.proj.weight": (width, width), "attn.proj.bias": (width,), "mlp.fc1.weight": (hidden, width),
        "mlp.fc1.bias": (hidden,), "mlp.fc2.weight": (width, hidden), "mlp.fc2.bias": (width,),
    }  # fmt: skip
    shapes = {
        "cls_token": (1, 1, width), "pos_embed": (1, tokens, width), "head.weight": (10, width),
        "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        **{f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()},
    }  # fmt: skip
    torch.save(_random(shapes), folder / "eva_vit_g.pth")
    return str(folder / "eva_vit_g.pth")


def write_blip2_pretrained(pieces: dict[str, str], folder: Path) -> str:
    """LAVIS's stage 1: Q-Former with its words, text layers and heads, the queries, the norm behind the ViT, no ViT."""
    width, vision, hidden = 64, 88, 48
    shapes = {"query_tokens": (1, 4, width), "ln_vision.weight": (vision,), "ln_vision.bias": (vision,), "temp": ()}
    shapes |= {"vision_proj.weight": (16, width), "text_proj.weight": (16, width), "itm_head.weight": (2, width)}
    embeddings = {"LayerNorm": (width,), "word_embeddings": (30, width), "position_embeddings": (16, width)}
    shapes |= {f"Qformer.bert.embeddings.{name}.weight": shape for name, shape in embeddings.items()}
    shapes |= {"Qformer.bert.embeddings.LayerNorm.bias": (width,), "Qformer.cls.predictions.bias": (30,)}
    for layer, kinds in enumerate((("attention", "crossattention"), ("attention",))):
        stem = f"Qformer.bert.encoder.layer.{layer}."
        for kind in kinds:
            source = vision if kind == "crossattention" else width
            linears = {"query": (width, width), "key": (width, source), "value": (width, source)}
            for name, shape in linears.items():
                shapes |= _linear(f"{stem}{kind}.self.{name}", *shape)
            shapes |= _linear(f"{stem}{kind}.output.dense", width, width)
            shapes |= {f"{stem}{kind}.output.LayerNorm.{end}": (width,) for end in ("weight", "bias")}
        for end in ("", "_query"):
            shapes |= _linear(f"{stem}intermediate{end}.dense", hidden, width)
            shapes |= _linear(f"{stem}output{end}.dense", width, hidden)
            shapes |= {f"{stem}output{end}.LayerNorm.{kind}": (width,) for kind in ("weight", "bias")}
    torch.save({"model": _random(shapes), "epoch": 9}, folder / "blip2_pretrained.pth")
    return str(folder / "blip2_pretrained.pth")


def write_mplug(size: str, folder: Path) -> str:
    """The authors' file of before its tuning, in which names of BERT and of the fusion are longer."""
    longer = {"text_encoder": "text_encoder.bert", "fusion_encoder": "fusion_encoder.fusion"}
    state = {}
    for name, tensor in GOLDENS[size].tensors().items():
        first, _, rest = name.partition(".")
        state[f"{longer.get(first, first)}.{rest}"] = tensor
    torch.save({"model": state}, folder / "mplug.pth")
    return str(folder / "mplug.pth")


def write_blip2_flant5(pieces: dict[str, str], folder: Path) -> str:
    """LAVIS's BLIP-2 on FlanT5 as its second stage leaves it: the same file with `t5_proj`, neither ViT nor FlanT5."""
    state = torch.load(write_blip2_pretrained(pieces, folder), weights_only=True)["model"]
    torch.save({"model": state | _random(_linear("t5_proj", 32, 64))}, folder / "blip2_pretrained_flant5xl.pth")
    return str(folder / "blip2_pretrained_flant5xl.pth")


def write_dinov2(pieces: dict[str, str], folder: Path) -> str:
    """DINOv2 with patches of 14 pixels, whose image processor is told the size by the recipe."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 4}
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(folder)
    size = {"height": 28, "width": 28}
    BitImageProcessorPil(size=size, crop_size=size, do_center_crop=False).save_pretrained(folder)
    return str(folder)


def write_smollm2(pieces: dict[str, str], folder: Path) -> str:
    """A LLaMA whose tokenizer has the ends of ChatML as one token each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=len(tokenizer), initializer_range=0.1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_real_projector(pieces: dict[str, str], folder: Path) -> str:
    """What `examples/real/align.py` solves for: 8 x 8 patches of the tower above as one token of the language model."""
    width = SMALL["hidden_size"]
    weights = _random({"projector.linear.weight": (width, 24 * 64)})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def _linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Norms near one, all else near zero."""
    generator = torch.Generator().manual_seed(0)
    norm = re.compile(r"(norm\d?|LayerNorm|ln_vision)\.weight$")
    return {n: torch.randn(s, generator=generator) * 0.1 + (norm.search(n) is not None) for n, s in shapes.items()}


# Published name → tiny checkpoint in its layout: (folders of the fixture `pieces`, empty folder) → path.
Writer = Callable[[dict[str, str], Path], str]
PIECES: dict[str, Writer] = {
    "llava-hf/llava-v1.6-mistral-7b-hf": lambda pieces, folder: str(tiny("llava_next")),
    "Qwen/Qwen2.5-VL-7B-Instruct": lambda pieces, folder: str(tiny("qwen2_5_vl")),
    "HuggingFaceTB/SmolVLM-Instruct": lambda pieces, folder: str(tiny("idefics3")),
    "Salesforce/blip2-opt-2.7b": lambda pieces, folder: pieces["blip2"],
    "Salesforce/blip2-flan-t5-xxl": lambda pieces, folder: pieces["blip2"],
    "Salesforce/instructblip-vicuna-7b": write_instructblip,
    "Salesforce/instructblip-flan-t5-xl": lambda pieces, folder: write_instructblip_flant5(folder),
    "THUDM/visualglm-6b": lambda pieces, folder: write_visualglm(folder),
    "hfl/vle-base": lambda pieces, folder: str(save_vle(folder / "vle")),
    "checkpoints/mplug_base.pth": lambda pieces, folder: write_mplug("base", folder),
    "checkpoints/mplug_large_v2.pth": lambda pieces, folder: write_mplug("large", folder),
    "google-bert/bert-base-uncased": lambda pieces, folder: save_words(folder),
    "data/real/dinov2": write_dinov2,
    "data/real/smollm2": write_smollm2,
    "data/real/projector": write_real_projector,
    "checkpoints/eva_vit_g.pth": write_eva,
    "checkpoints/blip2_pretrained.pth": write_blip2_pretrained,
    "checkpoints/blip2_pretrained_flant5xl.pth": write_blip2_flant5,
    "google/flan-t5-xl": lambda pieces, folder: write_flant5(folder),
    "facebook/opt-2.7b": lambda pieces, folder: pieces["opt"],
    "openai/clip-vit-large-patch14-336": lambda pieces, folder: pieces["clip"],
    "lmsys/vicuna-7b-v1.5": lambda pieces, folder: pieces["llama"],
    "lmsys/vicuna-13b-v1.5": lambda pieces, folder: pieces["llama"],
    "IDEA-CCNL/Ziya-LLaMA-13B-v1": lambda pieces, folder: pieces["llama"],
}


def shrink(name: str, folder: Path, pieces: dict[str, str], photos: list[str], init_from: Path | None = None) -> list:
    """Overrides with which a recipe that ships trains three steps on a CPU.

    Args:
        name: The recipe's name.
        folder: An empty folder: checkpoints, rows and the bundle go there.
        pieces: The fixture of that name.
        photos: The fixture of that name: eight images in one folder.
        init_from: Tiny bundle of the earlier stage; needed where the recipe has `init_from`.
    """
    recipe = load_recipe(name)
    changes: dict[str, Any] = {f"sft.{key}": value for key, value in SMALL_RUN.items()}
    changes["sft.output_dir"] = str(folder / "bundle")
    written: dict[str, str] = {}
    for path, value in _names_of_checkpoints(recipe.resolved()):
        if value not in written and value in PIECES:
            (folder / "pieces" / str(len(written))).mkdir(parents=True)
            written[value] = PIECES[value](pieces, folder / "pieces" / str(len(written)))
        elif value not in written:
            assert Path(value).is_dir(), f"{path}: give {value} an entry in PIECES"
            written[value] = str(Path(value).resolve())
        changes[path] = written[value]
    for group in ("train", "eval", "test"):
        for index, source in enumerate(getattr(recipe.data, group)):
            for key, value in write_source(source, folder / f"{group}_{index}", photos).items():
                changes[f"data.{group}.{index}.{key}"] = value
    if recipe.stack is not None and (recipe.stack.vision_tower.image_size or 0) > 200:  # tiny towers have 28
        changes["stack.vision_tower.image_size"] = 42
    if recipe.encoder is not None:
        changes["encoder.min_count"] = 1
        if recipe.encoder.tokenizer:  # an mPLUG: its files tell no sizes of heads, which are published ones
            own = GOLDENS["large" if "large" in name else "base"].config["bert"]
            heads = {key: own[key] for key in ("num_attention_heads", "fusion_layers", "stride_layer")}
            changes |= {"encoder.config": {**heads, "vision_heads": 4}, "encoder.image_size": 42}
    if recipe.init_from is not None:
        assert init_from is not None, f"{name} starts from {recipe.init_from}: train that first"
        changes["init_from"] = str(init_from)
    return [f"{path}={json.dumps(value)}" for path, value in changes.items()]


def _names_of_checkpoints(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """(path of the key, value) of what names a checkpoint or a file of one, under `stack`, `model` and `encoder`."""
    parts = {f"stack.{part}": spec for part, spec in (recipe.get("stack") or {}).items()}
    found = []
    for path, spec in {**parts, "model": recipe.get("model"), "encoder": recipe.get("encoder")}.items():
        for key in ("pretrained", "tokenizer"):
            if (spec or {}).get(key):
                found.append((f"{path}.{key}", spec[key]))
        found += [(f"{path}.more.{i}", file) for i, file in enumerate((spec or {}).get("more") or ())]
    return found


def write_source(source: Source, stem: Path, photos: list[str]) -> dict[str, Any]:
    """Writes what a source names, in its format; returns the keys that name it."""
    if source.format not in DOCUMENTS:
        keys = {"path": write_rows(source.format, stem, photos)}
    else:
        keys = {}
        for key, document in DOCUMENTS[source.format](photos).items():
            path = stem.with_name(f"{stem.name}_{key}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
            keys[key] = str(path)
        keys["image_name"] = "{id}" + Path(photos[0]).suffix
    if source.images is not None or source.format in DOCUMENTS:
        keys["images"] = str(Path(photos[0]).parent)
    else:
        keys["image_folders"] = [str(Path(photos[0]).parent)]
    return keys


def write_rows(form: str, stem: Path, photos: list[str]) -> str:
    """Writes eight rows in a format, images by the name of their file where the format has a folder of them."""
    folder = stem.parent
    folder.mkdir(parents=True, exist_ok=True)
    rows = [ROWS[form](i, photo, answer) for i, (photo, answer) in enumerate(zip(photos, ANSWERS, strict=True))]
    if form == "llava":
        rows += [LLAVA_TEXT_ROW] * 2
        path = stem.with_suffix(".json")
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        path = stem.with_suffix(".jsonl")
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _llava_row(number: int, photo: str, answer: str) -> dict[str, Any]:
    turns = [("human", f"<image>\n{QUESTION}"), ("gpt", answer), ("human", "Are you sure?"), ("gpt", "yes")]
    conversations = [{"from": who, "value": text} for who, text in turns]
    return {"id": str(number), "image": Path(photo).name, "conversations": conversations}


def _message_row(number: int, photo: str, answer: str) -> dict[str, Any]:
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    return {"id": number, "messages": [user, {"role": "assistant", "content": answer}], "images": [photo]}


def vcr_row(number: int, photo: str, answer: str) -> dict[str, Any]:
    """A row of VCR with its boxes; the right answer and the right reason are the last ones, and say `answer`."""
    others = [["a", "cat"], [[1], "and", [0]], ["No", ",", [0, 1], "."]]
    return {"annot_id": f"val-{number}", "img_fn": Path(photo).name, "objects": ["person", "dog"], "movie": "none",
            "question": ["What", "is", [0], "?"], "answer_choices": [*others, [answer]], "answer_label": 3,
            "rationale_choices": [*others, [[0], "is", answer]], "rationale_label": 3, "width": 40, "height": 30,
            "boxes": [[0, 0, 20, 15, 0.9], [10, 10, 39, 29, 0.8]]}  # fmt: skip


# Format → (number, photo, answer) → row.
ROWS: dict[str, Callable[[int, str, str], dict[str, Any]]] = {
    "vcr": vcr_row,
    "caption": lambda number, photo, answer: {"image": photo, "caption": answer},
    "vqa": lambda number, photo, answer: {"id": number, "image": photo, "question": QUESTION, "answer": answer},
    "llava": _llava_row,
    "messages": _message_row,
}


def _captions(photos: list[str]) -> dict[str, Any]:
    pairs = enumerate(zip(photos, ANSWERS, strict=True))
    entries = [{"id": i, "image_id": Path(photo).stem, "caption": answer} for i, (photo, answer) in pairs]
    return {"path": {"images": [], "annotations": entries}}


def _questions_and_annotations(photos: list[str]) -> dict[str, Any]:
    ids = [{"question_id": i, "image_id": Path(photo).stem} for i, photo in enumerate(photos)]
    given = [[answer] * 8 + ["a cat", "no"] for answer in ANSWERS]  # of ten annotators
    answered = [
        entry | {"answers": [{"answer": each} for each in answers]} for entry, answers in zip(ids, given, strict=True)
    ]
    asked = [entry | {"question": QUESTION} for entry in ids]
    return {"path": {"data_subtype": "tiny", "questions": asked}, "annotations": {"annotations": answered}}


# Format of whole documents → photos → key of the source → document.
DOCUMENTS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "cc_sbu_align": _captions,
    "coco": _captions,
    "vqav2": _questions_and_annotations,
}
# As LLaVA's instructions have it, some rows have no image.
LLAVA_TEXT_ROW = {
    "id": "text",
    "conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！"}],
}
