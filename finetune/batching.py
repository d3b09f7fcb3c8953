"""The plan: which examples each update takes, how every process lays them out, and the tensors of it.

A plan is a pure function of its fields. Update k is the same set of examples with the same number of target
tokens however it is packed, padded, cut into micro-batches or spread over processes.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.chat import IGNORE, Examples
from finetune.config import Config

Indices = list[int]

WORTH_SHARING = 8  # tokens that all examples of a row begin with


@dataclass(frozen=True)
class Layout:
    """How examples become micro-batches.

    Packed: whole examples side by side in one row of at most `max_tokens`. Padded: at most
    `micro_batch_size` examples, each in a row of its own, at most `max_tokens` with the padding.
    """

    packing: bool
    micro_batch_size: int
    max_tokens: int


@dataclass(frozen=True)
class Update:
    """One optimizer update as one process sees it."""

    epoch: int
    """From 0"""
    micro_batches: list[Indices]
    """This process's examples; an empty list stands for a process that has none but still takes part"""
    num_target_tokens: int
    """Of all processes together: what the loss is divided by"""
    num_tokens: int
    """Tokens of the examples, of all processes together; padding does not count"""


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

    def update(self, step: int) -> Update:
        """Update number `step`, from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.seed, epoch, len(self.lengths))
        examples = order[position * self.global_batch_size :][: self.global_batch_size]
        mine = split_over_processes(examples, self.lengths, self.num_processes)[self.rank]
        return Update(
            epoch=epoch,
            micro_batches=lay_out(mine, self.lengths, self.layout) or [[]],
            num_target_tokens=int(self.target_counts[examples].sum()),
            num_tokens=int(self.lengths[examples].sum()),
        )


def make_plan(config: Config, train_set: Examples, packing: bool, rank: int, num_processes: int) -> Plan:
    """The plan of a configuration for one of `num_processes` processes."""
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
    """The order of the examples in an epoch: a permutation that depends on nothing but these three."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def split_over_processes(
    examples: Iterable[int], lengths: NDArray[np.int64], num_processes: int
) -> list[Indices]:
    """Share the examples out so that each process has about as many tokens: longest first, each to the
    process that has least."""
    shares: list[Indices] = [[] for _ in range(num_processes)]
    loads = [0] * num_processes
    for example in sorted(map(int, examples), key=lambda i: (-int(lengths[i]), i)):
        lightest = loads.index(min(loads))
        shares[lightest].append(example)
        loads[lightest] += int(lengths[example])
    return shares


def lay_out(examples: Indices, lengths: NDArray[np.int64], layout: Layout) -> list[Indices]:
    """Cut examples, longest first, into micro-batches that keep to the layout's limits.

    Packed rows are filled first-fit, which wastes little and is deterministic.
    """
    longest_first = sorted(examples, key=lambda i: (-int(lengths[i]), i))
    assert all(lengths[i] <= layout.max_tokens for i in examples), "examples are cut to the budget before"
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
    """This process's share of the eval examples, laid out as in training: each of them is in exactly one
    micro-batch of one process."""
    lengths = eval_set.lengths
    shares = split_over_processes(range(len(lengths)), lengths, plan.num_processes)
    return lay_out(shares[plan.rank], lengths, plan.layout)


class Boundaries(NamedTuple):
    """Where the E examples of a packed row lie: what all begin with, once, then what is each one's own."""

    lengths: tuple[int, ...]
    """Tokens of each one's own: the host's numbers, so that reading them waits for no device"""
    starts: Tensor
    """[E + 1] int32: the place of each one's own first token, and the end of the last"""
    prefix: int = 0
    """Tokens that all begin with: every example sees them, and they see none of it"""

    def to(self, device: torch.device) -> "Boundaries":
        return self._replace(starts=self.starts.to(device, non_blocking=True))

    def mask(self) -> Tensor:
        """[1, 1, T, T] bool: True where the token of the row may see that of the column, which is of its own
        example, or of what all begin with, and not later."""
        places = torch.arange(self.prefix + sum(self.lengths), device=self.starts.device)
        example_of_token = torch.searchsorted(self.starts, places, right=True)  # from 1; 0 is everybody's
        sees = (example_of_token[:, None] == example_of_token) | (example_of_token == 0)
        return sees.tril()[None, None]


