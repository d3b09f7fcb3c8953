"""An update of the program in parts, as train.py makes it: zero, forward, head, backward, clip, optimizer.

It runs on a card and on fake tensors alike. What train.py has between these parts (logs, checkpoints, the
plan) is left out.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from finetune.config import Config
from finetune.data.collate import MicroBatch
from finetune.model.flat_adapter import FlatAdapter
from finetune.model.loss import TokenLoss
from finetune.runtime import accelerator as machine
from finetune.training.loss_scale import LossScale
from finetune.training.metrics import Numbers, SumWindow, check_numbers
from finetune.training.optim import choose_optimizer, create_optimizer, set_learning_rate

PARTS = ("zero", "forward", "head", "backward", "clip", "optimizer")

Part = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Program:
    """What train.py sets up before its loop."""

    config: Config
    accelerator: Any
    adapter: FlatAdapter
    token_loss: TokenLoss
    optimizer: Any
    loss_scale: LossScale
    window: SumWindow


def set_up(
    config: Config, accelerator: Any, precision: str, adapter: FlatAdapter, token_loss: TokenLoss
) -> Program:
    """What train.py makes between loading the model and its loop, without the fast paths."""
    name = choose_optimizer(config.optim.name, accelerator.device).actual
    optimizer = create_optimizer(name, adapter, config.optim)
    window = SumWindow(accelerator.device)
    return Program(config, accelerator, adapter, token_loss, optimizer, LossScale(precision), window)


def make_update(program: Program, batch: MicroBatch, step: int, part: Part) -> Numbers:
    """Update `step` of one micro-batch; `part` gives the context that each of PARTS runs in.

    As in train.py, weights are left alone if the numbers of the update are not finite.
    """
    config, accelerator, adapter = program.config, program.accelerator, program.adapter
    token_loss, loss_scale, window = program.token_loss, program.loss_scale, program.window
    machine.reseed(config.train.seed, step, rank=0)
    set_learning_rate(program.optimizer, config.optim.learning_rate)
    with part("zero"):
        adapter.zero_gradients()
        window.begin_update()
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
        accelerator.backward(loss_scale.apply(sums.nll / len(batch.target_ids)))
        window.add(sums)
    with part("clip"):
        adapter.reduce_gradients(accelerator)
        grad_norm = adapter.clip_gradients(config.optim.max_grad_norm, loss_scale.value)
        numbers = check_numbers(accelerator, window, grad_norm)
    if not loss_scale.adapt_to(numbers) and numbers is Numbers.FINITE:
        with part("optimizer"):
            program.optimizer.step()
            window.keep_update()
    return numbers
