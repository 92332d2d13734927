"""One trainer of `peers.py`, in a process of its own: python peer.py KIND SPEC, where SPEC is JSON.

KIND is `trl`, `plain`, `llamafactory` or `vlm_sft`; what it imports is of its own environment.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

import torch
from pace import Meter, Pace

RATE = 1e-12  # weights hold still, so that every epoch of everybody has the same loss
EPOCHS = 10_000  # it ends when it is told to


def frozen(model: Any, learns: list[str]) -> Any:
    """A LLaVA of transformers of which these parts alone learn, a `multi_modal_projector` being `projector`."""
    for name, parameter in model.named_parameters():
        part = next(
            (p for p in ("vision_tower", "projector") if f"{p}." in name), "language_model"
        )  # the head goes with the language model
        parameter.requires_grad_(part in learns)
    return model


def settings(spec: dict[str, Any]) -> dict[str, Any]:
    """What transformers' trainers are told alike."""
    return {
        "output_dir": spec["out"], "num_train_epochs": EPOCHS, "per_device_train_batch_size": spec["batch"],
        "learning_rate": RATE, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0,
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "bf16": spec.get("bf16", False), "dataloader_num_workers": 0, "dataloader_pin_memory": False, "seed": 0,
    }  # fmt: skip


def trl(spec: dict[str, Any]) -> None:
    """TRL's `SFTTrainer` with its own collator, on the answers alone."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture
    from peer_data import read_rows
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import SFTConfig, SFTTrainer

    folder = Path(spec["folder"])
    said = [
        {
            "images": [row["image"]],
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in read_rows(folder)
    ]
    message = List({"role": Value("string"), "content": Value("string")})
    features = Features({"images": List(Picture()), "prompt": message, "completion": message})
    model = AutoModelForImageTextToText.from_pretrained(folder / "llava", dtype=torch.float32)
    SFTTrainer(
        model=frozen(model, spec["learns"]),
        args=SFTConfig(
            **settings(spec), max_length=None, completion_only_loss=True, gradient_checkpointing=False,
            train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_list(said, features=features),
        processing_class=AutoProcessor.from_pretrained(folder / "llava"),
        callbacks=[Pace()],
    ).train()  # fmt: skip


def plain(spec: dict[str, Any]) -> None:
    """A loop as one writes it: processor, transformers' own loss, AdamW."""
    from peer_data import read_rows
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = Path(spec["folder"])
    rows = read_rows(folder)
    processor = AutoProcessor.from_pretrained(folder / "llava")
    model = AutoModelForImageTextToText.from_pretrained(folder / "llava", dtype=torch.float32)
    model = frozen(model, spec["learns"]).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0, fused=True)
    meter = Meter()
    meter.watch(model)
    meter.watch_images()
    while True:
        meter.wait()
        for start in range(0, len(rows), spec["batch"]):
            with meter.of("batches"):
                some = rows[start : start + spec["batch"]]
                texts, asked = [], []
                for row in some:
                    content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
                    talk = [{"role": "user", "content": content}, {"role": "assistant", "content": row["answer"]}]
                    texts.append(processor.apply_chat_template(talk, eos_token="</s>"))
                    asked.append(processor.apply_chat_template(talk[:1], add_generation_prompt=True))
                images = [Image.open(row["image"]).convert("RGB") for row in some]
                batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
                labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
                for own, text in zip(labels, asked, strict=True):
                    own[: len(processor.tokenizer(text)["input_ids"]) + spec["image_tokens"] - 1] = -100
                batch["labels"] = labels
            with torch.autocast("cpu", torch.bfloat16, enabled=spec.get("bf16", False)):
                loss = model(**batch, use_cache=False).loss
            with meter.of("backward"):
                loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            with meter.of("optimizer"):
                optimizer.step()
            optimizer.zero_grad()
            meter.add_batch(batch, loss.detach())
        meter.report()


