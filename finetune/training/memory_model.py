"""The memory of a run, by part: predicted for any number of tokens, and measured on the largest micro-batch.

What autograd saves is counted on two short sequences. It grows linearly with the tokens of a micro-batch. The
rest follows from the sizes of the model, the adapter and the optimizer.
"""

import math
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.config import Config
from finetune.config_checks import LARGEST_WHOLE_NUMBER
from finetune.data.collate import MicroBatch, collate, iterate_batches
from finetune.data.plan import Plan, count_tokens, plan_evaluation
from finetune.data.preparing.examples import Examples
from finetune.model.loss import TokenLoss
from finetune.model.sharding import gathered_bytes, local_share
from finetune.ops import chunked_head, torch_makers
from finetune.ops.quantized import dropout_off
from finetune.ops.token_rows import is_wrapper
from finetune.ops.trained_modules import layers_in_use, plain_layer, trained_copy, wrappers
from finetune.runtime.accelerator import DTYPES, reseed
from finetune.runtime.memory import GIB, held_bytes, peak_memory_gib, peak_reserved_gib, reset_peak_memory
from finetune.training.metrics import SumWindow
from finetune.training.optim import choose_optimizer, create_optimizer, state_bytes
from finetune.training.setup import Parts


@dataclass(frozen=True)
class Prediction:
    """Bytes, by part."""

    process: int
    """The memory of Python and the libraries; on a GPU, of the tensors besides those below"""
    base: int
    """Of a sharded base this process's share, and what is gathered at a time"""
    adapter: int
    """Weights and gradients, fp32, and the weights as a 16-bit forward pass multiplies them"""
    optimizer: int
    kept_per_token: float
    """What autograd saves for each token of a micro-batch"""
    per_layer_and_token: float
    """What the largest layer allocates temporarily for each token"""
    weight: int
    """The two largest weights, dequantized: those of gate_proj and up_proj may be so at the same time"""
    head_per_token: float
    """The logits of a target token, and the tensors computed from them"""
    head_most: float
    """The same for a chunk of target tokens; infinite without chunks"""
    copy: int = 0
    """The gradient of the largest trained copy of a layer, until it has been added to the adapter's"""

    @property
    def held(self) -> int:
        """The memory that stays allocated between updates."""
        return self.process + self.base + self.adapter + self.optimizer

    def of_update(self, num_tokens: int) -> float:
        """The peak of an update whose largest micro-batch has `num_tokens` tokens."""
        return self.held + self.temporary(num_tokens) + num_tokens * self.kept_per_token

    def temporary(self, num_tokens: int) -> float:
        """The memory that the forward and backward passes allocate temporarily, in a layer or in the head."""
        at_head = min(num_tokens * self.head_per_token, self.head_most)
        return max(self.weight + num_tokens * self.per_layer_and_token, at_head) + self.copy

    def largest_budget(self, gib: float) -> int:
        """The largest token budget per micro-batch whose update fits into `gib` GiB; 0 if none fits."""
        return bisect_right(range(1, LARGEST_WHOLE_NUMBER), gib * GIB, key=self.of_update)


def predict(config: Config, accelerator: Any, token_loss: TokenLoss, packing: bool) -> Prediction:
    """Predict the memory by part. Runs the forward passes of two short sequences."""
    model, device = token_loss.model, accelerator.device
    adapter = [p for p in model.parameters() if p.requires_grad]
    tensors = [*model.parameters(), *model.buffers(), *_quantization_states(model)]
    base = storage_bytes([tensor for tensor in tensors if not tensor.requires_grad])
    gradients = [p.grad for p in adapter if p.grad is not None]
    return Prediction(
        process=max(0, held_bytes(device) - base - storage_bytes([*adapter, *gradients])),
        base=base + gathered_bytes(token_loss),
        kept_per_token=kept_per_token(accelerator, token_loss, packing),
        **bytes_by_sizes(config, accelerator, token_loss),
    )


def bytes_by_sizes(config: Config, accelerator: Any, token_loss: TokenLoss) -> dict[str, Any]:
    """The parts of a Prediction that follow from sizes alone: the model may be on the device `meta`."""
    model = token_loss.model
    adapter = [p for p in model.parameters() if p.requires_grad]
    optimizer = choose_optimizer(config.optim.name, accelerator.device).actual
    num_trained = sum(p.numel() for p in adapter)
    dtype = DTYPES[accelerator.mixed_precision]
    widths = [m.in_features + m.out_features for m in _linear_layers(model)]
    weights = [m.in_features * m.out_features for m in _linear_layers(model)]
    return {
        "adapter": 2 * storage_bytes(adapter) + (num_trained * dtype.itemsize if dtype.itemsize < 4 else 0),
        "optimizer": num_trained * state_bytes(optimizer),
        "per_layer_and_token": 4 * max(widths) * dtype.itemsize,
        "weight": 2 * max(weights) * dtype.itemsize,
        **_head_bytes(token_loss, dtype, accelerator.device),
        # As it is added up, and multiplied by the factor of the loss.
        "copy": 2 * max((_copy_bytes(wrapper) for wrapper in wrappers(model)), default=0),
    }


def kept_per_token(accelerator: Any, token_loss: TokenLoss, packing: bool) -> float:
    """Bytes that autograd saves for a token: the slope between a sequence and one of twice its length."""
    kept, short = [], 64
    for length in (short, 2 * short):
        ids = [1] * length
        labels = [-100] * (length - 1) + [1]  # one target token: the head is counted separately
        batch = collate([{"input_ids": ids, "labels": labels}], packing).to(accelerator.device)
        kept.append(kept_bytes(accelerator, token_loss, batch))
    return (kept[1] - kept[0]) / short


