"""Rows of the embedding and the head for tokens that the base does not know, trained with the adapter."""

from collections.abc import Sequence
from typing import Any

import torch


def add_rows(base: Any, token_ids: Sequence[int]) -> None:
    """Give the embedding and the head rows for these tokens, where they have none: each the mean of all that
    were there."""
    layers = base.get_input_embeddings(), base.get_output_embeddings()
    before, needed = len(layers[0].weight), max(token_ids, default=-1) + 1
    if needed <= before:
        return
    # Not `weight.float()`: on a GPU that would be a copy of all the rows, at twice their size.
    means = [layer.weight.mean(0, dtype=torch.float32) for layer in layers]
    base.resize_token_embeddings(needed, mean_resizing=False)
    for layer, mean in zip((base.get_input_embeddings(), base.get_output_embeddings()), means, strict=True):
        layer.weight.data[before:] = mean.to(layer.weight.dtype)
    base.requires_grad_(False)


def trainable_token_indices(base: Any, token_ids: Sequence[int]) -> list[int] | dict[str, list[int]]:
    """PEFT's setting with which rows of the embedding and the head are trained.

    Where the two are one weight, PEFT follows from the embedding to the head itself.
    """
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if embedding.weight is head.weight:
        return list(token_ids)
    names = [name for name, module in base.named_modules() if module in (embedding, head)]
    return {name: list(token_ids) for name in names}


def token_ids_of(indices: list[int] | dict[str, list[int]] | None) -> list[int]:
    """The tokens that PEFT's `trainable_token_indices` names, for one layer or for several."""
    lists = indices.values() if isinstance(indices, dict) else [indices or []]
    return sorted({token for tokens in lists for token in tokens})
