"""Every accelerate config is read by accelerate's own launcher and becomes the plugin that it means: a typo fails."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from support.paths import ROOT

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
NAMES = "cpu cpu_2 ddp fsdp2 fsdp2_qlora multi_node_fsdp2 multi_node_zero3 single_gpu zero2 zero3".split()

by_name = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@pytest.fixture
def launched(monkeypatch):
    """Arguments with which `accelerate launch --config_file PATH -m vlm_sft.train RECIPE` would start processes."""

    def launch_only_in_words(path: Path) -> Namespace:
        caught: list[Namespace] = []
        for launcher in ("simple_launcher", "multi_gpu_launcher", "deepspeed_launcher"):
            monkeypatch.setattr(f"accelerate.commands.launch.{launcher}", caught.append)
        first = ["--main_process_ip", "10.0.0.1"] if "multi_node" in path.stem else []
        given = ["--config_file", str(path), "--num_cpu_threads_per_process", "1", *first]
        launch_command(launch_command_parser().parse_args([*given, "-m", "vlm_sft.train", "quickstart_stage1"]))
        return caught[0]

    return launch_only_in_words


def test_all_ship():
    assert [path.stem for path in CONFIGS] == NAMES


@by_name
def test_every_key_is_known_to_accelerate(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    load_config_from_file(str(path))  # refuses unknown keys at the top
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(content.get(section, {})) <= set(known), section
    assert content["mixed_precision"] == "no", "the recipe decides; two answers would be one too many"
    assert path.read_text(encoding="utf-8").startswith("# "), "says in a line what it is for"


@by_name
def test_the_launcher_starts_as_many_processes_as_it_says(path, launched):
    args, content = launched(path), yaml.safe_load(path.read_text(encoding="utf-8"))
    assert args.num_processes == content["num_processes"]
    assert args.num_processes % args.num_machines == 0
    kind = content["distributed_type"]
    assert (args.use_fsdp, args.use_deepspeed) == (kind == "FSDP", kind == "DEEPSPEED")


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_qlora", "multi_node_fsdp2"])
def test_fsdp_becomes_the_plugin_that_is_meant(name, launched):
    args = launched(ROOT / "accelerate_configs" / f"{name}.yaml")
    with patch_environment(**prepare_multi_gpu_env(args)):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    assert not plugin.transformer_cls_names_to_wrap, "the trainer finds the layers"


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3), ("multi_node_zero3", 3)])
def test_deepspeed_becomes_the_plugin_that_is_meant(name, stage, launched):
    args = launched(ROOT / "accelerate_configs" / f"{name}.yaml")
    _, environment = prepare_deepspeed_cmd_env(args)
    with patch_environment(**environment):
        plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == stage and not plugin.zero3_init_flag
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto", "transformers puts the recipe's in"
    assert plugin.deepspeed_config["zero_optimization"]["offload_optimizer"]["device"] == "none"


@pytest.mark.parametrize("name", ["multi_node_fsdp2", "multi_node_zero3"])
def test_machines_find_each_other(name, launched):
    args = launched(ROOT / "accelerate_configs" / f"{name}.yaml")
    prepare = prepare_deepspeed_cmd_env if args.use_deepspeed else prepare_multi_gpu_env
    prepare(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 0)
    assert args.rdzv_backend == "static" and args.rdzv_endpoint == "10.0.0.1:29500"
    assert "RANK" not in os.environ
