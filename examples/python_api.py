"""The whole flow in plain Python, on the quickstart's pieces: compose, train, save, load, ask.

    python examples/python_api.py

Run it in the folder of the checkout. It trains for a few seconds, so the caption it ends with is not a good one; with
8000 scenes and 960 steps of 32 rows it is stage 1 of the quickstart.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import vlm_sft


def main(
    max_steps: int = 20,
    batch_size: int = 16,
    scenes: int = 200,
    data: str | Path = "data/python_api",
    output: str | Path = "outputs/python_api",
) -> str:
    """Trains a projector for a few steps and captions one image.

    Args:
        max_steps: Optimizer steps.
        batch_size: Rows a step.
        scenes: Training scenes that are drawn; each has an English and a Chinese caption.
        data: Folder for the data.
        output: Folder for the bundle; what is in it is replaced.

    Returns:
        The caption that the model, loaded again, gives an image it was not trained on.
    """
    world = [sys.executable, "examples/digitscenes/digitscenes.py", "--out", str(data)]
    subprocess.run([*world, "--scenes", str(scenes), "8", "8"], check=True)

    # What to compose and how to train. Any key of a recipe can be set here, as on the command line.
    settings = {
        "data.train": [{"path": f"{data}/captions_train.jsonl", "format": "caption"}],
        "data.eval": [],
        "sft.eval_strategy": "no",
        "sft.max_steps": max_steps,
        "sft.warmup_steps": 2,
        "sft.logging_steps": 5,
        "sft.per_device_train_batch_size": batch_size,
        "sft.output_dir": str(output),
    }
    recipe = vlm_sft.load_recipe("quickstart_stage1", [f"{key}={json.dumps(value)}" for key, value in settings.items()])

    # The four parts, loaded and composed; the plan says which of them learn, and how fast.
    stack = vlm_sft.build_stack(recipe, say=print)
    rows = vlm_sft.load_mixture(recipe.data.train, recipe.data.sampling)
    collator = vlm_sft.MultimodalCollator(stack.processor, max_length=128)
    vlm_sft.match_embeddings(stack.model, collator(rows.select(range(8)).to_list())["pixel_values"])

    trainer = vlm_sft.VLMSFTTrainer(
        stack.model,
        vlm_sft.build_sft_config(recipe),
        collator,
        rows,
        stack.processor,
        vlm_sft.lora_config(recipe, stack.model),  # None here: this recipe has no `lora`
        plan=stack.plan,
        provenance=vlm_sft.Provenance(recipe, stack.pieces),
    )
    trainer.train()
    trainer.save_model()  # writes a bundle

    model, processor = vlm_sft.load(output)
    image = Path(data) / "images/test/test-00000.png"
    question = {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": [image]}
    (caption,) = vlm_sft.answer(model, processor, [question])
    print(f"{image}: {caption}")
    return caption


if __name__ == "__main__":
    main()
