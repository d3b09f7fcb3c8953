"""Merge the adapter into the weights of the base: the result needs neither PEFT nor bitsandbytes.

The base is either the full-precision model on disk or the dequantized one that the adapter was trained on.
The merge is computed in fp32.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from finetune.data.templates.chat_template import stop_ids
from finetune.model.load import load_base
from finetune.ops.quantized import frozen_weight
from finetune.run.adapter import Trained, TrainedModel, add_rows_of
from finetune.runtime.accelerator import DTYPES
from finetune.runtime.files import require_room, staged_folder

SMALL_FILES_BYTES = 2**26  # in addition to the weights: the tokenizer's files, with a margin
FULL_PRECISION, DEQUANTIZED = "full_precision", "dequantized"


def load_unmerged(trained: Trained, opened: TrainedModel, base: str) -> peft.PeftModel:
    """Load the adapter on its base in fp32, on the device of `opened`.

    FULL_PRECISION is the base on disk. DEQUANTIZED is the base in `opened`, which the adapter was trained on:
    quantized weights are dequantized as in its forward pass, all others are rounded to the run's precision.

    Raises:
        ValueError: the base cannot be loaded, or the adapter changes embeddings that the head shares.
    """
    config = replace(trained.config.model, quantization="none")
    model = load_base(config, "no", opened.accelerator.device)
    add_rows_of(trained.adapter, model)
    if base == DEQUANTIZED:
        _set_weights(model, opened.model.get_base_model(), DTYPES[opened.precision.actual])
    ties = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    unmerged = peft.PeftModel.from_pretrained(model, str(trained.adapter))
    embeddings = (unmerged.get_input_embeddings(), unmerged.get_output_embeddings())
    if ties and any(isinstance(module, LoraLayer) for module in embeddings):
        raise ValueError(
            "the adapter changes either the embeddings or the head, and the model shares one weight between "
            "them: it cannot be merged"
        )
    return unmerged


def _set_weights(model: nn.Module, trained_base: nn.Module, dtype: torch.dtype) -> None:
    """Set the weights of an fp32 model to those that a quantized base uses in a forward pass in `dtype`."""
    round_weights(model, dtype)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            layer: Any = trained_base.get_submodule(name)
            layer = layer.base_layer if isinstance(layer, LoraLayer) else layer
            if isinstance(layer, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit):
                module.weight.data = frozen_weight(layer, dtype).float()


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights to values that `dtype` can represent; they stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()


def merge(unmerged: peft.PeftModel) -> Any:
    """Return the causal language model with the adapter merged into its weights; `unmerged` is consumed.

    Raises:
        ValueError: a merged weight is not finite.
    """
    return unmerged.merge_and_unload(safe_merge=True)


def save_merged(model: Any, tokenizer: Any, dtype: torch.dtype, folder: Path) -> None:
    """Write the model in `dtype` and its tokenizer to a folder that transformers alone can load.

    The folder is written whole or not at all. The model itself is converted to `dtype`.

    Raises:
        ValueError: the disk has no room for them.
        OSError: they could not be written.
    """
    model.to(dtype)
    model.generation_config.eos_token_id = sorted(stop_ids(tokenizer))
    if hasattr(model.config, "quantization_config"):  # from a base that was loaded from a GGUF file
        del model.config.quantization_config
    folder = folder.absolute()
    require_room(folder.parent, model_bytes(model, dtype) + SMALL_FILES_BYTES, folder.name, advice="")
    with staged_folder(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def model_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of the weights in `dtype`; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def require_new_folder(output: Path) -> None:
    """Raise ValueError if `--output` names a file, or a folder that holds something."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} exists already: name a folder that is new or empty")
