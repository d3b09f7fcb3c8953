"""A share of the frozen base on each process, by PyTorch's FSDP2: `train.sharding base`.

A layer's weights are gathered from all shares while it computes, forward and backward, and freed afterwards.
The adapter is small: each process keeps all of it, and its gradient is summed as without sharding. So is an
update, to the bit.
"""

import os
import warnings
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch.distributed import new_subgroups
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from finetune.config import Config
from finetune.data.preparing.examples import Examples
from finetune.model.fast_paths import require_same_results
from finetune.model.layers_on_disk import LayersOnDisk
from finetune.model.loss import TokenLoss
from finetune.ops import lora, quantized
from finetune.ops.decoder_layer import stacks
from finetune.runtime.choice import Choice
from finetune.runtime.fsdp_launch import describe_settings
from finetune.runtime.memory import release_freed_memory, return_large_blocks
from finetune.runtime.processes import PEER_TIMEOUT, all_reduce_max

FORWARD_METHODS = ("token_stats", "target_logits", "generate")  # of TokenLoss, besides its forward method


class Sharding(NamedTuple):
    """How the base lies on the processes."""

    choices: tuple[Choice, ...]
    """Requested and actual, and what of the launcher's settings is not honoured"""
    mesh: DeviceMesh | None = None
    """The processes that share a base with this one; None: each has a whole base"""
    accelerator: Any = None
    """That of these processes"""

    @property
    def is_on(self) -> bool:
        return self.mesh is not None


def choose_sharding(config: Config, accelerator: Any) -> Sharding:
    """How `train.sharding` and `train.shard_over` have the base lie. All ranks must call it.

    Raises:
        ValueError: nodes have different numbers of processes.
    """
    requested, num_processes = config.train.sharding, accelerator.num_processes
    if requested == "none":
        return Sharding((Choice("sharding", "none", "none"),))
    others = tuple(describe_settings(config))
    size = num_processes if config.train.shard_over == "all" else _processes_of_node(accelerator)
    if size == 1:
        reason = "one process has the whole base"
        if num_processes > 1:
            reason = "a node has one process: train.shard_over all shares a base among the nodes"
        return Sharding((Choice("sharding", requested, "none", reason), *others))
    # `init_device_mesh` would make groups with the libraries' own timeouts, 10 minutes for NCCL.
    group, _ = new_subgroups(size, timeout=PEER_TIMEOUT)  # type: ignore[no-untyped-call]
    mesh, num_bases = DeviceMesh.from_group(group, accelerator.device.type), num_processes // size
    actual = f"base, on {size} processes" + (f", {num_bases} times" if num_bases > 1 else "")
    return Sharding((Choice("sharding", actual, actual), *others), mesh, accelerator)


def _processes_of_node(accelerator: Any) -> int:
    """How many processes each node has, as torchrun says."""
    own = int(os.environ.get("LOCAL_WORLD_SIZE", str(accelerator.num_processes)))
    most = all_reduce_max(accelerator, own)
    fewest = -all_reduce_max(accelerator, -own)
    if fewest != most:
        raise ValueError(
            f"train.shard_over node needs as many processes on each node, and they have {fewest} to {most}: "
            "start as many on each, or set train.shard_over to all"
        )
    return most


def shard_base(
    token_loss: TokenLoss, sharding: Sharding, train_set: Examples | None = None, packing: bool = False
) -> None:
    """Leave this process its share of the frozen parameters of token_loss; without a mesh, do nothing.

    The fast paths must have been chosen, for a sharded base: what computes before the whole is called would
    become a root of its own. Each decoder layer is gathered by itself; the embedding, the head and all others
    with the whole. What is trainable stays as it is.

    Where the base has the weights of its first layer alone, each layer's own are read before it is sharded.
    The fast paths were chosen without them, and are then compared once more, on `train_set`.

    Raises:
        ValueError: an adapted layer reads its quantized weight in PEFT's way, which keeps it; or as
            `require_same_results`.
    """
    if sharding.mesh is None:
        return
    _require_fast_layers(token_loss)
    return_large_blocks()
    trained = {parameter for parameter in token_loss.parameters() if parameter.requires_grad}
    # Gathered in its own precision: autocast rounds, as without sharding.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    on_disk: LayersOnDisk | None = getattr(token_loss.base, "layers_on_disk", None)
    for _, layers in stacks(token_loss.base):
        for index, layer in enumerate(layers):
            if on_disk is not None:
                on_disk.read(layer, index)
            fully_shard(layer, mesh=sharding.mesh, mp_policy=policy, ignored_params=trained)
    fully_shard(token_loss, mesh=sharding.mesh, mp_policy=policy, ignored_params=trained)
    # FSDP warns that its hooks are lost where a layer's output, a view, is added to in place. None is.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    for name in FORWARD_METHODS:
        register_fsdp_forward_method(token_loss, name)
    release_freed_memory(0)
    if on_disk is not None and train_set is not None:
        require_same_results(sharding.accelerator, token_loss, train_set, packing)


def _require_fast_layers(token_loss: TokenLoss) -> None:
    slow = [
        name
        for name, layer in token_loss.named_modules()
        if isinstance(layer, LoraLayer)
        and isinstance(layer.base_layer, (*quantized.INT8, *quantized.NF4))
        and not lora.is_ready(layer)
    ]
    if slow:
        raise ValueError(
            f"train.sharding base: {len(slow)} adapted layers, such as {slow[0]}, do not take the fast path "
            "(DoRA does not), which alone reads a sharded quantized weight: set model.quantization to none"
        )


def gathered_bytes(token_loss: TokenLoss) -> int:
    """The most bytes of the base that are gathered at a time, besides this process's share; 0 if the base is
    not sharded.

    Those outside the decoder layers are, and of two layers: the next one is gathered while one computes.
    """
    if not isinstance(token_loss, FSDPModule):
        return 0
    layers = [layer for _, layers in stacks(token_loss.base) for layer in layers]
    largest = sorted((_frozen_bytes(layer) for layer in layers), reverse=True)
    return _frozen_bytes(token_loss) - sum(largest) + sum(largest[:2])


def _frozen_bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad)


def local_share(parameter: Any) -> Any:
    """This process's share of a parameter; the parameter itself if it is not sharded."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
