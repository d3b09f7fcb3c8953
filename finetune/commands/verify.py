"""`python -m finetune verify --config FILE`: the fast paths against the plain ones, on your model and rows.

Both make the forward and backward passes of the same updates, without dropout: once as train.py would, and
once padded, with the model's own attention and head and PEFT's own layers. In fp32 they must agree. 16-bit
numbers round so much in every layer that not even two plain layouts do: there both are also compared with the
same weights in fp32, and the fast paths must come as near to that as the plain ones.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from finetune.config import Config
from finetune.config_parsing import parse_config
from finetune.data.collate import iterate_batches
from finetune.data.plan import Plan, make_plan
from finetune.model.fast_paths import choose_fast_paths, use_reference_paths
from finetune.model.precision import in_fp32
from finetune.ops.quantized import dequantized
from finetune.runtime.cli import config_parser, split_arguments
from finetune.runtime.console import console, say, show_choices
from finetune.runtime.memory import peak_memory_gib, reset_peak_memory
from finetune.training.setup import Parts, load_parts

# Of (loss, gradient, size of the gradient along the exact one), relative, by the precision of the forward
# pass: how far apart two fp32 computations may be, and how much farther from fp32 than the plain paths the
# fast ones. Rounding has no direction: the last of them shows a mistake that the second would hide.
TOLERANCES = {"no": (1e-5, 1e-4, 1e-4), "bf16": (1e-3, 1e-2, 1e-2), "fp16": (1e-3, 1e-2, 1e-2)}
LUCK = 1.5  # by this factor rounding may leave one way of computing more than another
FAR_OFF = 0.5  # of the gradient: what is no rounding in any precision


@dataclass(frozen=True)
class Outcome:
    """What an update computes, before the optimizer."""

    loss: float
    gradient: Tensor
    """All of the adapter's, end to end, fp32 on the CPU"""


def command(argv: Sequence[str]) -> int:
    """0 where every update agrees, 1 where one does not.

    Raises:
        ValueError: arguments, rows or a model that cannot be used, as for train.py.
    """
    parser = config_parser(
        "verify",
        "[--updates N]",
        "The fast paths against the plain ones, on your model and rows: differences of loss and "
        "gradient, speed and memory of each. Exit code 1 where they differ by more than rounding.",
    )
    parser.add_argument("--updates", type=int, default=3, help="how many updates are compared")
    arguments, settings = split_arguments(parser, argv)
    if arguments.updates < 1:
        raise ValueError(f"--updates must be at least 1, not {arguments.updates}")
    config = parse_config(settings)
    config = replace(config, lora=replace(config.lora, lora_dropout=0.0))
    parts = load_parts(config)
    _fill_adapter(parts.model)
    console.print("Dropout is off, and the adapter is random: a fresh one has no effect.")
    fast_paths = choose_fast_paths(config, parts.accelerator, parts.token_loss, parts.train_set)
    show_choices(fast_paths)
    return _compare(config, parts, fast_paths.packed, arguments.updates)


