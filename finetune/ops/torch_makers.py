"""Each operator of `operators` by torch's own operations, on any device; the signatures are described there.

Autocast is off within them: its list of 16-bit operations has some that these sum in fp32.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.ops import dropout

ROWS = (
    16  # tokens per pass over the vocabulary on a CPU: few enough for their logits to stay in a core's cache
)

Function = TypeVar("Function", bound=Callable[..., Any])


def _without_autocast(function: Function) -> Function:
    @functools.wraps(function)
    def call(first: Tensor, *others: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *others)

    return cast(Function, call)


@_without_autocast
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x32 = x.float()
    scale = x32.square().mean(-1).add_(eps).rsqrt_()
    return (x32 * scale[:, None]).mul_(weight).to(x.dtype), scale


@_without_autocast
def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = (x + delta).to(x.dtype)
    return total, *rms_norm(total, weight, eps)


@_without_autocast
def apply_rms_norm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return (x.float() * scale[:, None]).mul_(weight).to(x.dtype)


@_without_autocast
def rms_norm_backward(x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor, dtotal: Tensor | None) -> Tensor:
    normed = x.float() * scale[:, None]
    dnormed = dy.float() * weight
    along = (dnormed * normed).mean(-1, keepdim=True)
    # The gradient minus its component along x, scaled.
    dx = torch.addcmul(dnormed, normed, along, value=-1).mul_(scale[:, None])
    if dtotal is not None:
        dx += dtotal
    return dx.to(x.dtype)


@_without_autocast
def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = x.shape[-1] // 2
    a, b = x[..., :half].float(), x[..., half:].float()
    cosines, sines = cos[:, None, :half].float(), sin[:, None, :half].float() * direction
    return torch.cat([a * cosines - b * sines, b * cosines + a * sines], dim=-1).to(x.dtype)


@_without_autocast
def gated_silu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


@_without_autocast
def gated_silu_backward(gate_up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.float().chunk(2, dim=-1)
    dy32, activated = dy.float(), F.silu(gate)
    d_gate = torch.ops.aten.silu_backward(dy32 * up, gate)
    d_gate_up = torch.cat([d_gate, dy32 * activated], dim=-1).to(gate_up.dtype)
    return d_gate_up, (activated * up).to(gate_up.dtype)


@_without_autocast
def token_stats(logits: Tensor, target_ids: Tensor, with_gradient: bool) -> Tensor:
    rows = ROWS if logits.device.type == "cpu" else max(1, len(logits))
    stats = torch.empty(len(logits), 3, dtype=torch.float32, device=logits.device)
    parts = (torch.split(x, rows) for x in (logits, target_ids[:, None], stats))
    for some_logits, ids, some_stats in zip(*parts, strict=True):
        likeliest = some_logits.argmax(-1, keepdim=True)
        # Not log_softmax: on a CPU its sum over a vocabulary loses the small terms, and every loss 7e-6.
        shifted = some_logits - some_logits.gather(-1, likeliest).float()
        p = shifted.exp()
        total = p.sum(-1, keepdim=True)
        nll = total.log() - shifted.gather(-1, ids)
        p /= total
        # A logit of -infinity has p = 0, and adds nothing to the entropy.
        shifted.clamp_(min=torch.finfo(torch.float32).min).mul_(p)
        entropy = total.log() - shifted.sum(-1, keepdim=True)
        torch.cat([nll, entropy, likeliest == ids], dim=1, out=some_stats)
        if with_gradient:
            some_logits.copy_(p.scatter_add_(-1, ids, p.new_full(ids.shape, -1)))
    return stats


@_without_autocast
def dequantize_int8(codes: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    return torch.mul(codes, (largest / 127)[:, None], out=weight)  # a GPU makes no fp32 copy


@_without_autocast
def fill_noise(pool: Tensor, key: int, threshold: int) -> None:
    steps = torch.arange(1, len(pool) // 4 + 1, dtype=torch.int64, device=pool.device)
    words = steps.mul_(dropout.signed(dropout.GAMMA)).add_(key)
    for shift, factor in zip(dropout.SHIFTS, (*dropout.FACTORS, 1), strict=True):
        words ^= (words >> shift) & ((1 << (64 - shift)) - 1)  # `>>` repeats the sign's bit
        words *= dropout.signed(factor)
    pool.copy_(words.view(torch.int16) >= threshold).neg_()


@_without_autocast
def dropped_product(x: Tensor, a: Tensor, pool: Tensor, start: int) -> Tensor:
    return dropout.zero_dropped(x, pool, start) @ a.t()


@_without_autocast
def dropped_sum(v: Tensor, x: Tensor, pool: Tensor, start: int) -> Tensor:
    return (v.t() @ dropout.zero_dropped(x, pool, start)).float()


@_without_autocast
def add_dropped(dx: Tensor, v: Tensor, a: Tensor, pool: Tensor, start: int) -> None:
    product = v @ a
    numbers = product.view(-1).view(pool.dtype)
    for part, masks in dropout.slices(product.numel(), start):
        numbers[part].bitwise_and_(pool[masks])
    dx += product
