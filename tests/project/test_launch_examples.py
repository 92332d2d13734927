"""The Slurm script and the Kubernetes file start what they say, where nothing of Slurm or Kubernetes is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import time
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from support.paths import ROOT
from vlm_sft.base.assets import recipe_path

LAUNCH = ROOT / "examples" / "launch"
SLURM = LAUNCH / "slurm.sh"

# What stands in for Slurm: srun runs its command here, scontrol says what it was asked, accelerate waits to be ended.
STANDINS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "scontrol": '[ "$1" = show ] && echo node-a && echo node-b || echo "$@" >> "$SEEN/scontrol"',
    "accelerate": """trap 'echo stopped > "$SEEN/stopped"; exit 143' TERM
printf '%s\\n' "$@" > "$SEEN/arguments.part" && mv "$SEEN/arguments.part" "$SEEN/arguments"
[ -n "${ENDS:-}" ] && exit "$ENDS"
while true; do sleep 0.1; done""",
}


@pytest.fixture
def slurm(tmp_path):
    """Starts the script as Slurm does on the second of two machines; returns the process and what was seen."""
    for name, body in STANDINS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        path.chmod(0o755)
    job = {"SLURM_JOB_ID": "70123", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2",
           "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "8", "SEEN": str(tmp_path)}  # fmt: skip

    def start(**more: str) -> subprocess.Popen:
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", str(SLURM), "ziya_stage2", "sft.max_steps=7"]
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **job, "PATH": path, **more})

    return start


def check_launch(arguments: list[str], rank: int) -> Namespace:
    """The launcher takes the arguments; config, module and recipe are there, and the run is one that goes on."""
    args = launch_command_parser().parse_args(arguments)
    assert (ROOT / args.config_file).is_file()
    assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 16, rank)
    assert args.module and importlib.util.find_spec(args.training_script)
    assert "--resume" in args.training_script_args
    return args


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse_and_may_be_executed(path):
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert os.access(path, os.X_OK)


def test_slurm_starts_a_launcher_on_each_machine(slurm, tmp_path):
    assert slurm(ENDS="3").wait(60) == 3, "the job fails with the run"
    command, *arguments = (tmp_path / "arguments").read_text(encoding="utf-8").splitlines()
    args = check_launch(arguments, rank=1)
    assert command == "launch"
    assert args.main_process_ip == "node-a" and args.main_process_port == 30123
    assert args.training_script_args[-2:] == ["ziya_stage2", "sft.max_steps=7"]
    assert not (tmp_path / "scontrol").exists(), "what failed is not queued again"


def test_slurm_passes_sigterm_on_and_queues_the_job_again(slurm, tmp_path):
    job = slurm()
    deadline = time.monotonic() + 60
    while not (tmp_path / "arguments").exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0
    assert (tmp_path / "stopped").is_file(), "the run was told"
    assert (tmp_path / "scontrol").read_text(encoding="utf-8") == "requeue 70123\n"


def test_kubernetes_pods_find_the_first_and_start_the_same_run():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["accelerate", "launch"]
    arguments = [text.replace("$(JOB_COMPLETION_INDEX)", "1") for text in container["args"]]
    args = check_launch(arguments, rank=1)
    assert args.num_machines == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert args.num_processes == 2 * container["resources"]["limits"]["nvidia.com/gpu"]
    # Kubernetes calls the pods of an indexed Job JOB-0, JOB-1, … under the Service that `subdomain` names.
    name = job["metadata"]["name"]
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["selector"] == {"job-name": name}
    assert args.main_process_ip == f"{name}-0.{pod['subdomain']}"
    recipe = next(text for text in args.training_script_args if text.endswith(".yaml"))
    assert (ROOT / recipe) == recipe_path(Path(recipe).stem)
    seconds = {entry["name"]: entry["value"] for entry in container["env"]}["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert int(seconds) < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert json.dumps(job), "plain data, as the API server wants it"
