"""An update of the program in parts, as train.py makes it: forward, head, backward, clip, optimizer, zero.

It runs on a card and on fake tensors alike. What train.py has between these parts (logs, checkpoints, the
plan) is left out.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from finetune.config import Config
from finetune.data.collate import MicroBatch
from finetune.model.loss import TokenLoss
from finetune.runtime import accelerator as machine
from finetune.training.metrics import SumWindow, all_finite
from finetune.training.optim import choose_optimizer, create_optimizer, set_learning_rate

PARTS = ("forward", "head", "backward", "clip", "optimizer", "zero")

Part = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Program:
    """What train.py sets up before its loop."""

    config: Config
    accelerator: Any
    token_loss: TokenLoss
    trainable: list[Any]
    optimizer: Any
    window: SumWindow


def set_up(config: Config, accelerator: Any, model: Any) -> Program:
    """The model with its adapter, and the optimizer, on the reference paths."""
    token_loss = TokenLoss(model).train()
    trainable = [parameter for parameter in token_loss.parameters() if parameter.requires_grad]
    name = choose_optimizer(config.optim.name, accelerator.device).actual
    optimizer = create_optimizer(name, trainable, config.optim)
    ddp_loss, optimizer = accelerator.prepare(token_loss, optimizer)
    assert ddp_loss is token_loss
    return Program(config, accelerator, token_loss, trainable, optimizer, SumWindow(accelerator.device))


def make_update(program: Program, batch: MicroBatch, step: int, part: Part) -> None:
    """Update `step` of one micro-batch; `part` gives the context that each of PARTS runs in."""
    token_loss, accelerator = program.token_loss, program.accelerator
    machine.reseed(program.config.train.seed, step, rank=0)
    set_learning_rate(program.optimizer, program.config.optim.learning_rate)
    with part("forward"), ExitStack() as head:
        own = token_loss.target_hidden

        def then_the_head(batch: MicroBatch) -> Tensor:
            hidden = own(batch)
            head.enter_context(part("head"))
            return hidden

        token_loss.target_hidden = then_the_head  # type: ignore[method-assign]
        head.callback(delattr, token_loss, "target_hidden")
        with accelerator.autocast():
            sums = token_loss(batch)
    with part("backward"):
        accelerator.backward(sums.nll / len(batch.target_ids))
        program.window.add(sums)
    with part("clip"):
        limit = program.config.optim.max_grad_norm or math.inf
        grad_norm = accelerator.clip_grad_norm_(program.trainable, limit)
        assert all_finite(accelerator, program.window, grad_norm)
    with part("optimizer"):
        program.optimizer.step()
    with part("zero"):
        program.optimizer.zero_grad()
