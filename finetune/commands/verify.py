"""`python -m finetune verify --config FILE`: compare the fast paths with the reference paths on your rows.

Both run the forward and backward passes of the same updates, without dropout. The exit code is 1 if they
differ by more than rounding.
"""

from collections.abc import Sequence
from dataclasses import replace

from rich.table import Table

from finetune.model.fast_paths import choose_fast_paths
from finetune.model.given_adapter import parse_training_config
from finetune.runtime.cli import config_parser, split_arguments
from finetune.runtime.console import console, say, show_choices
from finetune.training.comparison import TOLERANCES, Comparison, compare_paths, distances, randomize_adapter
from finetune.training.setup import load_parts


def command(argv: Sequence[str]) -> int:
    """Returns 0 if every update agrees, else 1.

    Raises:
        ValueError: invalid arguments, or rows or a model that train.py cannot use either.
    """
    parser = config_parser(
        "verify",
        "[--updates N]",
        "The fast paths against the reference paths, on your model and rows: differences of loss and "
        "gradient, speed and memory of each. Exit code 1 if they differ by more than rounding.",
    )
    parser.add_argument("--updates", type=int, default=3, help="how many updates are compared (default 3)")
    arguments, settings = split_arguments(parser, argv)
    if arguments.updates < 1:
        raise ValueError(f"--updates must be at least 1, not {arguments.updates}")
    config = parse_training_config(settings)
    config = replace(config, lora=replace(config.lora, lora_dropout=0.0))
    parts = load_parts(config)
    randomize_adapter(parts.model)
    console.print("Dropout is off, and the adapter is random: a fresh one has no effect.")
    fast_paths = choose_fast_paths(config, parts.accelerator, parts.token_loss, parts.train_set)
    show_choices(fast_paths)
    comparison = compare_paths(config, parts, fast_paths.packed, arguments.updates)
    _show_updates(comparison)
    _show_speed_and_memory(comparison)
    _show_verdict(comparison)
    return 0 if comparison.agrees else 1


def _show_updates(comparison: Comparison) -> None:
    columns = ("loss, reference", "fast", "differs by", "gradient by", "off fp32: reference", "fast")
    table = Table("update", *columns)
    fast, reference = comparison.fast.outcomes, comparison.reference.outcomes
    pairs = zip(reference, fast, distances(fast, reference), strict=True)
    errors = zip(comparison.reference_errors, comparison.fast_errors, strict=True)
    for number, ((expected, outcome, apart), off) in enumerate(zip(pairs, errors, strict=True), 1):
        cells = [f"{expected.loss:.6f}", f"{outcome.loss:.6f}", f"{apart.loss:.1e}", f"{apart.gradient:.1e}"]
        cells += [f"{error.loss:.1e}, {error.gradient:.1e}" for error in off]
        table.add_row(str(number), *cells)
    console.print(table)


def _show_speed_and_memory(comparison: Comparison) -> None:
    table = Table("", "reference", "fast", "ratio")
    fast, reference = comparison.fast, comparison.reference
    speeds = (reference.tokens_per_second, fast.tokens_per_second)
    table.add_row("useful tokens/s", *(f"{speed:,.0f}" for speed in speeds), f"{speeds[1] / speeds[0]:.2f}")
    peaks = (reference.peak_gib, fast.peak_gib)
    table.add_row("peak GiB", *(f"{peak:.2f}" for peak in peaks), f"{peaks[1] / peaks[0]:.2f}")
    console.print(table)


def _show_verdict(comparison: Comparison) -> None:
    tolerances = TOLERANCES[comparison.precision]
    bounds = f"to {tolerances.loss:.0e} of the loss and {tolerances.gradient:.0e} of the gradient"
    if not comparison.agrees:
        say(f"The fast paths do NOT agree with the reference paths {bounds}, rounding aside.")
    elif comparison.precision == "no":
        say(f"The fast paths agree with the reference paths {bounds}.")
    else:
        say(f"The fast paths are as near to fp32 as the reference paths, {bounds}.")
