"""`python -m finetune plan --config FILE`: predict the memory and time of a run, and what would fit.

The memory is predicted by part. The largest update and the largest batch of the evaluation are then run once,
and what they took is shown beside the prediction.
"""

import math
from collections.abc import Sequence

import torch
from rich.table import Table

from finetune.data.plan import Plan, make_plan, requested_budget
from finetune.model.fast_paths import choose_fast_paths
from finetune.model.given_adapter import parse_training_config
from finetune.run.token_budget import fitting_budget, is_automatic, too_little_memory
from finetune.runtime.cli import config_parser, split_arguments
from finetune.runtime.console import console, say, show_choices
from finetune.runtime.memory import GIB, room_on
from finetune.training.memory_model import (
    Measured,
    Prediction,
    measure_evaluation,
    measure_update,
    predict,
)
from finetune.training.setup import Parts, load_parts


def command(argv: Sequence[str]) -> int:
    """Returns 0, or 1 if not even the longest example fits into the given GiB.

    Raises:
        ValueError: invalid arguments, or rows or a model that train.py cannot use either.
    """
    parser = config_parser(
        "plan",
        "[--gib N]",
        "Memory by part and time of an epoch, predicted and measured, and the largest token budget that fits "
        "into a number of GiB.",
    )
    parser.add_argument("--gib", type=float, help="memory to fit into (default: what is free, less a margin)")
    arguments, settings = split_arguments(parser, argv)
    if arguments.gib is not None and not 0 < arguments.gib < math.inf:
        raise ValueError(f"--gib must be above 0 and finite, not {arguments.gib}")
    config = parse_training_config(settings)
    parts = load_parts(config)
    fast_paths = choose_fast_paths(config, parts.accelerator, parts.token_loss, parts.train_set)
    show_choices(fast_paths)
    packing, device = fast_paths.packed, parts.accelerator.device
    gib = arguments.gib or _usable_gib(device)
    predicted = predict(config, parts.accelerator, parts.token_loss, packing)
    max_tokens = requested_budget(config)
    if is_automatic(config, device):
        max_tokens = max(fitting_budget(config, predicted, gib, packing), config.data.max_length)
    plan = make_plan(config, parts.train_set, packing, 0, 1, max_tokens)
    evaluation = measure_evaluation(parts, plan, parts.eval_set)  # first: an update may keep memory it freed
    update = measure_update(config, parts, plan)
    _show_parts(predicted, update)
    _show_peaks(predicted, plan, parts, update, evaluation)
    budget = predicted.largest_budget(gib)
    if budget < config.data.max_length:
        say(too_little_memory(config, budget, gib))
        return 1
    budget = max(budget // 64 * 64, config.data.max_length)
    say(f"{gib:.1f} GiB fit --train.max_tokens_per_micro_batch {budget}")
    return 0


def _usable_gib(device: torch.device) -> float:
    """The memory that a run may take on this device, printed with its parts."""
    room = room_on(device)
    say(f"A run can have {room.total_gib:.1f} GiB here, and leaves {room.margin_gib:.1f} of them as a margin")
    return room.usable_gib


def _show_parts(predicted: Prediction, update: Measured) -> None:
    table = Table("memory", "GiB", title="Predicted by part", title_justify="left")
    rows = [
        ("Python and libraries" if update.reserved_gib is None else "other tensors", predicted.process),
        ("base", predicted.base),
        ("adapter and its gradient", predicted.adapter),
        ("optimizer", predicted.optimizer),
        (
            f"kept of {update.largest_batch:,} tokens for the backward pass",
            update.largest_batch * predicted.kept_per_token,
        ),
        ("temporary, in the largest layer or the head", predicted.temporary(update.largest_batch)),
    ]
    for name, num_bytes in rows:
        table.add_row(name, f"{num_bytes / GIB:.2f}")
    console.print(table)


def _show_peaks(
    predicted: Prediction, plan: Plan, parts: Parts, update: Measured, evaluation: Measured | None
) -> None:
    """Print predicted and measured peaks, and how long an epoch takes."""
    measured = ["measured GiB"] if update.reserved_gib is None else ["allocated GiB", "reserved GiB"]
    table = Table("peak", "predicted GiB", *measured, "seconds")
    _add_peak(table, "longest update", predicted.of_update(update.largest_batch), update)
    epoch = update.seconds / update.num_tokens * float(plan.lengths.sum())
    if evaluation is not None:
        expected = predicted.held + predicted.temporary(evaluation.num_tokens)
        _add_peak(table, "longest eval batch", expected, evaluation)
        epoch += evaluation.seconds / evaluation.num_tokens * float(parts.eval_set.lengths.sum())
    console.print(table)
    say(f"An epoch: about {epoch / 60:,.1f} min, including its evaluation; epochs planned: {plan.num_epochs}")


def _add_peak(table: Table, name: str, predicted: float, measured: Measured) -> None:
    """Add a row: a prediction in bytes, and what was measured."""
    peaks = [predicted / GIB, measured.peak_gib]
    peaks += [] if measured.reserved_gib is None else [measured.reserved_gib]
    table.add_row(name, *(f"{gib:.2f}" for gib in peaks), f"{measured.seconds:.1f}")
