"""The adapter as one flat tensor, and its gradient as another: what is done to all of it takes one operation.

An adapter has hundreds of small tensors. Reducing, clipping, zeroing, rounding and updating them one by one
takes a call each, and on a GPU a call takes longer than its computation. PEFT's modules, names and files stay
as they are: only its parameters become views.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.ops.adapter_weights import add_gradients_in_place

BLOCK = 256  # numbers that share a scale in bitsandbytes' 8-bit states
SMALLEST_8BIT = 4096  # numbers; bitsandbytes keeps the state of a smaller tensor in fp32


@dataclass(frozen=True)
class Member:
    """One of the adapter's tensors within a region."""

    index: int
    """Its place among the trainable parameters, in the order of `named_parameters`"""
    start: int
    """The place of its first number in the region, in whole blocks"""
    shape: torch.Size

    @property
    def end(self) -> int:
        return self.start + self.shape.numel()


@dataclass(frozen=True)
class Region:
    """Tensors whose optimizer state has the same precision, and which have the same learning rate, as one
    parameter for the optimizer."""

    parameter: nn.Parameter
    """[numbers] fp32, a view of the flat tensor; its gradient is a view of the flat gradient"""
    members: list[Member]
    is_large: bool
    """Whether each of its tensors is large enough for an 8-bit optimizer state"""
    is_b: bool
    """Whether it was separated for LoRA+: each is LoRA's B, or a vector such as DoRA's magnitudes"""


