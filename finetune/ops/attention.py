"""Attention within each example of a packed sequence, without a mask in memory or work across examples.

Models call it through transformers' attention interface, under the name PACKED. A call without the boundaries
of the examples (in generation, or with padded examples) goes to transformers' own "sdpa".
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from finetune.data.collate import Boundaries
from finetune.data.segments import Segment
from finetune.ops import kernels
from finetune.ops.sequences import Sequences, separate

PACKED = "packed"

# Arguments that models pass to every attention function and that do not affect the result.
IGNORED = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states"}
IGNORED |= {"position_embeddings", "past_key_values", "logits_to_keep", "output_router_logits"}

Implementation = Callable[[Tensor, Tensor, Tensor, Boundaries, float], Tensor]
"""(query [T, H, D], key and value [T, K, D], boundaries, scale) -> [T, H, D]"""

ALIGNMENT = 8  # both of torch's kernels for GPUs want head sizes that are multiples of this
CAUSAL_FROM_BOTTOM_RIGHT = 2  # a mask of the memory-efficient kernel: the last query sees the last key


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
    # Not x[0]: its gradient would be a tensor of zeros that the gradient is copied into.
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return attend(query, key, value, boundaries, scale).unsqueeze(0), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def attend(query: Tensor, key: Tensor, value: Tensor, boundaries: Boundaries, scale: float) -> Tensor:
    """Causal attention [T, H, D] of query [T, H, D] to key and value [T, K, D] within each example.

    K divides H. The result has the dtype of the inputs, also within autocast, which would round what
    `by_example` computes in fp32.
    """
    with torch.autocast(query.device.type, enabled=False):
        return _choose_implementation(query, key, value)(query, key, value, boundaries, scale)


def describe_kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> tuple[str, str]:
    """The name of the implementation for this device, dtype and head size; on a GPU also why it is not
    FlashAttention, if it is not."""
    query = torch.empty(1, 1, head_size, dtype=dtype, device=device)
    capability = gpu_capability(device)
    size = _padded_size(query, query)
    obstacle = None if capability is None else flash_obstacle(capability, dtype, size)
    return NAMES[_choose_implementation(query, query, query)], obstacle or ""


def gpu_capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU, such as (8, 6); None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def flash_obstacle(capability: tuple[int, int], dtype: torch.dtype, head_size: int) -> str | None:
    """Why FlashAttention cannot compute this on a GPU of this capability; None if it can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return "FlashAttention computes in 16 bits only"
    if capability < (8, 0):
        return (
            f"FlashAttention needs compute capability 8.0, and this GPU has {'.'.join(map(str, capability))}"
        )
    if head_size > 256:
        return f"FlashAttention needs heads of at most 256 numbers, and these have {head_size}"
    # Of these, only A100, H100 and B200 have enough shared memory for its backward pass.
    if 192 < head_size <= 224 and ((8, 6) <= capability <= (8, 9) or capability >= (12, 0)):
        return f"FlashAttention cannot train heads of {head_size} numbers on this GPU"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no FlashAttention"
    return None


def _choose_implementation(query: Tensor, key: Tensor, value: Tensor) -> Implementation:
    if kernels.can_compute(query, key, value):
        return by_compiled_kernel
    capability = gpu_capability(query.device)
    if capability is None:
        return by_example
    head_size = _padded_size(query, value)
    return by_efficient_kernel if flash_obstacle(capability, query.dtype, head_size) else by_flash_kernel


def _refuse_unsupported(boundaries: Boundaries, dropout: float, others: dict[str, Any]) -> None:
    window = others.pop("sliding_window", None)
    if window is not None and window < max(segment.num_keys for segment in boundaries.segments()):
        raise NotImplementedError("a sliding window shorter than an example")
    refused = sorted(name for name, value in others.items() if value is not None and name not in IGNORED)
    if others.get("is_causal") in (None, True):
        refused = [name for name in refused if name != "is_causal"]
    if dropout > 0:
        refused.append("dropout")
    if refused:
        raise NotImplementedError(f"attention with {', '.join(refused)}")


def by_compiled_kernel(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Boundaries, scale: float
) -> Tensor:
    """An `Implementation` for CPUs, in kernels.cpp."""
    size = value.shape[-1]
    query, key, value = _pad_heads(max(query.shape[-1], size), query, key, value)
    attended: Tensor = _KernelAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, boundaries.segments(), scale
    )
    return attended[..., :size]


def by_flash_kernel(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Boundaries, scale: float
) -> Tensor:
    """An `Implementation` in 16 bits for GPUs from Ampere on, with FlashAttention."""
    return _by_gpu_kernel(_FlashAttention, query, key, value, boundaries, scale)


def by_efficient_kernel(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Boundaries, scale: float
) -> Tensor:
    """An `Implementation` for any GPU, head size and dtype, with torch's memory-efficient attention."""
    return _by_gpu_kernel(_EfficientAttention, query, key, value, boundaries, scale)


def _by_gpu_kernel(
    function: Any, query: Tensor, key: Tensor, value: Tensor, boundaries: Boundaries, scale: float
) -> Tensor:
    size, sequences = value.shape[-1], separate(boundaries)
    query, key, value = _pad_heads(_padded_size(query, value), query, key, value)
    attended: Tensor = function.apply(query, key, value, sequences, scale)
    return attended[..., :size]


