"""Whole layers that are trained beside LoRA, which PEFT calls `modules_to_save`.

PEFT keeps the frozen layer, and trains and saves a copy of it. Here the copy has fp32 weights, as LoRA's
matrices have, and its output has the precision of the frozen layer's: what follows computes as on the base.
"""

from functools import partial
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from finetune.ops.token_rows import frozen_layer


def wrappers(model: nn.Module) -> list[Any]:
    """PEFT's modules that hold a frozen layer, `original_module`, and its trained copy."""
    return [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]


def trained_copy(wrapper: Any) -> Any:
    """The copy of the active adapter."""
    (name,) = wrapper.active_adapters
    return wrapper.modules_to_save[name]


def plain_layer(module: Any) -> Any:
    """The layer below PEFT's wrappers, that computes at present: the trained copy of one, if there is one and
    the adapter is on; without a wrapper, the module itself."""
    if isinstance(module, ModulesToSaveWrapper):
        return module.original_module if module.disable_adapters else trained_copy(module)
    return frozen_layer(module)


def layers_in_use(model: nn.Module) -> list[nn.Module]:
    """The modules of the model without the layers that a trained copy stands for, and their wrappers."""
    left_out = {id(module) for wrapper in wrappers(model) for module in (wrapper, wrapper.original_module)}
    return [module for module in model.modules() if id(module) not in left_out]


def hold_in_fp32(model: nn.Module) -> None:
    """Convert the trained copies to fp32, and have them compute as the module's docstring says."""
    for wrapper in wrappers(model):
        copy = trained_copy(wrapper).float()
        copy.register_forward_pre_hook(_in_own_precision)
        copy.register_forward_hook(partial(_in_precision_of, wrapper.original_module))


def _in_own_precision(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hidden states in fp32, unless autocast decides; token ids as they are."""
    x, *others = inputs
    if x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
        x = x.float()
    return (x, *others)


def _in_precision_of(original: nn.Module, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(next(original.parameters()).dtype)
