"""Frozen layers of one input with a joint weight: the same bits, held once, and found where they were."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from finetune.ops.base_weights import BaseWeights
from finetune.ops.quantized import frozen_weight

KINDS = ["fp32", "bf16", "int8", "nf4"]
IN, SIZES = 64, (48, 16, 32)


def frozen_layer(kind: str, num_in: int, num_out: int, bias: bool = True, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    plain = nn.Linear(num_in, num_out, bias).requires_grad_(False)
    if kind in ("fp32", "bf16"):
        return plain.to(torch.float32 if kind == "fp32" else torch.bfloat16)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(num_in, num_out, bias, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(
            num_in,
            num_out,
            bias,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            compress_statistics=kind == "nested",
        )
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu").requires_grad_(False)


def frozen_layers(kind: str) -> list[Any]:
    return [frozen_layer(kind, IN, size, bias=size != 16, seed=size) for size in SIZES]


def held(base: Any) -> list[Tensor]:
    """The tensors of the layer's weight."""
    if isinstance(base, bnb.nn.Linear8bitLt):
        return [base.weight.data, base.state.CB, base.state.SCB]
    return [
        base.weight.data,
        *([base.weight.quant_state.absmax] if hasattr(base.weight, "quant_state") else []),
    ]


def storages(bases: list[Any]) -> dict[int, int]:
    """Bytes by storage, of the layers' weights."""
    parts = [tensor.untyped_storage() for base in bases for tensor in held(base)]
    return {part.data_ptr(): part.nbytes() for part in parts}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_joint_weight_has_the_bits_of_the_layers(kind, dtype):
    layers = frozen_layers(kind)
    expected = torch.cat([frozen_weight(layer, dtype) for layer in layers])
    weights = BaseWeights(layers)
    assert torch.equal(weights.dequantize(dtype), expected)
    assert torch.equal(torch.cat([frozen_weight(layer, dtype) for layer in layers]), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_held_twice(kind):
    layers = frozen_layers(kind)
    for layer in layers:
        frozen_weight(layer, torch.float32)  # bitsandbytes moves its tensors at the first call
    before = storages(layers)
    weights = BaseWeights(layers)
    after = storages(layers)
    assert sum(after.values()) == sum(before.values())
    assert len(after) == len(before) // len(layers)
    again = BaseWeights(layers)  # those who ask after have the same tensors
    assert storages(layers) == after
    weights.separate()
    assert len(storages(layers)) == len(before)
    assert sum(storages(layers).values()) == sum(before.values())
    assert torch.equal(again.dequantize(torch.float32), weights.dequantize(torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_compute_what_they_did_and_save_what_they_did(kind):
    x = torch.randn(5, IN).to(torch.float32 if kind == "fp32" else torch.bfloat16)
    layers, plain = frozen_layers(kind), frozen_layers(kind)
    BaseWeights(layers)
    for layer, expected in zip(layers, plain, strict=True):
        assert torch.equal(layer(x), expected(x))
        state, right = layer.state_dict(), expected.state_dict()
        assert state.keys() == right.keys()
        assert all(torch.equal(state[name], value) for name, value in right.items())


def test_a_weight_in_the_asked_type_is_not_copied():
    layers = frozen_layers("bf16")
    weights = BaseWeights(layers)
    assert weights.dequantize(torch.bfloat16).data_ptr() == layers[0].weight.data_ptr()
    alone = BaseWeights(layers[1:2])
    assert alone.dequantize(torch.bfloat16).data_ptr() == layers[1].weight.data_ptr()


@pytest.mark.parametrize(
    ("kinds", "num_in"),
    [
        (("nf4", "nf4"), 20),  # a block of 64 crosses from one layer to the next
        (("nested", "nested"), 64),  # the scales are quantized themselves
        (("bf16", "int8"), 64),
        (("bf16", "fp32"), 64),
    ],
)
def test_what_cannot_be_joined_bit_by_bit_is_dequantized_layer_by_layer(kinds, num_in):
    layers = [frozen_layer(kind, num_in, 12, seed=number) for number, kind in enumerate(kinds)]
    expected = torch.cat([frozen_weight(layer, torch.float32) for layer in layers])
    before = storages(layers)
    weights = BaseWeights(layers)
    assert torch.equal(weights.dequantize(torch.float32), expected)
    assert storages(layers) == before


def test_layers_without_a_bias_have_a_bias_of_zero_beside_those_with_one():
    layers = frozen_layers("fp32")
    expected = torch.cat([layers[0].bias, torch.zeros(16), layers[2].bias])
    assert torch.equal(BaseWeights(layers).bias(torch.float32), expected)
    assert BaseWeights(layers[1:2]).bias(torch.float32) is None


@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_in_a_layer_are_the_ones_that_count(kind):
    layers, others = frozen_layers(kind), frozen_layers(kind)
    weights = BaseWeights(layers)
    other = frozen_layer(kind, IN, SIZES[1], bias=False, seed=99)
    layers[1].weight = other.weight  # as PEFT does when it merges an adapter
    if kind == "int8":
        layers[1].state.reset_grads()
    expected = [
        frozen_weight(layer, torch.float32)
        for layer in (others[0], frozen_layer(kind, IN, 16, False, 99), others[2])
    ]
    assert torch.equal(weights.dequantize(torch.float32), torch.cat(expected))
