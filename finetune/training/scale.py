"""A run on many cards, before there are any: the memory of each card by moment, and the bytes that it sends.

No weight is loaded. The sizes of the model come from its configuration. What a token keeps for the backward
pass is counted on small copies of the model.

FSDP2 shards each frozen tensor along its first dimension, and gathers the tensors of a group together: those
of a decoder layer, and in the root group the embedding, the head and the last norm.
"""

import copy
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from finetune.config import Config
from finetune.data.preparing.examples import Examples
from finetune.model.fast_paths import choose_fast_paths
from finetune.model.flat_adapter import FlatAdapter
from finetune.model.load import add_adapter
from finetune.model.loss import TokenLoss
from finetune.model.quiet import quiet_libraries
from finetune.runtime.accelerator import DTYPES
from finetune.training.memory_model import Prediction, bytes_by_sizes, kept_per_token

NF4_BLOCK = 64
NF4_CODES = 16 * 4
"""Bytes of the table of nf4's 16 numbers, which each layer has"""
HEAD_SIZES = (16, 32)
# A group that is gathered exists in the buffer of the all-gather and in the parameters that are filled from
# it. gloo has one more copy: measured. For NCCL the number is read from the code of torch, not measured.
COPIES = {"cpu": 3, "cuda": 2}


@dataclass(frozen=True)
class Frozen:
    """A frozen tensor, by its first dimension."""

    rows: int
    row_bytes: int

    def shard(self, num_shards: int) -> int:
        """Bytes of the largest shard. The others are filled up to its size when they are sent."""
        return -(-self.rows // num_shards) * self.row_bytes


@dataclass(frozen=True)
class FrozenBase:
    """The frozen base, by what is gathered together."""

    layers: tuple[tuple[Frozen, ...], ...]
    root: tuple[Frozen, ...]
    replicated: int
    """Bytes that each card has whole: buffers, and the tables of nf4"""

    def shard(self, num_shards: int) -> int:
        """Bytes that a card holds of the base; all of them with one shard."""
        groups = (self.root, *self.layers)
        return self.replicated + sum(group_bytes(group, num_shards) for group in groups)

    @property
    def largest_layer(self) -> int:
        return max(group_bytes(layer) for layer in self.layers)


def group_bytes(group: Iterable[Frozen], num_shards: int = 1) -> int:
    """Bytes of the largest shard of each tensor."""
    return sum(tensor.shard(num_shards) for tensor in group)


@dataclass(frozen=True)
class Unloaded:
    """What is known of a run before its model is loaded."""

    predicted: Prediction
    """Of one card with all of the base"""
    base: FrozenBase
    gradient_bytes: int
    """The adapter's gradient, which all cards add up once in an update"""


@dataclass(frozen=True)
class Card:
    """Bytes of one card, by part."""

    base: int
    """Its shard of the frozen base; all of it, if that is not sharded"""
    adapter: int
    optimizer: int
    root: int
    """The embedding, the head and the last norm, gathered; 0 if the base is not sharded"""
    layers: int
    """The copies of a decoder layer that exist while it is gathered; 0 if the base is not sharded"""
    kept: float
    """What autograd saves for the tokens of a micro-batch"""
    at_layer: float
    """What a decoder layer allocates temporarily"""
    at_head: float
    """What the head allocates temporarily"""
    loading: int
    """The peak while the base is loaded, with the adapter and a weight that is quantized: all of the base; if
    it is sharded, its shard, the root group, and two layers, of which one is the first"""
    gathering: int
    """The peak of the root group while it is gathered, at the start of a forward pass"""

    @property
    def between_updates(self) -> int:
        return self.base + self.adapter + self.optimizer

    @property
    def update(self) -> float:
        """The peak of an update."""
        in_passes = self.root + self.kept + max(self.layers + self.at_layer, self.at_head)
        return self.between_updates + max(self.gathering, in_passes)

    @property
    def evaluation(self) -> float:
        """The peak of an evaluation with as many tokens in a batch, of which nothing is kept."""
        in_pass = self.root + max(self.layers + self.at_layer, self.at_head)
        return self.between_updates + max(self.gathering, in_pass)

    @property
    def first_update(self) -> float:
        """The peak of the first update until its optimizer step, which creates the optimizer's state."""
        return self.update - self.optimizer


def card_memory(run: Unloaded, num_shards: int, num_tokens: int, device_type: str = "cuda") -> Card:
    """The memory of each of `num_shards` cards that share the base, with `num_tokens` in a micro-batch.

    Python, the libraries, the context of CUDA and the buffers of NCCL are not included.
    """
    predicted, base = run.predicted, run.base
    is_sharded = num_shards > 1
    root, copies = group_bytes(base.root), COPIES[device_type]
    return Card(
        base=base.shard(num_shards),
        adapter=predicted.adapter,
        optimizer=predicted.optimizer,
        root=root if is_sharded else 0,
        layers=copies * base.largest_layer if is_sharded else 0,
        kept=num_tokens * predicted.kept_per_token,
        at_layer=predicted.weight + num_tokens * predicted.per_layer_and_token,
        at_head=min(num_tokens * predicted.head_per_token, predicted.head_most) + predicted.copy,
        loading=(base.shard(num_shards) + is_sharded * (root + 2 * base.largest_layer))
        + predicted.adapter
        + predicted.weight // 2,
        gathering=copies * root if is_sharded else 0,
    )


@dataclass(frozen=True)
class Traffic:
    """Bytes that a card sends, and as many that it receives."""

    gathered: int
    """Of the base, in a micro-batch, to the cards that share it"""
    reduced: float
    """Of the gradient, in an update, to all cards"""

    def of_update(self, num_micro_batches: int) -> float:
        return num_micro_batches * self.gathered + self.reduced


def traffic(run: Unloaded, num_shards: int, num_cards: int) -> Traffic:
    """What each of `num_cards` cards sends, of which each `num_shards` share the base.

    Each layer is gathered in the forward and in the backward pass, and the root group once: it stays until
    the backward pass ends. In a ring, each card passes on the shards of all others. A sum in a ring is a
    reduction of parts and a gathering of the reduced parts.
    """
    layers = sum(group_bytes(layer, num_shards) for layer in run.base.layers)
    gathered = (num_shards - 1) * (2 * layers + group_bytes(run.base.root, num_shards))
    return Traffic(gathered, 2 * (num_cards - 1) / num_cards * run.gradient_bytes)


def predict_unloaded(
    config: Config, accelerator: Any, architecture: Any, kept: float | None = None
) -> Unloaded:
    """Predict the memory of a run by the configuration of its model.

    `kept` are the bytes that autograd saves for a token, where they are known already.

    Raises:
        ValueError: the model does not have the target modules, or no list of decoder layers.
    """
    quiet_libraries()
    dtype = DTYPES[accelerator.mixed_precision]
    model = meta_model(architecture, dtype)
    base = frozen_base(model, config.model.quantization)
    with torch.device("meta"):
        adapted = add_adapter(model, config.lora)
    adapter, token_loss = FlatAdapter(adapted), TokenLoss(adapted)
    token_loss.head_mib = config.fast.head_mib if config.fast.head else None
    kept = count_kept_per_token(config, accelerator, architecture) if kept is None else kept
    sizes = bytes_by_sizes(config, accelerator, token_loss)
    predicted = Prediction(process=0, base=base.shard(1), kept_per_token=kept, **sizes)
    return Unloaded(predicted, base, adapter.gradient.nbytes)


def meta_model(architecture: Any, dtype: torch.dtype) -> Any:
    """The frozen model of an architecture without memory for its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
    model.tie_weights()
    return model.requires_grad_(False)


def frozen_base(model: Any, quantization: str) -> FrozenBase:
    """The tensors of a model without quantization, as they would be with `quantization`: none, int8 or nf4.

    bitsandbytes quantizes all linear layers but the head.

    Raises:
        ValueError: the model has no list of decoder layers.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} has no list of decoder layers, by which it would be sharded"
        )
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    quantized = {id(layer.weight) for layer in linear} if quantization != "none" else set()
    in_layers = {id(parameter) for parameter in layers.parameters()}

    def tensors(parameters: Iterable[Tensor]) -> tuple[Frozen, ...]:
        parts = [
            _quantized(own, quantization) if id(own) in quantized else (_as_is(own),) for own in parameters
        ]
        return tuple(itertools.chain.from_iterable(parts))

    tables = len(quantized) * NF4_CODES if quantization == "nf4" else 0
    return FrozenBase(
        layers=tuple(tensors(layer.parameters()) for layer in layers),
        root=tensors(parameter for parameter in model.parameters() if id(parameter) not in in_layers),
        replicated=sum(buffer.nbytes for buffer in model.buffers()) + tables,
    )


