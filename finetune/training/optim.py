"""The optimizer, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from finetune.config import OptimConfig
from finetune.runtime.choice import Choice

BLOCK = 256  # numbers that share a scale in bitsandbytes' 8-bit states
SMALLEST_PAGED = 100_000  # numbers; bitsandbytes does not page smaller states
# On a CPU there is no GPU memory to page from: the same optimizer runs without paging.
UNPAGED = {"paged_adamw_8bit": "adamw_8bit", "paged_adamw": "adamw"}


def state_bytes(name: str) -> int:
    """Bytes of optimizer state per parameter: AdamW has two moments, in fp32 or 8 bits; SGD has none."""
    return 0 if name == "sgd" else 2 if name.endswith("8bit") else 8


def choose_optimizer(requested: str, device: torch.device) -> Choice:
    if device.type != "cuda" and requested in UNPAGED:
        reason = "paging moves state out of GPU memory, and this device is no GPU"
        return Choice("optimizer", requested, UNPAGED[requested], reason)
    return Choice("optimizer", requested, requested)


def create_optimizer(
    name: str, parameters: Iterable[torch.nn.Parameter], config: OptimConfig
) -> torch.optim.Optimizer:
    """The optimizer `name` (the actual one of `choose_optimizer`) for the trainable parameters."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    adamw = {
        "adamw": torch.optim.AdamW,
        "adamw_8bit": GroupedAdamW8bit,
        "paged_adamw": bnb.optim.PagedAdamW32bit,
        "paged_adamw_8bit": partial(GroupedAdamW8bit, is_paged=True),
    }[name]
    optimizer: torch.optim.Optimizer = adamw(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    return optimizer


class GroupedAdamW8bit(bnb.optim.AdamW8bit):  # type: ignore[misc]
    """bitsandbytes' AdamW with one call for all small tensors of a parameter group, bit for bit the same.

    An adapter has hundreds of small tensors. For each of them, a call takes longer than its computation, and
    on a GPU bitsandbytes waits after each call. This class concatenates the small tensors for the call, and
    copies the results back into the parameters and states.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        moves_pages = False
        for group_index, group in enumerate(self.param_groups):
            small: dict[int, list[torch.nn.Parameter]] = {}  # by their number of previous updates
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if len(state) == 0:
                    self.init_state(group, parameter, group_index, index)
                if self._is_small(parameter):
                    small.setdefault(state["step"], []).append(parameter)
                else:
                    self.prefetch_state(parameter)
                    self.update_step(group, parameter, group_index, index)
                    moves_pages |= getattr(state["state1"], "is_paged", False)
            for parameters in small.values():
                self._update_together(group, parameters)
        if moves_pages:  # the host must not access the pages before they have moved
            torch.cuda.synchronize()

    def _is_small(self, parameter: torch.nn.Parameter) -> bool:
        """Whether the parameter's state has 8 bits and whole blocks, and is never paged."""
        state1 = self.state[parameter]["state1"]
        is_whole = parameter.numel() % BLOCK == 0 and parameter.is_contiguous()
        return state1.dtype == torch.uint8 and is_whole and parameter.numel() < SMALLEST_PAGED

    def _update_together(self, group: dict[str, Any], parameters: list[torch.nn.Parameter]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for state in states:
            state["step"] += 1
        tensors: list[list[Tensor]] = [[parameter.data for parameter in parameters]]
        tensors += [[state[name] for state in states] for name in ("state1", "state2", "absmax1", "absmax2")]
        joined = [torch.cat([part.flatten() for part in parts]) for parts in tensors]
        weights, state1, state2, absmax1, absmax2 = joined
        gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])  # type: ignore[union-attr]
        beta1, beta2 = group["betas"]
        bnb.functional.optimizer_update_8bit_blockwise(
            self.optimizer_name,
            gradient,
            weights,
            state1,
            state2,
            beta1,
            beta2,
            0.0,  # for optimizers with a third state
            0.0,
            group["eps"],
            states[0]["step"],
            group["lr"],
            states[0]["qmap1"],
            states[0]["qmap2"],
            absmax1,
            absmax2,
            group["weight_decay"],
        )
        for parts, updated in zip(tensors, joined, strict=True):
            changed = torch.split(updated, [part.numel() for part in parts])
            torch._foreach_copy_(parts, [new.view_as(part) for new, part in zip(changed, parts, strict=True)])


def learning_rate_at(step: int, num_steps: int, config: OptimConfig) -> float:
    """The learning rate of update `step` (from 0) of `num_steps`.

    It rises linearly from 0 over ceil(warmup_ratio * num_steps) updates, then follows the schedule. "linear"
    and "cosine" would reach 0 at update `num_steps`. The values are those of transformers' schedules.
    """
    warmup_steps = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup_steps:
        return config.learning_rate * step / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    factor = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "constant": 1.0,
    }[config.schedule]
    return config.learning_rate * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
