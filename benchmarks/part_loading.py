"""Peak memory of taking the vision tower out of a large checkpoint, against reading the whole checkpoint.

Writes the same random tensors in three layouts (one safetensors file, safetensors shards, a LAVIS `.pth`), reads each
in fresh processes, and prints how much memory a process took at its peak beyond what its imports had taken.

    python benchmarks/part_loading.py --gigabytes 1.5
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

import torch

LAYOUTS = ("safetensors", "shards", "pth")
DTYPE = torch.float16
SIDE = 2048  # of the matrices that stand for the language model: 8 MB each


def main(arguments: list[str] | None = None) -> list[dict[str, float | str]]:
    """Writes, measures and prints one row for each layout; returns the rows (megabytes)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.5, help="size of the checkpoint")
    parser.add_argument("--width", type=int, default=704, help="width of the tower, a multiple of 88")
    parser.add_argument("--layers", type=int, default=12, help="layers of the tower")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--folder", help="where to write; needs room for one checkpoint; default a temporary folder")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "PATH"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.measure:
        print(json.dumps(measure(*given.measure)))
        return []
    rows = []
    print("| layout | checkpoint MB | tower MB | peak, whole | peak, tower alone | ratio |\n|---|---|---|---|---|---|")
    for layout in given.layouts:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            path, sizes = WRITERS[layout](Path(folder), given)
            peaks = {what: fresh_process(what, path) for what in ("whole", "part")}
        row = {"layout": layout, **sizes, **peaks, "ratio": peaks["whole"] / peaks["part"]}
        rows.append(row)
        print(
            f"| {layout} | " + " | ".join(f"{row[key]:.0f}" for key in ("checkpoint", "tower", "whole", "part")), end=""
        )
        print(f" | {row['ratio']:.1f} |", flush=True)
    return rows


def make_tower(given: argparse.Namespace) -> torch.nn.Module:
    """BLIP-2's vision tower with random weights; heads of the width that EVA's have, so that a `.pth` tells them."""
    from transformers import Blip2VisionConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2VisionModel

    config = Blip2VisionConfig(
        hidden_size=given.width,
        intermediate_size=4 * given.width,
        num_hidden_layers=given.layers,
        num_attention_heads=given.width // 88,
        image_size=224,
        patch_size=14,
    )
    return Blip2VisionModel(config).to(DTYPE)


def rest(given: argparse.Namespace) -> dict[str, torch.Tensor]:
    """What a checkpoint holds beside the tower: as many matrices as fill it, under a language model's names."""
    matrix = torch.randn(SIDE, SIDE).to(DTYPE)
    count = max(1, int(given.gigabytes * 1e9 / matrix.nbytes))
    # Copies: torch writes tensors that share their memory once.
    return {f"language_model.model.layers.{i}.mlp.up_proj.weight": matrix.clone() for i in range(count)}


def sizes_of(tower: torch.nn.Module, others: dict[str, torch.Tensor]) -> dict[str, float]:
    """Megabytes of the whole and of the tower in it."""
    own = sum(tensor.nbytes for tensor in tower.state_dict().values())
    return {"checkpoint": (own + sum(tensor.nbytes for tensor in others.values())) / 1e6, "tower": own / 1e6}


def write_safetensors(folder: Path, given: argparse.Namespace, shard: str = "100GB") -> tuple[Path, dict[str, float]]:
    """A BLIP-2 folder of transformers."""
    from huggingface_hub import save_torch_state_dict
    from transformers import Blip2Config

    tower, others = make_tower(given), rest(given)
    Blip2Config(vision_config=tower.config).save_pretrained(folder)
    state = {f"vision_model.{name}": tensor for name, tensor in tower.state_dict().items()}
    save_torch_state_dict({**state, **others}, folder, max_shard_size=shard, metadata={"format": "pt"})
    return folder, sizes_of(tower, others)


def write_shards(folder: Path, given: argparse.Namespace) -> tuple[Path, dict[str, float]]:
    """The same in about eight shards."""
    return write_safetensors(folder, given, f"{max(1, int(given.gigabytes * 1000 / 8))}MB")


def write_pth(folder: Path, given: argparse.Namespace) -> tuple[Path, dict[str, float]]:
    """A file as LAVIS writes it: its names, under `model`, beside other things."""
    from vlm_sft.pieces.layouts import LAYOUTS as KNOWN

    tower, others = make_tower(given), rest(given)
    state = dict(others)
    for name, tensor in tower.state_dict().items():
        origin = KNOWN["lavis_vision"].origin(name, "visual_encoder.", ())
        parts = tensor.chunk(3)[::2] if origin.make else (tensor,)  # query and value; keys have no bias
        state |= {theirs: part.clone() for theirs, part in zip(origin.names, parts, strict=True)}
    torch.save({"model": state, "epoch": 1}, folder / "blip2.pth")
    return folder / "blip2.pth", sizes_of(tower, others)


WRITERS: dict[str, Callable[[Path, argparse.Namespace], tuple[Path, dict[str, float]]]] = {
    "safetensors": write_safetensors,
    "shards": write_shards,
    "pth": write_pth,
}


def fresh_process(what: str, path: Path) -> float:
    """Peak of one way to read, in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(what: str, path: str) -> float:
    """Megabytes at the peak of reading all (`whole`) or the tower alone (`part`), beyond what was there before.

    Every value is used once, so that pages of a file that is mapped count as soon as they are needed.
    """
    if what == "part":
        from vlm_sft.pieces.load_parts import load_vision_tower
        from vlm_sft.pieces.part_configs import find_vision_tower
        from vlm_sft.recipe.sections import VisionTower

        before = memory("VmRSS")
        tensors = load_vision_tower(find_vision_tower(VisionTower(pretrained=path)), DTYPE).state_dict()
    else:
        from safetensors.torch import load_file

        before = memory("VmRSS")
        if path.endswith(".pth"):
            tensors = torch.load(path, map_location="cpu", weights_only=True)["model"]
        else:
            tensors = {n: t for file in sorted(Path(path).glob("*.safetensors")) for n, t in load_file(file).items()}
    for tensor in tensors.values():
        tensor.max()
    return (memory("VmHWM") - before) / 1e6


def memory(field: str) -> float:
    """A field of this process's `/proc/self/status` (Linux) in bytes: `VmRSS` now, `VmHWM` at the peak."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, f"{field} is not told here"
    return int(found[1]) * 1024.0


if __name__ == "__main__":
    main()
