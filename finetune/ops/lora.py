"""LoRA on frozen linear layers: one autograd function for all layers that share an input.

It computes the same function as PEFT's layers, but saves a single copy of the input, and none in fp32. PEFT's
modules, parameters and files do not change; only the forward methods are replaced. PEFT's own forward methods
are the reference path. The dropout noise differs from PEFT's, but has the same mean and variance.
"""

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from finetune.ops import token_rows
from finetune.ops.projection import Call, Projection
from finetune.ops.quantized import LINEARS, compute_dtype, multiply


def enable(model: nn.Module, int8_matmul: bool = False, keep_joined: bool = True) -> tuple[int, int]:
    """Replace the forward methods of the LoRA layers, and of layers with trained rows of added tokens.

    Returns the numbers of replaced and of all LoRA layers.

    With `int8_matmul`, bitsandbytes multiplies int8 weights by int8 activations in the forward pass.
    Otherwise weights are dequantized for each multiplication. `keep_joined` is as in BaseWeights.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    fast = [layer for layer in layers if _is_plain_lora(layer)]
    for layer in fast:
        layer.forward = types.MethodType(_fast_forward, layer)
        layer.int8_matmul, layer.keep_joined = int8_matmul, keep_joined
        layer.projections = {}
    if fast:
        token_rows.enable(model)
    return len(fast), len(layers)


def disable(model: nn.Module) -> None:
    """Restore PEFT's forward methods, and give each frozen layer a weight of its own again."""
    token_rows.disable(model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.__dict__.pop("forward", None)
            for projection in module.__dict__.pop("projections", {}).values():
                projection.base.separate()


@contextmanager
def int8_matmul_off(model: nn.Module) -> Iterator[None]:
    """Dequantize the weights of layers that multiply in int8, so that their inputs are not rounded."""
    layers: list[Any] = [module for module in model.modules() if getattr(module, "int8_matmul", False)]
    for layer in layers:
        layer.int8_matmul = False
    try:
        yield
    finally:
        for layer in layers:
            layer.int8_matmul = True


def _is_plain_lora(layer: Any) -> bool:
    return type(layer.base_layer) in LINEARS and not layer.lora_variant and not any(layer.lora_bias.values())


def _fast_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """x [..., in] -> [..., out]."""
    is_off = layer.disable_adapters and not (layer.merged or args or kwargs or torch.is_grad_enabled())
    if is_off:
        return _base_output(layer, x)
    if args or kwargs or not _has_one_active_adapter(layer):
        reference: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return reference
    return _compute([layer], x)


def project(layers: Sequence[Any], x: Tensor) -> Tensor:
    """The outputs of several layers for the same input x [..., in], side by side: [..., sum of out].

    One call computes all of them if each is a LoRA layer on the fast path with the same settings. They then
    share the dropout noise on the input.
    """
    if not can_project_together(layers):
        return torch.cat([layer(x) for layer in layers], dim=-1)
    return _compute(layers, x)


def can_project_together(layers: Sequence[Any]) -> bool:
    """Whether each is a LoRA layer on the fast path, with the same settings and without hooks."""
    return (
        all(
            is_ready(layer)
            and layer.int8_matmul == layers[0].int8_matmul
            and not (layer._forward_hooks or layer._forward_pre_hooks)
            for layer in layers
        )
        and projection_of(layers).is_ready()
    )


def is_ready(layer: Any) -> bool:
    """Whether it is a LoRA layer on the fast path that computes one adapter at present."""
    return getattr(
        layer.__dict__.get("forward"), "__func__", None
    ) is _fast_forward and _has_one_active_adapter(layer)


def projection_of(layers: Sequence[Any]) -> Projection:
    """The layers as one projection. It is made once, because it joins their frozen weights."""
    known: dict[tuple[tuple[int, str], ...], Projection] = layers[0].projections
    key = tuple((id(layer), layer.active_adapters[0]) for layer in layers)
    if key not in known:
        known[key] = Projection(layers, layers[0].keep_joined)
    return known[key]


def _has_one_active_adapter(layer: Any) -> bool:
    """Whether exactly one adapter is active, and not merged into the weight."""
    names = layer.active_adapters
    return len(names) == 1 and names[0] in layer.lora_A and not (layer.disable_adapters or layer.merged)


def _base_output(layer: Any, x: Tensor) -> Tensor:
    """The output of the frozen layer without its adapter, computed as with the adapter."""
    rows = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
    with torch.autocast(x.device.type, enabled=False):
        return multiply(rows, layer.base_layer, layer.int8_matmul).view(*x.shape[:-1], -1)


def _compute(layers: Sequence[Any], x: Tensor) -> Tensor:
    """[..., out]: the outputs of the layers side by side."""
    projection, rows = projection_of(layers), x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
    call = projection.begin(rows.dtype)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _LoraLinears.apply(  # type: ignore[no-untyped-call]
            rows, projection, call, layers[0].int8_matmul, *projection.parameters
        )
    return y.view(*x.shape[:-1], -1)


class _LoraLinears(torch.autograd.Function):
    """A projection of x [T, in] to [T, out], with gradients for x, A and B.

    The backward pass dequantizes the weights again, and takes the same noise from the pool.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, projection: Projection, call: Call, int8_matmul: bool, *_: nn.Parameter
    ) -> Tensor:
        y, u = projection.forward(x, call, int8_matmul)
        ctx.save_for_backward(x, u)
        ctx.projection, ctx.call = projection, call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, u), projection, call = ctx.saved_tensors, ctx.projection, ctx.call
        v, of_b = projection.gradients_of_b(dy, u, call)
        of_a = projection.gradients_of_a(v, x, call)
        dx = projection.input_gradient(dy, v, call) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, *of_a, *of_b
