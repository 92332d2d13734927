"""Trains with kinds that were added to a copy of the package: run with the copy first on the path."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from support.first_families import TEXT, VISION, tokenizer_with


def write_vip_llava(folder: Path) -> str:
    """A tiny model of a family that the package does not know: ViP-LLaVA, of transformers."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaProcessor,
        VipLlavaConfig,
        VipLlavaForConditionalGeneration,
    )

    torch.manual_seed(0)
    tokenizer = tokenizer_with("<image>", pad="<pad>")
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1)  # fmt: skip
    config = VipLlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT),
                            vision_feature_layers=[-1, -2], image_token_index=processor.image_token_id,
                            image_seq_length=4)  # fmt: skip
    place = folder / "vip_llava"
    VipLlavaForConditionalGeneration(config).save_pretrained(place)
    processor.save_pretrained(place)
    return str(place)


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def parity_in_this_process(command: list[str], **options: Any) -> subprocess.CompletedProcess:
    """The parity gate without its fresh process, whose imports take longer than a tiny run."""
    from vlm_sft.bundle import parity

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        parity.main(command[4:])
    return subprocess.CompletedProcess(command, 0, said.getvalue(), "")


def main(recipes: list[str], photo: str) -> None:
    """Prints for each recipe, as JSON: the class of its projector, what moved, and what its first row learns."""
    import vlm_sft
    from vlm_sft.train import train

    lines = []
    for path in recipes:
        recipe = vlm_sft.load_recipe(path)
        before = tensors(vlm_sft.build_stack(recipe).model)
        with mock.patch.object(subprocess, "run", parity_in_this_process):
            model, processor = vlm_sft.load(str(train(recipe)))
        row = vlm_sft.load_source(recipe.data.train[0])[0]
        sample = vlm_sft.MultimodalCollator(processor).encode(row)
        learned = processor.tokenizer.decode([label for label in sample.chat.labels if label != -100])
        question = {"messages": row["messages"][:1], "images": [photo]}
        assert isinstance(vlm_sft.answer(model, processor, [question], max_new_tokens=2)[0], str)
        after = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): v for name, v in tensors(model).items()
        }
        moved = [n for n, v in after.items() if n not in before or not torch.equal(v.cpu(), before[n].cpu())]
        kinds = [type(module).__name__ for name, module in model.named_modules() if name.endswith("projector")]
        lines.append({"package": str(Path(vlm_sft.__file__).parent), "projector": kinds[0], "moved": sorted(moved),
                      "learned": learned})  # fmt: skip
    print(*map(json.dumps, lines), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:-1], sys.argv[-1])
