"""The tokens of a micro-batch: what the configuration names, or as many as fit into the free memory.

A number that was chosen by the free memory is recorded in the run. A run that resumes, on this machine or
another, lays out its updates as before, and so computes the same bits.
"""

from dataclasses import dataclass
from typing import Any

import torch

from finetune.config import Config, examples_per_update
from finetune.data.plan import requested_budget
from finetune.model.loss import TokenLoss
from finetune.run import folder
from finetune.runtime.choice import Choice
from finetune.runtime.memory import room_on
from finetune.runtime.processes import all_reduce_max
from finetune.training.memory_model import Prediction, predict


@dataclass(frozen=True)
class TokenBudget:
    tokens: int
    """The most tokens of a micro-batch"""
    choices: tuple[Choice, ...] = ()
    """A line of requested and actual, unless the configuration alone says how many"""
    to_record: int | None = None
    """What a resumed run takes; None where the configuration says how many"""


def choose(config: Config, accelerator: Any, token_loss: TokenLoss, packing: bool) -> TokenBudget:
    """The token budget of the run in output_dir: the same on all ranks.

    A number in the configuration holds. Otherwise that is taken which the run recorded when it started.

    Raises:
        ValueError: it is left to the free memory, which cannot hold an example of `max_length`.
    """
    requested = config.train.max_tokens_per_micro_batch
    recorded = folder.recorded_token_budget(config)
    if isinstance(requested, int):
        if recorded in (None, requested):
            return TokenBudget(requested, to_record=recorded)
        return _chosen(requested, f"in the configuration; until now the run had {recorded:,}")
    if recorded is not None:
        return _chosen(recorded, "as at the start of this run")
    if not is_automatic(config, accelerator.device):
        return TokenBudget(requested_budget(config))
    room = room_on(accelerator.device)
    predicted = predict(config, accelerator, token_loss, packing)
    processes = accelerator.num_processes
    fitting = fitting_budget(config, predicted, room.usable_gib, packing, processes)
    fitting = -all_reduce_max(accelerator, -fitting)
    if fitting < config.data.max_length:
        raise ValueError(too_little_memory(config, fitting, room.usable_gib))
    return _chosen(fitting, f"auto: {room.total_gib:.1f} GiB, less a margin of {room.margin_gib:.1f}")


def _chosen(tokens: int, reason: str) -> TokenBudget:
    choice = Choice("tokens per micro-batch", f"{tokens:,}", f"{tokens:,}", reason)
    return TokenBudget(tokens, (choice,), tokens)


def is_automatic(config: Config, device: torch.device) -> bool:
    """Whether the configuration leaves the token budget to the free memory: by default it does on a GPU."""
    requested = config.train.max_tokens_per_micro_batch
    return requested == "auto" or (requested is None and device.type == "cuda")


def fitting_budget(
    config: Config, predicted: Prediction, gib: float, packing: bool, num_processes: int = 1
) -> int:
    """The largest token budget that fits into `gib` GiB, and at most all tokens of an update.

    It may be too small for an example of `max_length`.
    """
    return min(predicted.largest_budget(gib), _most_tokens(config, packing, num_processes))


def _most_tokens(config: Config, packing: bool, num_processes: int) -> int:
    """The most tokens that a micro-batch can have. Packed, it may hold all examples of a rank's update."""
    of_a_rank = -(-examples_per_update(config.train, num_processes) // num_processes)
    return (of_a_rank if packing else config.train.micro_batch_size) * config.data.max_length


def too_little_memory(config: Config, fitting: int, gib: float) -> str:
    """One line: which keys to lower where `gib` GiB fit only `fitting` tokens."""
    max_length, change = config.data.max_length, "lower data.max_length"
    if not config.train.gradient_checkpointing:
        change += ", or set train.gradient_checkpointing"
    return f"{gib:.1f} GiB fit at most {fitting} tokens, and an example may have {max_length}: {change}"
