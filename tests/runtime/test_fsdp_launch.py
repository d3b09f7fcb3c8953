"""What `accelerate launch --use_fsdp` says, and what of it is done."""

import os

import pytest
from accelerate.utils import DistributedType

from finetune.config import Config, FastConfig, TrainConfig
from finetune.runtime.accelerator import create_accelerator
from finetune.runtime.fsdp_launch import describe_settings, follow_launcher

# What `accelerate launch --use_fsdp --fsdp_version 2` sets where nothing else is said.
DEFAULTS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}


@pytest.fixture
def launched(monkeypatch):
    """Set what the launcher sets, with these differences."""

    def launch(**others: str) -> None:
        for name, value in {**DEFAULTS, **others}.items():
            monkeypatch.setenv(name, value)

    return launch


def test_without_the_launcher_the_configuration_stays():
    config = Config()
    assert follow_launcher(config) is config
    assert list(describe_settings(config)) == []


def test_the_launcher_means_the_key(launched):
    launched()
    assert follow_launcher(Config()).train == TrainConfig(sharding="base")


def test_what_is_not_done_is_named(launched):
    launched()
    (loading,) = describe_settings(Config())
    assert (loading.name, loading.requested, loading.actual) == (
        "FSDP cpu_ram_efficient_loading",
        "true",
        "false",
    )
    others = {"FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    launched(**others, FSDP_CPU_RAM_EFFICIENT_LOADING="false")
    assert {choice.name for choice in describe_settings(Config())} == {
        "FSDP reshard_after_forward",
        "FSDP activation_checkpointing",
    }
    checkpointing = Config(train=TrainConfig(gradient_checkpointing=True))
    assert [choice.name for choice in describe_settings(checkpointing)] == ["FSDP reshard_after_forward"]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"FSDP_VERSION": "1"}, "asks for FSDP 1, .* add --fsdp_version 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params true: .* leave it out"),
    ],
)
def test_what_cannot_be_done_is_refused(launched, others, message):
    launched(**others)
    with pytest.raises(ValueError, match=message):
        follow_launcher(Config())


def test_a_configuration_that_cannot_be_sharded_is_refused(launched):
    launched()
    with pytest.raises(ValueError, match="leave fast"):
        follow_launcher(Config(fast=FastConfig(lora=False)))


def test_accelerate_makes_no_fsdp_of_its_own(launched, tmp_path):
    launched()
    accelerator = create_accelerator(Config(output_dir=str(tmp_path)), "no")
    assert accelerator.distributed_type is DistributedType.NO
    assert "ACCELERATE_USE_FSDP" not in os.environ
