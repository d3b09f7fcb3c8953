"""Attention within each example of a packed row: no mask in memory, and no work between examples.

It is called through transformers' attention interface, under the name PACKED, by any model that uses it. A
call without the examples' boundaries (generation, padded rows) is transformers' own "sdpa".
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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

from finetune.batching import Boundaries

PACKED = "packed"
STEP = 16
BLOCK = 64  # queries at a time: few enough that little is computed for keys they may not see

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
    grouped = query.shape[1] != key.shape[1]
    if query.device.type == "cpu":
        attended: Tensor = _BlockAttention.apply(  # type: ignore[no-untyped-call]
            query, key, value, boundaries.lengths, boundaries.prefix, scale
        )
        return attended, None
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
    parts = [torch.split(query, rows.num_queries, dim=2)]
    parts += [torch.split(tensor, rows.num_keys, dim=2) for tensor in (key, value)]
    outputs = []
    for q, k, v in zip(*parts, strict=True):
        before = k.shape[2] - q.shape[2]  # what all begin with
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(before)
        how: dict[str, Any] = {"attn_mask": seen} if before > 0 else {"is_causal": True}  # faster kernels
        outputs.append(F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped, **how))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def describe_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """What computes packed attention on this device."""
    if device.type == "cpu":
        return "per example, in blocks"
    has_kernel = _has_varlen_kernel(torch.empty(1, 1, 1, 64, dtype=dtype, device=device))
    return "variable-length kernel" if has_kernel else "per example"


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
        query.dtype in (torch.bfloat16, torch.float16)
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


class _BlockAttention(torch.autograd.Function):
    """Causal attention on a CPU, one block of queries after another, each with the keys that it may see.

    Scores and their softmax are fp32, all else is in the precision of the inputs; the backward pass computes
    the probabilities again. More exact than torch's own kernel in bf16, and two to three times faster, since
    all of its products are matrix multiplications of the library that is fastest at them.
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
        queries, keys, values = _by_key_head(query, key, value)
        num_keys, group, num_tokens, size = queries.shape
        output = queries.new_empty(num_tokens, num_keys, group, size)
        queries32, keys32 = queries.float(), keys.float().transpose(1, 2)
        for block in _blocks(lengths, prefix, group):
            probabilities = _probabilities(queries32, keys32, block, scale, queries.dtype).to(values.dtype)
            result = torch.bmm(probabilities, _seen(values, block))
            # [K, G * n, D] -> [n, K, G, D]
            output[block.rows] = result.view(num_keys, group, -1, size).permute(2, 0, 1, 3)
        ctx.save_for_backward(query, key, value)
        ctx.settings = lengths, prefix, scale
        return output.view(1, num_tokens, num_keys * group, size)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        lengths, prefix, scale = ctx.settings
        query, key, value = ctx.saved_tensors
        queries, keys, values = _by_key_head(query, key, value)
        num_keys, group, _, size = queries.shape
        grads = grad_output[0].transpose(0, 1).reshape(queries.shape)
        grad_query = torch.empty_like(queries)
        grad_key, grad_value = torch.zeros_like(keys), torch.zeros_like(values)
        queries32, keys32 = queries.float(), keys.float().transpose(1, 2)
        values_t = values.transpose(1, 2)
        for block in _blocks(lengths, prefix, group):
            probabilities = _probabilities(queries32, keys32, block, scale, queries.dtype)
            grad = grads[:, :, block.rows].flatten(1, 2)
            _add_seen(grad_value, block, torch.bmm(probabilities.to(grad.dtype).transpose(1, 2), grad))
            # In fp32: of probabilities near 1, bf16 would lose how far from 1 they are, on which all hangs.
            grad_probabilities = torch.bmm(grad, _seen(values_t, block, 2)).float()
            grad_scores = torch.ops.aten._softmax_backward_data(
                grad_probabilities, probabilities, -1, torch.float32
            ).to(grad.dtype)
            grad_block = torch.bmm(grad_scores, _seen(keys, block))
            grad_query[:, :, block.rows] = grad_block.view(num_keys, group, -1, size)
            block_queries = queries[:, :, block.rows].flatten(1, 2)
            _add_seen(grad_key, block, torch.bmm(grad_scores.transpose(1, 2), block_queries))
        return (
            grad_query.mul_(scale).view(query.shape),
            grad_key.mul_(scale).view(key.shape),
            grad_value.view(value.shape),
            None,
            None,
            None,
        )


