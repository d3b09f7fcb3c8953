"""`accelerate launch --use_fsdp`: what it sets in the environment, and what of it this program does.

The program shards the frozen base itself (`train.sharding base`). Accelerate's FSDP would shard the adapter
too.
"""

import os
from collections.abc import Iterator
from dataclasses import replace

from accelerate.utils import parse_flag_from_env

from finetune.config import Config
from finetune.config_checks import check_config
from finetune.runtime.choice import Choice


def follow_launcher(config: Config) -> Config:
    """The configuration, with `train.sharding base` if `accelerate launch --use_fsdp` started this process.

    Raises:
        ValueError: it asks for FSDP1 or to keep parameters in CPU memory, or the configuration cannot be
            sharded.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return config
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(
            f"accelerate launch --use_fsdp asks for FSDP {version}, and the base is sharded by FSDP 2: add "
            "--fsdp_version 2 (in its config file fsdp_version: 2)"
        )
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise ValueError(
            "accelerate launch --fsdp_offload_params true: the base is not kept in CPU memory; leave it out, "
            "and for less memory set model.quantization to nf4 or start more processes"
        )
    config = replace(config, train=replace(config.train, sharding="base"))
    check_config(config)
    return config


def describe_settings(config: Config) -> Iterator[Choice]:
    """What `accelerate launch --use_fsdp` sets that this program does otherwise."""
    if "FSDP_VERSION" not in os.environ:
        return
    actual = {
        "RESHARD_AFTER_FORWARD": ("true", "a layer's weights are freed as soon as it has computed"),
        "AUTO_WRAP_POLICY": ("TRANSFORMER_BASED_WRAP", "each decoder layer is gathered by itself"),
        "STATE_DICT_TYPE": ("FULL_STATE_DICT", "a checkpoint has the adapter alone, whole"),
        "FORWARD_PREFETCH": ("false", "the next layer is gathered when it is due"),
        "CPU_RAM_EFFICIENT_LOADING": ("false", "each process reads all layers, one at a time"),
        "ACTIVATION_CHECKPOINTING": (
            str(config.train.gradient_checkpointing).lower(),
            "train.gradient_checkpointing says it",
        ),
        "ACTIVATION_CHECKPOINTING_OFFLOAD": ("false", "activations stay on their device"),
        "IGNORED_MODULES": ("the adapter", "the adapter alone is whole on each process"),
    }
    for name, (does, reason) in actual.items():
        asked = os.environ.get(f"FSDP_{name}", does)
        if asked != does:
            yield Choice(f"FSDP {name.lower()}", asked, does, reason)
