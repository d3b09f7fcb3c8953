"""Norms, rotary positions, gated activations: the model's own values and gradients, and less is kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_model
from tiny import built
from torch import Tensor

from finetune.ops import elementwise


@pytest.fixture(autouse=True)
def _with_and_without_kernels(cpu_kernels: None) -> None:
    pass


def output_and_gradient(module: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return y.detach().double(), torch.autograd.grad((y.float() * weights).sum(), x)[0].double()


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "mistral"])
@pytest.mark.parametrize("part", ["model.layers.0.input_layernorm", "model.norm", "model.layers.1.mlp"])
def test_values_and_gradients_are_the_models_own(architecture, part):
    settings = {"sliding_window": None} if architecture == "mistral" else {}
    plain, fast = (built(architecture, **settings) for _ in range(2))
    # Two norms, a gated MLP and an attention a layer, and the last norm.
    assert elementwise.enable(fast) == 9
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2))
    exact = output_and_gradient(plain.get_submodule(part).double(), x.double())
    in_fp32 = output_and_gradient(fast.get_submodule(part), x)
    assert max(distance(*pair) for pair in zip(in_fp32, exact, strict=True)) < 1e-5
    in_bf16 = output_and_gradient(fast.get_submodule(part).bfloat16(), x.bfloat16())
    assert max(distance(*pair) for pair in zip(in_bf16, exact, strict=True)) < 1e-2


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_rotary_attention_is_the_models_own(architecture):
    plain, fast = built(architecture), built(architecture)
    elementwise.enable(fast)
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(2))
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 7], [3, 4, 5, 6, 7, 8, 9, 10, 11]])
    mask = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(3)) < 0.7
    mask |= torch.eye(9, dtype=torch.bool)

    def attend(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        layer = model.model.layers[1].self_attn
        positions = model.model.rotary_emb(x, places)
        return output_and_gradient(
            lambda x: layer(x, position_embeddings=positions, attention_mask=mask)[0], x
        )

    exact = attend(plain.double(), x.double())
    assert max(distance(*pair) for pair in zip(attend(fast, x), exact, strict=True)) < 1e-5
    in_bf16 = attend(fast.bfloat16(), x.bfloat16())
    assert max(distance(*pair) for pair in zip(in_bf16, exact, strict=True)) < 3e-2


def test_with_a_cache_the_attention_is_the_modules_own():
    model = built("llama")
    ids = torch.arange(3, 9)[None]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    elementwise.enable(model)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_less_is_kept_for_the_backward_pass():
    def kept_bytes(model: Any) -> int:
        storages: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(1, 500, 64).bfloat16().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            result = model.model.layers[0].mlp(model.model.norm(x))
        del result
        return sum(storages.values())

    model = built("llama").bfloat16()
    before = kept_bytes(model)
    elementwise.enable(model)
    assert kept_bytes(model) < 0.7 * before


@pytest.mark.parametrize(
    ("architecture", "settings", "count"),
    [
        ("gemma2", {}, 0),  # its norms multiply by 1 + weight, and its gate is a GELU
        ("llama", {"hidden_act": "gelu"}, 7),  # all but the gated activations
        ("mistral", {"sliding_window": 4}, 7),  # its attention is told of the window: all but that
        ("qwen3", {}, 11),  # it norms queries and keys: its attention is its own, but for those norms
        ("gpt2", {}, 0),
    ],
)
def test_what_computes_something_else_is_left_alone(architecture, settings, count):
    model = built(architecture, **settings)
    ids = torch.arange(3, 13)[None]
    before = model(input_ids=ids).logits
    assert elementwise.enable(model) == count
    assert torch.allclose(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)


def test_a_norm_that_is_trained_is_left_alone():
    model = tiny_model(20).requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    assert elementwise.enable(model) == 8


def test_slow_down_gives_every_module_its_own_forward_back():
    model = tiny_model(20).requires_grad_(False)
    ids = torch.arange(3, 13)[None]
    before = model(input_ids=ids).logits
    elementwise.enable(model)
    elementwise.disable(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model(input_ids=ids).logits, before)
