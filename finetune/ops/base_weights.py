"""The frozen weights of linear layers that share an input, joined, so that one product computes all of them.

The layers' own weights become views of the joint tensors: nothing is held twice, and whatever reads or saves
the layers finds in them what was there before. Sharded weights exist only while their layer computes: they
are joined anew for each product.
"""

from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch import Tensor, nn

from finetune.ops import operators
from finetune.ops.adapter_weights import joined
from finetune.ops.plain_weights import PlainNf4
from finetune.ops.quantized import INT8, NF4, frozen_weight, int8_state


class BaseWeights:
    """The weights [out, in] and biases [out] of frozen linear layers of one input, joined along `out`."""

    def __init__(self, bases: Sequence[Any], keep_joined: bool = True) -> None:
        """With `keep_joined`, the layers' weights become views of joint tensors at once. Without, no tensor
        is kept from one product to the next, as sharded weights need it."""
        self.bases, self._keeps_joined = list(bases), keep_joined
        self.sizes: list[int] = [base.out_features for base in bases]
        """The numbers of outputs of the layers, which add up to `out`"""
        self._joint: list[Tensor] | None = None
        if keep_joined:
            self._join()

    def _join(self) -> None:
        parts = [_tensors(base) for base in self.bases]
        self._joint = None
        if len(parts) > 1 and _can_join(self.bases):
            self._joint = _joined(parts)
            views = [
                joint.split([len(own) for own in tensors])
                for joint, *tensors in zip(self._joint, *parts, strict=True)
            ]
            for base, own in zip(self.bases, zip(*views, strict=True), strict=True):
                _replace_tensors(base, own)
        self._pointers = self._current_pointers()
        self._biases: dict[torch.dtype, Tensor | None] = {}

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[out, in]: the weights in `dtype`. They are not copied if they have this data type already."""
        joint = self._joint_tensors()
        if joint is None:
            weights = [frozen_weight(base, dtype) for base in self.bases]
            return weights[0] if len(weights) == 1 else torch.cat(weights)
        first = self.bases[0]
        if isinstance(first, INT8):
            codes, largest = joint
            return operators.dequantize_int8(codes, largest, dtype)
        if isinstance(first, NF4):
            own = _nf4_state(first)
            codes, largest = joint
            shape = torch.Size((sum(self.sizes), first.in_features))
            state = QuantState(largest, shape, own.code, own.blocksize, own.quant_type, own.dtype)
            dequantized: Tensor = dequantize_4bit(codes, state)
            return dequantized.to(dtype)
        return joint[0].to(dtype)

    def _joint_tensors(self) -> list[Tensor] | None:
        """The joint tensors that hold the weights; None if there is one layer, or they cannot be joined."""
        if self._keeps_joined:
            self._follow_changes()
            return self._joint
        if len(self.bases) == 1 or not _can_join(self.bases):
            return None
        return _joined([_tensors(base) for base in self.bases])

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """[out]: the biases in `dtype`, with zeros for the layers without one; None if no layer has one."""
        if not self._keeps_joined:
            return self._join_biases(dtype)
        self._follow_changes()
        if dtype not in self._biases:
            self._biases[dtype] = self._join_biases(dtype)
        return self._biases[dtype]

    def _join_biases(self, dtype: torch.dtype) -> Tensor | None:
        if all(base.bias is None for base in self.bases):
            return None
        device = self.bases[0].weight.device
        parts = [
            torch.zeros(base.out_features, dtype=dtype, device=device)
            if base.bias is None
            else base.bias.detach().to(dtype)
            for base in self.bases
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _follow_changes(self) -> None:
        """Join again if a layer has got other tensors: it was moved, or its adapter merged."""
        if self._current_pointers() != self._pointers:
            self._join()

    def _current_pointers(self) -> list[int]:
        tensors = [tensor for base in self.bases for tensor in (*_tensors(base), base.bias)]
        return [tensor.data_ptr() for tensor in tensors if tensor is not None]

    def separate(self) -> None:
        """Give each layer tensors of its own again. This object must not be used afterwards."""
        if self._joint is not None:
            for base in self.bases:
                _replace_tensors(base, [tensor.clone() for tensor in _tensors(base)])


def _joined(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The tensors of several layers, each kind joined."""
    return [joined(tensors) for tensors in zip(*parts, strict=True)]


def _nf4_state(base: Any) -> QuantState:
    state: QuantState = base.quant_state if isinstance(base, PlainNf4) else base.weight.quant_state
    return state


def _tensors(base: Any) -> list[Tensor]:
    """The tensors that hold a layer's weight, each with a whole number of rows for every output."""
    if isinstance(base, INT8):
        return list(int8_state(base))
    if isinstance(base, NF4):
        return [base.weight.data, _nf4_state(base).absmax]
    return [base.weight.data]


def _replace_tensors(base: Any, tensors: Sequence[Tensor]) -> None:
    """Have the layer hold its weight in other tensors with the same values."""
    base.weight.data = tensors[0]
    if isinstance(base, bnb.nn.Linear8bitLt):
        base.state.CB, base.state.SCB = tensors
    if isinstance(base, bnb.nn.Linear4bit):
        base.weight.quant_state.absmax = tensors[1]


def _can_join(bases: Sequence[Any]) -> bool:
    """Whether the joint weight, dequantized, has the very bits of the layers' weights."""
    first = bases[0]
    if any(type(base) is not type(first) or base.weight.dtype != first.weight.dtype for base in bases):
        return False
    if isinstance(first, NF4):
        states = [_nf4_state(base) for base in bases]
        formats = {(state.blocksize, state.quant_type, state.dtype) for state in states}
        # A block that crosses from one layer to the next would mix their scales.
        are_whole_blocks = all(state.shape.numel() % states[0].blocksize == 0 for state in states)
        return len(formats) == 1 and are_whole_blocks and not any(state.nested for state in states)
    return type(first) in (nn.Linear, *INT8)