def _compare(config: Config, parts: Parts, packing: bool, num_updates: int) -> int:
    plan = make_plan(config, parts.train_set, packing, 0, 1)
    plain_plan = make_plan(config, parts.train_set, False, 0, 1)
    steps = range(min(num_updates, plan.num_steps))
    fast = _run(parts, plan, steps)
    use_reference_paths(parts.token_loss)
    # On a GPU bitsandbytes rounds activations to int8: no reference for what does not round them.
    on_gpu = parts.accelerator.device.type == "cuda"
    with dequantized(parts.model) if on_gpu else nullcontext():
        plain = _run(parts, plain_plan, steps)
    precision = parts.precision.actual
    if precision == "no":
        exact = plain.outcomes
    else:
        with in_fp32(parts.model):
            exact = [compute_update(parts, plain_plan, step, nullcontext()) for step in steps]
    tolerances = TOLERANCES[precision]
    table = Table("update", "loss, plain", "fast", "differs by", "gradient by", "off fp32: plain", "fast")
    plain_off = [_distances(*pair) for pair in zip(plain.outcomes, exact, strict=True)]
    fast_off = [_distances(*pair) for pair in zip(fast.outcomes, exact, strict=True)]
    for step, expected, got in zip(steps, plain.outcomes, fast.outcomes, strict=True):
        cells = [f"{expected.loss:.6f}", f"{got.loss:.6f}"]
        cells += [f"{distance:.1e}" for distance in _distances(got, expected)[:2]]
        cells += [f"{loss:.1e}, {gradient:.1e}" for loss, gradient, _ in (plain_off[step], fast_off[step])]
        table.add_row(str(step + 1), *cells)
    # Against the largest of all updates: of a single one's loss, rounding may happen to leave nothing.
    limits = [LUCK * max(off[part] for off in plain_off) + more for part, more in enumerate(tolerances)]
    agree = all(off <= limit for offs in fast_off for off, limit in zip(offs, limits, strict=True))
    agree = agree and all(off <= FAR_OFF for _, off, _ in plain_off)  # NaN is not at most anything
    console.print(table)
    table = Table("", "plain", "fast", "ratio")
    speeds = (plain.tokens_per_second, fast.tokens_per_second)
    table.add_row("useful tokens/s", *(f"{speed:,.0f}" for speed in speeds), f"{speeds[1] / speeds[0]:.2f}")
    peaks = (plain.peak_gib, fast.peak_gib)
    table.add_row("peak GiB", *(f"{peak:.2f}" for peak in peaks), f"{peaks[1] / peaks[0]:.2f}")
    console.print(table)
    loss, gradient, _ = tolerances
    bounds = f"to {loss:.0e} of the loss and {gradient:.0e} of the gradient"
    if not agree:
        say(f"The fast paths do NOT agree with the plain ones {bounds}, rounding aside.")
    elif precision == "no":
        say(f"The fast paths agree with the plain ones {bounds}.")
    else:
        say(f"The fast paths are as near to fp32 as the plain ones, {bounds}.")
    return 0 if agree else 1


def _distances(got: Outcome, expected: Outcome) -> tuple[float, float, float]:
    """(of the loss, of the gradient, of its size along the expected one), relative."""
    square = expected.gradient @ expected.gradient
    gradient = (got.gradient - expected.gradient).norm() / square.sqrt()
    size = got.gradient @ expected.gradient / square
    return abs(got.loss / expected.loss - 1), float(gradient), abs(float(size) - 1)


@dataclass(frozen=True)
class _Run:
    outcomes: list[Outcome]
    tokens_per_second: float
    peak_gib: float


def _run(parts: Parts, plan: Plan, steps: range) -> _Run:
    reset_peak_memory(parts.accelerator.device)
    outcomes, seconds, tokens = [], 0.0, 0
    for step in steps:
        start = time.perf_counter()
        outcomes.append(compute_update(parts, plan, step))
        seconds += time.perf_counter() - start
        tokens += plan.update(step).num_tokens
    return _Run(outcomes, tokens / seconds, peak_memory_gib(parts.accelerator.device))


def compute_update(
    parts: Parts, plan: Plan, step: int, precision: AbstractContextManager[None] | None = None
) -> Outcome:
    """The forward and backward passes of update `step` (from 0), in this process; in the run's precision, or
    in that of a context."""
    update, token_loss, device = plan.update(step), parts.token_loss, parts.accelerator.device
    batches = iterate_batches(update.micro_batches, parts.train_set.dataset, plan.layout.packing, device)
    nll = 0.0
    token_loss.zero_grad()
    for batch in batches:
        with parts.accelerator.autocast() if precision is None else precision:
            sums = token_loss(batch)
        torch.autograd.backward(sums.nll / update.num_target_tokens)
        nll += float(sums.nll.detach())
    gradients = [p.grad for p in token_loss.parameters() if p.grad is not None]
    gradient = torch.cat([grad.flatten().float().cpu() for grad in gradients])
    token_loss.zero_grad()
    return Outcome(nll / update.num_target_tokens, gradient)


def _fill_adapter(model: Any) -> None:
    """A random B: while it is zero, as at first, A has no gradient and the adapter no effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
