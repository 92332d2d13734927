"""A recipe that ships, made small: tiny checkpoints in the layouts of the pieces that it names, a few rows, three steps.

What comes out is a list of overrides, so a tiny run takes the one way through: `train(load_recipe(name, overrides))`.
Parts and their kinds, freeze plan, LoRA, quantization, template, schedule and accumulation stay the recipe's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_sft import load_recipe

# What a run on a CPU of a few seconds needs in place of a run on GPUs of hours.
SMALL_RUN = {
    "max_steps": 3, "per_device_train_batch_size": 2, "bf16": False, "tf32": None, "dataloader_num_workers": 0,
    "dataloader_pin_memory": False, "logging_steps": 1, "report_to": "none",
}  # fmt: skip

ANSWERS = ["a red 3", "a blue 7", "左上角是红色的3", "two dogs", "a cat", "这是一只猫", "a bus", "three birds"]
QUESTION = "What is this?"

# Published name → tiny checkpoint in its layout: (folders of the fixture `pieces`, empty folder) → path.
Writer = Callable[[dict[str, str], Path], str]
PIECES: dict[str, Writer] = {
    "Salesforce/blip2-opt-2.7b": lambda pieces, folder: pieces["blip2"],
    "Salesforce/blip2-flan-t5-xxl": lambda pieces, folder: pieces["blip2"],
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
            changes[f"data.{group}.{index}.path"] = write_rows(source.format, folder / f"{group}_{index}", photos)
            if source.images is not None:
                changes[f"data.{group}.{index}.images"] = str(Path(photos[0]).parent)
    if recipe.init_from is not None:
        assert init_from is not None, f"{name} starts from {recipe.init_from}: train that first"
        changes["init_from"] = str(init_from)
    return [f"{path}={json.dumps(value)}" for path, value in changes.items()]


def _names_of_checkpoints(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """(path of the key, value) of everything under `stack` or `model` that names a checkpoint or a file of one."""
    parts = {f"stack.{part}": spec for part, spec in (recipe.get("stack") or {}).items()}
    found = []
    for path, spec in {**parts, "model": recipe.get("model")}.items():
        for key in ("pretrained", "tokenizer"):
            if (spec or {}).get(key):
                found.append((f"{path}.{key}", spec[key]))
        found += [(f"{path}.more.{i}", file) for i, file in enumerate((spec or {}).get("more") or ())]
    return found


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


# Format → (number, photo, answer) → row.
ROWS: dict[str, Callable[[int, str, str], dict[str, Any]]] = {
    "caption": lambda number, photo, answer: {"image": photo, "caption": answer},
    "vqa": lambda number, photo, answer: {"id": number, "image": photo, "question": QUESTION, "answer": answer},
    "llava": _llava_row,
    "messages": _message_row,
}
# As LLaVA's instructions have it, some rows have no image.
LLAVA_TEXT_ROW = {
    "id": "text",
    "conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！"}],
}