def _as_is(parameter: Tensor) -> Frozen:
    return Frozen(len(parameter), parameter.nbytes // len(parameter))


def _quantized(weight: Tensor, quantization: str) -> tuple[Frozen, Frozen]:
    """The codes and the scales of a weight [out, in]."""
    if quantization == "int8":  # a byte each, and an fp32 scale for each row
        return Frozen(weight.shape[0], weight.shape[1]), Frozen(weight.shape[0], 4)
    # Two codes in a byte, and an fp32 scale for each block, both in one dimension.
    return Frozen(weight.numel() // 2, 1), Frozen(math.ceil(weight.numel() / NF4_BLOCK), 4)


def count_kept_per_token(config: Config, accelerator: Any, architecture: Any) -> float:
    """Bytes that autograd saves for a token in a model of this architecture, by the fast paths that it gets.

    They grow linearly with the decoder layers, and with the widths where all grow in proportion to the size
    of an attention head. So they are counted on copies with one and two layers, and heads of two small sizes.
    The copies are not quantized: the fast paths keep nothing of a weight.
    """
    text = architecture.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if any(width * HEAD_SIZES[0] % size for width in (text.hidden_size, text.intermediate_size)):
        return _kept_at_width(config, accelerator, architecture, size, size)
    narrow, wide = (
        _kept_at_width(config, accelerator, architecture, size, small_size) for small_size in HEAD_SIZES
    )
    steps: float = (size - HEAD_SIZES[0]) / (HEAD_SIZES[1] - HEAD_SIZES[0])
    return narrow + steps * (wide - narrow)


def _kept_at_width(
    config: Config, accelerator: Any, architecture: Any, head_size: int, small_size: int
) -> float:
    """The same with widths in proportion to `small_size` instead of `head_size`."""
    one, two = (
        _count_small(config, accelerator, _smaller(architecture, layers, head_size, small_size))
        for layers in (1, 2)
    )
    num_layers: int = architecture.get_text_config().num_hidden_layers
    return one + (num_layers - 1) * (two - one)


def _count_small(config: Config, accelerator: Any, architecture: Any) -> float:
    """The same for a small architecture, whose weights are created."""
    torch.manual_seed(0)
    with accelerator.device:
        base = AutoModelForCausalLM.from_config(architecture, dtype=DTYPES[accelerator.mixed_precision])
    base.requires_grad_(False)
    if config.train.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    model = add_adapter(base, config.lora)
    FlatAdapter(model)
    token_loss = TokenLoss(model).train()
    rows = [{"input_ids": [1 + n % 7 for n in range(64)], "labels": 64 * [2]} for _ in range(2)]
    examples = Examples(Dataset.from_list(rows), truncated=[], dropped={})
    fast_paths = choose_fast_paths(config, accelerator, token_loss, examples)
    return kept_per_token(accelerator, token_loss, fast_paths.packed)


def _smaller(architecture: Any, num_layers: int, head_size: int, small_size: int) -> Any:
    """The architecture with so many layers, all widths in proportion, and a vocabulary of 256: of one target
    token, what the head keeps does not grow with the tokens."""
    small = copy.deepcopy(architecture)
    text = small.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = num_layers, 256, None
    text.hidden_size = text.hidden_size * small_size // head_size
    text.intermediate_size = text.intermediate_size * small_size // head_size
    text.head_dim = small_size
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:num_layers]
    return small
