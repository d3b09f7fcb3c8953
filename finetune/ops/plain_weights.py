"""Quantized weights as plain parameters, for a base whose parameters are sharded.

bitsandbytes keeps what belongs to a quantized weight beside the parameter: the scales of an int8 weight, the
state of an nf4 weight. Sharding replaces parameters and would lose these. Here all that has the size of the
weight is a frozen parameter of the layer, with the very bits that bitsandbytes made.
"""

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant, quantize_4bit
from torch import Tensor, nn
from torch.nn import functional as F


class PlainInt8(nn.Module):
    """A frozen linear layer in int8, made from one of bitsandbytes' on its device."""

    def __init__(self, layer: bnb.nn.Linear8bitLt) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        is_new = layer.weight.CB is not None  # before its first call
        codes, largest = (layer.weight.CB, layer.weight.SCB) if is_new else (layer.state.CB, layer.state.SCB)
        self.weight = _frozen(codes)
        """[out, in] int8: the codes"""
        self.largest = _frozen(largest)
        """[out] fp32: the largest absolute value of each row, which has code 127"""
        self.bias = layer.bias

    def quantize(self, weight: Tensor) -> None:
        """Take another weight [out, in], quantized as bitsandbytes does."""
        made = bnb.nn.Int8Params(weight.cpu(), False, has_fp16_weights=False).to(self.weight.device)
        self.weight, self.largest = _frozen(made.CB), _frozen(made.SCB)

    def dequantize(self) -> Tensor:
        """[out, in], as bitsandbytes dequantizes it."""
        weight: Tensor = int8_vectorwise_dequant(self.weight, self.largest)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], without rounding x."""
        return _linear(x, self.dequantize(), self.bias)


class PlainNf4(nn.Module):
    """A frozen linear layer in 4 bits, made from one of bitsandbytes' on its device."""

    def __init__(self, layer: bnb.nn.Linear4bit) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        state: QuantState = layer.weight.quant_state
        assert not state.nested, "load_base does not quantize the scales"
        self.weight = _frozen(layer.weight.data)
        """[out * in / 2, 1] uint8: two codes each"""
        self.absmax = _frozen(state.absmax)
        """[out * in / blocksize] fp32: the scale of each block"""
        self.bias = layer.bias
        # Without the scales: they are sharded, and `quant_state` adds them.
        self._state = QuantState(
            None, state.shape, state.code, state.blocksize, state.quant_type, state.dtype
        )

    def quantize(self, weight: Tensor) -> None:
        """Take another weight [out, in], quantized as bitsandbytes does."""
        own = self._state
        made, state = quantize_4bit(weight, blocksize=own.blocksize, quant_type=own.quant_type)
        self.weight, self.absmax = _frozen(made), _frozen(state.absmax)

    @property
    def quant_state(self) -> QuantState:
        """What bitsandbytes dequantizes the weight by."""
        own = self._state
        return QuantState(self.absmax, own.shape, own.code, own.blocksize, own.quant_type, own.dtype)

    def dequantize(self) -> Tensor:
        """[out, in], as bitsandbytes dequantizes it."""
        weight: Tensor = dequantize_4bit(self.weight, self.quant_state)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return _linear(x, self.dequantize(), self.bias)


def use_plain_weights(model: nn.Module) -> None:
    """Replace each quantized layer of bitsandbytes in the model by one with plain parameters."""
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, bnb.nn.Linear8bitLt):
                setattr(module, name, PlainInt8(layer))
            elif isinstance(layer, bnb.nn.Linear4bit):
                setattr(module, name, PlainNf4(layer))


def _frozen(tensor: Any) -> nn.Parameter:
    # Of bitsandbytes' own classes of parameters, `data` keeps the class.
    return nn.Parameter(tensor.data.as_subclass(torch.Tensor), requires_grad=False)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
