"""Quantized layers multiply by their dequantized weights: the same function everywhere, and no wait in it."""

from typing import Any

import pytest
import torch
from card import put_on_gpu, quantized_layer
from live import LiveBytes
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from finetune.ops import quantized, torch_makers

KINDS = pytest.mark.parametrize("kind", ["int8", "nf4"])


def outcome(layer: Any, autocast: bool) -> tuple[Tensor, Tensor]:
    """The output for random inputs, and the gradient of the inputs for a random one of the output."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 64, generator=generator).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    (dx,) = torch.autograd.grad(y, x, torch.randn(y.shape, generator=generator).to(y.dtype))
    return y, dx


@KINDS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_layer_computes_what_its_dequantized_weight_does(kind, bias, autocast):
    layer = quantized_layer(kind, bias)
    with quantized.dequantized(layer):
        expected = outcome(layer, autocast)
    quantized.enable(layer)
    for actual, right in zip(outcome(layer, autocast), expected, strict=True):
        assert (actual.dtype, actual.shape) == (right.dtype, right.shape)
        assert (actual - right).float().norm() <= (1e-2 if autocast else 1e-5) * right.float().norm()


@KINDS
def test_nothing_is_kept_for_the_backward_pass(kind):
    layer = quantized_layer(kind)
    quantized.enable(layer)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(torch.randn(3, 64, requires_grad=True))
    assert kept == []


@KINDS
def test_the_reference_path_returns_what_it_replaced(kind):
    layer = quantized_layer(kind)
    with quantized.dequantized(layer):
        pass
    assert "forward" not in vars(layer)
    quantized.enable(layer)
    before = layer.forward
    with quantized.dequantized(layer):
        assert layer.forward != before
    assert layer.forward == before
    quantized.disable(layer)
    assert "forward" not in vars(layer)


@KINDS
def test_the_host_waits_for_no_layer_on_a_gpu(kind):
    """A fake tensor has no numbers: what waits for one, or for how many there are, raises."""
    layer = quantized_layer(kind)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        put_on_gpu(layer)
        x = torch.empty(5, 64, device="cuda", dtype=torch.float16)
        if kind == "int8":
            with pytest.raises(DynamicOutputShapeException):
                layer(x)
        quantized.enable(layer)
        y = layer(x)
        assert (y.shape, y.dtype, y.device.type) == ((5, 128), torch.float16, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantizing_makes_the_weight_and_no_copy_of_it_in_fp32(dtype):
    """Beside the codes, of a byte a weight, which the layer holds."""
    layer = quantized_layer("int8")
    codes, largest = quantized.int8_state(layer)
    for dequantize in (
        lambda: quantized.frozen_weight(layer, dtype),
        lambda: torch_makers.dequantize_int8(codes, largest, dtype),
    ):
        with LiveBytes() as live:
            weight = dequantize()
        assert weight.dtype == dtype
        assert live.most <= 2 * codes.numel() + 2 * largest.nbytes
