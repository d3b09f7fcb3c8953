"""The optimizer, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable

import bitsandbytes as bnb
import torch

from finetune.config import OptimConfig
from finetune.machine import Setting

# On a CPU there is nothing to page from: the same optimizer, in memory that is never moved.
UNPAGED = {"paged_adamw_8bit": "adamw_8bit", "paged_adamw": "adamw"}


def choose_optimizer(asked: str, device: torch.device) -> Setting:
    if device.type != "cuda" and asked in UNPAGED:
        return Setting(
            "optimizer", asked, UNPAGED[asked], "paging moves state out of GPU memory; here is none"
        )
    return Setting("optimizer", asked, asked)


def create_optimizer(
    name: str, parameters: Iterable[torch.nn.Parameter], config: OptimConfig
) -> torch.optim.Optimizer:
    """The optimizer called `name` (as `choose_optimizer` got it) over the trainable parameters."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    adamw = {
        "adamw": torch.optim.AdamW,
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw": bnb.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    }[name]
    optimizer: torch.optim.Optimizer = adamw(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    return optimizer


def learning_rate_at(step: int, num_steps: int, config: OptimConfig) -> float:
    """The learning rate of update `step` (from 0) of `num_steps`.

    It rises linearly from 0 over ceil(warmup_ratio * num_steps) updates, then follows the schedule, which
    would reach 0 at update `num_steps`: the values of transformers' schedules of the same names.
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
