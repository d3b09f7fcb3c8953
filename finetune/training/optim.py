"""The optimizer, and the learning rate as a function of the step."""

import math
from typing import Any

import bitsandbytes as bnb
import torch

from finetune.config import OptimConfig
from finetune.model.flat_adapter import FlatAdapter
from finetune.runtime.choice import Choice

# On a CPU there is no GPU memory to page from: the same optimizer runs without paging.
UNPAGED = {"paged_adamw_8bit": "adamw_8bit", "paged_adamw": "adamw"}


def state_bytes(name: str) -> int:
    """Bytes of optimizer state per parameter: AdamW has two moments, in fp32 or 8 bits; SGD has none."""
    return 0 if name == "sgd" else 2 if name.endswith("8bit") else 8


def choose_optimizer(requested: str, device: torch.device) -> Choice:
    if device.type == "mps" and requested not in ("adamw", "sgd"):
        return Choice("optimizer", requested, "adamw", "bitsandbytes' optimizers do not run on Apple's GPUs")
    if device.type != "cuda" and requested in UNPAGED:
        reason = "paging moves state out of GPU memory, and this device is no GPU"
        return Choice("optimizer", requested, UNPAGED[requested], reason)
    return Choice("optimizer", requested, requested)


def create_optimizer(name: str, adapter: FlatAdapter, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer `name` (the actual one of `choose_optimizer`) of the adapter.

    A parameter group says by `lr_ratio` how its learning rate is to that of the schedule: LoRA+ (Hayou et al.
    2024, arXiv:2402.12354) trains B faster than A.
    """
    ratio_of_b = config.lora_b_lr_ratio or 1.0
    assert ratio_of_b == 1 or any(region.is_b for region in adapter.regions)
    groups: list[dict[str, Any]] = [
        {"params": [region.parameter], "lr_ratio": ratio_of_b if region.is_b else 1.0}
        for region in adapter.regions
    ]
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, **settings)
    elif name == "adamw":
        # One kernel on a GPU; a CPU keeps the order of operations that earlier checkpoints were made with.
        on_gpu = adapter.weights.is_cuda
        optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=on_gpu, **settings)
    else:
        bits, is_paged = 8 if name.endswith("8bit") else 32, name.startswith("paged")
        for group, region in zip(groups, adapter.regions, strict=True):
            group["optim_bits"] = bits if region.is_large else 32
        optimizer = BitsAndBytesAdamW(
            groups, betas=config.betas, eps=config.eps, optim_bits=bits, is_paged=is_paged, **settings
        )
    # An optimizer may write the weights without torch's knowing: copies of them must be made again.
    optimizer.register_step_post_hook(lambda *_: torch.autograd.graph.increment_version(adapter.weights))
    return optimizer


class BitsAndBytesAdamW(bnb.optim.AdamW):  # type: ignore[misc]
    """bitsandbytes' AdamW, bit for bit, without its waits for the device after each parameter.

    A parameter group says by `optim_bits` how many bits its state has, 8 or 32. Paged state is in memory that
    the host and the GPU share: whoever reads it on the host waits for the device first (`split_state`).
    """

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        return {**super().get_config(gindex, pindex, group), "optim_bits": group["optim_bits"]}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group_index, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if len(self.state[parameter]) == 0:
                    self.init_state(group, parameter, group_index, index)
                self.prefetch_state(parameter)
                self.update_step(group, parameter, group_index, index)

    def page_states(self) -> None:
        """Move states into paged memory where bitsandbytes would have created them there: loading a state
        puts plain tensors in their place."""
        if not self.is_paged:
            return
        for parameter, state in self.state.items():
            for name in ("state1", "state2"):
                buffer = self.get_state_buffer(parameter, dtype=state[name].dtype)
                state[name] = buffer.copy_(state[name])


def learning_rate_at(step: int, num_steps: int, config: OptimConfig) -> float:
    """The learning rate of update `step` (from 0) of `num_steps`.

    It rises linearly from 0 over `warmup_steps` or ceil(warmup_ratio * num_steps) updates, then follows the
    schedule. A falling one would reach its floor, `min_lr_ratio` of the peak, at update `num_steps`.
    "warmup_stable_decay" falls over the last ceil(decay_ratio * num_steps) updates. Where transformers has
    the schedule, the values are its own.
    """
    warmup_steps = config.warmup_steps or math.ceil(config.warmup_ratio * num_steps)
    if step < warmup_steps:
        return config.learning_rate * step / warmup_steps
    falls_from = warmup_steps
    if config.schedule == "warmup_stable_decay":
        decay_ratio = 0.1 if config.decay_ratio is None else config.decay_ratio
        falls_from = max(warmup_steps, num_steps - math.ceil(decay_ratio * num_steps))
    progress = max(0, step - falls_from) / max(1, num_steps - falls_from)
    factor = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "constant": 1.0,
        "warmup_stable_decay": 1 - progress,
    }[config.schedule]
    floor = config.min_lr_ratio or 0.0
    return config.learning_rate * (factor * (1 - floor) + floor)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of each parameter group: `learning_rate` times its `lr_ratio`, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
