"""`python -m finetune plan --config FILE`: the memory and the time that a run will take, and what would fit.

What autograd keeps is counted on two short rows, and grows with the tokens of a row in a straight line. The
rest follows from the sizes of the model, the adapter and the optimizer. The longest update and the longest
batch of the evaluation are then made once, and what they took is put beside it.
"""

import math
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from rich.table import Table
from torch import Tensor

from finetune.config import Config
from finetune.config_checks import LARGEST_WHOLE_NUMBER
from finetune.config_parsing import parse_config
from finetune.data.collate import MicroBatch, collate
from finetune.data.plan import Layout, Plan, make_plan, plan_evaluation
from finetune.data.tokenize import Examples
from finetune.model.fast_paths import choose_fast_paths
from finetune.ops import chunked_head
from finetune.ops.quantized import dropout_off
from finetune.runtime.accelerator import DTYPES, reseed
from finetune.runtime.cli import config_parser, split_arguments
from finetune.runtime.console import console, say, show_choices
from finetune.runtime.memory import GIB, peak_memory_gib, reset_peak_memory
from finetune.training.metrics import SumWindow
from finetune.training.optim import choose_optimizer, create_optimizer, state_bytes
from finetune.training.setup import Parts, load_parts


@dataclass(frozen=True)
class Prediction:
    """Bytes, by part."""

    process: int
    """What Python and the libraries hold; on a GPU, where only tensors are counted, nothing"""
    base: int
    adapter: int
    """Weights and gradients, fp32"""
    optimizer: int
    kept_per_token: float
    """What autograd keeps of a token of a micro-batch"""
    per_layer_and_token: float
    """What the largest layer needs besides, for a moment"""
    weight: int
    """The largest weight, dequantized"""
    head_per_token: float
    """Logits of a target token, and what is computed from them"""
    head_most: float
    """The same of a chunk of them; infinite without chunks"""

    @property
    def held(self) -> int:
        """What is there between two updates."""
        return self.process + self.base + self.adapter + self.optimizer

    def of_update(self, num_tokens: int) -> float:
        return self.held + self.passing(num_tokens) + num_tokens * self.kept_per_token

    def passing(self, num_tokens: int) -> float:
        """What forward and backward passes need for a moment: at a layer, or at the head."""
        at_head = min(num_tokens * self.head_per_token, self.head_most)
        return max(self.weight + num_tokens * self.per_layer_and_token, at_head)

    def largest_budget(self, gib: float) -> int:
        """The most tokens of a micro-batch whose update fits into `gib` GiB; 0 where none fits."""
        return bisect_right(range(1, LARGEST_WHOLE_NUMBER), gib * GIB, key=self.of_update)


def command(argv: Sequence[str]) -> int:
    """0, or 1 where not even the longest example fits into the GiB asked for.

    Raises:
        ValueError: arguments, rows or a model that cannot be used, as for train.py.
    """
    parser = config_parser(
        "plan",
        "[--gib N]",
        "Memory by part and time of an epoch, predicted and measured, and the largest token budget that fits "
        "into a number of GiB.",
    )
    parser.add_argument("--gib", type=float, help="memory to fit into; without it: what the device has")
    arguments, settings = split_arguments(parser, argv)
    if arguments.gib is not None and not 0 < arguments.gib < math.inf:
        raise ValueError(f"--gib must be above 0 and finite, not {arguments.gib}")
    config = parse_config(settings)
    parts = load_parts(config)
    fast_paths = choose_fast_paths(config, parts.accelerator, parts.token_loss, parts.train_set)
    show_choices(fast_paths)
    packing = fast_paths.packed
    plan = make_plan(config, parts.train_set, packing, 0, 1)
    predicted = predict(config, parts, packing)
    evaluation = measure_evaluation(parts, plan, parts.eval_set)  # first: an update's freed memory may stay
    update = measure_update(config, parts, plan)
    _show(predicted, plan, parts, update, evaluation)
    gib = arguments.gib or _memory_of(parts.accelerator.device)
    budget = predicted.largest_budget(gib)
    if budget < config.data.max_length:
        say(
            f"{gib:.1f} GiB hold {budget} tokens at most, and an example may have {config.data.max_length}: "
            "lower data.max_length, or set train.gradient_checkpointing"
        )
        return 1
    say(f"Into {gib:.1f} GiB fits --train.max_tokens_per_micro_batch {budget // 64 * 64}")
    return 0


