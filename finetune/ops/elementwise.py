"""Norms, rotary positions and gated activations as autograd functions that save only their inputs.

Models write these as sequences of single operations. Autograd then saves every intermediate result, some of
them in fp32. That costs memory, and time where memory bandwidth is the limit.
"""

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from finetune.ops import lora, operators
from finetune.ops.quantized import dropout_off


def enable(model: nn.Module) -> int:
    """Replace the forward method of each RMS norm, gated MLP and rotary attention that computes the same
    function as this module. Returns the number of replaced methods."""
    count = 0
    for module in model.modules():
        for forward in (_norm, _mlp, _attention):
            if "forward" not in module.__dict__ and _is_equivalent(module, forward):
                module.forward = types.MethodType(forward, module)
                count += 1
    return count


def disable(model: nn.Module) -> None:
    """Restore the modules' own forward methods."""
    for module in model.modules():
        if is_enabled(module):
            del module.forward


def is_enabled(module: nn.Module) -> bool:
    """Whether the module has a forward method of this module's."""
    return getattr(module.__dict__.get("forward"), "__func__", None) in (_norm, _mlp, _attention)


def is_norm(module: nn.Module) -> bool:
    """Whether the module has the attributes of an RMS norm."""
    return all(hasattr(module, name) for name in REQUIRED_ATTRIBUTES[_norm])


def _is_equivalent(module: Any, forward: Any) -> bool:
    """Whether the module has the attributes that `forward` needs, and gives the same for random input."""
    others: tuple[Any, ...] = ()
    if not all(hasattr(module, name) for name in REQUIRED_ATTRIBUTES[forward]):
        return False
    if forward is _norm:
        weight = module.weight
        if weight.requires_grad:
            return False
        size = weight.shape[-1]
    elif forward is _mlp:
        z = torch.linspace(-8, 8, 99)
        if not torch.equal(module.act_fn(z), F.silu(z)):
            return False
        weight = next(module.parameters())
        size = module.gate_proj.in_features
    else:
        if module.config._attn_implementation == "eager":
            return False
        weight = next(module.parameters())
        size = module.q_proj.in_features
        angles = torch.linspace(0, 3, 8 * module.head_dim // 2, device=weight.device).view(1, 8, -1)
        angles = torch.cat([angles, angles], dim=-1)
        others = ((angles.cos(), angles.sin()), None)
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.bfloat16
    x = torch.randn(1, 8, size, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    if others:
        others = (tuple(part.to(dtype) for part in others[0]), None)
    with torch.no_grad(), dropout_off(module):
        try:
            expected = module(x, *others)
            if others and _passes_other_arguments(module, x, *others):
                return False
        except Exception:  # it takes other inputs, so it is a different kind of module
            return False
        actual = forward(module, x, *others)
    expected, actual = (y[0].float() if others else y.float() for y in (expected, actual))
    return bool((actual - expected).norm() <= TOLERANCES[forward] * expected.norm())


def _passes_other_arguments(module: Any, *inputs: Any) -> bool:
    """Whether an attention module passes more than a scale to the attention function, such as a window."""
    passed: dict[str, Any] = {}

    def record(*arguments: Any, dropout: float = 0.0, scaling: float | None = None, **others: Any) -> Any:
        passed.update(others)
        return sdpa_attention_forward(*arguments, dropout=dropout, scaling=scaling)

    AttentionInterface.register("record", record)
    own = module.config._attn_implementation
    module.config._attn_implementation = "record"
    try:
        module(*inputs)
    finally:
        module.config._attn_implementation = own
    return any(value is not None for value in passed.values())


def _norm(module: Any, x: Tensor) -> Tensor:
    result: Tensor = _RmsNorm.apply(  # type: ignore[no-untyped-call]
        x, module.weight, module.variance_epsilon
    )
    return result


def _mlp(module: Any, x: Tensor) -> Tensor:
    product = _GatedSilu.apply(  # type: ignore[no-untyped-call]
        lora.project([module.gate_proj, module.up_proj], x)
    )
    result: Tensor = module.down_proj(product)
    return result


def _attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention with rotary positions. With a cache (in generation), the module's own method runs."""
    if past_key_values is not None or position_embeddings is None:
        own: tuple[Tensor, Tensor | None] = type(module).forward(
            module, hidden_states, position_embeddings, attention_mask, past_key_values, **others
        )
        return own
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    layers = [module.q_proj, module.k_proj, module.v_proj]
    joint, sizes = lora.project(layers, hidden_states), [layer.out_features for layer in layers]
    query, key, value = (part.view(shape) for part in torch.split(joint, sizes, dim=-1))
    query, key = (
        _Rotate.apply(part, *position_embeddings)  # type: ignore[no-untyped-call]
        for part in (query, key)
    )
    attend = AttentionInterface()[module.config._attn_implementation]
    output, weights = attend(
        module,
        *(part.transpose(1, 2) for part in (query, key, value)),
        attention_mask,
        dropout=module.attention_dropout if module.training else 0.0,
        scaling=module.scaling,
        **others,
    )
    return module.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class _Rotate(torch.autograd.Function):
    """Rotary positions of x [B, T, H, D] with cos, sin [B or 1, T, D]. The backward pass rotates back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = (part.expand(*x.shape[:2], x.shape[-1]).flatten(0, 1) for part in (cos, sin))
        ctx.save_for_backward(cos, sin)
        return operators.rotate(x.flatten(0, 1), cos, sin, 1).view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return operators.rotate(dy.flatten(0, 1), cos, sin, -1).view(dy.shape), None, None


class _RmsNorm(torch.autograd.Function):
    """y = w * x / sqrt(mean(x^2) + eps) over the last dimension of x [..., d], in fp32; w is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, scale = operators.rms_norm(rows, weight, eps)
        ctx.save_for_backward(rows, weight, scale)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        rows, weight, scale = ctx.saved_tensors
        dx = operators.rms_norm_backward(rows, weight, scale, dy.reshape(rows.shape), None)
        return dx.view(dy.shape), None, None


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up [..., F] of gate_up [..., 2F]; the backward pass recomputes silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        rows = gate_up.flatten(0, -2)
        ctx.save_for_backward(rows)
        return operators.gated_silu(rows).view(*gate_up.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        d_rows, _ = operators.gated_silu_backward(rows, dy.reshape(len(rows), -1))
        return d_rows.view(*dy.shape[:-1], -1)


# The attributes that a module must have for its forward method to be replaced.
REQUIRED_ATTRIBUTES = {
    _norm: ("weight", "variance_epsilon"),
    _mlp: ("gate_proj", "up_proj", "down_proj", "act_fn"),
    _attention: (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "head_dim",
        "scaling",
        "attention_dropout",
        "config",
    ),
}
# The largest relative difference that rounding may cause. Attention rounds after each of five products.
TOLERANCES = {_norm: 1e-2, _mlp: 1e-2, _attention: 5e-2}
