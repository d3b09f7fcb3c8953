"""The size of a model: its parameters, and the floating-point operations of an update."""

from typing import Any

import torch

from finetune.ops import quantized
from finetune.ops.trained_modules import layers_in_use, plain_layer


def training_flop(model: Any) -> tuple[int, int]:
    """FLOP per token, and additional FLOP per target token, of an update.

    The products with the base's weights count, in the forward pass and for the gradient of the input: 2 FLOP
    per weight each, and 2 for the gradient of one that is trained. LoRA, attention and everything else are a
    few percent, and count as overhead.
    """
    head = plain_layer(model.get_output_embeddings())
    in_use = {id(module) for module in layers_in_use(model)}
    flop = sum(
        _flop_per_weight(module) * module.in_features * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, quantized.LINEARS)
        and module is not head
        and ".lora_" not in name
        and id(module) in in_use
    )
    return flop, _flop_per_weight(head) * head.weight.numel()


def _flop_per_weight(layer: Any) -> int:
    return 6 if layer.weight.requires_grad else 4


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, total) numbers of parameters. Two 4-bit weights in one byte count as two, and the scales of
    quantized weights do not count."""
    sizes: dict[int, int] = {}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, (*quantized.INT8, *quantized.NF4)) and name != "bias":
                sizes[id(parameter)] = module.in_features * module.out_features if name == "weight" else 0
            else:
                sizes[id(parameter)] = parameter.numel()
    return sum(sizes[parameter] for parameter in trained), sum(sizes.values())
