"""LoRA on a frozen linear layer as one autograd function: the same function of its inputs as PEFT's layers
compute, with one copy of the input kept and nothing in fp32 that needs not be.

PEFT's modules, parameters and files stay as they are; only their forward method is another. PEFT's own is the
plain path. Dropout noise is another too, with the same mean and variance.
"""

import types
from functools import lru_cache
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

# Dropout: 16-bit numbers, drawn anew for each update, of which each layer takes a stretch at a random place.
# Drawing fresh noise for each layer costs as much as the layer's multiplication.
POOL_SIZE = 2**22
CACHED = 2**18  # numbers in fp32 that a core's cache holds with room
LEVELS = 2**16
INTEGERS = {2: torch.int16, 4: torch.int32}  # by bytes


def speed_up(model: nn.Module, int8_matmul: bool = False) -> tuple[int, int]:
    """Let the LoRA layers compute in one function each; returns how many do, of how many.

    `int8_matmul` multiplies int8 weights by int8 activations, through bitsandbytes, in the forward pass;
    otherwise weights are dequantised for each multiplication.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    fast = [layer for layer in layers if _is_plain_lora(layer)]
    for layer in fast:
        layer.forward = types.MethodType(_fast_forward, layer)
        layer.int8_matmul = int8_matmul
    return len(fast), len(layers)


def slow_down(model: nn.Module) -> None:
    """Give the layers PEFT's forward back."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.__dict__.pop("forward", None)


def _is_plain_lora(layer: Any) -> bool:
    kinds = (nn.Linear, bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)
    return type(layer.base_layer) in kinds and not layer.lora_variant and not any(layer.lora_bias.values())