class MicroBatch(NamedTuple):
    """The tensors of one forward pass: B rows of T tokens, N targets.

    input_ids, position_ids [B, T] long.
    target_positions [N] long: the places, in the B*T tokens laid end to end, that predict a target token.
    target_ids [N] long: the token each of them should predict.
    limits: of a packed row its Boundaries; of padded rows [B, T] bool, True for tokens that are no padding.
    num_tokens: how many of the B*T are no padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    target_positions: Tensor
    target_ids: Tensor
    limits: Boundaries | Tensor
    num_tokens: int

    def example_of_target(self) -> Tensor:
        """[N] long: which example of this micro-batch each target belongs to, from 0."""
        if isinstance(self.limits, Boundaries):
            return torch.searchsorted(self.limits.starts, self.target_positions, right=True) - 1
        return self.target_positions // self.input_ids.shape[1]

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(
            self.input_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.target_positions.to(device, non_blocking=True),
            self.target_ids.to(device, non_blocking=True),
            self.limits.to(device),
            self.num_tokens,
        )


def pack(examples: Sequence[dict[str, Any]]) -> MicroBatch:
    """Lay examples side by side in one row: positions restart, each example is blind to the others.

    What all of them begin with (a system prompt, a template's first words) stands in the row once: the tokens
    behind it see the same as if each example had its own.
    """
    prefix = shared_prefix(examples)
    lengths = tuple(len(example["input_ids"]) - prefix for example in examples)

    def row(column: str) -> Tensor:
        own = [value for example in examples for value in example[column][prefix:]]
        return torch.tensor([examples[0][column][:prefix] + own])

    positions = [torch.arange(prefix), *(torch.arange(prefix, prefix + length) for length in lengths)]
    return _micro_batch(
        input_ids=row("input_ids"),
        labels=row("labels"),
        position_ids=torch.cat(positions)[None],
        limits=Boundaries(
            lengths, torch.tensor([*accumulate(lengths, initial=prefix)], dtype=torch.int32), prefix
        ),
        num_tokens=prefix + sum(lengths),
    )


def shared_prefix(examples: Sequence[dict[str, Any]]) -> int:
    """How many tokens all examples begin with, of those that predict no target; 0 where hardly any."""
    if len(examples) < 2:
        return 0
    # The last of them predicts each example's own first token, so this must not be a target either.
    most = min(_first_target(example["labels"]) for example in examples) - 1
    columns = zip(*(example["input_ids"][:most] for example in examples), strict=False)
    prefix = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    return prefix if prefix >= WORTH_SHARING else 0


def _first_target(labels: Sequence[int]) -> int:
    """Its place; that behind the end where there is none."""
    return next((place for place, label in enumerate(labels) if label != IGNORE), len(labels))


def pad(examples: Sequence[dict[str, Any]]) -> MicroBatch:
    """Each example in a row of its own, filled up on the right: the plain layout."""
    width = max(len(example["input_ids"]) for example in examples)
    shape = (len(examples), width)
    input_ids = torch.zeros(shape, dtype=torch.long)  # padding is told by its place, not by a token
    labels = torch.full(shape, IGNORE)
    is_token = torch.zeros(shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        input_ids[row, :length] = torch.tensor(example["input_ids"])
        labels[row, :length] = torch.tensor(example["labels"])
        is_token[row, :length] = True
    position_ids = torch.arange(width).expand(shape)
    return _micro_batch(input_ids, labels, position_ids, is_token, int(is_token.sum()))


def _micro_batch(
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor,
    limits: Boundaries | Tensor,
    num_tokens: int,
) -> MicroBatch:
    # The token at t predicts the one at t + 1. The first label of an example, and that behind a shared
    # prefix, is IGNORE, so in a packed row no example predicts the start of the next.
    next_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
    target_positions = (next_labels != IGNORE).nonzero().squeeze(1)
    target_ids = next_labels[target_positions]
    return MicroBatch(input_ids, position_ids, target_positions, target_ids, limits, num_tokens)


def collate(examples: Sequence[dict[str, Any]], packing: bool) -> MicroBatch:
    """The tensors of these examples; of none, one token without a target, so that the process can join in
    with a gradient of zero."""
    if not examples:
        examples = [{"input_ids": [0], "labels": [IGNORE]}]
    return pack(examples) if packing else pad(examples)


def iterate_updates(
    plan: Plan, dataset: Any, first_step: int, device: torch.device
) -> Iterator[tuple[Update, list[MicroBatch]]]:
    """Updates from `first_step` on, each with its micro-batches on the device: built while the one before is
    computed."""

    def build(step: int) -> tuple[Update, list[MicroBatch]]:
        update = plan.update(step)
        return update, list(iterate_batches(update.micro_batches, dataset, plan.layout.packing, device))

    with ThreadPoolExecutor(max_workers=1) as builder:
        ahead = builder.submit(build, first_step)
        for step in range(first_step, plan.num_steps):
            built = ahead.result()
            ahead = builder.submit(build, min(step + 1, plan.num_steps - 1))
            yield built


def iterate_batches(
    batches: Sequence[Indices], dataset: Any, packing: bool, device: torch.device
) -> Iterator[MicroBatch]:
    for indices in batches:
        yield collate([dataset[i] for i in indices], packing).to(device)
