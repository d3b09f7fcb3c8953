"""How a run multiplies by int8 weights: dequantized, or in int8."""

import time
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from finetune.config import Config
from finetune.data.preparing.examples import Examples
from finetune.ops import quantized
from finetune.runtime.accelerator import DTYPES
from finetune.runtime.choice import Choice
from finetune.runtime.processes import all_reduce_max

# How many times faster int8 activations must be than dequantized weights, which are more accurate.
MIN_SPEEDUP = 1.2


def choose_int8(
    config: Config,
    accelerator: Any,
    model: nn.Module,
    train_set: Examples,
    recorded: str | None,
    is_sharded: bool,
) -> Choice:
    """How int8 weights are multiplied. With "auto", a GPU dequantizes them, and a CPU takes the way that is
    faster for a typical micro-batch."""
    name, requested = "int8 weights", config.fast.int8_matmul
    bases = (module.base_layer for module in model.modules() if isinstance(module, LoraLayer))
    layers = [base for base in bases if isinstance(base, quantized.INT8)]
    if not layers:
        return Choice(name, "none", "none")
    if is_sharded:
        asked = recorded if requested == "auto" and recorded is not None else requested
        differs = "bitsandbytes cannot multiply in int8 by sharded weights" if asked == "int8" else ""
        return Choice(name, "int8" if differs else "dequantize", "dequantize", differs)
    if not config.fast.lora:
        return Choice(name, "bitsandbytes'", "bitsandbytes'")
    if requested != "auto":
        return Choice(name, requested, requested)
    if recorded is not None:
        return Choice(name, recorded, recorded, "as at the start of this run")
    if accelerator.device.type != "cpu":
        reason = "to multiply in int8, bitsandbytes waits for the GPU in every layer"
        return Choice(name, "dequantize", "dequantize", reason)
    layer = max(layers, key=lambda layer: layer.weight.numel())
    num_tokens = max(64, min(1024, int(8 * train_set.lengths.mean())))
    x = torch.randn(num_tokens, layer.in_features, dtype=DTYPES[accelerator.mixed_precision])
    with torch.no_grad():
        in_int8 = _seconds(lambda: quantized.multiply(x, layer, int8_matmul=True))
        unrounded = _seconds(lambda: quantized.multiply(x, layer, int8_matmul=False))
    # int8 also rounds the activations, so it must pay off. All ranks use the decision of the main process.
    is_worth_it = accelerator.is_main_process and in_int8 < unrounded / MIN_SPEEDUP
    is_int8 = all_reduce_max(accelerator, int(is_worth_it)) == 1
    actual = "int8" if is_int8 else "dequantize"
    measured = f"{num_tokens} tokens: dequantized {unrounded * 1e3:.1f} ms, in int8 {in_int8 * 1e3:.1f} ms"
    return Choice(name, actual, actual, measured)


def _seconds(function: Callable[[], object]) -> float:
    """The median time of five calls on a CPU, after a warm-up call."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[2]
