"""The plan: which examples each update takes, and how each rank arranges them in micro-batches.

A plan is a pure function of its fields. Update k is the same set of examples with the same number of target
tokens, however they are packed, padded, split into micro-batches or distributed over ranks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from finetune.config import Config
from finetune.data.tokenize import Examples

Indices = list[int]


@dataclass(frozen=True)
class Layout:
    """How examples become micro-batches.

    Packed: one sequence of whole examples, at most `max_tokens` long. Padded: at most `micro_batch_size`
    sequences of one example each, at most `max_tokens` including the padding.
    """

    packing: bool
    micro_batch_size: int
    max_tokens: int


@dataclass(frozen=True)
class Update:
    """One optimizer update as one rank sees it."""

    epoch: int
    """From 0"""
    micro_batches: list[Indices]
    """The examples of this rank; one empty list if it has none, since it takes part all the same"""
    num_target_tokens: int
    """Over all ranks: the divisor of the loss"""
    num_tokens: int
    """Tokens of the examples over all ranks, without padding"""


@dataclass(frozen=True, eq=False)
class Plan:
    """All updates of a run.

    `lengths` [N] are the examples' token counts and `target_counts` [N] how many of them carry the loss.
    """

    lengths: NDArray[np.int64]
    target_counts: NDArray[np.int64]
    layout: Layout
    global_batch_size: int
    num_epochs: int
    seed: int
    max_steps: int | None = None
    rank: int = 0
    num_processes: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """The last update of an epoch may be short."""
        return -(-len(self.lengths) // self.global_batch_size)

    @property
    def num_steps(self) -> int:
        steps = self.steps_per_epoch * self.num_epochs
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def is_due(self, every: int | str, step: int) -> bool:
        """Whether `step` ends a period of `every` updates (or "epoch"), or the run."""
        period = self.steps_per_epoch if isinstance(every, str) else every
        return step % period == 0 or step == self.num_steps

    def update(self, step: int) -> Update:
        """Update number `step`, from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.seed, epoch, len(self.lengths))
        examples = order[position * self.global_batch_size :][: self.global_batch_size]
        mine = balance_over_ranks(examples, self.lengths, self.num_processes)[self.rank]
        return Update(
            epoch=epoch,
            micro_batches=lay_out(mine, self.lengths, self.layout) or [[]],
            num_target_tokens=int(self.target_counts[examples].sum()),
            num_tokens=int(self.lengths[examples].sum()),
        )


def make_plan(config: Config, train_set: Examples, packing: bool, rank: int, num_processes: int) -> Plan:
    """The plan of a configuration for rank `rank` of `num_processes`."""
    train = config.train
    return Plan(
        lengths=train_set.lengths,
        target_counts=train_set.target_counts,
        layout=Layout(
            packing=packing,
            micro_batch_size=train.micro_batch_size,
            max_tokens=train.max_tokens_per_micro_batch or train.micro_batch_size * config.data.max_length,
        ),
        global_batch_size=train.micro_batch_size * train.gradient_accumulation_steps * num_processes,
        num_epochs=train.num_epochs,
        max_steps=train.max_steps,
        seed=train.seed,
        rank=rank,
        num_processes=num_processes,
    )


@cache
def epoch_order(seed: int, epoch: int, num_examples: int) -> NDArray[np.int64]:
    """The order of the examples in an epoch: a permutation that depends on these three numbers alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def balance_over_ranks(
    examples: Iterable[int], lengths: NDArray[np.int64], num_processes: int
) -> list[Indices]:
    """Balance tokens across ranks: longest example first, to the least-loaded rank."""
    shares: list[Indices] = [[] for _ in range(num_processes)]
    loads = [0] * num_processes
    for example in sorted(map(int, examples), key=lambda i: (-int(lengths[i]), i)):
        lightest = loads.index(min(loads))
        shares[lightest].append(example)
        loads[lightest] += int(lengths[example])
    return shares


def lay_out(examples: Indices, lengths: NDArray[np.int64], layout: Layout) -> list[Indices]:
    """Split examples into micro-batches within the layout's limits.

    Packed sequences are filled by first-fit decreasing: deterministic, with little waste.
    """
    longest_first = sorted(examples, key=lambda i: (-int(lengths[i]), i))
    assert all(lengths[i] <= layout.max_tokens for i in examples), "max_length is within the budget"
    batches: list[Indices] = []
    loads: list[int] = []  # tokens in each
    for example in longest_first:
        length = int(lengths[example])
        if layout.packing:
            fitting = (n for n, load in enumerate(loads) if load + length <= layout.max_tokens)
        else:
            # Only the last one is open: its first example is its longest, and so its width.
            last = len(batches) - 1
            fitting = (
                n
                for n in range(max(last, 0), len(batches))
                if len(batches[n]) < layout.micro_batch_size
                and (len(batches[n]) + 1) * int(lengths[batches[n][0]]) <= layout.max_tokens
            )
        place = next(fitting, None)
        if place is None:
            batches.append([example])
            loads.append(length)
        else:
            batches[place].append(example)
            loads[place] += length
    return batches


def plan_evaluation(plan: Plan, eval_set: Examples) -> list[Indices]:
    """The eval examples of this rank, laid out as in training: each example is in exactly one micro-batch of
    one rank."""
    lengths = eval_set.lengths
    shares = balance_over_ranks(range(len(lengths)), lengths, plan.num_processes)
    return lay_out(shares[plan.rank], lengths, plan.layout)
