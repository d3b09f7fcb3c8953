"""LoRA's weights as the products need them: in their data type, joined where layers share an input.

The weights are fp32. Their copies in 16 bits are made once for each forward pass of the model, by one
operation for all weights that are views of one tensor. Nothing else has to be told of a change.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class AdapterCopies:
    """Copies of a model's adapter weights, made when the first layer of a forward pass asks for them."""

    def __init__(self, decoder: nn.Module) -> None:
        """`decoder` is the module whose forward method calls all layers that ask."""
        self._decoder = decoder
        self._parameters: list[nn.Parameter] = []
        self._copies: dict[torch.dtype, dict[int, Tensor]] | None = None
        self._handles: list[Any] = []

    def start(self, parameters: Sequence[nn.Parameter]) -> None:
        """Copy these parameters together from now on."""
        self._parameters = list(parameters)
        self._handles = [
            self._decoder.register_forward_pre_hook(self._begin),
            self._decoder.register_forward_hook(self._end, always_call=True),
        ]

    def stop(self) -> None:
        """Remove the hooks from the decoder."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, *_: Any) -> None:
        self._copies = {}

    def _end(self, *_: Any) -> None:
        self._copies = None

    def of(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> list[Tensor]:
        """The parameters in `dtype`, detached. Outside the decoder's forward pass they are copied anew."""
        if self._copies is None:
            return in_dtype(parameters, dtype)
        if dtype not in self._copies:
            made = in_dtype(self._parameters, dtype)
            self._copies[dtype] = {id(p): copy for p, copy in zip(self._parameters, made, strict=True)}
        copies = self._copies[dtype]
        if all(id(parameter) in copies for parameter in parameters):
            return [copies[id(parameter)] for parameter in parameters]
        return in_dtype(parameters, dtype)  # PEFT has put other parameters in their place


def in_dtype(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The parameters in `dtype`, without gradients: themselves, or copies that lie as the parameters do.

    A FlatAdapter, which parameters name as their `flat`, has copies already. Otherwise views of one tensor
    are copied together, unless other numbers make up more than half of it.
    """
    if all(parameter.dtype == dtype for parameter in parameters):
        return [parameter.detach() for parameter in parameters]
    flat = getattr(parameters[0], "flat", None)
    if flat is not None and all(getattr(parameter, "flat", None) is flat for parameter in parameters):
        copies: list[Tensor] = flat.rounded(parameters, dtype)
        return copies
    parameters = [parameter.detach() for parameter in parameters]
    wholes: dict[int, Tensor] = {}
    asked: dict[int, int] = {}
    for parameter in parameters:
        pointer = parameter.untyped_storage().data_ptr()
        if pointer not in wholes:
            length = parameter.untyped_storage().nbytes() // parameter.element_size()
            wholes[pointer] = parameter.as_strided((length,), (1,), 0)
        asked[pointer] = asked.get(pointer, 0) + parameter.numel()
    joint = {
        pointer: whole.to(dtype) for pointer, whole in wholes.items() if 2 * asked[pointer] >= len(whole)
    }
    return [
        parameter.to(dtype)
        if (copy := joint.get(parameter.untyped_storage().data_ptr())) is None
        else copy.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())
        for parameter in parameters
    ]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The matrices [r, in], concatenated along r; not copied where they lie one after the other."""
    return torch.cat(list(tensors)) if (view := joint_view(tensors)) is None else view


def joint_view(tensors: Sequence[Tensor]) -> Tensor | None:
    """The concatenated matrices as a view, if they are contiguous and lie one after the other in memory."""
    first = tensors[0]
    end = first.storage_offset()
    for tensor in tensors:
        is_next = tensor.storage_offset() == end and tensor.is_contiguous()
        if not is_next or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += tensor.numel()
    rows = sum(len(tensor) for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def add_gradients_in_place(parameters: Sequence[nn.Parameter]) -> None:
    """Let backward passes add to the parameters' `grad`, if there is one; for joint weights in one operation.

    autograd then gets no gradient of these parameters: `autograd.grad` and hooks on them do not work.
    """
    for parameter in parameters:
        parameter.adds_gradient_in_place = True  # type: ignore[attr-defined]


def pass_on_gradient(
    parameters: Sequence[nn.Parameter], gradient: Tensor, factor: float
) -> list[Tensor | None]:
    """What a backward function returns for these parameters: their gradients, or None where it added them to
    `grad` because the parameters ask for that. Concatenated, the gradients are factor * gradient.
    """
    grads = [p.grad for p in parameters if p.grad is not None and hasattr(p, "adds_gradient_in_place")]
    if len(grads) < len(parameters):
        whole = gradient.to(parameters[0].dtype, memory_format=torch.contiguous_format)
        return list(torch.split(whole if factor == 1 else whole * factor, [len(p) for p in parameters]))
    if (joint := joint_view(grads)) is not None:
        joint.add_(gradient, alpha=factor)
    else:
        for grad, part in zip(grads, torch.split(gradient, [len(grad) for grad in grads]), strict=True):
            grad.add_(part, alpha=factor)
    return [None] * len(parameters)
