"""The table of small computations: each a registered torch operator with up to three makers.

An operator `finetune::NAME` has one signature. Its makers are functions of that name and signature in
`torch_makers` (any device), `kernels` (C++ on a CPU) and `triton_makers` (Triton on a CUDA device); `makers`
says which serves. Each has a fake implementation, so that it can be counted without a device. None has a
derivative: the autograd functions of this package call the operators.

Numbers are fp32, bf16 or fp16. Sums are taken in fp32, and each result is rounded once to the type of the
first input. Tensors are contiguous unless said otherwise.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.ops import dropout, kernels, torch_makers, triton_makers


class Maker(NamedTuple):
    """What computes an operator: "torch", "C++" or "Triton"; why nothing faster, or what is left to torch."""

    name: str
    reason: str = ""


def enable(device: torch.device) -> None:
    """Use the compiled makers of the device: C++ on a CPU, Triton on a CUDA device.

    Raises:
        OSError: there are none; the message says why. torch's operations then serve.
    """
    if device.type == "cuda":
        triton_makers.enable(device)
    else:
        kernels.enable()


def disable() -> None:
    """Let torch's operations serve every operator."""
    kernels.disable()
    triton_makers.disable()


def makers(device: torch.device) -> dict[str, Maker]:
    """Which maker serves each operator on the device."""
    return {name: _maker(name, device) for name in _OPERATORS}


def _maker(name: str, device: torch.device) -> Maker:
    if device.type == "cuda":
        if not triton_makers.is_enabled():
            return Maker("torch", "Triton is not used")
        if reason := triton_makers.reason_against(name):
            return Maker("torch", reason)
        return Maker("Triton", triton_makers.limit_of(name))
    if device.type != "cpu":
        return Maker("torch", f"there are no kernels for {device.type}")
    if not hasattr(kernels, name):
        return Maker("torch", "its time is that of a matrix product")
    if not kernels.is_enabled():
        return Maker("torch", "the C++ kernels are not used")
    return Maker("C++", "torch for fp16 and mixed types")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [T, d] = weight * x * scale, and scale [T] fp32 = 1 / sqrt(mean(x^2) + eps), of x [T, d]."""
    result: tuple[Tensor, Tensor] = _rms_norm(x, weight, eps)
    return result


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """total [T, d] = x + delta, and y and scale of `rms_norm` of the rounded total; x, delta [T, d]."""
    result: tuple[Tensor, Tensor, Tensor] = _add_rms_norm(x, delta, weight, eps)
    return result


def apply_rms_norm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """y of `rms_norm` once more, given its scale [T]."""
    result: Tensor = _apply_rms_norm(x, weight, scale)
    return result


def rms_norm_backward(x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor, dtotal: Tensor | None) -> Tensor:
    """The gradient of x [T, d] given that of y, plus `dtotal` [T, d] if given: that of x by another way."""
    result: Tensor = _rms_norm_backward(x, weight, scale, dy, dtotal)
    return result


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Rotary positions: the halves (a, b) of x [T, H, D] become (a cos - b sin, b cos + a sin).

    cos, sin [T, D], whose two halves are equal. `direction` -1 rotates back. The tokens of x may lie apart,
    as in a slice of a joint projection, if each token's heads lie together. The result is contiguous.
    """
    result: Tensor = _rotate(x, cos, sin, direction)
    return result


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [T, F]; the first half of each row of gate_up [T, 2F] is the gate."""
    result: Tensor = _gated_silu(gate_up)
    return result


def gated_silu_backward(gate_up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up [T, 2F] given that of `gated_silu`'s result [T, F], and that result again."""
    result: tuple[Tensor, Tensor] = _gated_silu_backward(gate_up, dy)
    return result


def token_stats(logits: Tensor, target_ids: Tensor, with_gradient: bool) -> Tensor:
    """[n, 3] fp32 for logits [n, V] and target_ids [n] int64: nll and entropy in nats, and 1 if the target
    is the argmax. `with_gradient` overwrites the logits by the gradient of the nll, softmax - one_hot."""
    result: Tensor = _token_stats(logits, target_ids, with_gradient)
    return result


def dequantize_int8(codes: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in] of `dtype`: codes [out, in] int8 times largest [out] fp32 / 127."""
    result: Tensor = _dequantize_int8(codes, largest, dtype)
    return result


def noise_pool(rate: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The masks [POOL_SIZE] of this update's dropout at `rate`, for inputs of `dtype`.

    Integers as wide as `dtype`: all bits set where a number is kept, none where it is dropped. They depend on
    torch's initial seed, which the training loop sets for each update, and are the same on every device.
    """
    return _pool(torch.initial_seed(), rate, dropout.INTEGERS[dtype.itemsize], device)


@lru_cache(maxsize=1)
def _pool(seed: int, rate: float, integer: torch.dtype, device: torch.device) -> Tensor:
    pool = torch.empty(dropout.POOL_SIZE, dtype=integer, device=device)
    _fill_noise(pool, dropout.key_of(seed), dropout.threshold_of(rate))
    return pool


def dropped_product(x: Tensor, a: Tensor, pool: Tensor, start: int) -> Tensor:
    """u [T, R] = dropout(x) a^T, of x [T, in] and a [R, in], without writing dropout(x) on a CUDA device.

    `pool` is `noise_pool`'s, and `start` is `dropout.draw_start`'s. What is kept is not scaled up.
    """
    result: Tensor = _dropped_product(x, a, pool, start)
    return result


