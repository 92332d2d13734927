"""Does an engine learn what one process learns? Trains the same steps with and without it, compares the two bundles.

    python benchmarks/engines.py accelerate_configs/fsdp2.yaml --processes 2
    python benchmarks/engines.py accelerate_configs/zero3.yaml --processes 2 --cpu

Both runs train stage 2 of the quickstart (a projector and LoRA beside a frozen tower, resampler and language model) on
the same global batches, in fp32. `--cpu` is for DeepSpeed, which has a CPU accelerator (extra `deepspeed`, and a C++
compiler); accelerate enters FSDP on GPUs alone, and tests/end_to_end/test_distributed.py does it on CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
GLOBAL_BATCH = 8


def main() -> None:
    """Runs both, prints the comparison as a table and as JSON, and fails where they are not alike."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="an accelerate config")
    parser.add_argument("overrides", nargs="*", help="key.path=value of the recipe, for both runs")
    parser.add_argument("--processes", type=int, default=1, help="how many the engine has (default 1)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default 20)")
    parser.add_argument("--cpu", action="store_true", help="leave the GPUs alone")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference of a loss (default 0.001)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, one, many = (Path(folder) / name for name in ("data", "one", "many"))
        script = ROOT / "examples" / "digitscenes" / "digitscenes.py"
        scenes = ["--scenes", "400", "50", "50"]
        subprocess.run([sys.executable, str(script), "--out", str(data), *scenes], check=True, cwd=ROOT)
        alone = ROOT / "accelerate_configs" / ("cpu.yaml" if given.cpu else "single_gpu.yaml")
        train(given, one, data, alone, 1, [])
        # Without a GPU nothing else says which collectives DeepSpeed has, and accelerate would count one process.
        train(given, many, data, given.config.resolve(), given.processes, ["sft.ddp_backend=gloo"] if given.cpu else [])
        result = compare(one, many)
    for name, value in result.items():
        print(f"{name:28} {value}")
    print(json.dumps({"config": given.config.stem, "processes": given.processes, "steps": given.steps, **result}))
    sys.exit(0 if result["same_keys_and_shapes"] and result["loss_difference"] <= given.tolerance else 1)


def train(given: argparse.Namespace, out: Path, data: Path, config: Path, processes: int, more: list[str]) -> None:
    """One run of `accelerate launch`, into a folder of its own."""
    sources = json.dumps([{"path": str(data / "questions_train.jsonl"), "format": "vqa"}])
    overrides = [
        f"sft.output_dir={out}", f"sft.max_steps={given.steps}", f"data.train={sources}", "data.eval=[]",
        "data.sampling=proportional", "init_from=null", f"sft.per_device_train_batch_size={GLOBAL_BATCH // processes}",
        "sft.logging_steps=1", "sft.eval_strategy=no", "sft.train_sampling_strategy=sequential",
        *given.overrides, *more,
    ]  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(processes), "--main_process_port", "0"]
    on_cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if given.cpu else {}
    found = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **on_cpu, "PYTHONPATH": os.pathsep.join(found)}
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(
        [*command, "-m", "vlm_sft.train", "quickstart_stage2", *overrides], check=True, cwd=ROOT, env=environment
    )


def compare(one: Path, many: Path) -> dict[str, object]:
    """Keys, shapes, largest differences of a weight and of a loss, and each run's own parity gate."""
    ours, theirs = (
        {**load_file(f / "trained.safetensors"), **load_file(f / "adapter_model.safetensors")} for f in (one, many)
    )
    same = {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    moved = max(float(tensor.abs().max()) for tensor in ours.values())
    losses = [
        [row["loss"] for row in json.loads((folder / "metrics.json").read_text(encoding="utf-8")) if "loss" in row]
        for folder in (one, many)
    ]
    parity = [json.loads((folder / "bundle.json").read_text(encoding="utf-8"))["parity"] for folder in (one, many)]
    return {
        "same_keys_and_shapes": same,
        "weight_difference": max(float((theirs[n] - t).abs().max()) for n, t in ours.items()) if same else None,
        "largest_weight": moved,
        "loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "first_and_last_loss": [losses[0][0], losses[0][-1]],
        "parity_one": parity[0]["max_difference"],
        "parity_many": parity[1]["max_difference"],
    }


if __name__ == "__main__":
    main()
