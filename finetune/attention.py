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
BLOCK = 64  # queries at a time: few enough that little is computed for keys they may not see
STEP = 32  # keys: the numbers of them that blocks see are rounded up to whole steps
ALIKE = 2  # blocks of which one sees this many times the keys of another are multiplied together
MOST_SCORES = 2**21  # of a head at a time: 8 MiB

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
    if kind == "cpu":
        with torch.autocast(kind, enabled=False):
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
    """Causal attention on a CPU, in blocks of queries, each with the keys that it may see.

    Blocks that see about as many keys are multiplied together: of short examples, calling the library takes
    longer than what it computes. Scores and their softmax are fp32, all else is in the precision of the
    inputs; the backward pass computes the probabilities again. More exact than torch's own kernel in bf16,
    and faster, since its products are matrix multiplications of the library that is fastest at them.
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
        queries, keys, values = _in_blocks(query), key[0].contiguous(), value[0].contiguous()
        group = query.shape[1] // len(keys)
        output = torch.empty_like(queries)
        for part in _groups(lengths, prefix, group):
            own = _by_key_head(queries, part, group)
            result = torch.empty_like(own)
            for head, rows in enumerate(own):
                probabilities = _probabilities(rows, _seen(keys[head], part), part, scale).to(values.dtype)
                torch.bmm(probabilities, _seen(values[head], part), out=result[head])
            output[part.blocks] = _by_token(result, group)
        ctx.save_for_backward(query, key, value)
        ctx.settings = lengths, prefix, scale
        return _by_places(output, query)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        lengths, prefix, scale = ctx.settings
        query, key, value = ctx.saved_tensors
        queries, keys, values = _in_blocks(query), key[0].contiguous(), value[0].contiguous()
        group = query.shape[1] // len(keys)
        grads = _in_blocks(grad_output.transpose(1, 2))
        grad_queries = torch.empty_like(queries)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        for part in _groups(lengths, prefix, group):
            own, own_grads = _by_key_head(queries, part, group), _by_key_head(grads, part, group)
            grad_own = torch.empty_like(own)
            grad_seen = keys.new_empty(2, len(keys), *part.seen.shape, keys.shape[-1])
            for head, (rows, grad) in enumerate(zip(own, own_grads, strict=True)):
                seen = _seen(keys[head], part)
                probabilities = _probabilities(rows, seen, part, scale)
                torch.bmm(probabilities.to(grad.dtype).transpose(1, 2), grad, out=grad_seen[1, head])
                # In fp32: of probabilities near 1 bf16 would lose how far from 1 they are: all hangs on it.
                grad_probabilities = torch.bmm(grad, _seen(values[head], part).transpose(1, 2)).float()
                grad_scores = torch.ops.aten._softmax_backward_data(
                    grad_probabilities, probabilities, -1, torch.float32
                ).to(grad.dtype)
                torch.bmm(grad_scores, seen, out=grad_own[head])
                torch.bmm(grad_scores.transpose(1, 2), rows, out=grad_seen[0, head])
            grad_queries[part.blocks] = _by_token(grad_own, group)
            for grad_of_all, grad_of_seen in zip((grad_keys, grad_values), grad_seen, strict=True):
                _add_seen(grad_of_all, grad_of_seen, part)
        return (
            _by_places(grad_queries, query).transpose(1, 2).mul_(scale),
            grad_keys.mul_(scale).view(key.shape),
            grad_values.view(value.shape),
            None,
            None,
            None,
        )


class _Part(NamedTuple):
    """N blocks of BLOCK queries that see at most S keys each."""

    blocks: Tensor
    """[N]: which of the row's blocks"""
    seen: Tensor
    """[N, S]: the places of the keys that any of a block's queries may see, and filling"""
    runs: list[list[tuple[int, int, int]]]
    """Of each block, where stretches of neighbouring keys lie: (first place, first of S, how many)"""
    bias: Tensor
    """[N, G * BLOCK, S] fp32: 0 where a query may see a key, for each of the G queries of a key; else
    -infinity"""