def predict(config: Config, parts: Parts, packing: bool) -> Prediction:
    """Memory by part. Needs the forward passes of two short rows."""
    model, device = parts.model, parts.accelerator.device
    adapter = [p for p in model.parameters() if p.requires_grad]
    tensors = [*model.parameters(), *model.buffers(), *_quantization_states(model)]
    base = tensor_bytes([tensor for tensor in tensors if not tensor.requires_grad])
    optimizer = choose_optimizer(config.optim.name, device).actual
    num_trained = sum(p.numel() for p in adapter)
    rss = psutil.Process().memory_info().rss
    itemsize = DTYPES[parts.precision.actual].itemsize
    widths = [m.in_features + m.out_features for m in _linear_layers(model)]
    weights = [m.in_features * m.out_features for m in _linear_layers(model)]
    return Prediction(
        process=0 if device.type == "cuda" else max(0, rss - base - tensor_bytes(adapter)),
        base=base,
        adapter=2 * tensor_bytes(adapter),
        optimizer=num_trained * state_bytes(optimizer),
        kept_per_token=_kept_per_token(parts, packing),
        per_layer_and_token=4 * max(widths) * itemsize,
        weight=max(weights) * itemsize,
        **_head_bytes(parts, itemsize),
    )


def _kept_per_token(parts: Parts, packing: bool) -> float:
    """Bytes that autograd keeps of a token: the slope between a row and one of twice its length."""
    kept, short = [], 64
    for length in (short, 2 * short):
        ids = [1] * length
        labels = [-100] * (length - 1) + [1]  # one target: the head is counted apart
        batch = collate([{"input_ids": ids, "labels": labels}], packing).to(parts.accelerator.device)
        kept.append(_kept_bytes(parts, batch))
    return (kept[1] - kept[0]) / short


def _kept_bytes(parts: Parts, batch: MicroBatch) -> int:
    storages: dict[int, int] = {}
    held = {p.untyped_storage().data_ptr() for p in parts.model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    reseed(0, 0, 0)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), parts.accelerator.autocast():
        kept = parts.token_loss(batch)
    del kept
    return sum(storages.values())


def _head_bytes(parts: Parts, itemsize: int) -> dict[str, float]:
    """Of a target token's logits and the passes over them, and the most that all of them take at a time."""
    vocabulary = parts.model.get_output_embeddings().weight.shape[0]
    if parts.token_loss.head_mib is None:
        # The logits; in fp32, as log-probabilities, and their gradient.
        return {"head_per_token": vocabulary * (itemsize + 3 * 4), "head_most": math.inf}
    size = chunked_head.bytes_per_logit(DTYPES[parts.precision.actual], parts.accelerator.device)
    rows = chunked_head.tokens_per_chunk(parts.token_loss.head_mib, vocabulary, size)
    most = rows * vocabulary * size + 2 * chunked_head.ROWS * vocabulary * 4
    return {"head_per_token": vocabulary * size, "head_most": most}


@dataclass(frozen=True)
class Measured:
    num_tokens: int
    """Of the whole update, or of the whole batch"""
    largest_batch: int
    seconds: float
    peak_gib: float


def measure_update(config: Config, parts: Parts, plan: Plan) -> Measured:
    """Make the update of the first epoch that has the largest micro-batch, the optimizer's part too."""
    updates = [plan.update(step) for step in range(plan.steps_per_epoch)]

    def largest(micro_batches: Sequence[Sequence[int]]) -> int:
        return max(_num_tokens(plan.lengths, batch, plan.layout) for batch in micro_batches)

    update = max(updates, key=lambda update: (largest(update.micro_batches), update.num_tokens))
    trainable = [p for p in parts.model.parameters() if p.requires_grad]
    optimizer = create_optimizer(
        choose_optimizer(config.optim.name, parts.accelerator.device).actual, trainable, config.optim
    )
    window = SumWindow(parts.accelerator.device)
    reset_peak_memory(parts.accelerator.device)
    start = time.perf_counter()
    for indices in update.micro_batches:
        batch = collate([parts.train_set.dataset[i] for i in indices], plan.layout.packing)
        with parts.accelerator.autocast():
            sums = parts.token_loss(batch.to(parts.accelerator.device))
        torch.autograd.backward(sums.nll / update.num_target_tokens)
        window.add(sums)
    torch.nn.utils.clip_grad_norm_(trainable, config.optim.max_grad_norm or 1.0)
    optimizer.step()
    window.total(parts.accelerator).tolist()  # waits for the device
    seconds = time.perf_counter() - start
    peak = peak_memory_gib(parts.accelerator.device)
    return Measured(update.num_tokens, largest(update.micro_batches), seconds, peak)