def dropped_sum(v: Tensor, x: Tensor, pool: Tensor, start: int) -> Tensor:
    """v^T dropout(x) [R, in] fp32, of v [T, R] and x [T, in]: the gradient of a, given that of u, v."""
    result: Tensor = _dropped_sum(v, x, pool, start)
    return result


def add_dropped(dx: Tensor, v: Tensor, a: Tensor, pool: Tensor, start: int) -> None:
    """dx [T, in] += dropout(v a), with the noise of `dropped_product`: the gradient of x by way of u."""
    _add_dropped(dx, v, a, pool, start)


_LIBRARY: Any = torch.library.Library("finetune", "DEF")  # type: ignore[no-untyped-call]
_OPERATORS: list[str] = []


def _define(signature: str, fake: Callable[..., Any], in_cpp: Callable[..., bool] | None = None) -> Any:
    """Register an operator, and return it. `in_cpp` says whether the C++ kernels take the arguments."""
    name = signature.partition("(")[0]
    of_torch: Callable[..., Any] = getattr(torch_makers, name)
    of_cpp: Callable[..., Any] = getattr(kernels, name, of_torch)
    of_triton: Callable[..., Any] = getattr(triton_makers, name)

    def on_cpu(*arguments: Any) -> Any:
        maker = of_cpp if in_cpp is not None and in_cpp(*arguments) else of_torch
        return maker(*arguments)

    def on_cuda(*arguments: Any) -> Any:
        maker = of_triton if triton_makers.can_compute(name, *arguments) else of_torch
        return maker(*arguments)

    _OPERATORS.append(name)
    _LIBRARY.define(signature)
    _LIBRARY.impl(name, of_torch, "CompositeExplicitAutograd")  # any other device
    _LIBRARY.impl(name, on_cpu, "CPU")
    _LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"finetune::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.finetune, name).default


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _scales(x: Tensor) -> Tensor:
    return x.new_empty(len(x), dtype=torch.float32)


_rms_norm = _define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    lambda x, weight, eps: (_like(x), _scales(x)),
    in_cpp=lambda x, weight, eps: kernels.can_compute(x, weight),
)
_add_rms_norm = _define(
    "add_rms_norm(Tensor x, Tensor delta, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    lambda x, delta, weight, eps: (_like(x), _like(x), _scales(x)),
    in_cpp=lambda x, delta, weight, eps: kernels.can_compute(x, delta, weight),
)
_apply_rms_norm = _define(
    "apply_rms_norm(Tensor x, Tensor weight, Tensor scale) -> Tensor",
    lambda x, weight, scale: _like(x),
    in_cpp=lambda x, weight, scale: kernels.can_compute(x, weight),
)
_rms_norm_backward = _define(
    "rms_norm_backward(Tensor x, Tensor weight, Tensor scale, Tensor dy, Tensor? dtotal) -> Tensor",
    lambda x, weight, scale, dy, dtotal: _like(x),
    in_cpp=lambda x, weight, scale, dy, dtotal: kernels.can_compute(
        x, weight, dy, *([] if dtotal is None else [dtotal])
    ),
)
_rotate = _define(
    "rotate(Tensor x, Tensor cos, Tensor sin, int direction) -> Tensor",
    lambda x, cos, sin, direction: _like(x),
    in_cpp=lambda x, cos, sin, direction: kernels.can_compute(x, cos, sin),
)
_gated_silu = _define(
    "gated_silu(Tensor gate_up) -> Tensor",
    lambda gate_up: gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2),
    in_cpp=kernels.can_compute,
)
_gated_silu_backward = _define(
    "gated_silu_backward(Tensor gate_up, Tensor dy) -> (Tensor, Tensor)",
    lambda gate_up, dy: (_like(gate_up), _like(dy)),
    in_cpp=kernels.can_compute,
)
_token_stats = _define(
    "token_stats(Tensor(a!) logits, Tensor target_ids, bool with_gradient) -> Tensor",
    lambda logits, target_ids, with_gradient: logits.new_empty(len(logits), 3, dtype=torch.float32),
    in_cpp=lambda logits, target_ids, with_gradient: kernels.can_compute(logits),
)
_dequantize_int8 = _define(
    "dequantize_int8(Tensor codes, Tensor largest, ScalarType dtype) -> Tensor",
    lambda codes, largest, dtype: codes.new_empty(codes.shape, dtype=dtype),
    in_cpp=lambda codes, largest, dtype: kernels.is_enabled() and dtype in kernels.DTYPES,
)
_fill_noise = _define(
    "fill_noise(Tensor(a!) pool, int key, int threshold) -> ()",
    lambda pool, key, threshold: None,
    in_cpp=lambda pool, key, threshold: kernels.is_enabled(),
)
_dropped_product = _define(
    "dropped_product(Tensor x, Tensor a, Tensor pool, int start) -> Tensor",
    lambda x, a, pool, start: x.new_empty(len(x), len(a)),
)
_dropped_sum = _define(
    "dropped_sum(Tensor v, Tensor x, Tensor pool, int start) -> Tensor",
    lambda v, x, pool, start: x.new_empty(v.shape[1], x.shape[1], dtype=torch.float32),
)
_add_dropped = _define(
    "add_dropped(Tensor(a!) dx, Tensor v, Tensor a, Tensor pool, int start) -> ()",
    lambda dx, v, a, pool, start: None,
)
