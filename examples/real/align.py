"""Solves for the projector that `make real` starts from: least squares from drawings to the embeddings of their words.

`python examples/real/align.py [--data data/real] [--out data/real/projector]` shows the tower the drawings that are
trained on, as they are (the varied ones it leaves for stage 1), folds the patches of each as `pixel_shuffle` does, and
finds the matrix that takes them nearest to the mean embedding of the English name in the language model, plus that of
its kind where things are asked for it, with a ridge. So an image begins as words that the language model knows. Run
examples/real/pieces.py and examples/real/draw.py first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

LAYER, SIDE = -5, 112  # as the recipes say
RIDGE = 0.2  # share of the mean square of a drawing's features; 0.05 and 0.01 find as many names
SCALE = 3.0  # what the ridge shrinks is stretched back to about the spread of the embeddings


@torch.inference_mode()
def features(files: list[Path], tower: Path) -> torch.Tensor:
    """(N, P, V) patches of each drawing at LAYER, without the class token."""
    model = AutoModel.from_pretrained(tower, dtype=torch.bfloat16).eval()
    processor = AutoImageProcessor.from_pretrained(tower, size={"height": SIDE, "width": SIDE})
    found = []
    for start in range(0, len(files), 64):
        images = [Image.open(file).convert("RGB") for file in files[start : start + 64]]
        pixels = processor(images, return_tensors="pt")["pixel_values"].to(torch.bfloat16)
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        found.append(states[LAYER][:, 1:].float())
    return torch.cat(found)


@torch.inference_mode()
def embeddings(names: list[str], language_model: Path) -> torch.Tensor:
    """(N, D) mean embedding of the tokens of each name, less the mean of all."""
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    table = AutoModelForCausalLM.from_pretrained(language_model).get_input_embeddings().weight
    found = torch.stack([table[tokenizer(f" {name}", add_special_tokens=False)["input_ids"]].mean(0) for name in names])
    return found - found.mean(0)


def ridge(patches: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(N, P, V) and (N, D) → (D, P·V): the matrix of a `pixel_shuffle` that folds all patches into one token.

    There are fewer drawings than numbers in one, so the system is solved in as many unknowns as there are drawings.
    """
    spread = patches.std((0, 1))  # some features are a hundred times others
    flat = (patches / spread).flatten(1)
    products = flat @ flat.T
    products.diagonal().add_(RIDGE * products.diagonal().mean())
    weight = SCALE * (flat.T @ torch.linalg.solve(products, targets))
    return (weight / spread.repeat(patches.shape[1])[:, None]).T.contiguous()


def targets(rows: list[dict[str, str]], kinds: dict[str, str], language_model: Path) -> torch.Tensor:
    """(N, D) where each drawing should come to lie: its name and, if its thing has one, its kind."""
    found = embeddings([row["caption"] for row in rows], language_model).clone()
    words = [kinds.get(Path(row["image"]).stem) for row in rows]
    known = [number for number, word in enumerate(words) if word]
    found[known] += embeddings([words[number] for number in known], language_model)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/real"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("data/real/projector"), help="default: %(default)s")
    parser.add_argument("--tower", type=Path, help="default: the folder dinov2 in DATA")
    given = parser.parse_args()
    lines = (given.data / "things/names_train_en.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "-varied/" not in row["image"]]
    patches = features([given.data / "things" / row["image"] for row in rows], given.tower or given.data / "dinov2")
    kinds = json.loads((given.data / "things/kinds_train.json").read_text(encoding="utf-8"))
    wanted = targets(rows, kinds, given.data / "smollm2")
    weight = ridge(patches, wanted)
    near = functional.cosine_similarity(patches.flatten(1) @ weight.T, wanted).mean().item()
    given.out.mkdir(parents=True, exist_ok=True)
    unfinished = given.out / "unfinished"
    save_file({"projector.linear.weight": weight}, unfinished, metadata={"format": "pt"})
    unfinished.replace(given.out / "model.safetensors")  # whole or not there
    print(f"{given.out}: written; over {len(rows)} drawings the mean cosine to name and kind is {near:.2f}.")


if __name__ == "__main__":
    main()
