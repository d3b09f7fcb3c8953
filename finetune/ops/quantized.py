"""Frozen linear layers in 16 bits, int8 or nf4: dequantize their weights, and multiply by them."""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.ops import operators


def frozen_weight(base: Any, dtype: torch.dtype) -> Tensor:
    """[out, in]: the dequantized weight of a frozen linear layer, rounded as bitsandbytes rounds it."""
    if isinstance(base, bnb.nn.Linear8bitLt):
        codes, largest = int8_state(base)
        return operators.dequantize_int8(codes, largest, dtype)
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
    layers: list[Any] = [m for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit)]
    for layer in layers:
        layer.forward = types.MethodType(_multiply_dequantized, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _multiply_dequantized(layer: Any, x: Tensor) -> Tensor:
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(x.to(dtype), _dequantize(layer).to(dtype), bias)


def _dequantize(layer: Any) -> Tensor:
    if isinstance(layer, bnb.nn.Linear4bit):
        weight: Tensor = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
    else:
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        weight = bnb.functional.int8_vectorwise_dequant(layer.weight.data, scales)
    return weight
