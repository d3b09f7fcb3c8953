"""Frozen linear layers in 16 bits, int8 or nf4: dequantize their weights, and multiply by them."""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.ops import operators
from finetune.ops.plain_weights import PlainInt8, PlainNf4

INT8, NF4 = (bnb.nn.Linear8bitLt, PlainInt8), (bnb.nn.Linear4bit, PlainNf4)
LINEARS = (nn.Linear, *INT8, *NF4)
"""The classes of linear layers whose weights this module multiplies by"""


def frozen_weight(base: Any, dtype: torch.dtype) -> Tensor:
    """[out, in]: the dequantized weight of a frozen linear layer, rounded as bitsandbytes rounds it."""
    if isinstance(base, INT8):
        codes, largest = int8_state(base)
        return operators.dequantize_int8(codes, largest, dtype)
    if isinstance(base, PlainNf4):
        return base.dequantize().to(dtype)
    if isinstance(base, bnb.nn.Linear4bit):
        assert not getattr(base.weight.quant_state, "packing_format_for_cpu", False), (
            "load_base disables this format"
        )
        dequantized: Tensor = bnb.functional.dequantize_4bit(base.weight, base.weight.quant_state)
        return dequantized.to(dtype)
    weight: Tensor = base.weight
    return weight.to(dtype)


def int8_state(base: Any) -> tuple[Tensor, Tensor]:
    """The int8 codes [out, in], and the largest absolute value [out] of each row, which has code 127."""
    if isinstance(base, PlainInt8):
        return base.weight, base.largest
    if base.weight.CB is not None:  # before the layer's first call
        base.init_8bit_state()
    return base.state.CB, base.state.SCB


def multiply(x: Tensor, base: Any, int8_matmul: bool) -> Tensor:
    """[T, out]: the frozen layer of x [T, in]. With `int8_matmul`, bitsandbytes multiplies in int8."""
    bias = None if base.bias is None else base.bias.to(x.dtype)
    if not int8_matmul:
        return F.linear(x, frozen_weight(base, x.dtype), bias)
    int8_state(base)
    base.state.is_training = False  # otherwise bitsandbytes dequantizes on a CPU
    product: Tensor = bnb.matmul(x, base.weight, bias=bias, state=base.state)
    return product


def enable(model: torch.nn.Module) -> None:
    """Replace the forward method of each quantized layer: it multiplies by its dequantized weight, as LoRA
    layers on the fast path do.

    bitsandbytes' own rounds the activations of an int8 layer to int8 on a GPU, and the host waits for the GPU
    in every call.
    """
    for layer in _quantized_layers(model):
        layer.forward = types.MethodType(_forward, layer)


def disable(model: torch.nn.Module) -> None:
    """Restore the layers' own forward methods."""
    for layer in _quantized_layers(model):
        layer.__dict__.pop("forward", None)


def _quantized_layers(model: torch.nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (*INT8, *NF4))]


def _forward(layer: Any, x: Tensor) -> Tensor:
    """x [..., in] -> [..., out]."""
    rows = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _FrozenLinear.apply(rows, layer)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The data type in which a layer multiplies x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _FrozenLinear(torch.autograd.Function):
    """A frozen layer of x [T, in]. The backward pass dequantizes the weight again: nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return multiply(x, layer, int8_matmul=False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ frozen_weight(ctx.layer, dy.dtype), None


@contextmanager
def dropout_off(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, except for the int8 layers, which compute as in training.

    On a CPU, bitsandbytes' int8 layers dequantize their weights in training mode, and also quantize the
    activations in evaluation mode. The latter is many times slower, and not the function that was trained.
    """
    was_training = model.training
    model.eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            module.train()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def dequantized(model: torch.nn.Module) -> Iterator[None]:
    """Have quantized layers dequantize their weights and multiply in torch, without rounding activations.

    This is the reference path of `frozen_weight`: it dequantizes with bitsandbytes' own functions.
    """
    layers = _quantized_layers(model)
    replaced = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = types.MethodType(_multiply_dequantized, layer)
    try:
        yield
    finally:
        for layer, forward in zip(layers, replaced, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _multiply_dequantized(layer: Any, x: Tensor) -> Tensor:
    dtype = compute_dtype(x)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(x.to(dtype), _dequantize(layer).to(dtype), bias)


def _dequantize(layer: Any) -> Tensor:
    weight: Tensor
    if isinstance(layer, PlainInt8 | PlainNf4):
        weight = layer.dequantize()
    elif isinstance(layer, bnb.nn.Linear4bit):
        weight = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
    else:
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        weight = bnb.functional.int8_vectorwise_dequant(layer.weight.data, scales)
    return weight
