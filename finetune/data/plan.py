"""The plan: which examples each update takes, and how each rank arranges them in micro-batches.

A plan is a pure function of its fields. Update k is the same set of examples with the same number of target
tokens, however they are packed, padded, split into micro-batches or distributed over ranks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heapreplace

import numpy as np
from numpy.typing import NDArray

from finetune.config import Config, examples_per_update
from finetune.data.by_source import several_sources
from finetune.data.order import examples_at
from finetune.data.preparing.examples import Examples
from finetune.data.segments import SequenceSizes

Indices = list[int]

# Examples of a rank that are laid out together: the time that this takes grows faster than their number.
LAID_OUT_AT_ONCE = 2**12


@dataclass(frozen=True)
class Layout:
    """How examples become micro-batches.

    Packed: one sequence of whole examples, at most `max_tokens` long. Padded: at most `micro_batch_size`
    sequences of one example each, at most `max_tokens` including the padding. An example with branches is
    several sequences there; if these alone exceed a limit, they are a micro-batch.
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
    """The examples of this rank. An empty list stands in for what this rank lacks: see `Plan.collective`; and
    there is one if the rank has no example, since it takes part all the same"""
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
    shared_prefix: int = 0
    """Tokens that all examples begin with: once in a packed sequence"""
    sequences: SequenceSizes | None = None
    """What the examples are in the padded layout; None: each is one sequence"""
    sources: Mapping[int, str] = field(default_factory=dict)
    """If the examples come from several sources: their names, to give the losses apart; else none"""
    collective: bool = False
    """Whether a forward pass takes all ranks, as where each holds a part of the base. Then all have the same
    number of micro-batches, filled up with empty ones, or those with more would wait forever"""

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

    def largest_batch(self, update: Update) -> int:
        """Tokens of the update's largest micro-batch on this rank, including padding."""
        sizes = self.lengths, self.layout, self.shared_prefix, self.sequences
        return max(count_tokens(batch, *sizes) for batch in update.micro_batches)

    def update(self, step: int) -> Update:
        """Update number `step`, from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        stop = start + self.global_batch_size
        examples = examples_at(self.seed, epoch, len(self.lengths), start, stop)
        shares = balance(examples, self.lengths, self.num_processes)
        sizes = self.lengths, self.layout, self.shared_prefix, self.sequences
        return Update(
            epoch=epoch,
            micro_batches=_lay_out_own(self, shares, *sizes) or [[]],
            num_target_tokens=int(self.target_counts[examples].sum()),
            num_tokens=int(self.lengths[examples].sum()),
        )


def make_plan(
    config: Config,
    train_set: Examples,
    packing: bool,
    rank: int,
    num_processes: int,
    max_tokens: int | None = None,
    collective: bool = False,
) -> Plan:
    """The plan of a configuration for rank `rank` of `num_processes`.

    `max_tokens` is the token budget that a run chose; None takes that of the configuration, and
    micro_batch_size x max_length where it leaves the choice to a run. `collective` is as in Plan.

    Raises:
        ValueError: as `examples_per_update`.
    """
    train = config.train
    return Plan(
        lengths=train_set.lengths,
        target_counts=train_set.target_counts,
        layout=Layout(
            packing=packing,
            micro_batch_size=train.micro_batch_size,
            max_tokens=requested_budget(config) if max_tokens is None else max_tokens,
        ),
        global_batch_size=examples_per_update(train, num_processes),
        num_epochs=train.num_epochs,
        max_steps=train.max_steps,
        seed=train.seed,
        rank=rank,
        num_processes=num_processes,
        shared_prefix=train_set.shared_prefix,
        sequences=train_set.sequence_sizes,
        sources=several_sources(train_set),
        collective=collective,
    )


def requested_budget(config: Config) -> int:
    """The most tokens of a micro-batch, as the configuration says, or those of `micro_batch_size` examples of
    `max_length`."""
    requested = config.train.max_tokens_per_micro_batch
    return requested if isinstance(requested, int) else config.train.micro_batch_size * config.data.max_length


def balance(examples: Iterable[int], lengths: NDArray[np.int64], count: int) -> list[Indices]:
    """Split examples into `count` groups of about equal tokens: longest first, to the least-loaded group."""
    groups: list[Indices] = [[] for _ in range(count)]
    loads = [(0, group) for group in range(count)]  # a heap: of equal loads, the first group
    for example in longest_first(examples, lengths):
        load, group = loads[0]
        groups[group].append(example)
        heapreplace(loads, (load + int(lengths[example]), group))
    return groups


def longest_first(examples: Iterable[int], lengths: NDArray[np.int64]) -> Indices:
    return sorted(map(int, examples), key=lambda i: (-int(lengths[i]), i))


def lay_out(
    examples: Indices,
    lengths: NDArray[np.int64],
    layout: Layout,
    shared_prefix: int,
    sequences: SequenceSizes | None = None,
) -> list[Indices]:
    """Split examples into micro-batches within the layout's limits: as few, and then as even, as they can be.

    In a packed sequence the `shared_prefix` of all examples counts once. Packed sequences are balanced groups
    where these fit, and first-fit decreasing otherwise.
    """
    assert all(lengths[i] <= layout.max_tokens for i in examples), "max_length is within the budget"
    if not layout.packing:
        return _pad_to_width(examples, sequences or _one_sequence_each(lengths), layout)
    ordered = np.array(sorted(examples), np.int64)
    own, budget = lengths[ordered] - shared_prefix, layout.max_tokens - shared_prefix
    return [ordered[group].tolist() for group in _pack_evenly(own, budget)]


def _pack_evenly(own: NDArray[np.int64], budget: int) -> list[Indices]:
    """The numbers from 0 of sequences of `own` [N] tokens, in groups of at most `budget` tokens."""
    first_fit = _first_fit(own, budget)
    # First-fit fills all but the last group, and may need one more than balanced groups do.
    for count in range(-(-int(own.sum()) // budget), len(first_fit) + 1):
        groups = balance(range(len(own)), own, count)
        if all(own[group].sum() <= budget for group in groups):
            return groups
    return first_fit


def _lay_out_own(
    plan: Plan,
    shares: list[Indices],
    lengths: NDArray[np.int64],
    layout: Layout,
    shared_prefix: int,
    sequences: SequenceSizes | None,
) -> list[Indices]:
    """The micro-batches of this rank, of the shares of all. A `collective` plan gives all ranks as many."""
    own = lay_out(shares[plan.rank], lengths, layout, shared_prefix, sequences)
    if not plan.collective:
        return own
    counts = [len(lay_out(share, lengths, layout, shared_prefix, sequences)) for share in shares]
    return own + [[]] * (max(counts) - len(own))


def count_tokens(
    batch: Indices,
    lengths: NDArray[np.int64],
    layout: Layout,
    shared_prefix: int,
    sequences: SequenceSizes | None = None,
) -> int:
    """Tokens of a micro-batch, including padding; the shared prefix of a packed sequence counts once."""
    if layout.packing:
        return shared_prefix + sum(int(lengths[i]) - shared_prefix for i in batch)
    counts, widths = sequences or _one_sequence_each(lengths)
    return int(counts[batch].sum()) * max((int(widths[i]) for i in batch), default=0)


def _one_sequence_each(lengths: NDArray[np.int64]) -> SequenceSizes:
    return SequenceSizes(np.broadcast_to(np.int64(1), lengths.shape), lengths)


def _first_fit(own: NDArray[np.int64], budget: int) -> list[Indices]:
    """Groups of at most `budget` tokens, by first-fit decreasing."""
    groups: list[Indices] = []
    loads = np.zeros(len(own) + 1, np.int64)  # behind the groups, an empty one
    for number in longest_first(range(len(own)), own):
        place = int(np.argmax(loads[: len(groups) + 1] <= budget - own[number]))
        if place == len(groups):
            groups.append([])
        groups[place].append(number)
        loads[place] += own[number]
    return groups


def _pad_to_width(examples: Indices, sequences: SequenceSizes, layout: Layout) -> list[Indices]:
    """Groups of neighbours in width: the first of a group is its widest, and so its width."""
    counts, widths = sequences
    groups: list[Indices] = []
    count = 0  # sequences of the last group
    for example in longest_first(examples, widths):
        count += int(counts[example])
        fits = count <= layout.micro_batch_size
        if groups and fits and count * int(widths[groups[-1][0]]) <= layout.max_tokens:
            groups[-1].append(example)
        else:
            groups.append([example])
            count = int(counts[example])
    return groups


def plan_evaluation(plan: Plan, eval_set: Examples, most: int | None = None) -> list[Indices]:
    """The eval examples of this rank, laid out as in training: each example, or of the first `most`, is in
    exactly one micro-batch of one rank. If the plan is
    `collective`, empty ones fill up as in an update."""
    lengths = eval_set.lengths
    sizes = lengths, plan.layout, eval_set.shared_prefix, eval_set.sequence_sizes
    num_examples = len(lengths[:most])
    at_once = LAID_OUT_AT_ONCE * plan.num_processes
    batches: list[Indices] = []
    for start in range(0, num_examples, at_once):
        examples = range(start, min(start + at_once, num_examples))
        batches += _lay_out_own(plan, balance(examples, lengths, plan.num_processes), *sizes)
    return batches