def _fast_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """x [..., in] -> [..., out]."""
    names = layer.active_adapters
    is_usual = len(names) == 1 and names[0] in layer.lora_A and not layer.merged
    if layer.disable_adapters and torch.is_grad_enabled():
        is_usual = False
    if not is_usual or args or kwargs:
        plain: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return plain
    (name,) = names
    dropout = layer.lora_dropout[name]
    share = dropout.p if isinstance(dropout, nn.Dropout) and layer.training else 0.0
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if layer.disable_adapters:  # the base alone, on the same path as with its adapter
        with torch.autocast(kind, enabled=False):
            own = multiply(x.reshape(-1, x.shape[-1]).to(dtype), layer.base_layer, layer.int8_matmul)
        return own.view(*x.shape[:-1], -1)
    with torch.autocast(kind, enabled=False):
        y: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, x.shape[-1]).to(dtype),
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.base_layer,
            layer.scaling[name],
            share,
            layer.int8_matmul,
        )
    return y.view(*x.shape[:-1], -1)


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + scaling * dropout(x) A^T B^T, with gradients for x, A and B.

    x [T, in], A [r, in], B [out, r], y [T, out]. Kept for the backward pass: x, which layers side by side
    share, and dropout(x) A^T [T, r]. W is dequantised again there, and the noise found again by its place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        base: Any,
        scaling: float,
        dropout: float,
        int8_matmul: bool,
    ) -> Tensor:
        y = multiply(x, base, int8_matmul)
        offsets = draw_offsets(x.numel()) if dropout > 0 else []
        kept, scaling = x, scaling / (1 - dropped_share(dropout))
        if dropout > 0:
            kept = zero_dropped(x, keep_mask(x, dropout, offsets))
        u = (kept @ a.to(x.dtype).t()).mul_(scaling)
        y.addmm_(u, b.to(x.dtype).t())
        ctx.save_for_backward(x, u, a, b)
        ctx.settings = base, scaling, dropout, offsets, torch.initial_seed()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, a, b = ctx.saved_tensors
        base, scaling, dropout, offsets, seed = ctx.settings
        mask = keep_mask(x, dropout, offsets, seed) if dropout > 0 else None
        kept = x if mask is None else zero_dropped(x, mask)
        v = (dy @ b.to(dy.dtype)).mul_(scaling)
        db = (u.t() @ dy).t().to(b.dtype)
        da = (v.t() @ kept).to(a.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ frozen_weight(base, dy.dtype)
            if mask is None:
                dx.addmm_(v, a.to(dy.dtype))
            else:
                through_lora = v @ a.to(dy.dtype)
                through_lora.view(mask.dtype).bitwise_and_(mask)
                dx += through_lora
        return dx, da, db, None, None, None, None


def frozen_weight(base: Any, dtype: torch.dtype) -> Tensor:
    """[out, in]: the weight of a frozen linear layer, dequantised, rounded as bitsandbytes rounds it."""
    if isinstance(base, bnb.nn.Linear8bitLt):
        codes, largest = _int8_state(base)
        return _scale_rows(codes, largest / 127, dtype)
    if isinstance(base, bnb.nn.Linear4bit):
        assert not getattr(base.weight.quant_state, "packing_format_for_cpu", False), "load_base forbids it"
        dequantised: Tensor = bnb.functional.dequantize_4bit(base.weight, base.weight.quant_state)
        return dequantised.to(dtype)
    plain: Tensor = base.weight
    return plain.to(dtype)


def _scale_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes [out, in] by scales [out] fp32, rounded once, to `dtype`. On a CPU some rows at a time: torch
    makes the product in fp32 first, and that is to stay in a core's cache."""
    rows = len(codes) if codes.is_cuda else max(1, CACHED // codes.shape[1])
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for first in range(0, len(codes), rows):
        part = slice(first, first + rows)
        torch.mul(codes[part], scales[part, None], out=weight[part])
    return weight


def _int8_state(base: Any) -> tuple[Tensor, Tensor]:
    """codes [out, in] int8 and the largest absolute value [out] of each row, which is code 127."""
    if base.weight.CB is not None:  # before the layer's first call
        base.init_8bit_state()
    return base.state.CB, base.state.SCB


def multiply(x: Tensor, base: Any, int8_matmul: bool) -> Tensor:
    """[T, out]: x [T, in] through the frozen layer; with `int8_matmul` in int8, by bitsandbytes."""
    bias = None if base.bias is None else base.bias.to(x.dtype)
    if not int8_matmul:
        return F.linear(x, frozen_weight(base, x.dtype), bias)
    _int8_state(base)
    base.state.is_training = False  # where it is set, bitsandbytes dequantises on a CPU
    product: Tensor = bnb.matmul(x, base.weight, bias=bias, state=base.state)
    return product


def dropped_share(dropout: float) -> float:
    """The share of numbers that is dropped: `dropout`, to the nearest of LEVELS, and never all."""
    return min(round(dropout * LEVELS), LEVELS - 1) / LEVELS


def draw_offsets(count: int) -> list[int]:
    """Random places in the pool where stretches for `count` numbers begin. They come from torch's global
    generator, so gradient checkpointing, which puts its state back, repeats them."""
    num_stretches = max(1, -(-count // (POOL_SIZE // 2)))
    offsets: list[int] = torch.randint(POOL_SIZE // 2, (num_stretches,)).tolist()
    return offsets


def keep_mask(x: Tensor, dropout: float, offsets: list[int], seed: int | None = None) -> Tensor:
    """Of x's shape, integers of its width: all bits set where a number is kept, none where it is dropped."""
    pool = _pool(
        torch.initial_seed() if seed is None else seed, dropout, INTEGERS[x.element_size()], x.device
    )
    left, stretches = x.numel(), []
    for offset in offsets:
        size = min(left, POOL_SIZE // 2)
        stretches.append(pool[offset : offset + size])
        left -= size
    return (stretches[0] if len(stretches) == 1 else torch.cat(stretches)).view(x.shape)


def zero_dropped(x: Tensor, mask: Tensor) -> Tensor:
    """x with zeros where the mask drops it. Bits: a multiplication would have to make numbers of them."""
    return (x.view(mask.dtype) & mask).view(x.dtype)


@lru_cache(maxsize=1)
def _pool(seed: int, dropout: float, integer: torch.dtype, device: torch.device) -> Tensor:
    """[POOL_SIZE]: the keep masks of an update, before which the loop seeds torch from (seed, step, rank)."""
    generator = torch.Generator(device).manual_seed(seed)
    words = torch.empty(POOL_SIZE // 4, dtype=torch.int64, device=device).random_(
        -(2**63), None, generator=generator
    )
    threshold = int(dropped_share(dropout) * LEVELS) - LEVELS // 2
    return -(words.view(torch.int16) >= threshold).to(integer)
