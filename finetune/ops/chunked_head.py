"""The head and the loss as one operation: sums over target tokens, computed in chunks without keeping logits.

The head is frozen under LoRA, so the backward pass needs only the gradient of the hidden states. The forward
pass computes that gradient while a chunk's logits exist. This takes two matrix multiplications. Recomputing
the logits in the backward pass would take three. A head that is trained takes a third one for its gradient.

Rows of the head that are trained, for added tokens, are few: their logits and gradients are computed apart.
"""

from typing import Any

import torch
from torch import Tensor

from finetune.ops import operators
from finetune.ops.token_rows import TokenRows


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

    hidden [N, d], weight [V, d] of a head without bias, target_ids [N]. `rows` [k, d] fp32, if given, are
    what the rows `row_ids` [k] of the head are instead. `trained_weight` [V, d] fp32, if given, is what
    `weight` is in the data type of `hidden`. Only the nll has a gradient, with respect to `hidden`, `rows`
    and `trained_weight`. With p the softmax of a token's logits, the gradient with respect to these logits is
    p - one_hot(target). `stats` [N, 3] fp32, if given, receives the values that are added up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target_ids: Tensor,
        chunk: int,
        rows: Tensor | None = None,
        row_ids: Tensor | None = None,
        stats: Tensor | None = None,
        trained_weight: Tensor | None = None,
    ) -> Tensor:
        gradient = torch.empty_like(hidden) if any(ctx.needs_input_grad) else None
        trained = _in_precision_of(hidden, rows, row_ids)
        of_rows = None if rows is None else torch.zeros_like(rows)
        is_trained = trained_weight is not None and gradient is not None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if is_trained else None
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight, trained)
            values = operators.token_stats(logits, target_ids[part], gradient is not None)
            sums += values.sum(0)
            if stats is not None:
                stats[part] = values
            if of_weight is not None:
                of_weight += _product_over_tokens(logits, hidden[part])
            if gradient is not None:
                at_rows = None if trained is None else logits[:, trained.ids]
                if trained is not None:
                    logits.index_fill_(1, trained.ids, 0)
                torch.mm(logits, weight, out=gradient[part])
                if trained is not None and at_rows is not None and of_rows is not None:
                    gradient[part].addmm_(at_rows, trained.values)
                    # In fp32: a sum over all tokens of a chunk may be too large for fp16.
                    of_rows.addmm_(at_rows.t().float(), hidden[part].float())
            del logits  # before those of the next chunk
        ctx.save_for_backward(gradient, of_rows, of_weight)
        return sums

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        gradient, of_rows, of_weight = ctx.saved_tensors
        factor = grad_sums[0]  # fp32: rounding it would bias the whole gradient
        of_rows, of_weight = (
            None if gradient is None else gradient * factor for gradient in (of_rows, of_weight)
        )
        return gradient * factor, None, None, None, of_rows, None, None, of_weight


def _product_over_tokens(logits: Tensor, hidden: Tensor) -> Tensor:
    """[V, d] of logits [N, V] and hidden [N, d]: a sum over tokens, which may be too large for fp16."""
    if hidden.dtype == torch.float16:
        logits, hidden = logits.float(), hidden.float()
    return logits.t() @ hidden


def _in_precision_of(hidden: Tensor, rows: Tensor | None, row_ids: Tensor | None) -> TokenRows | None:
    return None if rows is None or row_ids is None else TokenRows(row_ids, rows.to(hidden.dtype))


def _logits(hidden: Tensor, weight: Tensor, rows: TokenRows | None) -> Tensor:
    """[N, V]: the product with the head, whose trained rows are given in the data type of hidden [N, d]."""
    logits = hidden @ weight.t()
    return logits if rows is None else logits.index_copy_(1, rows.ids, hidden @ rows.values.t())


@torch.no_grad()
def chunked_token_stats(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    chunk: int,
    rows: Tensor | None = None,
    row_ids: Tensor | None = None,
) -> Tensor:
    """[N, 3] fp32: the values of each target token that ChunkedTokenSums adds up, without a gradient."""
    trained = _in_precision_of(hidden, rows, row_ids)
    values = torch.empty(len(hidden), 3, device=hidden.device)
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        values[part] = operators.token_stats(_logits(hidden[part], weight, trained), target_ids[part], False)
    return values
