"""Trained rows of the embedding and of the head, for tokens that the base does not know.

PEFT (`trainable_token_indices`) writes them into a copy of the whole weight in each forward pass, and takes a
gradient as large. Here the frozen weight stays as it is, and what depends on the rows is computed from them
alone. PEFT's modules, parameters and files do not change; its own forward methods are the reference path.
"""

import types
from typing import Any, NamedTuple

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn import functional as F


class TokenRows(NamedTuple):
    """The trained rows of a weight [V, d]."""

    ids: Tensor
    """[k] int64: which rows"""
    values: Tensor
    """[k, d] fp32: what they are, with a gradient"""


def frozen_layer(module: Any) -> Any:
    """The embedding or the head below PEFT's wrapper for trained rows; without one, the module itself."""
    return module.token_adapter.base_layer if isinstance(module, TrainableTokensWrapper) else module


def is_wrapper(module: nn.Module) -> bool:
    """Whether it is one of PEFT's modules around a layer with trained rows."""
    return isinstance(module, TrainableTokensWrapper | TrainableTokensLayer)


def rows_of(module: Any) -> TokenRows | None:
    """The rows that the layer computes with instead of those of its frozen weight; None if there are none, or
    if the adapter is off or merged."""
    if not isinstance(module, TrainableTokensWrapper) or module.disable_adapters:
        return None
    adapter = module.token_adapter
    if adapter.merged or adapter.disable_adapters:
        return None
    (name,) = module.active_adapters
    values = adapter.trainable_tokens_delta[name]
    kept: dict[Any, Tensor] = module.__dict__.setdefault("ids_of_rows", {})
    if (key := (name, values.device)) not in kept:  # to make it anew would block the host
        kept[key] = torch.tensor(adapter.token_indices[name], device=values.device)
    return TokenRows(kept[key], values)


def enable(model: nn.Module) -> None:
    """Replace the forward methods of the embedding and the head that have trained rows."""
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper) and _is_plain(module):
            module.forward = types.MethodType(_forward, module)


def disable(model: nn.Module) -> None:
    """Restore PEFT's forward methods."""
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.__dict__.pop("forward", None)


def _is_plain(module: Any) -> bool:
    layer = frozen_layer(module)
    if type(layer) is nn.Embedding:
        indices = {token for tokens in module.token_adapter.token_indices.values() for token in tokens}
        return layer.max_norm is None and layer.padding_idx not in indices
    return type(layer) is nn.Linear and layer.bias is None


def _forward(module: Any, x: Tensor) -> Tensor:
    """Of token ids [...] or of hidden states [..., d]: what PEFT's method computes."""
    layer, rows = frozen_layer(module), rows_of(module)
    y: Tensor = layer(x)
    if rows is None:
        return y
    if type(layer) is nn.Linear:
        return y.index_copy(-1, rows.ids, F.linear(x.to(y.dtype), rows.values.to(y.dtype)))
    is_row = x[..., None] == rows.ids
    with torch.autocast(x.device.type, enabled=False):
        # A product with a single 1 in each line is exact, and so is the sum that is its gradient, in fp32.
        trained = is_row.to(rows.values.dtype) @ rows.values
    return torch.where(is_row.any(-1, keepdim=True), trained.to(y.dtype), y)
