"""The tensors of a micro-batch: examples packed into one sequence, or padded; built one update ahead."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.data.plan import Indices, Plan, Update
from finetune.data.tokenize import IGNORE, MIN_SHARED, common_prefix, first_target


class Boundaries(NamedTuple):
    """Where the E examples of a packed sequence lie: their shared prefix once, then the rest of each."""

    lengths: tuple[int, ...]
    """Tokens of each example behind the prefix, as host numbers: reading them waits for no device"""
    starts: Tensor
    """[E + 1] int32: where each example continues behind the prefix, and the end of the last"""
    prefix: int = 0
    """Length of the shared prefix: every example attends to it, and it attends to none of them"""

    def to(self, device: torch.device) -> "Boundaries":
        return self._replace(starts=self.starts.to(device, non_blocking=True))

    def mask(self) -> Tensor:
        """[1, 1, T, T] bool: True where a query may attend to a key: one of its own example or of the shared
        prefix, and not later."""
        places = torch.arange(self.prefix + sum(self.lengths), device=self.starts.device)
        example_of_token = torch.searchsorted(self.starts, places, right=True)  # from 1; 0 is the prefix
        sees = (example_of_token[:, None] == example_of_token) | (example_of_token == 0)
        return sees.tril()[None, None]


class MicroBatch(NamedTuple):
    """The tensors of one forward pass: B sequences of T tokens, N targets.

    input_ids, position_ids [B, T] long.
    target_positions [N] long: positions in the B*T flattened tokens that predict a target token.
    target_ids [N] long: the token each of them should predict.
    limits: of a packed sequence its Boundaries; of padded ones [B, T] bool, True for tokens, not padding.
    num_tokens: how many of the B*T are not padding.
    is_from [N, S] bool: which of S sources each target is from; None where they are not told apart.
    """

    input_ids: Tensor
    position_ids: Tensor
    target_positions: Tensor
    target_ids: Tensor
    limits: Boundaries | Tensor
    num_tokens: int
    is_from: Tensor | None = None

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
            None if self.is_from is None else self.is_from.to(device, non_blocking=True),
        )


def pack(examples: Sequence[dict[str, Any]]) -> MicroBatch:
    """Pack examples into one sequence: positions restart, and no example attends to another.

    Their shared prefix (a system prompt, a template's first words) is in the sequence once: the tokens behind
    it attend to the same tokens as if each example had its own copy.
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
    """Tokens that all examples begin with and that predict no target; 0 if below MIN_SHARED."""
    if len(examples) < 2:
        return 0
    prefix: list[int] = examples[0]["input_ids"]
    for example in examples:
        # The last shared token predicts the first one that is not, so that must not be a target either.
        prefix = common_prefix(prefix, example["input_ids"][: max(0, first_target(example["labels"]) - 1)])
    return len(prefix) if len(prefix) >= MIN_SHARED else 0


def pad(examples: Sequence[dict[str, Any]]) -> MicroBatch:
    """Pad each example on the right to the longest: the reference layout."""
    width = max(len(example["input_ids"]) for example in examples)
    shape = (len(examples), width)
    input_ids = torch.zeros(shape, dtype=torch.long)  # padding is known by position, not by token
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
    # The token at t predicts the one at t + 1. The first label of an example, and the one behind a shared
    # prefix, is IGNORE, so that in a packed sequence no example predicts the start of the next.
    next_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
    target_positions = (next_labels != IGNORE).nonzero().squeeze(1)
    target_ids = next_labels[target_positions]
    return MicroBatch(input_ids, position_ids, target_positions, target_ids, limits, num_tokens)


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