def kept_bytes(accelerator: Any, token_loss: TokenLoss, batch: MicroBatch) -> int:
    """Bytes that are kept for the backward pass of a micro-batch, without the parameters."""
    storages: dict[int, int] = {}
    parameters = {local_share(p).untyped_storage().data_ptr() for p in token_loss.parameters()}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    reseed(0, 0, 0)
    with (
        torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor),
        accelerator.autocast(),
    ):
        kept = token_loss(batch)
    for tensor in _held_by_functions(kept.nll):
        record(tensor)
    del kept  # only now: a new storage may reuse the address of a freed one
    return sum(storages.values())


def _held_by_functions(output: Tensor) -> Iterator[Tensor]:
    """The tensors that our autograd functions hold as attributes of `ctx`, which no hook of autograd sees."""
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
            yield from _tensors_in(list(getattr(node, "__dict__", {}).values()))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors_in(part)


def _head_bytes(token_loss: TokenLoss, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Bytes of a target token's logits and of the passes over them, and the most that exist at once."""
    vocabulary = plain_layer(token_loss.base.get_output_embeddings()).weight.shape[0]
    if token_loss.head_mib is None:
        # The logits, and in fp32: the logits, their log-probabilities and their gradient.
        return {"head_per_token": vocabulary * (dtype.itemsize + 3 * 4), "head_most": math.inf}
    size = chunked_head.bytes_per_logit(dtype, device)
    rows = chunked_head.tokens_per_chunk(token_loss.head_mib, vocabulary, size)
    most = rows * vocabulary * size + 2 * torch_makers.ROWS * vocabulary * 4
    return {"head_per_token": vocabulary * size, "head_most": most}


@dataclass(frozen=True)
class Measured:
    num_tokens: int
    """Tokens of the whole update, or of the whole evaluation batch"""
    largest_batch: int
    """Tokens of the largest micro-batch, including padding"""
    seconds: float
    peak_gib: float
    """Allocated on a GPU, resident (RSS) on a CPU"""
    reserved_gib: float | None
    """What torch's allocator took from a GPU for it; None on a CPU"""


def measure_update(config: Config, parts: Parts, plan: Plan) -> Measured:
    """Run the update of the first epoch that has the largest micro-batch, including the optimizer's step."""
    updates = [plan.update(step) for step in range(plan.steps_per_epoch)]
    update = max(updates, key=lambda update: (plan.largest_batch(update), update.num_tokens))
    device = parts.accelerator.device
    name = choose_optimizer(config.optim.name, device).actual
    optimizer = create_optimizer(name, parts.adapter, config.optim)
    window = SumWindow(device)
    dataset, packing = parts.train_set.dataset, plan.layout.packing
    _start_measuring(device)
    start = time.perf_counter()
    for batch in iterate_batches(update.micro_batches, dataset, packing, device):
        with parts.accelerator.autocast():
            sums = parts.token_loss(batch)
        torch.autograd.backward(sums.nll / update.num_target_tokens)
        window.add(sums)
    parts.adapter.clip_gradients(config.optim.max_grad_norm or 1.0)
    optimizer.step()
    window.keep_update()
    window.total(parts.accelerator).tolist()  # waits for the device
    seconds = time.perf_counter() - start
    peaks = peak_memory_gib(device), peak_reserved_gib(device)
    return Measured(update.num_tokens, plan.largest_batch(update), seconds, *peaks)


def measure_evaluation(parts: Parts, plan: Plan, eval_set: Examples) -> Measured | None:
    """Run the largest batch of the evaluation; None without eval rows."""
    if len(eval_set.dataset) == 0:
        return None
    batches = plan_evaluation(plan, eval_set)
    sizes = [
        count_tokens(batch, eval_set.lengths, plan.layout, eval_set.shared_prefix, eval_set.sequence_sizes)
        for batch in batches
    ]
    num_tokens = max(sizes)
    indices = batches[sizes.index(num_tokens)]
    device = parts.accelerator.device
    _start_measuring(device)
    start = time.perf_counter()
    with torch.no_grad(), dropout_off(parts.token_loss), parts.accelerator.autocast():
        batch = collate([eval_set.dataset[i] for i in indices], plan.layout.packing)
        parts.token_loss.token_stats(batch.to(device)).cpu()
    seconds = time.perf_counter() - start
    return Measured(num_tokens, num_tokens, seconds, peak_memory_gib(device), peak_reserved_gib(device))


def _start_measuring(device: torch.device) -> None:
    """Reset the peaks. What torch reserved on a GPU and no longer needs is given back first."""
    torch.cuda.empty_cache()  # without a GPU, nothing happens
    reset_peak_memory(device)


def _linear_layers(model: Any) -> list[Any]:
    output = plain_layer(model.get_output_embeddings())
    linear = [m for m in layers_in_use(model) if hasattr(m, "in_features") and m is not output]
    return [m for m in linear if not is_wrapper(m)]


def _copy_bytes(wrapper: Any) -> int:
    return sum(parameter.nbytes for parameter in trained_copy(wrapper).parameters())


def _quantization_states(model: Any) -> list[Tensor]:
    """The tensors that quantized layers hold besides their weights."""
    states = []
    for module in model.modules():
        state = getattr(module, "state", None)
        states += [tensor for tensor in (getattr(state, "SCB", None),) if tensor is not None]
        quant = getattr(getattr(module, "weight", None), "quant_state", None)
        states += [] if quant is None else [quant.absmax, quant.code]
    return states


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the tensors' storages on this process. A storage that several tensors share counts once."""
    # Not by their address, which a tensor on `meta` does not have.
    storages = [local_share(tensor).untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