def _padded_size(query: Tensor, value: Tensor) -> int:
    """The head size that a GPU's kernel gets."""
    return -(-max(query.shape[-1], value.shape[-1]) // ALIGNMENT) * ALIGNMENT


def _pad_heads(size: int, *tensors: Tensor) -> list[Tensor]:
    """Append zeros to each head. They change no score, and the outputs that they add are cut off."""
    return [x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1])) for x in tensors]


def by_example(query: Tensor, key: Tensor, value: Tensor, boundaries: Boundaries, scale: float) -> Tensor:
    """An `Implementation` for CPUs: one call of torch's attention for each segment."""
    sequences, dtype = separate(boundaries), query.dtype
    grouped = query.shape[1] != key.shape[1]
    # On a CPU, torch's attention is two to four times slower in bf16, and less exact.
    query, key, value = (x.float() for x in (query, sequences.gather(key), sequences.gather(value)))
    queries = torch.split(query, sequences.num_queries)
    keys, values = (torch.split(x, sequences.num_keys) for x in (key, value))
    outputs = []
    for rows in zip(queries, keys, values, strict=True):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in rows)
        context = k.shape[2] - q.shape[2]
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(context)
        mask: dict[str, Any] = (
            {"attn_mask": visible} if context > 0 else {"is_causal": True}
        )  # faster kernels
        outputs.append(F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped, **mask))
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1).to(dtype)


NAMES: dict[Implementation, str] = {
    by_compiled_kernel: "compiled kernel",
    by_flash_kernel: "FlashAttention",
    by_efficient_kernel: "memory-efficient kernel",
    by_example: "per example",
}


class _FlashAttention(torch.autograd.Function):
    """Attention [T, H, D] of query [T, H, D] to key and value [T, K, D].

    It calls the operator itself: torch's public function for it has other arguments in each version.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float
    ) -> Tensor:
        ctx.lengths = max(sequences.num_queries), max(sequences.num_keys)
        starts = sequences.query_starts, sequences.key_starts
        copies = sequences.copies_of(key, value)
        # Causal attention is aligned at the end of each sequence: its last query attends to its last key.
        output, logsumexp, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            query, *copies, *starts, *ctx.lengths, 0.0, True, False, scale=scale
        )
        kept = copies if sequences.keeps_copies else (key, value)
        ctx.save_for_backward(query, *kept, output, logsumexp, *starts, seed, offset)
        ctx.sequences, ctx.scale = sequences, scale
        result: Tensor = output
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved, seed, offset = ctx.saved_tensors
        if not ctx.sequences.keeps_copies:
            key, value = ctx.sequences.copies_of(key, value)
        grad_query, *grads = torch.ops.aten._flash_attention_backward(
            grad_output, query, key, value, *saved, *ctx.lengths, 0.0, True, seed, offset, scale=ctx.scale
        )
        return grad_query, *ctx.sequences.gradients_of(*grads), None, None


class _EfficientAttention(torch.autograd.Function):
    """Attention [T, H, D] of query [T, H, D] to key and value [T, K, D].

    The kernel takes as many heads of keys as of queries. The backward pass expands them again: to keep them
    would take H / K times the memory.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float
    ) -> Tensor:
        ctx.lengths = max(sequences.num_queries), max(sequences.num_keys)
        starts = sequences.query_starts, sequences.key_starts
        heads = query.shape[1]
        copies = sequences.copies_of(key, value)
        output, logsumexp, seed, offset, *_ = torch.ops.aten._efficient_attention_forward(
            query.unsqueeze(0),
            *(_expand_heads(x, heads) for x in copies),
            None,
            *starts,
            *ctx.lengths,
            0.0,
            CAUSAL_FROM_BOTTOM_RIGHT,
            True,
            scale=scale,
        )
        kept = copies if sequences.keeps_copies else (key, value)
        ctx.save_for_backward(query, *kept, output, logsumexp, *starts, seed, offset)
        ctx.sequences, ctx.scale = sequences, scale
        result: Tensor = output.squeeze(0)
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logsumexp, *starts, seed, offset = ctx.saved_tensors
        if not ctx.sequences.keeps_copies:
            key, value = ctx.sequences.copies_of(key, value)
        heads = query.shape[1]
        grad_query, *grads, _ = torch.ops.aten._efficient_attention_backward(
            grad_output.unsqueeze(0),
            query.unsqueeze(0),
            _expand_heads(key, heads),
            _expand_heads(value, heads),
            None,
            output,
            *starts,
            *ctx.lengths,
            logsumexp,
            0.0,
            seed,
            offset,
            CAUSAL_FROM_BOTTOM_RIGHT,
            False,
            scale=ctx.scale,
        )
        of_copies = (grad.reshape(*key.shape[:2], -1, key.shape[2]).sum(2) for grad in grads)
        return grad_query.squeeze(0), *ctx.sequences.gradients_of(*of_copies), None, None


def _expand_heads(x: Tensor, heads: int) -> Tensor:
    """x [T, K, D] as [1, T, heads, D]: each of its heads for heads / K queries."""
    tokens, count, size = x.shape
    return x[:, :, None].expand(tokens, count, heads // count, size).reshape(1, tokens, heads, size)


class _KernelAttention(torch.autograd.Function):
    """Attention [T, H, D] of query [T, H, D] to key and value [T, K, D] on a CPU.

    It is computed in fp32 and rounded once. The backward pass recomputes the probabilities.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: tuple[Segment, ...],
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.settings = segments, scale
        return kernels.attention_forward(query, key, value, segments, scale)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grads = kernels.attention_backward(query, key, value, grad_output, *ctx.settings)
        return *grads, None, None
