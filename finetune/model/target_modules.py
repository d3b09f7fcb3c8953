"""Which modules of the base get LoRA, and which are trained whole: what the configuration names, checked
against what is there."""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from finetune.config import Config, LoraConfig
from finetune.ops import quantized
from finetune.ops.trained_modules import trained_copy, wrappers
from finetune.runtime.choice import Choice

MODULES_TO_SAVE = "lora.modules_to_save"


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


def check_modules_to_save(
    base: Any, names: Sequence[str], trains_rows: bool, key: str = MODULES_TO_SAVE
) -> None:
    """Raise ValueError where PEFT cannot train these modules whole, or would do something else than asked.

    PEFT takes a module if its name ends with one of `names`: `norm` is every norm. `trains_rows` says whether
    rows of the embedding and the head are trained for added tokens. `key` is what a user wrote.
    """
    modules = dict(base.named_modules(remove_duplicate=False))
    for name in names:
        found = [full for full in modules if full.endswith(name)]
        if not found:
            last_names = sorted({full.rpartition(".")[2] for full in modules})
            near = difflib.get_close_matches(name.rpartition(".")[2], last_names)
            has = f"; it has {', '.join(near)}" if near else ""
            raise ValueError(f"{key}: the model has no {name}{has}")
        for full in found:
            _check_module_to_save(base, full, name, modules[full], trains_rows, key)


def _check_module_to_save(
    base: Any, full: str, name: str, module: nn.Module, trains_rows: bool, key: str
) -> None:
    if next(module.children(), None) is not None:
        raise ValueError(f"{key}: {full} is a {type(module).__name__} of several layers: name its layers")
    if not list(module.parameters(recurse=False)):
        raise ValueError(f"{key}: {full} has no weights to train")
    if isinstance(module, (*quantized.INT8, *quantized.NF4)):
        raise ValueError(
            f"{key}: {full} is quantized, and only LoRA trains on a quantized weight: leave it out, or set "
            "model.quantization to none"
        )
    is_whole_name = f".{full}".endswith(f".{name}")
    if isinstance(module, nn.Linear) and not is_whole_name:  # PEFT would give it LoRA too
        raise ValueError(f"{key}: {name} is only the end of {full}: write the whole name")
    if trains_rows and module in (base.get_input_embeddings(), base.get_output_embeddings()):
        raise ValueError(
            f"{key}: {full} is to be trained whole, and rows of it for the tokens that were added: leave it "
            "out, or choose a chat template that adds no tokens"
        )


def describe_modules_to_save(config: Config, model: Any) -> list[Choice]:
    """The modules that are trained whole, where any were requested."""
    names = config.lora.modules_to_save
    if not names:
        return []
    copies = [trained_copy(wrapper) for wrapper in wrappers(model)]
    numbers = sum(parameter.numel() for copy in copies for parameter in copy.parameters())
    reason = f"{len(copies)} trained and saved whole, {numbers:,} numbers in fp32"
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    both = model.get_input_embeddings(), model.get_output_embeddings()
    if is_tied and any(wrapper in both for wrapper in wrappers(model)):
        reason += "; the embedding and the head were one weight, and are two from now on"
    requested = ", ".join(names)
    return [Choice("modules to save", requested, requested, reason)]