@lru_cache(maxsize=2)
def _groups(lengths: tuple[int, ...], prefix: int, group: int) -> list[_Part]:
    """A packed row cut into blocks, put together: made once, and used by all layers."""
    counts = torch.tensor([prefix, *lengths])
    first_seen = (counts.cumsum(0) - counts).repeat_interleave(counts)
    num_tokens = len(first_seen)
    runs = []
    for first in range(0, num_tokens, BLOCK):
        stop, begin = min(first + BLOCK, num_tokens), int(first_seen[first])
        if begin > prefix:
            shared = [(0, 0, prefix)] if prefix > 0 else []
            runs.append([*shared, (begin, prefix, stop - begin)])
        else:
            runs.append([(0, 0, stop)])
    sizes = [sum(count for *_, count in stretches) for stretches in runs]
    parts, left = [], sorted(range(len(runs)), key=lambda number: sizes[number])
    while left:
        # In steps of STEP: of each shape that it multiplies, torch's library keeps a program.
        limit = -(-int(ALIKE * sizes[left[0]]) // STEP) * STEP
        chosen = [number for number in left if sizes[number] <= limit]
        width = -(-sizes[chosen[-1]] // STEP) * STEP
        chosen = chosen[: max(1, MOST_SCORES // (group * BLOCK * width))]
        left = left[len(chosen) :]
        stretches = [runs[number] for number in chosen]
        parts.append(_part(chosen, stretches, width, first_seen, prefix, group))
    return parts


def _part(
    blocks: list[int],
    runs: list[list[tuple[int, int, int]]],
    width: int,
    first_seen: Tensor,
    prefix: int,
    group: int,
) -> _Part:
    places = torch.full((len(blocks), width), len(first_seen))  # behind all: filling
    for row, stretches in zip(places, runs, strict=True):
        for first, at, count in stretches:
            row[at : at + count] = torch.arange(first, first + count)
    queries = torch.tensor(blocks)[:, None] * BLOCK + torch.arange(BLOCK)
    is_filling = queries >= len(first_seen)
    own_from = first_seen[queries.clamp(max=len(first_seen) - 1)]
    sees = (places[:, None] <= queries[..., None]) & (
        (places[:, None] >= own_from[..., None]) | (places[:, None] < prefix)
    )
    sees |= is_filling[..., None]  # of which nothing is used; with no key at all they would be NaN
    bias = torch.zeros(sees.shape).masked_fill_(~sees, -torch.inf)
    filled = places.clamp(max=len(first_seen) - 1)
    return _Part(torch.tensor(blocks), filled, runs, bias.repeat(1, group, 1))


def _in_blocks(tensor: Tensor) -> Tensor:
    """[1, H, T, D] -> [blocks, BLOCK, H, D], filled up with zeros."""
    tokens = tensor[0].transpose(0, 1)
    blocks = -(-len(tokens) // BLOCK)
    filled = tokens.new_zeros(blocks * BLOCK, *tokens.shape[1:])
    filled[: len(tokens)] = tokens
    return filled.view(blocks, BLOCK, *tokens.shape[1:])


def _by_places(blocks: Tensor, query: Tensor) -> Tensor:
    """[blocks, BLOCK, H, D] -> [1, T, H, D] of query [1, H, T, D]."""
    return blocks.flatten(0, 1)[None, : query.shape[2]]


def _by_key_head(blocks: Tensor, part: _Part, group: int) -> Tensor:
    """[blocks, BLOCK, H, D] -> [K, N, G * BLOCK, D] of a part, where G queries share a key."""
    chosen = blocks[part.blocks]
    heads = chosen.view(*chosen.shape[:2], -1, group, chosen.shape[-1]).permute(2, 0, 3, 1, 4)
    return heads.reshape(*heads.shape[:2], group * BLOCK, -1)


def _by_token(heads: Tensor, group: int) -> Tensor:
    """The inverse: [K, N, G * BLOCK, D] -> [N, BLOCK, H, D]."""
    num_keys, num_blocks, _, size = heads.shape
    tokens = heads.view(num_keys, num_blocks, group, BLOCK, size).permute(1, 3, 0, 2, 4)
    return tokens.reshape(num_blocks, BLOCK, num_keys * group, size)


def _seen(head: Tensor, part: _Part) -> Tensor:
    """[N, S, D]: of a head's keys or values [T, D], those that each block sees."""
    return head.index_select(0, part.seen.flatten()).view(*part.seen.shape, -1)


def _add_seen(grads: Tensor, parts: Tensor, part: _Part) -> None:
    """Add the gradients of what blocks saw [K, N, S, D] to those of all keys, or values [K, T, D]."""
    for number, stretches in enumerate(part.runs):
        for first, at, count in stretches:
            grads[:, first : first + count] += parts[:, number, at : at + count]


def _probabilities(rows: Tensor, keys: Tensor, part: _Part, scale: float) -> Tensor:
    """[N, G * BLOCK, S] fp32: the softmax of the scores of rows [N, G * BLOCK, D] and keys [N, S, D].

    In fp32; where they came in bf16, nothing is lost by multiplying them as such.
    """
    with _bf16_products() if rows.dtype == torch.bfloat16 else nullcontext():
        scores = torch.baddbmm(part.bias, rows.float(), keys.float().transpose(1, 2), alpha=scale)
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
