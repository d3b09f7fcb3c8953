"""Quantized weights as plain parameters: the same bits, and nothing kept from one product to the next."""

import pytest
import torch
from ops.test_base_weights import IN, SIZES, frozen_layer
from torch import nn

from finetune.ops import quantized
from finetune.ops.base_weights import BaseWeights
from finetune.ops.plain_weights import PlainInt8, PlainNf4, use_plain_weights
from finetune.ops.quantized import dequantized, frozen_weight

QUANTIZED = ["int8", "nf4"]
KINDS = ["fp32", "bf16", *QUANTIZED]


def layers_of(kind: str, plain: bool = True) -> nn.ModuleList:
    layers = nn.ModuleList(frozen_layer(kind, IN, size, bias=size != 16, seed=size) for size in SIZES)
    if plain:
        use_plain_weights(layers)
    return layers


@pytest.mark.parametrize("kind", QUANTIZED)
def test_layers_are_replaced_and_everything_as_large_as_the_weight_is_a_frozen_parameter(kind):
    layers = layers_of(kind)
    for layer, size in zip(layers, SIZES, strict=True):
        assert type(layer) is (PlainInt8 if kind == "int8" else PlainNf4)
        assert (layer.in_features, layer.out_features) == (IN, size)
        names = {"weight", "largest" if kind == "int8" else "absmax"} | ({"bias"} if size != 16 else set())
        assert {name for name, _ in layer.named_parameters()} == names
        assert {type(parameter) for parameter in layer.parameters()} == {nn.Parameter}
        assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_weights_have_the_bits_of_bitsandbytes(kind, called, dtype):
    layers = layers_of(kind, plain=False)
    if called:  # an int8 layer moves its codes at its first call
        layers[0](torch.randn(2, IN, dtype=torch.bfloat16))
    expected = [frozen_weight(layer, dtype) for layer in layers_of(kind, plain=False)]
    use_plain_weights(layers)
    for layer, weight in zip(layers, expected, strict=True):
        assert torch.equal(frozen_weight(layer, dtype), weight)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_all_ways_to_multiply_give_the_same_as_with_bitsandbytes_layers(kind):
    x = torch.randn(3, 5, IN, dtype=torch.bfloat16, requires_grad=True)
    made = []
    for layer in (layers_of(kind, plain=False)[0], layers_of(kind)[0]):
        model = nn.Sequential(layer)
        with dequantized(model):
            reference = model(x)
        quantized.enable(model)
        y = model(x)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
        quantized.disable(model)
        made.append((reference, y, gradient))
    for theirs, ours in zip(*made, strict=True):
        assert torch.equal(theirs, ours)
    assert torch.equal(layer(x), made[1][0])  # its own forward method is the reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_kept_joined_give_the_bits_of_those_that_are(kind, dtype):
    layers = layers_of(kind)
    apart, together = BaseWeights(list(layers), keep_joined=False), BaseWeights(list(layers_of(kind, False)))
    assert torch.equal(apart.dequantize(dtype), together.dequantize(dtype))
    assert torch.equal(apart.bias(dtype), together.bias(dtype))
    alone = BaseWeights(list(layers[:1]), keep_joined=False)
    assert torch.equal(alone.dequantize(dtype), frozen_weight(layers[0], dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_without_joining_new_parameters_are_read_at_the_next_use_and_the_old_ones_are_not_held(kind):
    layers = layers_of(kind)
    before = {name: parameter.data_ptr() for name, parameter in layers.named_parameters()}
    weights = BaseWeights(list(layers), keep_joined=False)
    weights.dequantize(torch.bfloat16)
    assert {name: parameter.data_ptr() for name, parameter in layers.named_parameters()} == before
    for layer in layers:  # as sharding does: other parameters, and the old ones are gone
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(torch.zeros_like(parameter), requires_grad=False))
            parameter.data.fill_(1)
    assert float(weights.dequantize(torch.bfloat16).float().abs().max()) == 0
    assert float(weights.bias(torch.bfloat16).float().abs().max()) == 0
