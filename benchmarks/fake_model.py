"""Qwen2 models as fake tensors on a card: quantized as the program loads them, with nothing in memory.

`fake_card` has to be inserted and pretended before.
"""

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.initialization import no_init_weights

SIZES = {  # hidden size, intermediate size, layers, heads
    "Qwen2-0.5B": (896, 4864, 24, 14),
    "Qwen2-1.5B": (1536, 8960, 28, 12),
}
CARD = torch.device("cuda", 0)
NF4_BLOCK = 64


def fake_base(size: str, base: str) -> Any:
    """The frozen base: int8, nf4 or bf16 layers, the rest in bf16. For use while `Counting` fakes a card."""
    hidden, intermediate, layers, heads = SIZES[size]
    config = Qwen2Config(
        vocab_size=151936,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    with CARD, no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    if base != "bf16":
        quantize = {"int8": _int8_layer, "nf4": _nf4_layer}[base]
        for parent in list(model.model.layers.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear:
                    setattr(parent, name, quantize(layer))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = base == "int8", base == "nf4"
    return model.requires_grad_(False)


def _int8_layer(layer: nn.Linear) -> bnb.nn.Linear8bitLt:
    """As after the layer's first call, when its state has the codes and their scales."""
    settings = {"has_fp16_weights": False, "threshold": 6.0}
    quantized = _without_weight(bnb.nn.Linear8bitLt, layer, bias=layer.bias is not None, **settings)
    codes = torch.empty(layer.weight.shape, dtype=torch.int8, device=CARD)
    quantized.weight = _frozen(codes, CB=None, SCB=None, has_fp16_weights=False)
    quantized.state.CB, quantized.state.SCB = codes, torch.empty(layer.out_features, device=CARD)
    return quantized


def _nf4_layer(layer: nn.Linear) -> bnb.nn.Linear4bit:
    settings = {"compute_dtype": torch.bfloat16, "compress_statistics": False, "quant_type": "nf4"}
    quantized = _without_weight(bnb.nn.Linear4bit, layer, bias=layer.bias is not None, **settings)
    quantized.support_avx512bf16_for_cpu = False
    count = layer.weight.numel()
    quantized.quant_state = bnb.functional.QuantState(
        absmax=torch.empty(count // NF4_BLOCK, device=CARD),
        shape=layer.weight.shape,
        code=torch.empty(16, device=CARD),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )
    codes = torch.empty(count // 2, 1, dtype=torch.uint8, device=CARD)
    attributes = {"quant_state": quantized.quant_state, "bnb_quantized": True}
    quantized.weight = _frozen(codes, compress_statistics=False, quant_type="nf4", **attributes)
    return quantized


def _without_weight(kind: Any, layer: nn.Linear, **settings: Any) -> Any:
    """A layer of this kind, whose own parameters are placeholders, with the bias of `layer`."""
    with (
        _disable_current_modes()
    ):  # bitsandbytes makes parameters of a class of its own, which cannot be fake
        quantized = kind(1, 1, **settings)
    quantized.in_features, quantized.out_features = layer.in_features, layer.out_features
    quantized.bias = layer.bias
    return quantized


def _frozen(codes: Tensor, **attributes: Any) -> Any:
    """A parameter with the attributes that bitsandbytes' own class for it has."""
    parameter = nn.Parameter(codes, requires_grad=False)
    parameter.__dict__.update(attributes)
    return parameter
