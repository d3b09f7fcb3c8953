"""A checkpoint holds the optimizer state of each tensor, whatever the optimizer computes with."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from optimizers import ALL, SETTINGS, SHAPES, separate_optimizer
from safetensors.torch import load_file, save_file
from tiny import flat_adapter, parameters_of
from torch import Tensor, nn

from finetune.model.flat_adapter import FlatAdapter
from finetune.training.optim import create_optimizer
from finetune.training.optim_state import kind_of, load_state, split_state

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def update_flat(adapter: FlatAdapter, optimizer: torch.optim.Optimizer, following: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters_of(adapter), following, strict=True):
        parameter.grad.copy_(gradient)
    optimizer.step()


def update_separate(
    weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, following: list[Tensor]
) -> None:
    for weight, gradient in zip(weights, following, strict=True):
        weight.grad = gradient
    optimizer.step()


def flattened(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        leaves |= flattened(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return leaves


def state_of_separate(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as checkpoints held it when each tensor was a parameter of the optimizer."""
    leaves = flattened(optimizer.state_dict()["state"])
    kept = {key: value.detach().clone() for key, value in leaves.items() if isinstance(value, Tensor)}
    return kept, {key: value for key, value in leaves.items() if key not in kept}


@pytest.mark.parametrize("name", ALL)
def test_what_is_saved_is_the_state_of_the_separate_tensors(name):
    adapter = flat_adapter(*tensors())
    optimizer = create_optimizer(name, adapter, SETTINGS)
    weights = [nn.Parameter(tensor) for tensor in tensors()]
    separate = separate_optimizer(name, weights)
    for seed in range(3):
        update_flat(adapter, optimizer, gradients(seed))
        update_separate(weights, separate, gradients(seed))
    saved, values = split_state(optimizer, adapter)
    expected, expected_values = state_of_separate(separate)
    assert values == expected_values
    assert saved.keys() == expected.keys()
    for key, tensor in expected.items():
        assert saved[key].dtype == tensor.dtype, key
        assert torch.equal(saved[key], tensor), key
    if name.endswith("8bit"):
        assert {torch.uint8, torch.float32} <= {tensor.dtype for tensor in saved.values()}


@pytest.mark.parametrize("name", ALL)
def test_a_checkpoint_of_separate_tensors_goes_on_to_the_bit(tmp_path, name):
    weights = [nn.Parameter(tensor) for tensor in tensors()]
    separate = separate_optimizer(name, weights)
    update_separate(weights, separate, gradients(0))
    state, values = state_of_separate(separate)
    save_file(state, tmp_path / "optimizer.safetensors")
    adapter = flat_adapter(*weights)
    optimizer = create_optimizer(name, adapter, SETTINGS)
    load_state(optimizer, adapter, load_file(tmp_path / "optimizer.safetensors"), values)
    # The first of these brings the mean of the gradients (beta 0.8) near 0, so that what is left of it is
    # smaller than what a wrong number in the padding would be.
    opposite = [-0.8 * gradient for gradient in gradients(0)]
    for following in (opposite, gradients(1), gradients(2)):
        update_separate(weights, separate, following)
        update_flat(adapter, optimizer, following)
        for parameter, weight in zip(parameters_of(adapter), weights, strict=True):
            assert torch.equal(parameter, weight), weight.shape


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw", "torch AdamW"),
        ("adamw_8bit", "bitsandbytes AdamW8bit"),
        ("paged_adamw", "bitsandbytes AdamW32bit"),
        ("paged_adamw_8bit", "bitsandbytes AdamW8bit"),
        ("sgd", "torch SGD"),
    ],
)
def test_its_kind_is_the_library_and_class_of_the_plain_optimizer(name, kind):
    assert kind_of(create_optimizer(name, flat_adapter(torch.zeros(3)), SETTINGS)) == kind


def test_states_that_do_not_belong_together_are_refused():
    adapter = flat_adapter(*tensors())
    optimizer = create_optimizer("adamw_8bit", adapter, SETTINGS)
    update_flat(adapter, optimizer, gradients(0))
    saved, values = split_state(optimizer, adapter)
    with pytest.raises(ValueError, match="different numbers of updates"):
        load_state(optimizer, adapter, saved, {**values, "1.step": 7})
    without = {key: tensor for key, tensor in saved.items() if not key.startswith("1.")}
    with pytest.raises(ValueError, match="not of the same kind"):
        load_state(optimizer, adapter, without, values)


class Pages:
    """Stands in for the memory that a GPU and the host share: plain memory that is marked as paged."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prefetched: list[int] = []
        # On a CPU, bitsandbytes would not ask for pages.
        monkeypatch.setattr(bnb.optim.optimizer.Optimizer8bit, "get_state_buffer", self.get_state_buffer)
        monkeypatch.setattr(bnb.functional, "get_paged", self.get_paged)
        monkeypatch.setattr(bnb.functional, "prefetch_tensor", self.prefetch)

    def get_state_buffer(self, parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if parameter.numel() < 1e5:
            return torch.zeros_like(parameter, dtype=dtype)
        return bnb.functional.get_paged(*parameter.shape, dtype=dtype).fill_(0)

    def get_paged(self, *shape: int, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        tensor.is_paged = True
        return tensor

    def prefetch(self, tensor: Tensor) -> None:
        assert tensor.is_paged
        self.prefetched.append(tensor.numel())


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_state_is_paged_again_after_a_resume(monkeypatch, name):
    pages = Pages(monkeypatch)
    adapter = flat_adapter(*tensors())
    large = adapter.regions[0].parameter
    optimizer = create_optimizer(name, adapter, SETTINGS)
    update_flat(adapter, optimizer, gradients(0))
    assert pages.prefetched == 2 * [large.numel()]

    again = flat_adapter(*parameters_of(adapter))
    resumed = create_optimizer(name, again, SETTINGS)
    saved, values = split_state(optimizer, adapter)
    load_state(resumed, again, saved, values)
    large_again, small_again = (region.parameter for region in again.regions)
    for key in ("state1", "state2"):
        assert resumed.state[large_again][key].is_paged
        assert not hasattr(resumed.state[small_again][key], "is_paged")
    restored, _ = split_state(resumed, again)
    assert restored.keys() == saved.keys()
    assert all(torch.equal(restored[key], tensor) for key, tensor in saved.items())
    pages.prefetched.clear()
    update_flat(again, resumed, gradients(1))
    assert pages.prefetched == 2 * [large.numel()]
    update_flat(adapter, optimizer, gradients(1))
    for parameter, other in zip(parameters_of(adapter), parameters_of(again), strict=True):
        assert torch.equal(parameter, other)
