"""An optimizer's state of the flat adapter, split into that of each parameter, and joined again.

A checkpoint holds the state by parameter, as an optimizer of the separate tensors would have it: other tools
read it, and a checkpoint from before the adapter was flat still loads.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from finetune.model.flat_adapter import BLOCK, FlatAdapter, Member, Region
from finetune.training.optim import BitsAndBytesAdamW


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer's package and class; a paged one has the same state as the plain one."""
    if isinstance(optimizer, BitsAndBytesAdamW):
        return f"bitsandbytes AdamW{optimizer.args.optim_bits}bit"
    kind = type(optimizer)
    return f"{kind.__module__.partition('.')[0]} {kind.__name__}"


def split_state(
    optimizer: torch.optim.Optimizer, adapter: FlatAdapter
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of each parameter, by `INDEX.name`: its tensors, on the CPU, and its other values.

    INDEX counts the trainable parameters in the order of `named_parameters`.
    """
    if adapter.weights.is_cuda:  # the host must not access paged state before the update has ended
        torch.cuda.synchronize(adapter.weights.device)
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    state = optimizer.state_dict()["state"]
    for number, region in enumerate(adapter.regions):
        for path, value in _leaves(state.get(number, {})):
            for member in region.members:
                if isinstance(value, Tensor):
                    part = _part_of(value, path, region, member)
                    tensors[f"{member.index}.{path}"] = part.detach().cpu().contiguous().clone()
                else:
                    values[f"{member.index}.{path}"] = value
    return tensors, values


def load_state(
    optimizer: torch.optim.Optimizer,
    adapter: FlatAdapter,
    tensors: dict[str, Tensor],
    values: dict[str, Any],
) -> None:
    """Restore the state that `split_state` returned. State that bitsandbytes would page is paged again.

    Raises:
        ValueError: the parameters have states of different kinds or different numbers of updates.
    """
    saved: dict[int, dict[str, Any]] = {}
    for key, value in {**values, **tensors}.items():
        index, _, path = key.partition(".")
        saved.setdefault(int(index), {})[path] = value
    joined = {
        number: state
        for number, region in enumerate(adapter.regions)
        if (state := _join([saved.get(member.index, {}) for member in region.members], region))
    }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": joined, "param_groups": groups})
    if isinstance(optimizer, BitsAndBytesAdamW):
        optimizer.page_states()


def _join(states: list[dict[str, Any]], region: Region) -> dict[str, Any]:
    """The state of a region from those of its members."""
    if any(state.keys() != states[0].keys() for state in states):
        raise ValueError("the checkpoint's optimizer state is not of the same kind for all parameters")
    joined: dict[str, Any] = {}
    for path, first in states[0].items():
        parts = [state[path] for state in states]
        if isinstance(first, Tensor):
            value: Any = _join_tensors(parts, path, region, _zero_of(first, path, states[0]))
        elif any(part != first for part in parts):
            raise ValueError("the parameters of the checkpoint have had different numbers of updates")
        else:
            value = first
        _set(joined, path.split("."), value)
    return joined


def _zero_of(tensor: Tensor, path: str, state: dict[str, Any]) -> int:
    """What stands for 0 in a tensor of the state: bitsandbytes' 8-bit codes have a map to their values."""
    if tensor.dtype != torch.uint8:
        return 0
    head, _, name = path.rpartition("state")  # state1 or state2
    values: Tensor = state[f"{head}qmap{name}"]
    return int(values.abs().argmin())


def _join_tensors(parts: list[Tensor], path: str, region: Region, zero: int) -> Tensor:
    first = parts[0]
    if not _is_split(path, first, region.members[0].shape):
        return first
    size = region.parameter.numel() // (BLOCK if _is_of_blocks(path) else 1)
    # Padding that were not 0 could be the largest number of its block, by which the others are scaled.
    joined = torch.full((size,), zero, dtype=first.dtype)
    for member, part in zip(region.members, parts, strict=True):
        _place_of(path, member, joined).copy_(part.flatten())
    return joined


def _part_of(value: Tensor, path: str, region: Region, member: Member) -> Tensor:
    """A member's share of a region's state: of a number for each weight, of a number for each block, or the
    whole of what has neither size, such as a count of updates."""
    if not _is_split(path, value, region.parameter.shape):
        return value
    part = _place_of(path, member, value)
    return part if _is_of_blocks(path) else part.view(member.shape)


def _is_split(path: str, value: Tensor, shape: torch.Size) -> bool:
    return value.shape == shape or _is_of_blocks(path)


def _is_of_blocks(path: str) -> bool:
    """Whether bitsandbytes keeps one number for each block there: the scale of its 8-bit codes."""
    return path.rpartition(".")[2].startswith("absmax")


def _place_of(path: str, member: Member, flat: Tensor) -> Tensor:
    if _is_of_blocks(path):
        return flat[member.start // BLOCK : -(-member.end // BLOCK)]
    return flat[member.start : member.end]


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _set(tree: dict[str, Any], names: list[str], value: Any) -> None:
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
    tree[names[-1]] = value
