"""The adapter's weights in 16 bits: copied together, once for each forward pass, and never out of date."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.ops.adapter_weights import (
    AdapterCopies,
    add_gradients_in_place,
    in_dtype,
    joined,
    pass_on_gradient,
)

SHAPES = [(2, 8), (2, 8), (3, 4), (5, 2)]


class Count(TorchDispatchMode):
    """Counts the operations that write."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        result = function(*arguments, **(settings or {}))
        if not function.is_view and "as_strided" not in str(function) and "detach" not in str(function):
            self.names.append(function.__name__)
        return result


def flat_parameters() -> tuple[Tensor, list[nn.Parameter]]:
    """Parameters that are views of one tensor, one after the other."""
    sizes = [a * b for a, b in SHAPES]
    flat = torch.randn(sum(sizes))
    parts = torch.split(flat, sizes)
    return flat, [nn.Parameter(part.view(shape)) for part, shape in zip(parts, SHAPES, strict=True)]


def test_views_of_one_tensor_are_copied_by_one_operation_and_lie_as_before():
    _, parameters = flat_parameters()
    with Count() as count:
        copies = in_dtype(parameters, torch.bfloat16)
    assert count.names == ["_to_copy.default"]
    assert all(torch.equal(copy, p.bfloat16()) for copy, p in zip(copies, parameters, strict=True))
    with Count() as count:
        joint = joined(copies[:2])
    assert count.names == []
    assert torch.equal(joint, torch.cat([p.bfloat16() for p in parameters[:2]]))


def test_a_small_part_of_a_large_tensor_is_copied_alone():
    large = torch.randn(1000, 8)
    parameter = nn.Parameter(large[4:6])
    (copy,) = in_dtype([parameter], torch.bfloat16)
    assert torch.equal(copy, large[4:6].bfloat16())
    assert copy.untyped_storage().nbytes() == 2 * 16


def test_weights_of_their_own_are_joined_by_copying():
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES[:2]]
    copies = in_dtype(parameters, torch.bfloat16)
    assert torch.equal(joined(copies), torch.cat([p.bfloat16() for p in parameters]))


def test_in_their_own_type_they_are_not_copied():
    _, parameters = flat_parameters()
    same = in_dtype(parameters, torch.float32)
    assert [one.data_ptr() for one in same] == [p.data_ptr() for p in parameters]
    assert not any(one.requires_grad for one in same)


class Decoder(nn.Module):
    """Asks for the copies of each of its weights in turn."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.weights, self.copies = nn.ParameterList(parameters), AdapterCopies(self)

    def forward(self) -> list[Tensor]:
        return [self.copies.of([weight], torch.bfloat16)[0] for weight in self.weights]


def test_a_forward_pass_copies_once_and_the_next_one_has_the_changes():
    flat, parameters = flat_parameters()
    decoder = Decoder(parameters)
    decoder.copies.start(parameters)
    with Count() as count:
        first = decoder()
    assert count.names == ["_to_copy.default"]
    before = [copy.clone() for copy in first]
    flat.data.mul_(2)  # as an optimizer does, which no version counter notes
    assert torch.equal(decoder.copies.of([parameters[0]], torch.bfloat16)[0], parameters[0].bfloat16())
    second = decoder()
    assert all(torch.equal(copy, 2 * old) for copy, old in zip(second, before, strict=True))
    assert all(torch.equal(copy, old) for copy, old in zip(first, before, strict=True))
    decoder.copies.stop()
    assert not decoder._forward_hooks
    assert not decoder._forward_pre_hooks


def test_after_a_failed_pass_nothing_old_is_left():
    _, parameters = flat_parameters()
    decoder = Decoder(parameters)
    decoder.copies.start(parameters)
    decoder.forward = lambda: (decoder.copies.of(parameters, torch.bfloat16), 1 / 0)  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        decoder()
    parameters[0].data.zero_()
    assert decoder.copies.of(parameters[:1], torch.bfloat16)[0].count_nonzero() == 0


@pytest.mark.parametrize("is_flat", [True, False])
def test_gradients_are_added_where_the_parameters_ask_for_it(is_flat):
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES[:2]]
    gradient = torch.randn(4, 8).bfloat16()
    plain = pass_on_gradient(parameters, gradient, 0.5)
    assert torch.equal(torch.cat([g for g in plain if g is not None]), gradient.float() * 0.5)
    add_gradients_in_place(parameters)  # while they have no `grad`, autograd is to make it
    assert all(
        torch.equal(*pair) for pair in zip(pass_on_gradient(parameters, gradient, 0.5), plain, strict=True)
    )
    flat = torch.ones(4, 8)
    for parameter, part in zip(parameters, torch.split(flat, 2), strict=True):
        parameter.grad = part if is_flat else part.clone()
    with Count() as count:
        assert pass_on_gradient(parameters, gradient, 0.5) == [None, None]
    assert count.names == ["add_.Tensor"] * (1 if is_flat else 2)
    assert torch.equal(torch.cat([p.grad for p in parameters]), 1 + gradient.float() * 0.5)
