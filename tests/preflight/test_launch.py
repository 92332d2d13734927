"""What `accelerate launch` and its config files say about the processes, and what a device then holds."""

from __future__ import annotations

import pytest
import yaml

from support.paths import accelerate_config
from vlm_sft.base.errors import UserError
from vlm_sft.preflight.launch import Launch, read_launch


@pytest.fixture
def config(tmp_path):
    def write(**keys):
        path = tmp_path / "accelerate.yaml"
        path.write_text(yaml.safe_dump(keys), encoding="utf-8")
        return str(path)

    return write


def test_the_config_files_that_ship():
    assert read_launch(str(accelerate_config("cpu"))) == Launch()
    assert read_launch(str(accelerate_config("ddp"))) == Launch(8, "DDP")
    assert read_launch(str(accelerate_config("fsdp2"))) == Launch(8, "FSDP", 3)
    assert str(Launch()) == "one process" and str(Launch(8, "DDP")) == "8 processes, DDP"


@pytest.mark.parametrize(
    ("keys", "launch", "words"),
    [
        (
            {"distributed_type": "DEEPSPEED", "num_processes": 4, "deepspeed_config": {"zero_stage": 3}},
            Launch(4, "DeepSpeed", 3),
            "4 processes, DeepSpeed ZeRO-3",
        ),
        (
            {
                "distributed_type": "DEEPSPEED",
                "num_processes": 4,
                "deepspeed_config": {
                    "zero_stage": 2,
                    "offload_optimizer_device": "cpu",
                    "offload_param_device": "none",
                },
            },
            Launch(4, "DeepSpeed", 2, ("optimizer",)),
            "4 processes, DeepSpeed ZeRO-2, optimizer offloaded to the host",
        ),
        (
            {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_version": 2}},
            Launch(2, "FSDP", 3),
            "2 processes, FSDP, sharing as ZeRO-3",
        ),
        (
            {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_reshard_after_forward": False}},
            Launch(2, "FSDP", 2),
            "2 processes, FSDP, sharing as ZeRO-2",
        ),
        ({"distributed_type": "DEEPSPEED"}, Launch(1, "DeepSpeed", 2), "one process, DeepSpeed ZeRO-2"),
        ({"distributed_type": "NO"}, Launch(), "one process"),
    ],
)
def test_config_files_of_people(keys, launch, words, config):
    assert read_launch(config(**keys)) == launch
    assert str(launch) == words


def test_the_variables_that_accelerate_sets():
    assert read_launch(environment={}) == Launch()
    assert read_launch(environment={"WORLD_SIZE": "2"}) == Launch(2, "DDP")
    zero = {"WORLD_SIZE": "8", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert read_launch(environment=zero) == Launch(8, "DeepSpeed", 3)
    zero["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] = "cpu"
    assert read_launch(environment=zero).offloads == ("optimizer",)
    fsdp = {"WORLD_SIZE": "8", "ACCELERATE_USE_FSDP": "true", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    assert read_launch(environment=fsdp) == Launch(8, "FSDP", 3)


def test_what_is_shared_out():
    sizes = ("weights", "gradients", "optimizer")
    assert [Launch(4, "DDP").share(what, 100) for what in sizes] == [100, 100, 100]
    assert [Launch(4, "DeepSpeed", 1).share(what, 100) for what in sizes] == [100, 100, 25]
    assert [Launch(4, "DeepSpeed", 2).share(what, 100) for what in sizes] == [100, 25, 25]
    assert [Launch(4, "FSDP", 3).share(what, 101) for what in sizes] == [26, 26, 26]
    assert [Launch(4, "DeepSpeed", 3, ("optimizer",)).share(what, 100) for what in sizes] == [25, 25, 0]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"num_processes": 2}, "it has no distributed_type; `accelerate config` writes such files"),
        ({"distributed_type": "TPU"}, "distributed_type TPU is not estimated; NO, MULTI_GPU"),
        ({"distributed_type": "NO", "num_processes": 0}, "num_processes must be a number above zero, not 0"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "zero.json"}},
            "it leaves ZeRO to zero.json, which is not read here",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": "三"}},
            "zero_stage must be 0, 1, 2 or 3, not '三'",
        ),
        ({"distributed_type": "FSDP", "fsdp_config": ["zero"]}, r"fsdp_config must be a mapping, not \['zero'\]"),
    ],
)
def test_other_files_are_refused(keys, sentence, config):
    with pytest.raises(UserError, match=sentence):
        read_launch(config(**keys))


@pytest.mark.parametrize("name", ["cp_size", "sp_size", "tp_size"])
def test_a_config_that_shares_single_rows_out_is_refused(config, name):
    keys = {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_version": 2}}
    split = {"parallelism_config_dp_shard_size": 2, f"parallelism_config_{name}": 2}
    with pytest.raises(UserError, match=rf"accelerate.yaml: parallelism_config: {name} is 2, but .* not supported"):
        read_launch(config(**keys, parallelism_config=split))
    assert read_launch(config(**keys, parallelism_config={**split, f"parallelism_config_{name}": 1})).kind == "FSDP"
