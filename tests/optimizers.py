"""The libraries' optimizers of separate tensors, with which those of the flat adapter are compared."""

import bitsandbytes as bnb
import torch

from finetune.config import OptimConfig

ALL = ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd"]

# In whole blocks of 256 numbers or not; with states in 8 bits or (below 4,096 numbers) in fp32; so large that
# they could be paged.
SHAPES = [(8, 576), (64, 64), (5, 1000), (8, 32), (300,), (400, 256), (16, 512)]
SETTINGS = OptimConfig(learning_rate=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
SEPARATE = {
    "adamw": torch.optim.AdamW,
    "adamw_8bit": bnb.optim.AdamW8bit,
    "paged_adamw": bnb.optim.PagedAdamW32bit,
    "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    "sgd": torch.optim.SGD,
}


def separate_optimizer(name: str, weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The libraries' own optimizer of the separate tensors."""
    settings = {"lr": SETTINGS.learning_rate, "weight_decay": SETTINGS.weight_decay}
    if name != "sgd":
        settings |= {"betas": SETTINGS.betas, "eps": SETTINGS.eps}
    return SEPARATE[name](weights, **settings)
