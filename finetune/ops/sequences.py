"""A packed sequence as separate ones, as attention takes them: each with its own copy of a shared prefix."""

from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.data.collate import Boundaries


class _Shared(NamedTuple):
    """Where the keys of a shared prefix are, when each sequence has its own copy of them."""

    key_indices: Tensor
    """The tokens whose keys each sequence attends to, concatenated"""
    copies: Tensor
    """The rows of `key_indices` that are the prefix: those of the first sequence, of the second, ..."""
    own: Tensor
    """The rows of `key_indices` that are not, one for each token behind the prefix"""
    prefix: int
    """The length of the prefix"""


class Sequences(NamedTuple):
    """A packed sequence as S separate ones: the shared prefix of the examples, if any, then each example."""

    num_queries: list[int]
    num_keys: list[int]
    """Including those of the prefix"""
    query_starts: Tensor
    """[S + 1] int32, like `key_starts`: the start of each sequence, and the end of the last"""
    key_starts: Tensor
    shared: _Shared | None
    """None: each token's key once, in order"""

    def gather(self, x: Tensor) -> Tensor:
        """Gather keys or values [T, K, D] of the tokens into [sum(num_keys), K, D]."""
        if self.shared is None:
            return x
        gathered: Tensor = _CopyPrefix.apply(x, self.shared)  # type: ignore[no-untyped-call]
        return gathered


@lru_cache(maxsize=2)
def separate(boundaries: Boundaries) -> Sequences:
    """The sequences of a packed one.

    The result is kept, because every layer of a forward pass uses the same.
    """
    lengths, starts, prefix = boundaries
    if prefix == 0:
        counts = list(lengths)
        return Sequences(counts, counts, starts, starts, None)

    def on_device(numbers: Iterable[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor([*numbers], dtype=dtype).to(starts.device, non_blocking=True)

    num_queries, num_keys = [prefix, *lengths], [prefix, *(prefix + length for length in lengths)]
    query_ends, key_ends = [*accumulate(num_queries)], [*accumulate(num_keys)]
    keys = [index for start, end in pairwise(query_ends) for index in (*range(prefix), *range(start, end))]
    starts_of_keys = [0, *key_ends[:-1]]
    shared = _Shared(
        on_device([*range(prefix), *keys]),
        on_device(start + place for start in starts_of_keys for place in range(prefix)),
        on_device(
            row
            for start, end in zip(starts_of_keys, key_ends, strict=True)
            for row in range(start + prefix, end)
        ),
        prefix,
    )
    query_starts, key_starts = (on_device([0, *ends], torch.int32) for ends in (query_ends, key_ends))
    return Sequences(num_queries, num_keys, query_starts, key_starts, shared)


class _CopyPrefix(torch.autograd.Function):
    """x [T, K, D] -> [sum(num_keys), K, D]: each sequence gets its own copy of the prefix.

    The backward pass adds the gradients of the copies in their order. That of indexing would sort the
    indices, and add in the order in which threads arrive.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: _Shared) -> Tensor:
        ctx.shared = shared
        return x.index_select(0, shared.key_indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _, copies, own, prefix = ctx.shared
        dx = grad.new_empty(prefix + len(own), *grad.shape[1:])
        torch.sum(grad.index_select(0, copies).view(-1, prefix, *grad.shape[1:]), 0, out=dx[:prefix])
        torch.index_select(grad, 0, own, out=dx[prefix:])
        return dx, None
