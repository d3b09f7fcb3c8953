"""The tensors of a micro-batch: examples packed into one sequence, or padded; built one update ahead."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.data.plan import Indices, Plan, Update
from finetune.data.segments import (
    MIN_SHARED,
    Branch,
    Segment,
    branches_of,
    keys_of,
    segments_of,
    shareable,
)
from finetune.data.templates.tokenize import IGNORE, common_prefix, first_target


class Boundaries(NamedTuple):
    """Where the E examples of a packed sequence lie: their shared prefix once, then the rest of each."""

    lengths: tuple[int, ...]
    """Tokens of each example behind the prefix, as host numbers: reading them waits for no device"""
    starts: Tensor
    """[E + 1] int32: where each example continues behind the prefix, and the end of the last"""
    prefix: int = 0
    """Length of the shared prefix: every example attends to it, and it attends to none of them"""
    branches: tuple[tuple[Branch, ...], ...] = ()
    """Of each example, as places in the whole example; empty if none has any"""

    def to(self, device: torch.device) -> "Boundaries":
        return self._replace(starts=self.starts.to(device, non_blocking=True))

    def segments(self) -> tuple[Segment, ...]:
        """The runs of tokens that attend to the same ones before them, in order."""
        return segments_of(self.lengths, self.prefix, self.branches)

    def mask(self) -> Tensor:
        """[1, 1, T, T] bool: True where a query may attend to a key: one of its own segment or of that
        segment's context, and not later."""
        segments = self.segments()
        sees = torch.zeros(len(segments), sum(segment.length for segment in segments), dtype=torch.bool)
        for row, keys in zip(sees, keys_of(segments), strict=True):
            row[torch.from_numpy(keys)] = True
        numbers = [number for number, segment in enumerate(segments) for _ in range(segment.length)]
        sees, segment_of_token = (
            x.to(self.starts.device, non_blocking=True) for x in (sees, torch.tensor(numbers))
        )
        return sees[segment_of_token].tril()[None, None]


class MicroBatch(NamedTuple):
    """The tensors of one forward pass: B sequences of T tokens, E examples, N targets.

    input_ids, position_ids [B, T] long.
    target_positions [N] long: positions in the B*T flattened tokens that predict a target token, in the order
        of the targets. A token that branches continue may predict several.
    target_ids [N] long: the token each of them should predict.
    example_starts [E + 1] long: where each example begins in the B*T flattened tokens, behind a shared
        prefix, and the end of the last.
    limits: of a packed sequence its Boundaries; of padded ones [B, T] bool, True for tokens, not padding.
    num_tokens: how many of the B*T are not padding.
    is_from [N, S] bool: which of S sources each target is from; None where they are not told apart.
    """

    input_ids: Tensor
    position_ids: Tensor
    target_positions: Tensor
    target_ids: Tensor
    example_starts: Tensor
    limits: Boundaries | Tensor
    num_tokens: int
    is_from: Tensor | None = None

    def example_of_target(self) -> Tensor:
        """[N] long: which example of this micro-batch each target belongs to, from 0."""
        return torch.searchsorted(self.example_starts, self.target_positions, right=True) - 1

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(
            self.input_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.target_positions.to(device, non_blocking=True),
            self.target_ids.to(device, non_blocking=True),
            self.example_starts.to(device, non_blocking=True),
            self.limits.to(device),
            self.num_tokens,
            None if self.is_from is None else self.is_from.to(device, non_blocking=True),
        )


def pack(examples: Sequence[dict[str, Any]]) -> MicroBatch:
    """Pack examples into one sequence: positions restart, and no example attends to another.

    Their shared prefix (a system prompt, a template's first words) is in the sequence once: the tokens behind
    it attend to the same tokens as if each example had its own copy. So is what branches continue.
    """
    prefix = shared_prefix(examples)
    lengths = tuple(len(example["input_ids"]) - prefix for example in examples)
    branches = tuple(branches_of(example) for example in examples)
    starts = [*accumulate(lengths, initial=prefix)]
    boundaries = Boundaries(
        lengths, torch.tensor(starts, dtype=torch.int32), prefix, branches if any(branches) else ()
    )
    segments = boundaries.segments()

    def row(column: str) -> Tensor:
        own = [value for example in examples for value in example[column][prefix:]]
        return torch.tensor([examples[0][column][:prefix] + own])

    previous = torch.arange(starts[-1]) - 1
    for segment, keys in zip(segments, keys_of(segments), strict=True):
        if segment.context:
            previous[segment.start] = int(keys[segment.context - 1])
    return _micro_batch(
        input_ids=row("input_ids"),
        labels=row("labels"),
        position_ids=torch.cat([torch.arange(one.context, one.num_keys) for one in segments])[None],
        previous=previous,
        example_starts=starts,
        limits=boundaries,
        num_tokens=starts[-1],
    )


