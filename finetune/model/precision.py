"""The precision of a model's computation, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from finetune.ops.lora import int8_matmul_off
from finetune.ops.quantized import dequantized


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Compute in fp32 with the weights as they are, quantized or rounded, on the fast and reference paths.

    The parameters are fp32 inside and get their own dtypes and values back: 16 bits to fp32 and back loses
    nothing. Quantized weights stay as they are and are dequantized for each multiplication. Autocast is off
    on the model's device; a context that is entered inside must not turn it on again.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32]
    dtypes = [parameter.dtype for parameter in parameters]
    device = next(model.parameters()).device
    try:
        for parameter in parameters:
            parameter.data = parameter.data.float()
        with dequantized(model), int8_matmul_off(model), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for parameter, dtype in zip(parameters, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)
