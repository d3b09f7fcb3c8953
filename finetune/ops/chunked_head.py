"""The head and the loss in one: sums over target tokens, a chunk of them at a time, and no logits kept.

The head is frozen under LoRA, so all that the backward pass needs of it is the gradient of the hidden states.
That is taken in the forward pass, while a chunk's logits are there: two matrix multiplications in all, where
computing the logits again would need three.
"""

from typing import Any

import torch
from torch import Tensor

from finetune.ops import kernels

ROWS = 16  # tokens at a time in the passes over the vocabulary: they still lie in a core's cache


def tokens_per_chunk(budget_mib: int, vocabulary: int, bytes_per_logit: int) -> int:
    """How many tokens' logits fit into the budget, at least one."""
    return max(1, budget_mib * 2**20 // (vocabulary * bytes_per_logit))


def bytes_per_logit(dtype: torch.dtype, device: torch.device) -> int:
    """Of the logit itself; on a GPU, which takes a whole chunk at a time, of its two values in fp32 too."""
    return dtype.itemsize + (8 if device.type == "cuda" else 0)


class ChunkedTokenSums(torch.autograd.Function):
    """Sums [3] fp32 over N target tokens: nll and entropy in nats, and how many were the likeliest.

    hidden [N, d], weight [V, d] of a frozen head without bias, target_ids [N]. Only the nll has a gradient,
    and only for `hidden`: with p the softmax of the logits, that of a token's logits is p - one_hot(target).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target_ids: Tensor, chunk: int) -> Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = hidden[part] @ weight.t()
            sums += _stats_of(logits, target_ids[part], gradient is not None).sum(0)
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return sums

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_sums[0], None, None, None  # a scale in fp32; rounded, it would bias all alike


def chunked_token_stats(hidden: Tensor, weight: Tensor, target_ids: Tensor, chunk: int) -> Tensor:
    """[N, 3] fp32: what ChunkedTokenSums adds up, of each target token. It has no gradient."""
    values = torch.empty(len(hidden), 3, device=hidden.device)
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        values[part] = _stats_of(hidden[part] @ weight.t(), target_ids[part], with_gradient=False)
    return values


def _stats_of(logits: Tensor, target_ids: Tensor, with_gradient: bool) -> Tensor:
    """[n, 3] of logits [n, V] and target_ids [n]; with the gradient, the logits become that of their nll."""
    if kernels.can_compute(logits):
        return kernels.kernel_token_stats(logits, target_ids, with_gradient)
    rows = len(logits) if logits.is_cuda else ROWS
    values = []
    for some_logits, ids in zip(
        torch.split(logits, rows), torch.split(target_ids[:, None], rows), strict=True
    ):
        likeliest = some_logits.argmax(-1, keepdim=True)
        log_p = torch.log_softmax(some_logits.float(), -1)
        p = log_p.exp()
        columns = [-log_p.gather(-1, ids), -torch.linalg.vecdot(p, log_p)[:, None], likeliest == ids]
        values.append(torch.cat(columns, dim=1))
        if with_gradient:
            some_logits.copy_(p.scatter_add_(-1, ids, p.new_full(ids.shape, -1)))
    return torch.cat(values)
