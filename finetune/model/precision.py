"""Change the precision of a model's computation temporarily."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from finetune.ops.lora import int8_matmul_off
from finetune.ops.quantized import dequantized


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Compute in fp32 with the existing quantized or rounded weights, on the fast and the reference paths.

    A module's parameters are converted to fp32 only while it computes. Quantized weights are dequantized for
    each multiplication. Autocast is off on the model's device; no nested context may turn it on again.
    """
    handles = [
        handle
        for module in model.modules()
        if _rounded_parameters(module)
        for handle in _compute_in_fp32(module)
    ]
    device = next(model.parameters()).device
    try:
        with dequantized(model), int8_matmul_off(model), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _rounded_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The 16-bit parameters that the module computes with: its own, or those of the layer that it wraps."""
    own = list(module.parameters(recurse=False))
    if isinstance(module, TrainableTokensLayer):  # it takes the weight without calling the layer
        own += module.base_layer.parameters()
    if isinstance(module, ModulesToSaveWrapper):  # its copy takes the precision of its output from there
        own += module.original_module.parameters()
    return [p for p in own if p.is_floating_point() and p.dtype != torch.float32]


def _compute_in_fp32(module: nn.Module) -> list[Any]:
    """Add hooks that replace the module's parameters by fp32 copies while its forward method runs.

    They are looked up then: those of a sharded base are other ones while the module computes.
    """
    originals: list[tuple[nn.Parameter, Tensor]] = []

    def to_fp32(*_: Any) -> None:
        originals[:] = [(parameter, parameter.data) for parameter in _rounded_parameters(module)]
        for parameter, original in originals:
            parameter.data = original.float()

    def restore(*_: Any) -> None:
        for parameter, original in originals:
            parameter.data = original
        originals.clear()

    return [
        module.register_forward_pre_hook(to_fp32),
        module.register_forward_hook(restore, always_call=True),
    ]
