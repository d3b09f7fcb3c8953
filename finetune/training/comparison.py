"""Compare the fast paths with the reference paths: both run the same updates, without the optimizer's step.

The fast paths run as in train.py. The reference paths run padded, with the model's own attention and head and
PEFT's own layers. In fp32 the two must agree. In 16 bits, every layer rounds so much that not even two
reference layouts agree. There, both are also compared with the same weights in fp32, and the fast paths must
be as close to that result as the reference paths.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.config import Config
from finetune.data.collate import iterate_batches
from finetune.data.plan import Plan, make_plan
from finetune.model.fast_paths import use_reference_paths
from finetune.model.precision import in_fp32
from finetune.ops.quantized import dequantized
from finetune.runtime.memory import peak_memory_gib, reset_peak_memory
from finetune.training.setup import Parts

CHANCE = 1.5  # the factor by which rounding may, by chance, affect one path more than the other
MAX_ERROR = 0.5  # of the gradient, relative: rounding in no precision causes more


@dataclass(frozen=True)
class Outcome:
    """What an update computes before the optimizer's step."""

    loss: float
    gradient: Tensor
    """The gradients of all adapter weights, concatenated, fp32 on the CPU"""


class Distance(NamedTuple):
    """Relative differences of an outcome from an expected one."""

    loss: float
    gradient: float
    """The norm of the difference of the gradients"""
    size: float
    """The size of the gradient along the expected one. Rounding has no direction, so this reveals a mistake
    that `gradient` would hide"""


# By the precision of the forward pass: how much two fp32 computations may differ, and how much farther from
# fp32 the fast paths may be than the reference paths.
TOLERANCES = {
    "no": Distance(1e-5, 1e-4, 1e-4),
    "bf16": Distance(1e-3, 1e-2, 1e-2),
    "fp16": Distance(1e-3, 1e-2, 1e-2),
}


@dataclass(frozen=True)
class PathRun:
    """The updates on either the fast or the reference paths."""

    outcomes: list[Outcome]
    tokens_per_second: float
    peak_gib: float


@dataclass(frozen=True)
class Comparison:
    precision: str
    """no, bf16 or fp16"""
    fast: PathRun
    reference: PathRun
    exact: list[Outcome]
    """The reference paths in fp32 with the same weights; without mixed precision, the reference outcomes"""

    @property
    def fast_errors(self) -> list[Distance]:
        return distances(self.fast.outcomes, self.exact)

    @property
    def reference_errors(self) -> list[Distance]:
        return distances(self.reference.outcomes, self.exact)

    @property
    def agrees(self) -> bool:
        """Whether the errors of the fast paths are no more than rounding, in every update."""
        tolerances, of_reference = TOLERANCES[self.precision], self.reference_errors
        # The largest error of all updates counts, because the loss of a single one may happen to be exact.
        limits = [CHANCE * max(error[part] for error in of_reference) + tolerances[part] for part in range(3)]
        # With a NaN, every comparison is false.
        return all(error[part] <= limits[part] for error in self.fast_errors for part in range(3)) and all(
            error.gradient <= MAX_ERROR for error in of_reference
        )


def compare_paths(config: Config, parts: Parts, packing: bool, num_updates: int) -> Comparison:
    """Run the first updates on the fast paths that `parts` have enabled, then on the reference paths.

    `packing` is the layout of the fast paths. The reference paths stay enabled.
    """
    plan = make_plan(config, parts.train_set, packing, 0, 1)
    padded_plan = make_plan(config, parts.train_set, False, 0, 1)
    steps = range(min(num_updates, plan.num_steps))
    fast = _run_updates(parts, plan, steps)
    use_reference_paths(parts.token_loss)
    # On a GPU, bitsandbytes rounds activations to int8, so it is no reference for paths that do not.
    on_gpu = parts.accelerator.device.type == "cuda"
    with dequantized(parts.model) if on_gpu else nullcontext():
        reference = _run_updates(parts, padded_plan, steps)
    exact = reference.outcomes
    if parts.precision.actual != "no":
        with in_fp32(parts.model):
            exact = [compute_update(parts, padded_plan, step, nullcontext()) for step in steps]
    return Comparison(parts.precision.actual, fast, reference, exact)


def _run_updates(parts: Parts, plan: Plan, steps: range) -> PathRun:
    reset_peak_memory(parts.accelerator.device)
    outcomes, seconds, tokens = [], 0.0, 0
    for step in steps:
        start = time.perf_counter()
        outcomes.append(compute_update(parts, plan, step))
        seconds += time.perf_counter() - start
        tokens += plan.update(step).num_tokens
    return PathRun(outcomes, tokens / seconds, peak_memory_gib(parts.accelerator.device))


def compute_update(
    parts: Parts, plan: Plan, step: int, precision: AbstractContextManager[None] | None = None
) -> Outcome:
    """Run the forward and backward passes of update `step` (from 0) in this process.

    `precision` replaces the autocast context of the run's own precision.
    """
    update, token_loss, device = plan.update(step), parts.token_loss, parts.accelerator.device
    batches = iterate_batches(update.micro_batches, parts.train_set.dataset, plan.layout.packing, device)
    nll = 0.0
    parts.adapter.zero_gradients()
    for batch in batches:
        with parts.accelerator.autocast() if precision is None else precision:
            sums = token_loss(batch)
        torch.autograd.backward(sums.nll / update.num_target_tokens)
        nll += float(sums.nll.detach())
    gradients = [p.grad for p in token_loss.parameters() if p.grad is not None]
    gradient = torch.cat([grad.flatten().float().cpu() for grad in gradients])
    parts.adapter.zero_gradients()
    return Outcome(nll / update.num_target_tokens, gradient)


def distances(outcomes: Sequence[Outcome], expected: Sequence[Outcome]) -> list[Distance]:
    return [distance(*pair) for pair in zip(outcomes, expected, strict=True)]


def distance(outcome: Outcome, expected: Outcome) -> Distance:
    square = expected.gradient @ expected.gradient
    gradient = (outcome.gradient - expected.gradient).norm() / square.sqrt()
    size = outcome.gradient @ expected.gradient / square
    return Distance(abs(outcome.loss / expected.loss - 1), float(gradient), abs(float(size) - 1))


def randomize_adapter(model: Any) -> None:
    """Fill B with random numbers. In a fresh adapter, B is zero, so A has no gradient and the adapter has no
    effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