def shared_prefix(examples: Sequence[dict[str, Any]]) -> int:
    """Tokens that all examples begin with and that predict no target; 0 if below MIN_SHARED."""
    if len(examples) < 2:
        return 0
    prefix: list[int] = examples[0]["input_ids"]
    for example in examples:
        own = shareable(example["input_ids"], first_target(example["labels"]), branches_of(example))
        prefix = common_prefix(prefix, own)
    return len(prefix) if len(prefix) >= MIN_SHARED else 0


def pad(examples: Sequence[dict[str, Any]]) -> MicroBatch:
    """Pad each example on the right to the longest: the reference layout. Of an example with branches, the
    trunk and each branch are sequences of their own."""
    counts, sequences = [], []
    for example in examples:
        unfolded = unfold(example)
        counts.append(len(unfolded))
        sequences += unfolded
    width = max(len(sequence["input_ids"]) for sequence in sequences)
    shape = (len(sequences), width)
    input_ids = torch.zeros(shape, dtype=torch.long)  # padding is known by position, not by token
    labels = torch.full(shape, IGNORE)
    is_token = torch.zeros(shape, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        length = len(sequence["input_ids"])
        input_ids[row, :length] = torch.tensor(sequence["input_ids"])
        labels[row, :length] = torch.tensor(sequence["labels"])
        is_token[row, :length] = True
    return _micro_batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=torch.arange(width).expand(shape),
        previous=torch.arange(len(sequences) * width) - 1,
        example_starts=[row * width for row in accumulate(counts, initial=0)],
        limits=is_token,
        num_tokens=int(is_token.sum()),
    )


def unfold(example: dict[str, Any]) -> list[dict[str, list[int]]]:
    """The sequences without branches that give an example's targets: its trunk, then each branch behind the
    tokens that it continues, which are no targets there."""
    ids, labels, branches = example["input_ids"], example["labels"], branches_of(example)
    ends = [*(branch.start for branch in branches), len(ids)]
    trunk = {"input_ids": ids[: ends[0]], "labels": labels[: ends[0]]}
    return [trunk] + [
        {"input_ids": ids[:attach] + ids[start:end], "labels": [IGNORE] * attach + labels[start:end]}
        for (start, attach), end in zip(branches, ends[1:], strict=True)
    ]


def _micro_batch(
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor,
    previous: Tensor,
    example_starts: Sequence[int],
    limits: Boundaries | Tensor,
    num_tokens: int,
) -> MicroBatch:
    """`previous` [B*T] is, for each token, the position of the one that predicts it.

    The first token of a sequence is no target.
    """
    targets = (labels.flatten() != IGNORE).nonzero().squeeze(1)
    return MicroBatch(
        input_ids,
        position_ids,
        previous[targets],
        input_ids.flatten()[targets],
        torch.tensor(example_starts),
        limits,
        num_tokens,
    )


def collate(examples: Sequence[dict[str, Any]], packing: bool) -> MicroBatch:
    """The tensors of these examples. Of none: one token without a target, so that the rank takes part with a
    gradient of zero."""
    if not examples:
        examples = [{"input_ids": [0], "labels": [IGNORE]}]
    return pack(examples) if packing else pad(examples)


def iterate_updates(
    plan: Plan, dataset: Any, first_step: int, device: torch.device
) -> Iterator[tuple[Update, list[MicroBatch]]]:
    """Updates from `first_step` on, each with its micro-batches on the device, built while the previous one
    is computed."""

    def build(step: int) -> tuple[Update, list[MicroBatch]]:
        update = plan.update(step)
        packing, sources = plan.layout.packing, tuple(plan.sources)
        return update, list(iterate_batches(update.micro_batches, dataset, packing, device, sources))

    with ThreadPoolExecutor(max_workers=1) as builder:
        ahead = builder.submit(build, first_step)
        for step in range(first_step, plan.num_steps):
            built = ahead.result()
            ahead = builder.submit(build, min(step + 1, plan.num_steps - 1))
            yield built


def iterate_batches(
    batches: Sequence[Indices],
    dataset: Any,
    packing: bool,
    device: torch.device,
    sources: Sequence[int] = (),
) -> Iterator[MicroBatch]:
    """The micro-batches on the device. If `sources` are given, the targets of each are told apart."""
    for indices in batches:
        examples = [dataset[i] for i in indices]
        batch = collate(examples, packing)
        if sources:
            own = torch.tensor([example["source"] for example in examples], dtype=torch.long)
            is_from = own[batch.example_of_target()][:, None] == torch.tensor(sources)
            batch = batch._replace(is_from=is_from)
        yield batch.to(device)
