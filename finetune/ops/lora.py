"""LoRA on frozen linear layers: one autograd function for all layers that share an input.

It computes the same function as PEFT's layers, but saves a single copy of the input, and none in fp32. PEFT's
modules, parameters and files do not change; only the forward methods are replaced. PEFT's own forward methods
are the reference path. The dropout noise differs from PEFT's, but has the same mean and variance.
"""

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from finetune.ops.quantized import frozen_weight, multiply

# Dropout: each update draws a pool of 16-bit numbers, and each layer takes slices of it at random offsets.
# Drawing fresh noise for each layer would cost as much as the layer's matrix multiplication.
POOL_SIZE = 2**22
LEVELS = 2**16
INTEGERS = {2: torch.int16, 4: torch.int32}  # by size in bytes


def enable(model: nn.Module, int8_matmul: bool = False) -> tuple[int, int]:
    """Replace the forward methods of the LoRA layers. Returns the numbers of replaced and of all LoRA layers.

    With `int8_matmul`, bitsandbytes multiplies int8 weights by int8 activations in the forward pass.
    Otherwise weights are dequantized for each multiplication.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    fast = [layer for layer in layers if _is_plain_lora(layer)]
    for layer in fast:
        layer.forward = types.MethodType(_fast_forward, layer)
        layer.int8_matmul = int8_matmul
    return len(fast), len(layers)


def disable(model: nn.Module) -> None:
    """Restore PEFT's forward methods."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.__dict__.pop("forward", None)


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
    kinds = (nn.Linear, bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)
    return type(layer.base_layer) in kinds and not layer.lora_variant and not any(layer.lora_bias.values())


def _fast_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """x [..., in] -> [..., out]."""
    is_off = layer.disable_adapters and not (layer.merged or args or kwargs or torch.is_grad_enabled())
    if is_off:
        return _base_output(layer, x)
    if args or kwargs or not _has_one_active_adapter(layer):
        reference: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return reference
    (y,) = _compute([layer], x)
    return y


