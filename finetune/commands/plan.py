"""`python -m finetune plan --config FILE`: predict the memory and time of a run, and what would fit.

The memory is predicted by part. The largest update and the largest batch of the evaluation are then run once,
and what they took is shown beside the prediction.
"""

import math
from collections.abc import Sequence

from rich.table import Table

from finetune.config_parsing import parse_config
from finetune.data.plan import Plan, make_plan
from finetune.model.fast_paths import choose_fast_paths
from finetune.runtime.cli import config_parser, split_arguments
from finetune.runtime.console import console, say, show_choices
from finetune.runtime.memory import GIB
from finetune.training.memory_model import (
    Measured,
    Prediction,
    device_memory_gib,
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
    parser.add_argument("--gib", type=float, help="memory to fit into (default: what the device has)")
    arguments, settings = split_arguments(parser, argv)
    if arguments.gib is not None and not 0 < arguments.gib < math.inf:
        raise ValueError(f"--gib must be above 0 and finite, not {arguments.gib}")
    config = parse_config(settings)
    parts = load_parts(config)
    fast_paths = choose_fast_paths(config, parts.accelerator, parts.token_loss, parts.train_set)
    show_choices(fast_paths)
    plan = make_plan(config, parts.train_set, fast_paths.packed, 0, 1)
    predicted = predict(config, parts, fast_paths.packed)
    evaluation = measure_evaluation(parts, plan, parts.eval_set)  # first: an update may keep memory it freed
    update = measure_update(config, parts, plan)
    _show_parts(predicted, update)
    _show_peaks(predicted, plan, parts, update, evaluation)
    gib = arguments.gib or device_memory_gib(parts.accelerator.device)
    return _show_budget(predicted.largest_budget(gib), gib, config.data.max_length)


def _show_parts(predicted: Prediction, update: Measured) -> None:
    table = Table("memory", "GiB", title="Predicted by part", title_justify="left")
    rows = [
        ("Python and libraries", predicted.process),
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
    table = Table("peak", "predicted GiB", "measured GiB", "seconds")
    gib = predicted.of_update(update.largest_batch) / GIB
    table.add_row("longest update", f"{gib:.2f}", f"{update.peak_gib:.2f}", f"{update.seconds:.1f}")
    epoch = update.seconds / update.num_tokens * float(plan.lengths.sum())
    if evaluation is not None:
        gib = (predicted.held + predicted.temporary(evaluation.num_tokens)) / GIB
        table.add_row(
            "longest eval batch", f"{gib:.2f}", f"{evaluation.peak_gib:.2f}", f"{evaluation.seconds:.1f}"
        )
        epoch += evaluation.seconds / evaluation.num_tokens * float(parts.eval_set.lengths.sum())
    console.print(table)
    say(f"An epoch: about {epoch / 60:,.1f} min, including its evaluation; epochs planned: {plan.num_epochs}")


def _show_budget(budget: int, gib: float, max_length: int) -> int:
    """Print the largest token budget. Returns 1 if an example may exceed it, else 0."""
    if budget < max_length:
        say(
            f"{gib:.1f} GiB fit at most {budget} tokens, and an example may have {max_length}: "
            "lower data.max_length, or set train.gradient_checkpointing"
        )
        return 1
    say(f"{gib:.1f} GiB fit --train.max_tokens_per_micro_batch {budget // 64 * 64}")
    return 0
