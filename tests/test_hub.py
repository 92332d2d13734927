"""A bundle goes to the Hub and comes back the same, over real HTTP; what goes wrong is one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hub_server import TOKEN, HubServer

TRAIN = """
import sys
import torch
from vlm_sft import build_stack, load_recipe, lora_config, save_bundle
from vlm_sft.adapters import add_adapter
from vlm_sft.bundle import Provenance

recipe = load_recipe(sys.argv[1])
stack = build_stack(recipe)
model = add_adapter(stack.model, lora_config(recipe, stack.model))
stack.plan.apply(model)
generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
save_bundle(sys.argv[2], model, stack.processor, stack.plan, Provenance(recipe, stack.pieces))
"""
COMPARE = """
import sys
import torch
import vlm_sft

def logits(bundle):
    model, processor = vlm_sft.load(bundle)
    ids = torch.tensor([[1, *[processor.image_token_id] * processor.num_image_tokens, 40, 41]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits

assert torch.equal(logits(sys.argv[1]), logits(sys.argv[2]))
print("equal")
"""


def run(hub: HubServer, home: Path, *arguments: str, token: str | None = TOKEN) -> subprocess.CompletedProcess:
    """A fresh Python that uses this Hub."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**keep, **hub.environment(home, token), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def hub(pieces):
    """A Hub that has the tiny pieces."""
    with HubServer() as server:
        for name in ("blip2", "llama"):
            server.add(f"tiny/{name}", pieces[name])
        yield server


@pytest.fixture(scope="module")
def bundle(hub, tmp_path_factory) -> Path:
    """A bundle with an adapter, of pieces on that Hub; and what must stay at home."""
    import yaml

    folder = tmp_path_factory.mktemp("hub")
    recipe = {
        "stack": {
            "vision_tower": {"pretrained": "tiny/blip2"},
            "resampler": {"type": "qformer", "pretrained": "tiny/blip2"},
            "projector": {"type": "linear"},
            "language_model": {"pretrained": "tiny/llama"},
        },
        "chat_template": "plain",
        "train": {"projector": 1.0e-3},
        "lora": {"r": 2},
        "data": {"train": [{"path": "data/captions.json", "format": "caption"}]},
        "sft": {"output_dir": "out", "bf16": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = run(hub, folder / "home", "-c", TRAIN, str(folder / "recipe.yaml"), str(folder / "bundle"))
    assert done.returncode == 0, done.stderr
    (folder / "bundle" / "optimizer.pt").write_bytes(b"states")
    (folder / "bundle" / "trainer_state.json").write_text("{}")
    (folder / "bundle" / "checkpoint-2").mkdir()
    (folder / "bundle" / "checkpoint-2" / "config.json").write_text("{}")
    return folder / "bundle"


@pytest.mark.slow
def test_a_pushed_bundle_loads_elsewhere_with_equal_logits(hub, bundle, tmp_path):
    before = bytes_of(bundle)
    pushed = run(hub, tmp_path / "home", "-m", "vlm_sft.cli", "push", str(bundle), "me/lora", "--private")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.startswith(f"{hub.endpoint}/me/lora/commit/")
    assert bytes_of(bundle) == before
    files = hub.files("me/lora")
    assert hub.repos["me/lora"].private
    assert {"adapter_config.json", "adapter_model.safetensors", "bundle.json", "trained.safetensors"} <= set(files)
    assert not [name for name in files if name.startswith(("checkpoint", "optimizer", "trainer_state", "model."))]
    assert 'vlm_sft.load("me/lora")' in files["README.md"].decode()
    loaded = run(hub, tmp_path / "elsewhere", "-c", COMPARE, "me/lora", str(bundle))
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == "equal"
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tiny/llama"
