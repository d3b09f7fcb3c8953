"""The adapter in the weights of the base: a model that needs neither PEFT nor bitsandbytes.

The base is the one on disk, or the one that was trained on, dequantized. All is computed in fp32.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn

from finetune.model.load import load_base
from finetune.ops.quantized import frozen_weight
from finetune.run.adapter import Trained, TrainedModel, load_trained
from finetune.runtime.accelerator import DTYPES
from finetune.runtime.files import flush_to_disk

SMALL_FILES_BYTES = 2**26  # beside the weights: the tokenizer's files, with room
FULL_PRECISION, DEQUANTISED = "full_precision", "dequantized"


def load_unmerged(trained: Trained, opened: TrainedModel, base: str) -> peft.PeftModel:
    """The adapter on its base in fp32, on the device of `opened`.

    FULL_PRECISION is the base as it lies on disk. DEQUANTISED is the one in `opened`, which the adapter was
    trained on: quantized weights as they are multiplied there, all others rounded to the run's precision.

    Raises:
        ValueError: the base cannot be loaded, or the adapter changes embeddings that the head shares.
    """
    config = replace(trained.config.model, quantization="none")
    model = load_base(config, "no", opened.accelerator.device)
    if base == DEQUANTISED:
        _set_weights(model, opened.model.get_base_model(), DTYPES[opened.precision.actual])
    ties = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    unmerged = peft.PeftModel.from_pretrained(model, str(trained.adapter))
    embeddings = (unmerged.get_input_embeddings(), unmerged.get_output_embeddings())
    if ties and any(isinstance(module, LoraLayer) for module in embeddings):
        raise ValueError(
            "the adapter changes the embeddings or the head alone, and the model shares one weight between "
            "them: that cannot be merged"
        )
    return unmerged


def _set_weights(model: nn.Module, trained_base: nn.Module, dtype: torch.dtype) -> None:
    """Give the model in fp32 the weights of a quantized one, as they are in a forward pass in `dtype`."""
    round_weights(model, dtype)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            layer: Any = trained_base.get_submodule(name)
            layer = layer.base_layer if isinstance(layer, LoraLayer) else layer
            if isinstance(layer, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit):
                module.weight.data = frozen_weight(layer, dtype).float()


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights to what `dtype` can hold; they stay in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()


def merge(unmerged: peft.PeftModel) -> Any:
    """The causal language model with the adapter in its weights; `unmerged` is used up.

    Raises:
        ValueError: a merged weight is not a finite number.
    """
    return unmerged.merge_and_unload(safe_merge=True)


def load_merged(trained: Trained) -> TrainedModel:
    """The adapter merged into the base as it lies on disk, in fp32, with its tokenizer.

    Raises:
        ValueError: as `load_trained` and `merge`.
    """
    config = trained.config
    plain = replace(
        config,
        model=replace(config.model, quantization="none"),
        train=replace(config.train, mixed_precision="no"),
    )
    loaded = load_trained(replace(trained, config=plain))
    return replace(loaded, model=merge(loaded.model))


def save_merged(model: Any, tokenizer: Any, dtype: torch.dtype, folder: Path) -> None:
    """Write the model in `dtype` and its tokenizer, whole or not at all, as transformers alone loads them.

    The model is left in `dtype`.

    Raises:
        ValueError: the disk is full.
    """
    model.to(dtype)
    if hasattr(model.config, "quantization_config"):  # of a base that was read from a GGUF file
        del model.config.quantization_config
    with _whole_folder(folder, model_bytes(model, dtype)) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def model_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """What its weights take in `dtype`; those that are tied count once."""
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


@contextmanager
def _whole_folder(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A folder to write into, which then takes the name `folder`; gone where that fails."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < num_bytes + SMALL_FILES_BYTES:
        raise ValueError(
            f"no room for {folder}: it takes {num_bytes / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB "
            "are free"
        )
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        yield staging
        for path in [*staging.iterdir(), staging]:
            flush_to_disk(path)
        os.replace(staging, folder)  # an empty folder of that name gives way
    except SafetensorError as error:  # its own kind for a full disk
        raise ValueError(f"{folder} could not be written ({error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