def llamafactory(spec: dict[str, Any]) -> None:
    """LLaMA-Factory, by its own command's function. It imports torchaudio, which does not fit every build of torch."""
    if importlib.util.find_spec("torchaudio") is None:
        sys.modules["torchaudio"] = unused = types.ModuleType("torchaudio")
        unused.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    from llamafactory.train.tuner import run_exp

    folder = Path(spec["folder"])
    run_exp(
        {
            **settings(spec), "stage": "sft", "do_train": True, "finetuning_type": "full",
            "model_name_or_path": str(folder / "llava"), "template": "llava", "dataset": "rows",
            "dataset_dir": str(folder), "cutoff_len": 2048, "disable_shuffling": True, "overwrite_cache": True,
            "disable_gradient_checkpointing": True, "freeze_vision_tower": "vision_tower" not in spec["learns"],
            "freeze_multi_modal_projector": "projector" not in spec["learns"],
            "freeze_language_model": "language_model" not in spec["learns"], "remove_unused_columns": False,
            "preprocessing_num_workers": None,
        },
        callbacks=[Pace()],
    )  # fmt: skip


def vlm_sft(spec: dict[str, Any]) -> None:
    """A recipe of this toolkit, in the steps of `vlm_sft.train`."""
    import yaml
    from rich.console import Console

    from vlm_sft import build_sft_config, load_recipe
    from vlm_sft.recipe.libraries import validate_libraries
    from vlm_sft.stack.kinds import compose
    from vlm_sft.training.build_trainer import build_collator, build_trainer
    from vlm_sft.training.run_rows import load_rows

    folder, options = Path(spec["folder"]), spec.get("options", {})
    source = {"path": str(folder / "rows.jsonl"), "format": "vqa", **options.get("source", {})}
    recipe_file = Path(spec["out"]) / "recipe.yaml"
    recipe_file.parent.mkdir(parents=True, exist_ok=True)
    tree = {
        "stack": {
            "vision_tower": {"pretrained": str(folder / "tower"), "feature_layer": -2, "feature_select": "patch"},
            "projector": {"type": "mlp", "depth": 2, "activation": "gelu"},
            "language_model": {"pretrained": str(folder / "lm")},
        },
        "chat_template": "vicuna_v1",
        "train": dict.fromkeys(spec["learns"], RATE),
        "data": {"train": [source]},
        "sft": {
            **settings(spec), "max_length": options.get("length", 2048), "activation_checkpointing": False,
            "train_sampling_strategy": "sequential", **options.get("sft", {}),
        },
        **({"cache": {"path": str(Path(spec["out"]) / "cache")}} if options.get("cache") else {}),
    }  # fmt: skip
    recipe_file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    recipe = load_recipe(str(recipe_file))
    validate_libraries(recipe)
    args, console = build_sft_config(recipe), Console(stderr=True)
    composed = compose(recipe)
    collator = build_collator(recipe, composed.processor, args)
    rows = load_rows(recipe, collator, args, console)
    trainer = build_trainer(recipe, args, collator, rows, composed, console.print)
    copy_projector(folder / "llava", trainer.model.model.projector)
    if not options.get("supervised", True):
        score_all(trainer)
    trainer.add_callback(Pace())
    trainer.train()


def copy_projector(llava: Path, projector: Any) -> None:
    """The weights of LLaVA's own projector into ours."""
    from safetensors.torch import load_file

    found = load_file(llava / "model.safetensors")
    theirs = [tensor for name, tensor in sorted(found.items()) if "multi_modal_projector" in name]
    ours = [parameter for _, parameter in sorted(projector.named_parameters())]
    for parameter, tensor in zip(ours, theirs, strict=True):
        parameter.data.copy_(tensor)


def score_all(trainer: Any) -> None:
    """Takes away what scores supervised positions alone: all logits are made, as transformers makes them."""
    import torch.nn.functional as F

    from vlm_sft.model import modeling

    def mean_loss(head: Any, hidden: Any, labels: Any, weights: Any, items: Any, positions: Any) -> Any:
        logits = head(hidden).float()[:, :-1].flatten(0, 1)
        wanted = labels[:, 1:].flatten()
        losses = F.cross_entropy(logits, wanted, reduction="none", ignore_index=-100)
        kept = wanted != -100
        return losses.sum() / items, losses.detach()[kept], (logits.detach().argmax(-1) == wanted)[kept]

    modeling.mean_loss = mean_loss


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, given = sys.argv[1], json.loads(sys.argv[2])
    sys.path.insert(0, str(Path(__file__).parent))
    {"trl": trl, "plain": plain, "llamafactory": llamafactory, "vlm_sft": vlm_sft}[kind](given)
