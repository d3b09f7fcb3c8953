"""Compile `kernels.cpp` on the machine that runs it, and call its functions with tensors.

`compiler` finds a compiler and keeps what it makes in the user's cache. If the compiler is missing or fails,
torch's own operations compute the same results. The table at the start of a run shows which of the two is
used.
"""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from finetune.data.segments import Segment
from finetune.ops import compiler

SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = (torch.float32, torch.bfloat16)  # in the order of the function pointers that the source exports

_library: ctypes.CDLL | None = None


def enable() -> None:
    """Use the kernels for tensors on a CPU.

    Raises:
        OSError: there is no compiler, it failed, or the library cannot be loaded; the message says which.
    """
    global _library
    library = compiler.build(SOURCE)
    try:
        _library = ctypes.CDLL(str(library))
    except OSError:
        library.unlink(missing_ok=True)  # one that cannot be loaded is not kept
        raise


def disable() -> None:
    """Use torch's own operations."""
    global _library
    _library = None


def is_enabled() -> bool:
    return _library is not None


def can_compute(*tensors: Tensor) -> bool:
    """Whether the kernels are enabled and support these tensors: all on a CPU, and all fp32 or all bf16."""
    first = tensors[0]
    return (
        _library is not None
        and first.dtype in DTYPES
        and all(x.device.type == "cpu" and x.dtype == first.dtype for x in tensors)
    )


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], scale: float
) -> Tensor:
    """Attention [T, H, D] of query [T, H, D] to key and value [T, K, D]: within each segment of the packed
    sequence, and to its context."""
    query, key, value = (_with_contiguous_heads(x) for x in (query, key, value))
    output = query.new_empty(query.shape)
    shapes = _attention_shapes(query, key, value, segments, scale)
    _call("attention_forward", query.dtype, query, key, value, output, *shapes)
    return output


def attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    segments: tuple[Segment, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, given the gradient of the output [T, H, D]."""
    query, key, value = (_with_contiguous_heads(x) for x in (query, key, value))
    grads = tuple(x.new_empty(x.shape) for x in (query, key, value))
    shapes = _attention_shapes(query, key, value, segments, scale)
    _call("attention_backward", query.dtype, query, key, value, grad_output.contiguous(), *grads, *shapes)
    return grads[0], grads[1], grads[2]


def _with_contiguous_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _attention_shapes(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], scale: float
) -> list[Tensor | int | float]:
    strides = _integers(tuple(x.stride(dimension) for x in (query, key, value) for dimension in (0, 1)))
    _, heads, size = query.shape
    assert value.shape == key.shape
    assert sum(segment.length for segment in segments) == len(query) == len(key)
    return [strides, _integers(segments), len(segments), heads, key.shape[1], size, float(scale)]


@lru_cache(maxsize=64)
def _integers(numbers: tuple[int, ...] | tuple[tuple[int, ...], ...]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `operators.rms_norm`, and so on for the functions of the same names."""
    x = x.contiguous()
    y, scale = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    _call("rms_norm", x.dtype, x, None, weight, None, y, scale, *x.shape, float(eps))
    return y, scale


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, delta = x.contiguous(), delta.contiguous()
    total, y, scale = torch.empty_like(x), torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    _call("rms_norm", x.dtype, x, delta, weight, total, y, scale, *x.shape, float(eps))
    return total, y, scale


def apply_rms_norm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _call("apply_rms_norm", x.dtype, x, weight, scale, y, *x.shape)
    return y


def rms_norm_backward(x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor, dtotal: Tensor | None) -> Tensor:
    x, dy, dtotal = x.contiguous(), dy.contiguous(), None if dtotal is None else dtotal.contiguous()
    dx = torch.empty_like(x)
    _call("rms_norm_backward", x.dtype, x, weight, scale, dy, dtotal, dx, *x.shape)
    return dx


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    heads, size = x.shape[1:]
    if x.stride()[1:] != (size, 1):
        x = x.contiguous()
    y = x.new_empty(x.shape)
    cos, sin = cos.contiguous(), sin.contiguous()
    _call("rotate", x.dtype, x, cos, sin, y, x.stride(0), len(x), heads, size, float(direction))
    return y


def gated_silu(gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    rows, width = gate_up.shape
    y = gate_up.new_empty(rows, width // 2)
    _call("gated_silu", y.dtype, *gate_up.chunk(2, dim=1), y, width, *y.shape)
    return y


def gated_silu_backward(gate_up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    gate_up, dy = gate_up.contiguous(), dy.contiguous()
    grads, y = torch.empty_like(gate_up), torch.empty_like(dy)
    halves = (*gate_up.chunk(2, dim=1), dy, *grads.chunk(2, dim=1))
    _call("gated_silu_backward", y.dtype, *halves, y, gate_up.shape[1], *y.shape)
    return grads, y


def token_stats(logits: Tensor, target_ids: Tensor, with_gradient: bool) -> Tensor:
    assert logits.is_contiguous()
    assert target_ids.dtype == torch.int64
    values = torch.empty(len(logits), 3)
    _call(
        "token_stats",
        logits.dtype,
        logits,
        target_ids.contiguous(),
        values,
        *logits.shape,
        int(with_gradient),
    )
    return values


def dequantize_int8(codes: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    assert largest.dtype == torch.float32
    weight = torch.empty(codes.shape, dtype=dtype)
    _call("dequantize_int8", dtype, codes.contiguous(), largest.contiguous(), weight, *codes.shape)
    return weight


def fill_noise(pool: Tensor, key: int, threshold: int) -> None:
    dtype = torch.float32 if pool.dtype == torch.int32 else torch.bfloat16  # as wide as the masks
    _call("fill_noise", dtype, pool, key, threshold, len(pool) // 4)


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel with as many threads as torch uses. Its tensors stay alive until it returns; None is a
    null pointer."""
    values = [*arguments, torch.get_num_threads()]
    kinds = tuple(_kind(value) for value in values)
    assert _library is not None
    pointer = (ctypes.c_void_p * len(DTYPES)).in_dll(_library, f"{name}_of")[DTYPES.index(dtype)]
    _prototype(kinds)(pointer)(*(x.data_ptr() if isinstance(x, Tensor) else x for x in values))


@lru_cache
def _prototype(kinds: tuple[type, ...]) -> type:
    return ctypes.CFUNCTYPE(None, *kinds)


def _kind(value: Tensor | int | float | None) -> type:
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p
    return ctypes.c_int64 if isinstance(value, int) else ctypes.c_float