class _Block(NamedTuple):
    """n queries side by side, which may be of several examples."""

    rows: slice
    """Their places"""
    shared: int
    """How many of the row's first keys they see too, apart from those in `seen`"""
    seen: slice
    """The places of the keys from the first of their own that any of them may see to the last"""
    bias: Tensor
    """[G * n, S] fp32, of the S keys of both: 0 where a query may see a key, for each of the G queries of a
    key; else -infinity"""


@lru_cache(maxsize=2)
def _blocks(lengths: tuple[int, ...], prefix: int, group: int) -> list[_Block]:
    """A packed row cut into blocks: made once, and used by all layers."""
    counts = torch.tensor([prefix, *lengths])
    first_seen = (counts.cumsum(0) - counts).repeat_interleave(counts)
    places = torch.arange(len(first_seen))
    blocks = []
    # In steps of STEP and BLOCK: of each shape that it multiplies, torch's library keeps a program.
    reach = -(-prefix // STEP) * STEP
    for first in range(0, len(places), BLOCK):
        rows = slice(first, min(first + BLOCK, len(places)))
        begin = int(first_seen[first]) // BLOCK * BLOCK
        shared, begin = (reach, begin) if begin > reach else (0, 0)
        keys = torch.cat([places[:shared], places[begin : rows.stop]])
        seen = (keys <= places[rows, None]) & ((keys >= first_seen[rows, None]) | (keys < prefix))
        bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        blocks.append(_Block(rows, shared, slice(begin, rows.stop), bias.repeat(group, 1)))
    return blocks


def _seen(tensor: Tensor, block: _Block, dim: int = 1) -> Tensor:
    """The keys, or values, that a block sees, of all along `dim`."""
    own = tensor.narrow(dim, block.seen.start, block.seen.stop - block.seen.start)
    return own if block.shared == 0 else torch.cat([tensor.narrow(dim, 0, block.shared), own], dim)


def _add_seen(grad: Tensor, block: _Block, part: Tensor) -> None:
    """Add a block's part [K, S, D] to the gradient [K, T, D] of all keys, or values."""
    if block.shared > 0:
        grad[:, : block.shared] += part[:, : block.shared]
    grad[:, block.seen] += part[:, block.shared :]


def _by_key_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """query [K, G, T, D], where G queries share a key; key and value [K, T, D]."""
    num_keys = key.shape[1]
    return query[0].reshape(num_keys, -1, *query.shape[2:]), key[0].contiguous(), value[0].contiguous()


def _probabilities(queries: Tensor, keys: Tensor, block: _Block, scale: float, dtype: torch.dtype) -> Tensor:
    """[K, G * n, S] fp32: the softmax of a block of queries [K, G, T, D] over the keys [K, D, T] it sees.

    Both are fp32; where they came from bf16, `dtype`, nothing is lost by multiplying them as such.
    """
    rows = queries[:, :, block.rows].flatten(1, 2)
    with _bf16_products() if dtype == torch.bfloat16 else nullcontext():
        scores = torch.baddbmm(block.bias, rows, _seen(keys, block, 2), alpha=scale)
    return scores.softmax(-1)


@contextmanager
def _bf16_products() -> Iterator[None]:
    """Have a CPU that can multiply bf16 do so in products of fp32 tensors: sums and results stay fp32."""
    backend: Any = torch.backends.mkldnn
    backend = backend.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before
