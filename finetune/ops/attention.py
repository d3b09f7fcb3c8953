"""Attention within each example of a packed sequence, without a mask in memory or work across examples.

Models call it through transformers' attention interface, under the name PACKED. A call without the boundaries
of the examples (in generation, or with padded examples) goes to transformers' own "sdpa".
"""

from collections.abc import Callable
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

# Arguments that models pass to every attention function and that do not affect the result.
IGNORED = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states"}
IGNORED |= {"position_embeddings", "past_key_values", "logits_to_keep", "output_router_logits"}

Implementation = Callable[[Tensor, Tensor, Tensor, Boundaries, float], Tensor]
"""(query [1, H, T, D], key and value [1, K, T, D], boundaries, scale) -> [1, T, H, D]"""


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
    """Attention [1, T, H, D] of query [1, H, T, D] to key and value [1, K, T, D], where K divides H.

    Raises:
        NotImplementedError: the model needs more than causal attention within each example.
    """
    if boundaries is None:
        result, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return result, None
    _refuse_unsupported(boundaries, dropout, others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # as in torch's own function: rotary positions may return fp32
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    attend = _choose_implementation(query, key, value)
    return attend(query, key, value, boundaries, scale), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def describe_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the implementation of packed attention for this device and dtype."""
    query = torch.empty(1, 1, 1, 64, dtype=dtype, device=device)
    return NAMES[_choose_implementation(query, query, query)]


def _choose_implementation(query: Tensor, key: Tensor, value: Tensor) -> Implementation:
    if kernels.can_compute(query, key, value):
        return by_compiled_kernel
    return by_varlen_kernel if _has_varlen_kernel(query) else by_example


def _refuse_unsupported(boundaries: Boundaries, dropout: float, others: dict[str, Any]) -> None:
    window = others.pop("sliding_window", None)
    if window is not None and window < boundaries.prefix + max(boundaries.lengths):
        raise NotImplementedError("a sliding window shorter than an example")
    refused = sorted(name for name, value in others.items() if value is not None and name not in IGNORED)
    if others.get("is_causal") in (None, True):
        refused = [name for name in refused if name != "is_causal"]
    if dropout > 0:
        refused.append("dropout")
    if refused:
        raise NotImplementedError(f"attention with {', '.join(refused)}")


def _has_varlen_kernel(query: Tensor) -> bool:
    """FlashAttention needs 16 bits, head sizes up to 256, and an Ampere or newer GPU."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
    )


def by_compiled_kernel(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Boundaries, scale: float
) -> Tensor:
    """An `Implementation` for CPUs, in kernels.cpp."""
    size = value.shape[-1]
    if query.shape[-1] != size:  # zeros change no score, and the outputs they add are cut off
        largest = max(query.shape[-1], size)
        query, key, value = (F.pad(x, (0, largest - x.shape[-1])) for x in (query, key, value))
    attended: Tensor = _KernelAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, boundaries.lengths, boundaries.prefix, scale
    )
    return attended[..., :size]


def by_varlen_kernel(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Boundaries, scale: float
) -> Tensor:
    """An `Implementation` in 16 bits for recent GPUs, with FlashAttention."""
    sequences = _sequences(boundaries.lengths, boundaries.prefix, query.device)
    kernel: Any = varlen_attn
    attended: Tensor = kernel(
        *(x[0].transpose(0, 1) for x in (query, sequences.gather(key), sequences.gather(value))),
        sequences.query_starts,
        sequences.key_starts,
        max(sequences.num_queries),
        max(sequences.num_keys),
        scale=scale,
        window_size=(-1, 0),  # causal, aligned at the end: the last query attends to the last key
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended[None]


def by_example(query: Tensor, key: Tensor, value: Tensor, boundaries: Boundaries, scale: float) -> Tensor:
    """An `Implementation` for any device: one call of torch's attention for each example."""
    sequences = _sequences(boundaries.lengths, boundaries.prefix, query.device)
    grouped, dtype = query.shape[1] != key.shape[1], query.dtype
    key, value = sequences.gather(key), sequences.gather(value)
    # On a CPU, torch's attention is two to four times slower in bf16, and less exact.
    if query.device.type == "cpu":
        query, key, value = (x.float() for x in (query, key, value))
    queries = torch.split(query, sequences.num_queries, dim=2)
    keys, values = (torch.split(x, sequences.num_keys, dim=2) for x in (key, value))
    outputs = []
    for q, k, v in zip(queries, keys, values, strict=True):
        prefix = k.shape[2] - q.shape[2]
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(prefix)
        mask: dict[str, Any] = {"attn_mask": visible} if prefix > 0 else {"is_causal": True}  # faster kernels
        outputs.append(F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped, **mask))
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype)


NAMES: dict[Implementation, str] = {
    by_compiled_kernel: "compiled kernel",
    by_varlen_kernel: "variable-length kernel",
    by_example: "per example",
}


class _Sequences(NamedTuple):
    """A packed sequence as S separate ones: the shared prefix of the examples, if any, then each example."""

    num_queries: list[int]
    num_keys: list[int]
    """Including those of the prefix"""
    query_starts: Tensor
    """[S + 1] int32, like `key_starts`: the start of each sequence, and the end of the last"""
    key_starts: Tensor
    key_indices: Tensor | None
    """The tokens whose keys each sequence attends to, concatenated; None: each token once, in order"""

    def gather(self, x: Tensor) -> Tensor:
        """Gather keys or values [1, K, T, D] of the tokens into [1, K, sum(num_keys), D]."""
        return x if self.key_indices is None else x[:, :, self.key_indices]


@lru_cache(maxsize=2)
def _sequences(lengths: tuple[int, ...], prefix: int, device: torch.device) -> _Sequences:
    """The result is cached, because every layer of a forward pass uses the same sequences."""

    def starts(counts: list[int]) -> Tensor:
        return torch.tensor([*accumulate(counts, initial=0)], dtype=torch.int32).to(device, non_blocking=True)

    if prefix == 0:
        counts = list(lengths)
        return _Sequences(counts, counts, starts(counts), starts(counts), None)
    ends = [*accumulate(lengths, initial=prefix)]
    shared = torch.arange(prefix)
    indices = [shared]
    for start, end in pairwise(ends):
        indices += [shared, torch.arange(start, end)]
    num_queries, num_keys = [prefix, *lengths], [prefix, *(prefix + length for length in lengths)]
    key_indices = torch.cat(indices).to(device, non_blocking=True)
    return _Sequences(num_queries, num_keys, starts(num_queries), starts(num_keys), key_indices)


class _KernelAttention(torch.autograd.Function):
    """Attention [1, T, H, D] of query [1, H, T, D] to key and value [1, K, T, D] on a CPU.

    It is computed in fp32 and rounded once. The backward pass recomputes the probabilities.
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