def measure_evaluation(parts: Parts, plan: Plan, eval_set: Examples) -> Measured | None:
    """Make the largest batch of the evaluation; None without eval rows."""
    if len(eval_set.dataset) == 0:
        return None
    batches = plan_evaluation(plan, eval_set)
    indices = max(batches, key=lambda batch: _num_tokens(eval_set.lengths, batch, plan.layout))
    num_tokens = _num_tokens(eval_set.lengths, indices, plan.layout)
    reset_peak_memory(parts.accelerator.device)
    start = time.perf_counter()
    with torch.no_grad(), dropout_off(parts.token_loss), parts.accelerator.autocast():
        batch = collate([eval_set.dataset[i] for i in indices], plan.layout.packing)
        parts.token_loss.token_stats(batch.to(parts.accelerator.device)).cpu()
    seconds = time.perf_counter() - start
    return Measured(num_tokens, num_tokens, seconds, peak_memory_gib(parts.accelerator.device))


def _num_tokens(lengths: Any, batch: Sequence[int], layout: Layout) -> int:
    """Of a micro-batch, its padding included."""
    if layout.packing:
        return sum(int(lengths[i]) for i in batch)
    return len(batch) * max((int(lengths[i]) for i in batch), default=0)


def _show(
    predicted: Prediction, plan: Plan, parts: Parts, update: Measured, evaluation: Measured | None
) -> None:
    table = Table("memory", "GiB", title="Predicted by part", title_justify="left")
    activations = update.largest_batch * predicted.kept_per_token
    rows = [
        ("Python and libraries", predicted.process),
        ("base", predicted.base),
        ("adapter and its gradient", predicted.adapter),
        ("optimizer", predicted.optimizer),
        (f"kept of {update.largest_batch:,} tokens for the backward pass", activations),
        ("the largest layer, or the head, at work", predicted.passing(update.largest_batch)),
    ]
    for name, num_bytes in rows:
        table.add_row(name, f"{num_bytes / GIB:.2f}")
    console.print(table)
    table = Table("peak", "predicted GiB", "measured GiB", "seconds")
    gib = predicted.of_update(update.largest_batch) / GIB
    table.add_row("longest update", f"{gib:.2f}", f"{update.peak_gib:.2f}", f"{update.seconds:.1f}")
    epoch = update.seconds / update.num_tokens * float(plan.lengths.sum())
    if evaluation is not None:
        gib = (predicted.held + predicted.passing(evaluation.num_tokens)) / GIB
        table.add_row(
            "longest eval batch", f"{gib:.2f}", f"{evaluation.peak_gib:.2f}", f"{evaluation.seconds:.1f}"
        )
        epoch += evaluation.seconds / evaluation.num_tokens * float(parts.eval_set.lengths.sum())
    console.print(table)
    say(f"An epoch: about {epoch / 60:,.1f} min, its evaluation included; epochs planned: {plan.num_epochs}")


def _memory_of(device: torch.device) -> float:
    """GiB in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return psutil.virtual_memory().total / GIB


def _linear_layers(model: Any) -> list[Any]:
    output = model.get_output_embeddings()
    return [m for m in model.modules() if hasattr(m, "in_features") and m is not output]


def _quantization_states(model: Any) -> list[Tensor]:
    """What quantized layers keep beside their weights."""
    states = []
    for module in model.modules():
        state = getattr(module, "state", None)
        states += [tensor for tensor in (getattr(state, "SCB", None),) if tensor is not None]
        quant = getattr(getattr(module, "weight", None), "quant_state", None)
        states += [] if quant is None else [quant.absmax, quant.code]
    return states


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """A storage counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
