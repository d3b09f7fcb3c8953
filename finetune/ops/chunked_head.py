"""The head and the loss as one operation: sums over target tokens, computed in chunks without keeping logits.

The head is frozen under LoRA, so the backward pass needs only the gradient of the hidden states. The forward
pass computes that gradient while a chunk's logits exist. This takes two matrix multiplications. Recomputing
the logits in the backward pass would take three.
"""

from typing import Any

import torch
from torch import Tensor

from finetune.ops import operators


def tokens_per_chunk(budget_mib: int, vocabulary: int, bytes_per_logit: int) -> int:
    """The number of tokens whose logits fit into the budget, at least 1."""
    return max(1, budget_mib * 2**20 // (vocabulary * bytes_per_logit))


def bytes_per_logit(dtype: torch.dtype, device: torch.device) -> int:
    """The bytes that live for each logit of a chunk: those of the logit, which the gradient replaces.

    Where torch's operations serve on a GPU, they pass over a whole chunk at once: two fp32 numbers more.
    """
    by_torch = operators.makers(device)["token_stats"].name == "torch"
    return dtype.itemsize + (2 * 4 if device.type == "cuda" and by_torch else 0)


class ChunkedTokenSums(torch.autograd.Function):
    """Sums [3] fp32 over N target tokens: nll and entropy in nats, and the number of correct predictions.

    hidden [N, d], weight [V, d] of a frozen head without bias, target_ids [N]. Only the nll has a gradient,
    and only with respect to `hidden`. With p the softmax of a token's logits, the gradient with respect to
    these logits is p - one_hot(target). `stats` [N, 3] fp32, if given, receives the values that are added up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target_ids: Tensor,
        chunk: int,
        stats: Tensor | None = None,
    ) -> Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = hidden[part] @ weight.t()
            values = operators.token_stats(logits, target_ids[part], gradient is not None)
            sums += values.sum(0)
            if stats is not None:
                stats[part] = values
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[part])
            del logits  # before those of the next chunk
        ctx.save_for_backward(gradient)
        return sums

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (
            gradient * grad_sums[0],
            None,
            None,
            None,
            None,
        )  # an fp32 factor: rounding it would bias the whole gradient


def chunked_token_stats(hidden: Tensor, weight: Tensor, target_ids: Tensor, chunk: int) -> Tensor:
    """[N, 3] fp32: the values of each target token that ChunkedTokenSums adds up, without a gradient."""
    values = torch.empty(len(hidden), 3, device=hidden.device)
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        values[part] = operators.token_stats(hidden[part] @ weight.t(), target_ids[part], False)
    return values
