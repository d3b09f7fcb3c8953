"""RMS norms and gated activations as autograd functions that keep no more than their inputs.

Written out in single operations, as models do, autograd keeps every product on the way, some of them in fp32:
memory, and time where memory is what takes it.
"""

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.model import dropout_off


def speed_up(model: nn.Module) -> int:
    """Replace the forward method of the RMS norms and gated MLPs that compute what is computed here; returns
    how many do."""
    count = 0
    for module in model.modules():
        for forward in (_norm, _mlp):
            if "forward" not in module.__dict__ and _computes(module, forward):
                module.forward = types.MethodType(forward, module)
                count += 1
    return count


def slow_down(model: nn.Module) -> None:
    """Give the modules their own forward method back."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "__func__", None) in (_norm, _mlp):
            del module.forward


def _computes(module: Any, forward: Any) -> bool:
    """Whether a module looks like one of these, and gives the same for random input."""
    if forward is _norm:
        weight = getattr(module, "weight", None)
        if not hasattr(module, "variance_epsilon") or not isinstance(weight, Tensor) or weight.requires_grad:
            return False
        size = weight.shape[-1]
    else:
        parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
        z = torch.linspace(-8, 8, 99)
        if not all(hasattr(module, part) for part in parts) or not torch.equal(module.act_fn(z), F.silu(z)):
            return False
        weight = next(module.parameters())
        size = module.gate_proj.in_features
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.bfloat16
    x = torch.randn(1, 8, size, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    with torch.no_grad(), dropout_off(module):
        expected, got = module(x).float(), forward(module, x).float()
    return bool((got - expected).norm() <= 1e-2 * expected.norm())


def _norm(module: Any, x: Tensor) -> Tensor:
    result: Tensor = _RmsNorm.apply(  # type: ignore[no-untyped-call]
        x, module.weight, module.variance_epsilon
    )
    return result


def _mlp(module: Any, x: Tensor) -> Tensor:
    product = _GatedSilu.apply(  # type: ignore[no-untyped-call]
        module.gate_proj(x), module.up_proj(x)
    )
    result: Tensor = module.down_proj(product)
    return result


class _RmsNorm(torch.autograd.Function):
    """y = w * x / sqrt(mean(x^2) + eps) over the last dimension of x [..., d], in fp32; w is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        scale = torch.linalg.vecdot(x32, x32).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale)
        y: Tensor = weight * (x32 * scale).to(x.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.float().mul_(scale) if x.dtype != torch.float32 else x * scale
        dnormed = (dy * weight).float()
        share = torch.linalg.vecdot(dnormed, normed).div_(x.shape[-1]).unsqueeze(-1)
        # d y / d x: the gradient less its part along x, scaled.
        dx = torch.addcmul(dnormed, normed, share, value=-1).mul_(scale)
        return dx.to(x.dtype), None, None


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up; silu(gate) is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)
