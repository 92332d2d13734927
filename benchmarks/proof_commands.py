"""The folder of `real_proofs.py`, and the commands that users type, run in it and measured."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ("What is this?", "这是什么？")
STEPS, ROWS, BATCH = 4, 16, 4
TRAIN = [sys.executable, "-m", "vlm_sft.train"]
TOOL = [str(Path(sys.executable).with_name("vlm-sft"))]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
# What two pictures are taught to be called, in the two languages of QUESTIONS.
NAMES, TAUGHT_STEPS = ("a red kite", "一只蓝色的鸟"), 16


class Ran(NamedTuple):
    """What a command did: exit code, all it said, seconds, CPU seconds with its children, MB of the largest process."""

    code: int
    text: str
    wall: float
    cpu: float
    peak: float


class Proofs:
    """The folder of one round of proofs, and the commands in it."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.out, self.given = given.out.resolve(), given
        self.out.mkdir(parents=True, exist_ok=True)
        self.cpu = self.peak = 0.0
        self.commands: list[str] = []
        self.pictures = sorted(given.pictures.rglob("*.png"))[
            :: max(1, len(list(given.pictures.rglob("*.png"))) // ROWS)
        ]

    def run(self, *command: str | Path, fails: bool = False, kill: Callable[[], bool] | None = None) -> Ran:
        """Runs a command to its end, or until `kill` says so; one that fails is an error unless it may."""
        words = list(map(str, command))
        self.commands.append(" ".join(words).replace(sys.executable, "python").replace(str(self.out), "OUT"))
        began, log = time.monotonic(), self.out / "log.txt"
        with log.open("w") as file:
            process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
            while kill is not None and process.poll() is None:
                if kill():
                    os.killpg(process.pid, signal.SIGKILL)
                    break
                time.sleep(0.05)
            if process.returncode is None:
                _, status, used = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                self.cpu += used.ru_utime + used.ru_stime
                self.peak = max(self.peak, used.ru_maxrss / 1e3)
            else:
                used = None
        text = log.read_text(errors="replace")
        if process.returncode and not fails and kill is None:
            raise RuntimeError(text[-2000:])
        cpu = used.ru_utime + used.ru_stime if used else 0.0
        return Ran(process.returncode, text, time.monotonic() - began, cpu, used.ru_maxrss / 1e3 if used else 0.0)

    def recipe(self, name: str, **changes: Any) -> Path:
        """Writes a recipe; `sft` is merged, everything else replaced. Its bundle is `OUT/NAME`."""
        rows = self.out / "rows.jsonl"
        if not rows.exists():
            lines = [
                {
                    "image": str(path.relative_to(self.given.pictures)),
                    "question": QUESTIONS[i % 2],
                    "answer": f"{path.parent.name} {path.stem}",
                }
                for i, path in enumerate(self.pictures[:ROWS])
            ]
            rows.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        tower = {"pretrained": str(self.given.tower), "feature_layer": -3, "feature_select": "patch"}
        tower["image_size"] = self.given.image_size
        sft = {
            "output_dir": str(self.out / name), "learning_rate": 1e-3, "max_steps": STEPS, "max_length": 160,
            "per_device_train_batch_size": BATCH, "bf16": False, "activation_checkpointing": False, "report_to": "none",
            "logging_steps": 1, "save_strategy": "no", "dataloader_num_workers": 0, "use_cpu": True, "seed": 1,
        }  # fmt: skip
        made = {
            "stack": {
                "vision_tower": tower,
                "projector": {"type": "mlp"},
                "language_model": {"pretrained": str(self.given.language_model)},
            },
            "chat_template": "chatml",
            "train": {"projector": 1e-3},
            "lora": {"r": 8},
            "data": {"train": [{"path": str(rows), "format": "vqa", "images": str(self.given.pictures)}]},
            **changes,
            "sft": {**sft, **changes.get("sft", {})},
        }
        path = self.out / f"{name}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in made.items() if v is not None}, allow_unicode=True))
        shutil.rmtree(self.out / name, ignore_errors=True)
        return path

    def train(self, name: str, *arguments: str, **changes: Any) -> Ran:
        """Trains a recipe."""
        return self.run(*TRAIN, self.recipe(name, **changes), *arguments)

    @property
    def bundle(self) -> Path:
        """A bundle of projector and LoRA, after stage 1's projector."""
        if not (self.out / "stage2" / "bundle.json").exists():
            self.stages()
        return self.out / "stage2"

    def stages(self) -> tuple[Ran, Ran]:
        """Stage 1, the projector alone, and stage 2, which begins with it."""
        first = self.train("stage1", lora=None)
        return first, self.train("stage2", init_from=str(self.out / "stage1"))

    @property
    def taught(self) -> Path:
        """A bundle that learned the NAMES of two pictures by heart, so that what it answers is known."""
        if not (self.out / "taught" / "bundle.json").exists():
            rows, file = [], self.out / "taught.jsonl"
            for i, name in enumerate(NAMES):
                row = {"image": str(self.pictures[i].relative_to(self.given.pictures)), "question": QUESTIONS[i]}
                rows.append(json.dumps({**row, "answer": name}, ensure_ascii=False) + "\n")
            file.write_text("".join(rows), encoding="utf-8")
            source = {"path": str(file), "format": "vqa", "images": str(self.given.pictures)}
            sft = {"max_steps": TAUGHT_STEPS, "per_device_train_batch_size": len(NAMES), "learning_rate": 3e-3}
            self.train("taught", data={"train": [source]}, sft=sft)
        return self.out / "taught"

    @contextmanager
    def server(self, folder: Path) -> Iterator[str]:
        """`transformers serve` in a folder, where models are named by their folders; gives the address."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [str(Path(sys.executable).with_name("transformers")), "serve", "--device", "cpu", "--port", str(port)]
        self.commands.append(" ".join(["transformers", *words[1:]]))
        with (self.out / "server.log").open("w") as log:
            process = subprocess.Popen(words, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
            try:
                for _ in range(1500):
                    with socket.socket() as asked:
                        if not asked.connect_ex(("127.0.0.1", port)):
                            break
                    if process.poll() is not None:
                        raise RuntimeError((self.out / "server.log").read_text()[-2000:])
                    time.sleep(0.2)
                yield f"http://127.0.0.1:{port}/v1"
            finally:
                process.terminate()
                _, _, used = os.wait4(process.pid, 0)
                process.returncode = 0
                self.cpu += used.ru_utime + used.ru_stime
                self.peak = max(self.peak, used.ru_maxrss / 1e3)

    def losses(self, name: str) -> list[float]:
        """What a run logged, step by step."""
        logs = json.loads((self.out / name / "metrics.json").read_text(encoding="utf-8"))
        return [log["loss"] for log in logs if "loss" in log]

    def difference(self, one: str, other: str) -> float:
        """Largest difference of a trained weight between two bundles."""
        worst = 0.0
        for file in ("trained.safetensors", "adapter_model.safetensors"):
            ours, theirs = load_file(self.out / one / file), load_file(self.out / other / file)
            assert ours.keys() == theirs.keys()
            worst = max([worst, *(float((ours[n] - theirs[n]).abs().max()) for n in ours)])
        return worst
