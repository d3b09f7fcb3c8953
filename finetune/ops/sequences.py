"""A packed sequence as separate ones, as attention takes them: each with a copy of its context's keys."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.data.collate import Boundaries
from finetune.data.segments import keys_of


class _Shared(NamedTuple):
    """Where the keys of shared tokens are, when each sequence has its own copy of them."""

    key_indices: Tensor
    """The tokens whose keys each sequence attends to, concatenated"""
    copies: Tensor
    """The rows of `key_indices` that are shared tokens, group by group: of a group's tokens the first copies,
    the second ones, ..."""
    groups: tuple[tuple[int, int], ...]
    """The copies and the tokens of each group: the shared tokens that have as many copies as each other"""
    own: Tensor
    """The rows of `key_indices` that are the only copy of their token"""
    order: Tensor | None
    """For each token its row among those of all groups, then `own`; None where these are in order"""

    def copy(self, x: Tensor) -> Tensor:
        """x [T, K, D] -> [sum(num_keys), K, D]: each sequence gets its own copy of its context."""
        return x.index_select(0, self.key_indices)

    def add_copies(self, grad: Tensor) -> Tensor:
        """The gradient [T, K, D] of the tokens from that of their copies, which are added in their order."""
        num_shared, sizes = sum(num_tokens for _, num_tokens in self.groups), grad.shape[1:]
        dx = grad.new_empty(num_shared + len(self.own), *sizes)
        of_copies = grad.index_select(0, self.copies)
        first = row = 0
        for num_copies, num_tokens in self.groups:
            last = row + num_copies * num_tokens
            part = of_copies[row:last].view(num_copies, num_tokens, *sizes)
            torch.sum(part, 0, out=dx[first : first + num_tokens])
            first, row = first + num_tokens, last
        torch.index_select(grad, 0, self.own, out=dx[num_shared:])
        return dx if self.order is None else dx.index_select(0, self.order)


class Sequences(NamedTuple):
    """A packed sequence as S separate ones, one for each of its segments."""

    num_queries: list[int]
    num_keys: list[int]
    """Including those of the context"""
    query_starts: Tensor
    """[S + 1] int32, like `key_starts`: the start of each sequence, and the end of the last"""
    key_starts: Tensor
    shared: _Shared | None
    """None: each token's key once, in order"""
    keeps_copies: bool
    """Whether a backward pass keeps the copies of keys. Those of a shared prefix are few. Those of what
    branches continue may be many times the tokens, and are made again."""

    def gather(self, x: Tensor) -> Tensor:
        """Gather keys or values [T, K, D] of the tokens into [sum(num_keys), K, D], with a gradient."""
        if self.shared is None:
            return x
        gathered: Tensor = _CopyShared.apply(x, self.shared)  # type: ignore[no-untyped-call]
        return gathered

    def copies_of(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """As `gather` for each tensor, within an autograd function."""
        return tensors if self.shared is None else tuple(self.shared.copy(x) for x in tensors)

    def gradients_of(self, *grads: Tensor) -> tuple[Tensor, ...]:
        """The gradients [T, K, D] of tokens from those of what `copies_of` returns."""
        return grads if self.shared is None else tuple(self.shared.add_copies(grad) for grad in grads)


@lru_cache(maxsize=2)
def separate(boundaries: Boundaries) -> Sequences:
    """The sequences of a packed one.

    The result is kept, because every layer of a forward pass uses the same.
    """
    segments, device = boundaries.segments(), boundaries.starts.device

    def on_device(numbers: NDArray[np.int64], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(numbers).to(dtype).to(device, non_blocking=True)

    def starts_of(counts: list[int]) -> Tensor:
        return on_device(np.cumsum([0, *counts]), torch.int32)

    num_queries = [segment.length for segment in segments]
    if not any(segment.context for segment in segments):
        starts = starts_of(num_queries) if boundaries.branches else boundaries.starts
        return Sequences(num_queries, num_queries, starts, starts, None, keeps_copies=True)
    num_keys = [segment.num_keys for segment in segments]
    key_indices = np.concatenate(keys_of(segments))
    num_copies = np.bincount(key_indices)
    rows = np.argsort(key_indices, kind="stable")  # those of the first token, in order, of the second, ...
    first_copies = np.cumsum(num_copies) - num_copies
    groups, copies, tokens = [], [], []
    for count in np.unique(num_copies[num_copies > 1])[::-1]:
        of_group = np.flatnonzero(num_copies == count)
        groups.append((int(count), len(of_group)))
        copies.append(rows[first_copies[of_group] + np.arange(count)[:, None]].ravel())
        tokens.append(of_group)
    alone = np.flatnonzero(num_copies == 1)
    order = np.argsort(np.concatenate([*tokens, alone]))
    is_in_order = bool((order == np.arange(len(order))).all())
    shared = _Shared(
        on_device(key_indices),
        on_device(np.concatenate(copies)),
        tuple(groups),
        on_device(rows[first_copies[alone]]),
        None if is_in_order else on_device(order),
    )
    starts_of_both = starts_of(num_queries), starts_of(num_keys)
    return Sequences(num_queries, num_keys, *starts_of_both, shared, keeps_copies=not boundaries.branches)


class _CopyShared(torch.autograd.Function):
    """`_Shared.copy`. The backward pass of indexing would sort the indices, and add in the order in which
    threads arrive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: _Shared) -> Tensor:
        ctx.shared = shared
        return shared.copy(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.shared.add_copies(grad), None