class FlatAdapter:
    """All trainable parameters of a model as views of one flat tensor, each padded to whole blocks.

    The padding makes the blocks of an 8-bit optimizer state those that the tensors have on their own, so that
    an update is the same to the bit. Its gradient is zero, and nothing depends on its weights. Tensors below
    SMALLEST_8BIT form a region of their own, whose state stays in fp32. With `separates_b`, LoRA's B form
    regions of their own: their learning rate can be another.

    The parameters are new objects: whatever holds the model's old ones holds them in vain. Each has an
    attribute `flat`, this FlatAdapter; and `fixed`, where the old one has it: a dimension, and the index from
    which on the weights are held fixed. `weights` and `gradient` [n] fp32 are the flat tensors; a parameter
    lies at its storage offset in both.
    """

    def __init__(self, model: Any, separates_b: bool = False) -> None:
        self.model = model
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        assert all(parameter.dtype == torch.float32 for _, parameter in named)
        indices = range(len(named))
        # All A, then all others, in the model's order. Layers that share an input (q, k, v; gate, up) follow
        # one another there. Their A then lie side by side and are one matrix, if A is whole blocks.
        ordered = sorted(indices, key=lambda index: ".lora_A." not in named[index][0])
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for index in ordered:
            name, parameter = named[index]
            is_b = separates_b and (".lora_B." in name or parameter.dim() == 1)  # as PEFT's LoRA+ has it
            kinds.setdefault((parameter.numel() >= SMALLEST_8BIT, is_b), []).append(index)
        num_blocks = sum(_blocks(parameter.numel()) for _, parameter in named)
        device = named[0][1].device
        self.weights = torch.zeros(num_blocks * BLOCK, device=device)
        self.gradient = torch.zeros_like(self.weights)
        self._views: list[tuple[nn.Parameter, Tensor]] = []  # each parameter, with its view of the gradient
        self._copies: dict[torch.dtype, _Copy] = {}
        self.regions: list[Region] = []
        start = 0
        for (is_large, is_b), chosen in sorted(kinds.items(), key=lambda kind: (not kind[0][0], kind[0][1])):
            self.regions.append(self._make_region(start, chosen, named, is_large, is_b))
            start += self.regions[-1].parameter.numel()
        self._trained = self._mask_of_fixed()
        self._attach_gradients()

    def _mask_of_fixed(self) -> Tensor | None:
        """[n] fp32: 0 where a weight is held fixed, 1 elsewhere; None where all are trained."""
        fixed = [(parameter, *parameter.fixed) for parameter, _ in self._views if hasattr(parameter, "fixed")]
        if not fixed:
            return None
        mask = torch.ones_like(self.weights)
        for parameter, dimension, start in fixed:
            whole = mask.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())
            whole.narrow(dimension, start, parameter.shape[dimension] - start).zero_()
        return mask

    def _make_region(
        self,
        start: int,
        indices: list[int],
        named: list[tuple[str, nn.Parameter]],
        is_large: bool,
        is_b: bool,
    ) -> Region:
        members, at = [], start
        for index in indices:
            name, old = named[index]
            place = slice(at, at + old.numel())
            # A view of the flat tensor shares its version counter, which `.data` would not: `rounded` sees
            # a change of any parameter.
            new = nn.Parameter(self.weights[place].view(old.shape))
            with torch.no_grad():
                new.copy_(old)
            new.flat = self  # type: ignore[attr-defined]
            if hasattr(old, "fixed"):
                new.fixed = old.fixed  # type: ignore[attr-defined]
            add_gradients_in_place([new])
            owner, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(owner), attribute, new)
            self._views.append((new, self.gradient[place].view(old.shape)))
            members.append(Member(index, at - start, old.shape))
            at += _blocks(old.numel()) * BLOCK
        whole = nn.Parameter(self.weights[start:at])
        self._views.append((whole, self.gradient[start:at]))
        return Region(whole, members, is_large, is_b)

    def _attach_gradients(self) -> None:
        for parameter, view in self._views:
            if parameter.grad is not view:
                parameter.grad = view

    def broadcast(self, accelerator: Any) -> None:
        """Give all ranks the weights of rank 0."""
        if accelerator.num_processes > 1:
            torch.distributed.broadcast(self.weights, 0)

    def reduce_gradients(self, accelerator: Any) -> None:
        """Sum the gradient over all ranks, in one communication; it is 0 where a weight is held fixed.

        Raises:
            RuntimeError: a parameter's gradient is no view of the flat one any more.
        """
        if any(parameter.grad is not view for parameter, view in self._views):
            raise RuntimeError(
                "a gradient was replaced, as zero_grad() does; FlatAdapter.zero_gradients() keeps it in place"
            )
        if self._trained is not None:
            self.gradient.mul_(self._trained)
        if accelerator.num_processes > 1:
            torch.distributed.all_reduce(self.gradient)

    def clip_gradients(self, max_norm: float, loss_scale: float = 1.0) -> Tensor:
        """Divide the gradient by the scale of the loss, then scale it down to the norm `max_norm`, unless
        that is 0. Returns the norm before clipping, a scalar on the device. Does not wait for the device."""
        # In two steps: on a CPU, a sum over millions of fp32 numbers would be off by 1e-4.
        norm_of_block = torch.linalg.vector_norm(self.gradient.view(-1, BLOCK), dim=1)
        norm: Tensor = torch.linalg.vector_norm(norm_of_block) / loss_scale
        if max_norm > 0:
            # As torch.nn.utils.clip_grad_norm_ does.
            self.gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0) / loss_scale)
        elif loss_scale != 1:
            self.gradient.mul_(1 / loss_scale)
        return norm

    def zero_gradients(self) -> None:
        """Set the gradient to zero, in place; gradients that were replaced become views of it again."""
        self._attach_gradients()
        self.gradient.zero_()

    def rounded(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The parameters in a 16-bit type, for products: views of one copy of all weights. It is written
        anew, in place, when it is asked for after the weights have changed: once in an update."""
        if dtype not in self._copies:
            self._copies[dtype] = self._make_copy(dtype)
        copy = self._copies[dtype]
        if copy.version != self.weights._version:
            copy.whole.copy_(self.weights)
            copy.version = self.weights._version
        return [copy.views[id(parameter)] for parameter in parameters]

    def _make_copy(self, dtype: torch.dtype) -> "_Copy":
        whole = torch.empty_like(self.weights, dtype=dtype)
        views = {
            id(parameter): whole.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())
            for parameter, _ in self._views
        }
        return _Copy(whole, views)


@dataclass
class _Copy:
    whole: Tensor
    views: dict[int, Tensor]
    """By the id of the parameter"""
    version: int = -1
    """That of the weights when they were copied"""


def _blocks(numbers: int) -> int:
    return -(-numbers // BLOCK)
