"""`python -m finetune sweep --over KEY=VALUE,VALUE`: train a run for each combination of values of keys."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from finetune.report.comparison import write_comparison
from finetune.run.folder import only_one_at_a_time
from finetune.run.sweep import (
    Trial,
    as_text,
    check_trials,
    choose_combinations,
    eval_rows,
    evaluation_of_result,
    make_trial,
    parse_values,
    run_trials,
    short_keys,
)
from finetune.runtime.cli import CommandParser, split_arguments
from finetune.runtime.console import console, say
from finetune.training.best import best_in_words, best_value_first

PAGE = "comparison.html"


def command(argv: Sequence[str]) -> int:
    """Returns 0 if all runs finished, 1 if one failed, 2 if one could not start, and 128 + the signal that
    stopped the sweep.

    Raises:
        ValueError: an argument or a combination of values is invalid, or the folder holds something else.
    """
    parser = CommandParser(
        prog="python -m finetune sweep",
        usage="%(prog)s --over KEY=VALUE,VALUE [--over ...] [--config FILE] [--section.key VALUE ...]",
        description=__doc__,
        epilog="Other keys of the configuration, as train.py takes them, apply to all runs. If stopped, "
        "rerun the same command: it skips finished runs and resumes the others.",
    )
    parser.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="KEY=VALUE,VALUE",
        help="a key and its values, as the items of a YAML list: one that holds a comma is quoted, or is "
        "itself a list: 'lora.target_modules=all-linear,[q_proj, v_proj]'. Given again, for another key, "
        "all combinations are run",
    )
    parser.add_argument("--random", type=int, metavar="N", help="run N combinations drawn at random, not all")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of that draw (0)")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/sweep"), help="folder of all its runs (runs/sweep)"
    )
    arguments, settings = split_arguments(parser, argv)
    values = parse_values(arguments.over)
    combinations = choose_combinations(values, arguments.random, arguments.seed)
    folder: Path = arguments.output_dir
    trials = [make_trial(combination, settings, folder) for combination in combinations]
    check_trials(trials, folder)
    with only_one_at_a_time(replace(trials[0].config, output_dir=str(folder))):
        code, outcomes = run_trials(trials, folder)
    _show_trials(trials, outcomes)
    if code in (0, 1):
        _write_page(trials, outcomes, folder / PAGE)
    else:
        say("To resume the sweep:")
        say(f"  python -m finetune sweep {shlex.join(argv)}")
    return code


def _show_trials(trials: Sequence[Trial], outcomes: Mapping[str, str]) -> None:
    """Print the eval loss of each run's adapter and its metric `checkpoint.best_by`, and the best by that."""
    by = trials[0].config.checkpoint.best_by
    if any(trial.config.checkpoint.best_by != by for trial in trials):
        say("The runs differ in checkpoint.best_by: they are ranked by their loss.")
        by = "loss"
    metrics = list(dict.fromkeys(["loss", by]))
    headings = (f"eval {metric}" for metric in metrics)
    keys = short_keys(trials[0].values)
    table = Table(*keys, *headings, "after update", "run", title="Sweep", title_justify="left")
    ranked: dict[Path, dict[str, Any]] = {}
    for trial in trials:
        outcome = outcomes.get(trial.run_dir.name, "not begun")
        entry = evaluation_of_result(trial.run_dir) if outcome == "finished" else None
        if entry is not None:
            ranked[trial.run_dir] = entry
        figures = [""] * len(metrics) if entry is None else [f"{entry[metric]:.4f}" for metric in metrics]
        values = [Text(as_text(value)) for value in trial.values.values()]
        step = "" if entry is None else str(entry["step"])
        style = "" if outcome == "finished" else "yellow"
        table.add_row(*values, *figures, step, outcome, style=style)
    console.print(table)
    if not ranked:
        say(f"No run has an eval {by} yet.")
        return
    if len({eval_rows(run_dir) for run_dir in ranked}) > 1:
        say("The runs were not evaluated on the same examples: their figures cannot be compared.")
    best = best_value_first(list(ranked.values()), by)[0]
    run_dir = next(run_dir for run_dir, entry in ranked.items() if entry is best)
    words = best_in_words(by)
    say(f"{words[0].upper()}{words[1:]}: {best[by]:.4f}, of {run_dir}")


def _write_page(trials: Sequence[Trial], outcomes: Mapping[str, str], page: Path) -> None:
    """Write the page that compares the finished runs, if there are at least two."""
    finished = [trial.run_dir for trial in trials if outcomes.get(trial.run_dir.name) == "finished"]
    if len(finished) > 1:
        write_comparison(finished, page)
        say(f"comparison   {page}")
