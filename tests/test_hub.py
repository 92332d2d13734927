"""A bundle goes to the Hub and comes back the same, over real HTTP; what goes wrong is one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hub_server import TOKEN, HubServer

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
def trained(hub, caption_file, tmp_path_factory) -> tuple[Path, str]:
    """A run of two steps on pieces of that Hub that pushes each save and its end; its bundle and all that it said."""
    folder = tmp_path_factory.mktemp("run")
    recipe = {
        "stack": {
            "vision_tower": {"pretrained": "tiny/blip2"},
            "resampler": {"type": "qformer", "pretrained": "tiny/blip2"},
            "projector": {"type": "linear"},
            "language_model": {"pretrained": "tiny/llama"},
        },
        "chat_template": "plain",
        "train": {"projector": 1.0e-2},
        "lora": {"r": 2},
        "data": {name: [{"path": caption_file, "format": "caption"}] for name in ("train", "eval", "test")},
        "sft": {
            "output_dir": str(folder / "bundle"), "max_steps": 2, "per_device_train_batch_size": 4, "bf16": False,
            "gradient_checkpointing": False, "report_to": "none", "save_steps": 1, "dataloader_num_workers": 0,
            "learning_rate": 1.0e-2,
        },
        "hub": {"repo_id": "me/lora", "private": True, "every_save": True, "license": "apache-2.0",
                "language": ["zh", "en"], "message": "The first"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = run(hub, folder / "home", "-m", "vlm_sft.train", str(folder / "recipe.yaml"))
    assert done.returncode == 0, done.stderr
    return folder / "bundle", done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_pushes_its_saves_and_its_end(hub, trained):
    bundle, said = trained
    repo, files = hub.repos["me/lora"], hub.files("me/lora")
    assert repo.private
    assert repo.messages[1] == "Step 1: The first" and repo.messages[-1] == "The first"
    assert said.count(f"Pushed: {hub.endpoint}/me/lora/commit/") == len(repo.messages) - 1
    # "initial commit", step 1, step 2 unless step 1 was still on its way, the end
    assert len(repo.messages) == 4 - said.count("Step 2 is not pushed: an earlier checkpoint is still on its way")
    wanted = {"adapter_config.json", "adapter_model.safetensors", "bundle.json", "trained.safetensors", "curves.png"}
    assert wanted <= set(files)
    assert {"optimizer.pt", "trainer_state.json", "checkpoint-2"} <= {path.name for path in bundle.iterdir()} | {
        path.name for path in (bundle / "checkpoint-2").iterdir()
    }
    strange = ("checkpoint", "optimizer", "scheduler", "rng_state", "trainer_state", "training_args", "model.", "runs")
    assert not [name for name in files if name.startswith(strange)]
    for name in ("trained.safetensors", "adapter_model.safetensors"):
        assert files[name] == (bundle / name).read_bytes()


@pytest.mark.slow
def test_what_is_pushed_names_bases_and_no_folder_of_this_machine(hub, trained):
    bundle, _ = trained
    files = hub.files("me/lora")
    _, head, body = files["README.md"].decode().split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["pipeline_tag"] == "image-text-to-text" and head["license"] == "apache-2.0"
    assert head["base_model"] == ["tiny/blip2", "tiny/llama"] and head["base_model_relation"] == "adapter"
    assert head["language"] == ["zh", "en"]
    assert 'vlm_sft.load("me/lora")' in body
    for section in ("Stages", "Frozen pieces", "Data", "Validation at step 2", "Parity", "Curves", "Recipe"):
        assert f"\n## {section}\n" in body
    commits = {name: hub.repos[f"tiny/{name}"].branches["main"] for name in ("blip2", "llama")}
    pieces = json.loads(files["bundle.json"])["pieces"]
    assert pieces["vision_tower"]["commit"] == commits["blip2"]
    assert pieces["language_model"]["commit"] == commits["llama"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tiny/llama"
    for name, data in files.items():
        assert str(bundle.parent).encode() not in data, name


@pytest.mark.slow
def test_a_pushed_bundle_loads_elsewhere_with_equal_logits(hub, trained, tmp_path):
    bundle, _ = trained
    before = bytes_of(bundle)
    pushed = run(hub, tmp_path / "home", "-m", "vlm_sft.cli", "push", str(bundle), "me/again", "--revision", "v1")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.startswith(f"{hub.endpoint}/me/again/commit/")
    assert bytes_of(bundle) == before
    assert list(bundle.parent.glob(".vlm-sft-push-*")) == []
    hub.repos["tiny/llama"].commit("main", {}, "the branch moved on: the recorded commit must be asked for")
    loaded = run(hub, tmp_path / "elsewhere", "-c", COMPARE, "me/again@v1", str(bundle))
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == "equal"
