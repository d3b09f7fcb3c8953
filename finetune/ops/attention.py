"""Attention within each example of a packed row: no mask in memory, and no work between examples.

It is called through transformers' attention interface, under the name PACKED, by any model that uses it. A
call without the examples' boundaries (generation, padded rows) is transformers' own "sdpa".
"""

from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from finetune.data.collate import Boundaries
from finetune.ops import kernels

PACKED = "packed"

# What models tell every attention function, and what changes nothing here.
HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states"}
HARMLESS |= {"position_embeddings", "past_key_values", "logits_to_keep", "output_router_logits"}


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    boundaries: Boundaries | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, K, T, D] with K a divisor of H: returns [1, T, H, D].

    Raises:
        NotImplementedError: the model asks for more than causal attention within each example.
    """
    if boundaries is None:
        result, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return result, None
    _refuse_others(boundaries, dropout, others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped, kind = query.shape[1] != key.shape[1], query.device.type
    if torch.is_autocast_enabled(kind):  # torch's own function casts too: positions may have made fp32
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    if kernels.can_compute(query, key, value):
        size = value.shape[-1]
        if query.shape[-1] != size:  # zeros change no score, and nothing before them in the output
            largest = max(query.shape[-1], size)
            query, key, value = (F.pad(x, (0, largest - x.shape[-1])) for x in (query, key, value))
        attended: Tensor = _KernelAttention.apply(  # type: ignore[no-untyped-call]
            query, key, value, boundaries.lengths, boundaries.prefix, scale
        )
        return attended[..., :size], None
    rows = _rows_of(boundaries.lengths, boundaries.prefix, query.device)
    # Each example with keys and values of its own for what all begin with.
    key, value = (x if rows.key_places is None else x[:, :, rows.key_places] for x in (key, value))
    if _has_varlen_kernel(query):
        tokens_first = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        kernel: Any = varlen_attn
        attended = kernel(
            *tokens_first,
            rows.query_starts,
            rows.key_starts,
            max(rows.num_queries),
            max(rows.num_keys),
            scale=scale,
            window_size=(-1, 0),  # causal; the last query sees the last key, and all before
            enable_gqa=grouped,
        )
        return attended[None], None
    dtype = query.dtype
    if kind == "cpu":  # where torch's attention takes bf16 two to four times as long, and loses more
        query, key, value = (x.float() for x in (query, key, value))
    parts = [torch.split(query, rows.num_queries, dim=2)]
    parts += [torch.split(tensor, rows.num_keys, dim=2) for tensor in (key, value)]
    outputs = []
    for q, k, v in zip(*parts, strict=True):
        before = k.shape[2] - q.shape[2]  # what all begin with
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(before)
        how: dict[str, Any] = {"attn_mask": seen} if before > 0 else {"is_causal": True}  # faster kernels
        outputs.append(F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped, **how))
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def describe_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """What computes packed attention on this device."""
    query = torch.empty(1, 1, 1, 64, dtype=dtype, device=device)
    if kernels.can_compute(query):
        return "compiled kernel"
    return "variable-length kernel" if _has_varlen_kernel(query) else "per example"


def _refuse_others(boundaries: Boundaries, dropout: float, others: dict[str, Any]) -> None:
    window = others.pop("sliding_window", None)
    if window is not None and window < boundaries.prefix + max(boundaries.lengths):
        raise NotImplementedError("a sliding window shorter than an example")
    asked = sorted(name for name, value in others.items() if value is not None and name not in HARMLESS)
    if others.get("is_causal") in (None, True):
        asked = [name for name in asked if name != "is_causal"]
    if dropout > 0:
        asked.append("dropout")
    if asked:
        raise NotImplementedError(f"attention with {', '.join(asked)}")


def _has_varlen_kernel(query: Tensor) -> bool:
    """FlashAttention: 16-bit numbers, heads of at most 256, a card of the Ampere generation or newer."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
    )


class _Rows(NamedTuple):
    """A packed row as sequences: what all examples begin with, if anything, and then each of them."""

    num_queries: list[int]
    num_keys: list[int]
    query_starts: Tensor
    """[S + 1] int32, as `key_starts`: where the S sequences begin, and the end of the last"""
    key_starts: Tensor
    key_places: Tensor | None
    """Which of the row's keys those of the sequences are; None: the same, in order"""


@lru_cache(maxsize=2)
def _rows_of(lengths: tuple[int, ...], prefix: int, device: torch.device) -> _Rows:
    """Made once a row, and used by all layers."""

    def starts(counts: list[int]) -> Tensor:
        return torch.tensor([*accumulate(counts, initial=0)], dtype=torch.int32).to(device, non_blocking=True)

    if prefix == 0:
        counts = list(lengths)
        return _Rows(counts, counts, starts(counts), starts(counts), None)
    ends = [*accumulate(lengths, initial=prefix)]
    shared = torch.arange(prefix)
    places = [shared]
    for start, end in pairwise(ends):
        places += [shared, torch.arange(start, end)]
    num_queries, num_keys = [prefix, *lengths], [prefix, *(prefix + length for length in lengths)]
    key_places = torch.cat(places).to(device, non_blocking=True)
    return _Rows(num_queries, num_keys, starts(num_queries), starts(num_keys), key_places)


class _KernelAttention(torch.autograd.Function):
    """query [1, H, T, D], key and value [1, K, T, D] of a packed row on a CPU: [1, T, H, D].

    All in fp32, and rounded once; the backward pass computes the probabilities again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        prefix: int,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.settings = lengths, prefix, scale
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        return kernels.attention_forward(query, key, value, lengths, prefix, scale)[None]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = (x[0].transpose(0, 1) for x in ctx.saved_tensors)
        grads = kernels.attention_backward(query, key, value, grad_output[0], *ctx.settings)
        return *(grad.transpose(0, 1)[None] for grad in grads), None, None, None
