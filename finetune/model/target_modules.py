"""Which modules of the base get LoRA: what the configuration names, checked against what is there."""

from typing import Any

import torch

from finetune.config import LoraConfig


def targets_of(base: Any, config: LoraConfig) -> str | list[str]:
    """`lora.target_modules` as PEFT takes it: with `layers_to_transform` it wants a list of names.

    Raises:
        ValueError: the base has no such module to exclude, or no such layer. PEFT would
            say nothing.
    """
    _check_excluded(base, config)
    _check_layers(base, config)
    if config.layers_to_transform is not None and config.target_modules == "all-linear":
        return _linear_names(base)
    return config.target_modules


def _check_excluded(base: Any, config: LoraConfig) -> None:
    names = [name for name, _ in base.named_modules()]
    known = {*names, *(name.rpartition(".")[2] for name in names)}
    for name in config.exclude_modules or ():
        if name not in known:
            raise ValueError(f"lora.exclude_modules: the model has no {name}")


def _check_layers(base: Any, config: LoraConfig) -> None:
    last = base.config.get_text_config().num_hidden_layers - 1
    for number in config.layers_to_transform or ():
        if number > last:
            raise ValueError(f"lora.layers_to_transform: the model has no layer {number}; its last is {last}")


def _linear_names(base: Any) -> list[str]:
    """The last names of all linear layers but the head."""
    head = base.get_output_embeddings()
    linear = [name for name, m in base.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return sorted({name.rpartition(".")[2] for name in linear})
