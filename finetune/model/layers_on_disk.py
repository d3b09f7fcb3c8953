"""A base that is to be sharded: its decoder layers are read from the files one at a time.

At first transformers loads the first layer alone, with the embedding, the head and the last norm. All others
are made with the weights of the first one, in the same memory, so that an adapter is laid on them and fast
paths are chosen as on a whole base. Each gets its own weights when it is sharded, and is freed to a share
before the next is read: no process ever holds a whole base.
"""

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM
from transformers.utils.hub import cached_file

from finetune.config import LoraConfig
from finetune.model.safetensors_files import INDEX, WEIGHTS
from finetune.ops.plain_weights import PlainInt8, PlainNf4
from finetune.runtime.choice import Choice


@dataclass(frozen=True)
class LayersOnDisk:
    """The decoder layers of a model in safetensors files, all with tensors of the same names and shapes."""

    architecture: Any
    """transformers' configuration of the whole model"""
    layers: nn.ModuleList
    """The layers of the architecture, on the device `meta`"""
    files: dict[str, Path]
    """Of each tensor"""
    dtype: torch.dtype
    """Of weights that are not quantized, and of those that are before they are"""
    prefix: str
    """What the tensors of all layers begin with, such as `model.layers.`"""

    @property
    def first_alone(self) -> Any:
        """The configuration of the model with the first layer alone."""
        first = copy.deepcopy(self.architecture)
        first.num_hidden_layers = 1
        if getattr(first, "layer_types", None) is not None:
            first.layer_types = first.layer_types[:1]
        return first

    def complete(self, base: Any) -> None:
        """Give the base, which has the first layer alone, all others, with the weights of the first."""
        layers, config = base.get_decoder().layers, base.config
        config.num_hidden_layers = self.architecture.num_hidden_layers
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = self.architecture.layer_types
        for layer in list(self.layers)[1:]:
            for module in layer.modules():
                if hasattr(module, "config"):
                    module.config = config
            _share_weights(layers[0], layer)
            layers.append(layer)
        base.layers_on_disk = self

    def read(self, layer: nn.Module, index: int) -> None:
        """Give the layer of this number its own frozen weights, in place of those of the first one."""
        start = f"{self.prefix}{index}."
        for name in (name for name in self.files if name.startswith(start)):
            owner, _, attribute = name.removeprefix(start).rpartition(".")
            module = layer.get_submodule(owner)
            module = getattr(module, "base_layer", module)
            old = getattr(module, attribute)
            with safe_open(self.files[name], "pt") as file:  # closed, it no longer counts as resident
                weight = file.get_tensor(name).to(old.device, self.dtype)
            if isinstance(module, PlainInt8 | PlainNf4) and attribute == "weight":
                module.quantize(weight)
            else:
                setattr(module, attribute, nn.Parameter(weight, False))


def needs_no_weights(config: LoraConfig, given: peft.LoraConfig | None) -> bool:
    """Whether an adapter with the settings `given`, or else a new one, can be made before the layers have
    their weights."""
    if given is not None:
        return not (given.use_dora or given.modules_to_save)
    return not (config.use_dora or config.modules_to_save or config.init_lora_weights)


def find_layers(
    architecture: Any, dtype: torch.dtype, source: str, arguments: dict[str, Any]
) -> LayersOnDisk | None:
    """The layers of a model that can be read one at a time; None if its files do not name and shape all of
    them as transformers' modules do.

    `source` and `arguments` are what transformers loads the model with.
    """
    if architecture.get_text_config() is not architecture or hasattr(architecture, "quantization_config"):
        return None
    files = _files_of_tensors(source, arguments)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    layers = getattr(model.get_decoder(), "layers", None)
    if not files or not isinstance(layers, nn.ModuleList) or any(True for _ in layers.buffers()):
        return None
    (prefix,) = (f"{name}." for name, module in model.named_modules() if module is layers)
    in_layers = {prefix + name for name, _ in layers.named_parameters()}
    if {
        name for name in files if name.startswith(prefix)
    } != in_layers or not files.keys() <= model.state_dict().keys():
        return None
    shapes = [{name: parameter.shape for name, parameter in layer.named_parameters()} for layer in layers]
    are_alike = all(shape == shapes[0] for shape in shapes)
    return LayersOnDisk(architecture, layers, files, dtype, prefix) if are_alike else None


def describe_reading(model: peft.PeftModel) -> list[Choice]:
    """Of a base that is sharded: whether its layers were read one at a time, where they were not."""
    is_sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    if not is_sharded or hasattr(model.get_base_model(), "layers_on_disk"):
        return []
    reason = "its files, or the first weights of the adapter, need all layers at once"
    return [Choice("reading the base", "a layer at a time", "whole, on each process", reason)]


@contextmanager
def without_report() -> Iterator[None]:
    """Silence transformers' report of the tensors that it did not load: those of later layers."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_warning)  # of another level, it would report more
    try:
        yield
    finally:
        logger.removeFilter(_is_no_warning)


def _is_no_warning(record: logging.LogRecord) -> bool:
    return record.levelno != logging.WARNING


def _files_of_tensors(source: str, arguments: dict[str, Any]) -> dict[str, Path]:
    """The file of each tensor; empty if the model is in files of another kind."""

    def find(name: str) -> Path | None:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **arguments)
        return None if found is None else Path(found)

    if "gguf_file" in arguments:
        return {}
    if single := find(WEIGHTS):
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)
    if index := find(INDEX):
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = {name: find(name) for name in set(names.values())}
        return {tensor: path for tensor, name in names.items() if (path := paths[name]) is not None}
    return {}


def _share_weights(first: nn.Module, layer: nn.Module) -> None:
    """Give a layer the weights of the first one: tensors of its own in the same memory."""
    for name, module in first.named_modules():
        if isinstance(module, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit):
            kept = {id(parameter): parameter for parameter in module.parameters()}
            layer.set_submodule(name, copy.deepcopy(module, kept))
            continue
        for attribute, parameter in module.named_parameters(recurse=False):
            setattr(layer.get_submodule(name), attribute, nn.Parameter(parameter.data, False))
