"""The first weights of an adapter that starts from the base's own weights (PiSSA, OLoRA), from what
quantization took from them (LoftQ) or from data (EVA).

PiSSA and OLoRA take a part of rank r out of a weight, W = R + s B0 A0, and train that part: R + s B A. PEFT
changes the base to R, which a base in 8 or 4 bits or in bf16 cannot hold exactly. Here the base stays as it
is, and the adapter has twice the rank: W + s (B A - B0 A0), with A0 and B0 as its second half, which is held
fixed. That is the same function with the same gradients, its adapter adds nothing at first, and it is saved
as plain LoRA. Dropout acts on the whole difference, where in PEFT it takes away a part of the base too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from peft import EvaConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from finetune.config import LoraConfig
from finetune.data.templates.tokenize import IGNORE
from finetune.ops.quantized import NF4, frozen_weight
from finetune.runtime.choice import Choice

FROM_BASE = ("pissa", "olora")
EVA_EXAMPLES = 64
"""How many training examples EVA sees, again and again until its directions stay the same"""
EVA_BATCH = 4


def rank_and_alpha(config: LoraConfig) -> tuple[int, float]:
    """`r` and `lora_alpha` of the adapter that is made: where it has a second half, twice the rank at the
    same scale."""
    if config.init_lora_weights not in FROM_BASE:
        return config.r, config.lora_alpha
    return 2 * config.r, config.lora_alpha * (2**0.5 if config.use_rslora else 2)


def describe_first_weights(config: LoraConfig) -> list[Choice]:
    """How the adapter's first weights are made, where not by PEFT's default."""
    method = config.init_lora_weights
    if method is None:
        return []
    reason = f"as rank {2 * config.r}, of which half is fixed, the start: the base stays as it is"
    if method == "eva":
        reason = f"of the first {EVA_EXAMPLES} training examples; all layers keep rank {config.r}"
    if method == "loftq":
        reason = f"what 4 bits took from each weight, as far as rank {config.r} holds it"
    return [Choice("first LoRA weights", method, method, reason)]


@torch.no_grad()
def start_from_base(model: PeftModel, method: str) -> None:
    """Fill both halves of each LoRA layer's weights from the weight of its base layer.

    Raises:
        ValueError: a layer is no linear layer.
    """
    for name, layer in _lora_layers(model):
        if not isinstance(layer.base_layer, nn.Linear | bnb.nn.Linear8bitLt | bnb.nn.Linear4bit):
            raise ValueError(
                f"lora.init_lora_weights {method} is for linear layers, and {name} is a "
                f"{type(layer.base_layer).__name__}: name others as lora.target_modules"
            )
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight = frozen_weight(layer.base_layer, torch.float32)
        a0, b0 = first_factors(weight, len(a) // 2, layer.scaling["default"], method)
        a.copy_(torch.cat([a0, a0]))
        b.copy_(torch.cat([b0, -b0], dim=1))


def first_factors(weight: Tensor, rank: int, scaling: float, method: str) -> tuple[Tensor, Tensor]:
    """A0 [rank, in] and B0 [out, rank] of a weight [out, in], fp32, as PEFT makes them.

    "pissa" (Meng et al. 2024, arXiv:2404.02948): scaling * B0 A0 is the best approximation of that rank.
    "olora" (Büyükakyüz 2024, arXiv:2406.01775): the first columns and rows of the QR decomposition.
    """
    if method == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def start_from_data(model: PeftModel, examples: Sequence[dict[str, Any]]) -> None:
    """Fill each A with the main directions of its layer's inputs at the target tokens of the first examples,
    which have `input_ids` and `labels` (EVA: Paischer et al. 2024, arXiv:2410.07170).

    Raises:
        ValueError: they have too few target tokens.
    """
    settings = model.peft_config["default"]
    targets = settings.target_modules
    chosen = [examples[number] for number in range(min(EVA_EXAMPLES, len(examples)))]
    batches = [_padded(chosen[start : start + EVA_BATCH]) for start in range(0, len(chosen), EVA_BATCH)]
    # PEFT would wait forever for a batch of more.
    batches = [batch for batch in batches if int((batch["labels"] != IGNORE).sum()) >= settings.r]
    if not batches:
        raise ValueError(
            f"lora.init_lora_weights eva wants {settings.r} target tokens (lora.r) in {EVA_BATCH} examples, "
            "and the training rows have fewer: take a smaller lora.r"
        )
    # Without giving the rank of one layer to another.
    settings.init_lora_weights, settings.eva_config = "eva", EvaConfig(rho=1.0)
    initialize_lora_eva_weights(
        model, batches, forward_fn=_decode, gather_distributed_inputs=False, show_progress_bar=False
    )
    # From now on it is plain LoRA, and is saved as that.
    settings.init_lora_weights, settings.eva_config, settings.target_modules = True, None, targets


@torch.no_grad()
def start_from_lost(model: PeftModel, full_weight: Callable[[str], Tensor]) -> None:
    """Fill A and B of each LoRA layer on a weight in 4 bits, so that scaling * B A is the best approximation
    of that rank of what quantization took from the weight (LoftQ: Li et al. 2023, arXiv:2310.08659, with one
    iteration: the quantized weight is already there). Layers that are not quantized begin as always.

    PEFT's `replace_lora_weights_loftq` needs CUDA, and leaves out the scaling. `full_weight` returns the
    weight [out, in] of the base before quantization, by its name.

    Raises:
        ValueError: no layer with LoRA is in 4 bits, or as `full_weight`.
    """
    layers = [(name, layer) for name, layer in _lora_layers(model) if isinstance(layer.base_layer, NF4)]
    if not layers:
        raise ValueError("lora.init_lora_weights loftq: no layer that gets LoRA has a weight in 4 bits")
    for name, layer in layers:
        quantized = frozen_weight(layer.base_layer, torch.float32)
        full = full_weight(f"{name.removeprefix('base_model.model.')}.weight")
        lost = full.to(quantized.device, torch.float32) - quantized
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a0, b0 = first_factors(lost, len(a), layer.scaling["default"], "pissa")
        a.copy_(a0)
        b.copy_(b0)


def _padded(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """input_ids, labels and attention_mask [B, T]."""

    def column(rows: list[Tensor], padding: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=padding)

    tokens = [torch.tensor(example["input_ids"]) for example in examples]
    labels = [torch.tensor(example["labels"]) for example in examples]
    mask = [torch.ones_like(row) for row in tokens]
    return {
        "input_ids": column(tokens, 0),
        "labels": column(labels, IGNORE),
        "attention_mask": column(mask, 0),
    }


def _decode(model: PeftModel, inputs: dict[str, Tensor]) -> Any:
    """All layers but the head."""
    decoder = model.get_base_model().get_decoder()
    return decoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])


def hold_second_half(model: PeftModel) -> None:
    """Mark the second half of each A and B as fixed: their attribute `fixed` is the dimension, and the index
    at which it begins. `FlatAdapter` sets the gradient there to zero."""
    for _, layer in _lora_layers(model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.fixed, b.fixed = (0, len(a) // 2), (1, len(a) // 2)


def _lora_layers(model: PeftModel) -> list[tuple[str, LoraLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