def project(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    """The outputs of several layers for the same input x [..., in].

    One call computes all of them if each is a LoRA layer on the fast path with the same settings. They then
    share the dropout noise on the input.
    """
    first = layers[0]
    can_share = all(
        getattr(layer.__dict__.get("forward"), "__func__", None) is _fast_forward
        and _has_one_active_adapter(layer)
        and _dropout_of(layer) == _dropout_of(first)
        and layer.int8_matmul == first.int8_matmul
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        for layer in layers
    )
    return _compute(layers, x) if can_share else [layer(x) for layer in layers]


def _has_one_active_adapter(layer: Any) -> bool:
    """Whether exactly one adapter is active, and not merged into the weight."""
    names = layer.active_adapters
    return len(names) == 1 and names[0] in layer.lora_A and not (layer.disable_adapters or layer.merged)


def _dropout_of(layer: Any) -> float:
    dropout = layer.lora_dropout[layer.active_adapters[0]]
    return float(dropout.p) if isinstance(dropout, nn.Dropout) and layer.training else 0.0


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer multiplies x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _base_output(layer: Any, x: Tensor) -> Tensor:
    """The output of the frozen layer without its adapter, computed as with the adapter."""
    rows = x.reshape(-1, x.shape[-1]).to(_compute_dtype(x))
    with torch.autocast(x.device.type, enabled=False):
        return multiply(rows, layer.base_layer, layer.int8_matmul).view(*x.shape[:-1], -1)


def _compute(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    names = [layer.active_adapters[0] for layer in layers]
    rows = x.reshape(-1, x.shape[-1]).to(_compute_dtype(x))
    with torch.autocast(x.device.type, enabled=False):
        ys = _LoraLinears.apply(  # type: ignore[no-untyped-call]
            rows,
            [layer.base_layer for layer in layers],
            [layer.scaling[name] for layer, name in zip(layers, names, strict=True)],
            _dropout_of(layers[0]),
            layers[0].int8_matmul,
            *(layer.lora_A[name].weight for layer, name in zip(layers, names, strict=True)),
            *(layer.lora_B[name].weight for layer, name in zip(layers, names, strict=True)),
        )
    return [y.view(*x.shape[:-1], -1) for y in ys]


class _LoraLinears(torch.autograd.Function):
    """y = x W^T + bias + scaling * dropout(x) A^T B^T for each layer, with gradients for x, A and B.

    x [T, in], A [r, in], B [out, r], y [T, out]; `weights` are all A, then all B. Saved for the backward pass
    are x, which all layers share, and scaling * dropout(x) A^T [T, r] of each layer. The backward pass
    dequantizes W again, and takes the same noise from the pool by its offsets.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bases: list[Any],
        scalings: list[float],
        dropout: float,
        int8_matmul: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        all_a, all_b = weights[: len(bases)], weights[len(bases) :]
        offsets = draw_offsets(x.numel()) if dropout > 0 else []
        kept = x if dropout == 0 else zero_dropped(x, keep_mask(x, dropout, offsets))
        scalings = [scaling / (1 - dropped_share(dropout)) for scaling in scalings]
        us = torch.split(kept @ torch.cat(all_a).to(x.dtype).t(), [len(a) for a in all_a], dim=1)
        ys = []
        for base, u, b, scaling in zip(bases, us, all_b, scalings, strict=True):
            y = multiply(x, base, int8_matmul)
            ys.append(y.addmm_(u.mul_(scaling), b.to(x.dtype).t()))
        ctx.save_for_backward(x, *us, *weights)
        ctx.settings = bases, scalings, dropout, offsets, torch.initial_seed()
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        bases, scalings, dropout, offsets, seed = ctx.settings
        x, *saved = ctx.saved_tensors
        count = len(bases)
        us, all_a, all_b = saved[:count], saved[count : 2 * count], saved[2 * count :]
        mask = keep_mask(x, dropout, offsets, seed) if dropout > 0 else None
        kept = x if mask is None else zero_dropped(x, mask)
        layers = zip(dys, all_b, scalings, strict=True)
        v = torch.cat([(dy @ b.to(dy.dtype)).mul_(scaling) for dy, b, scaling in layers], dim=1)
        das = torch.split((v.t() @ kept).to(all_a[0].dtype), [len(a) for a in all_a])
        dbs = [(u.t() @ dy).t().to(b.dtype) for u, dy, b in zip(us, dys, all_b, strict=True)]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dys[0] @ frozen_weight(bases[0], x.dtype)
            for dy, base in zip(dys[1:], bases[1:], strict=True):
                dx.addmm_(dy, frozen_weight(base, x.dtype))
            a = torch.cat(all_a).to(x.dtype)
            if mask is None:
                dx.addmm_(v, a)
            else:
                through_lora = v @ a
                through_lora.view(mask.dtype).bitwise_and_(mask)
                dx += through_lora
        return dx, None, None, None, None, *das, *dbs


def dropped_share(dropout: float) -> float:
    """The fraction of numbers that is dropped: `dropout` rounded to a multiple of 1 / LEVELS, below 1."""
    return min(round(dropout * LEVELS), LEVELS - 1) / LEVELS


def draw_offsets(count: int) -> list[int]:
    """Random offsets into the pool, of the slices for `count` numbers.

    They come from torch's global generator. Gradient checkpointing restores its state, so recomputed layers
    draw the same offsets.
    """
    num_slices = max(1, -(-count // (POOL_SIZE // 2)))
    offsets: list[int] = torch.randint(POOL_SIZE // 2, (num_slices,)).tolist()
    return offsets


def keep_mask(x: Tensor, dropout: float, offsets: list[int], seed: int | None = None) -> Tensor:
    """Integers of the shape and width of x: all bits set where a number is kept, none where it is dropped."""
    pool = _pool(
        torch.initial_seed() if seed is None else seed, dropout, INTEGERS[x.element_size()], x.device
    )
    remaining, slices = x.numel(), []
    for offset in offsets:
        size = min(remaining, POOL_SIZE // 2)
        slices.append(pool[offset : offset + size])
        remaining -= size
    return (slices[0] if len(slices) == 1 else torch.cat(slices)).view(x.shape)


def zero_dropped(x: Tensor, mask: Tensor) -> Tensor:
    """x with zeros where the mask is 0. A bitwise AND needs no conversion of the mask to floating point."""
    return (x.view(mask.dtype) & mask).view(x.dtype)


@lru_cache(maxsize=1)
def _pool(seed: int, dropout: float, integer: torch.dtype, device: torch.device) -> Tensor:
    """[POOL_SIZE]: the keep masks of an update. The training loop seeds torch from (seed, step, rank)."""
    generator = torch.Generator(device).manual_seed(seed)
    words = torch.empty(POOL_SIZE // 4, dtype=torch.int64, device=device).random_(
        -(2**63), None, generator=generator
    )
    threshold = int(dropped_share(dropout) * LEVELS) - LEVELS // 2
    return -(words.view(torch.int16) >= threshold).to(integer)
