"""`python -m finetune evaluate RUN`: compare the tuned model with its base, with confidence intervals."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data import slices
from finetune.data.by_source import is_main, source_of_each
from finetune.data.preparing.examples import tokenize_rows
from finetune.data.reading.files import read_column
from finetune.data.reading.sources import eval_sources, training_sources
from finetune.report import evaluation
from finetune.run.adapter import load_trained, parse_trained, trained_parser
from finetune.runtime.cli import CommandParser
from finetune.runtime.console import say
from finetune.runtime.files import write_atomically


def command(argv: Sequence[str]) -> None:
    """Print the figures, and write them to a file if --output names one.

    Raises:
        ValueError: invalid arguments, or an adapter, rows or a base that cannot be used.
    """
    arguments, trained = parse_trained(_parser(), argv)
    _check(arguments)
    harness = None if arguments.lm_eval is None else evaluation.import_harness()
    evaluated = evaluation.read_rows(trained, arguments.data)
    eval_sets = trained.config.eval.sets if arguments.data is None else None
    cells = None
    if arguments.by is not None:
        sources = [*training_sources(evaluated.data), *eval_sources(evaluated.data, eval_sets)]
        cells = read_column(sources, arguments.by)
    opened = load_trained(trained)
    examples = tokenize_rows(evaluated.rows, opened.tokenizer, evaluated.data, evaluated.source_names)
    if len(examples.dataset) == 0:
        raise ValueError(f"{evaluated.source}: no example is left; raise data.max_length")
    base, tuned = evaluation.evaluate_both(trained, opened, evaluated, examples)
    main = is_main(source_of_each(examples), eval_sets or ())
    everything = evaluation.group_figures("all", base, tuned, main)
    chosen = [
        *slices.by_length(examples.lengths),
        *slices.by_input(evaluated.rows, examples),
        *slices.by_leak(evaluated.leaks(), examples),
    ]
    if cells is not None:
        chosen += slices.by_value(arguments.by, cells, examples)
    chosen = [slices.Slice(name, members & main) for name, members in chosen] + slices.by_source(examples)
    groups = [
        evaluation.group_figures(name, base, tuned, members)
        for name, members in slices.without_trivial(chosen)
    ]
    evaluation.show_figures(trained, evaluated, everything)
    evaluation.show_groups(groups)
    source = {"run": str(arguments.trained), "adapter": str(trained.adapter), "data": evaluated.source}
    figures: dict[str, Any] = {**source, "all": everything, "slices": groups}
    if arguments.generate > 0:
        written = evaluation.write_answers(opened, evaluated, arguments.generate, arguments.max_new_tokens)
        figures["answers"] = evaluation.score_answers(written, arguments.max_new_tokens)
        evaluation.show_answers(figures["answers"])
    if harness is not None:
        figures["lm_eval"] = evaluation.run_harness(harness, opened, arguments.lm_eval.split(","))
        evaluation.show_harness(figures["lm_eval"])
    if arguments.output is not None:
        write_atomically(
            arguments.output,
            json.dumps(evaluation.to_plain(figures), indent=1, ensure_ascii=False, allow_nan=False),
        )
        say(f"All figures are in {arguments.output}.")


def _parser() -> CommandParser:
    parser = trained_parser(
        "evaluate",
        "[--data FILE] [--by COLUMN] [--generate N] [--lm-eval TASKS] [--output FILE]",
        "Loss, perplexity, entropy and token accuracy of the base and of the tuned model, on the run's eval "
        "rows or on all rows of a file, with 95 % confidence intervals. Changes are paired by example.",
    )
    add = parser.add_argument
    add("--data", metavar="FILE", help="evaluate on all rows of this file, instead of the run's eval rows")
    add("--by", metavar="COLUMN", help="figures for each value of this column of the data")
    add(
        "--generate",
        metavar="N",
        type=int,
        default=20,
        help="generate answers to the first N rows (default 20; 0: none)",
    )
    add(
        "--max_new_tokens",
        metavar="N",
        type=int,
        default=128,
        help="longest answer, in tokens (default 128)",
    )
    add("--lm-eval", metavar="TASKS", help="tasks of lm-evaluation-harness, separated by commas")
    add("--output", metavar="FILE", type=Path, help="write all figures to this JSON file")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if arguments.generate < 0:
        raise ValueError(f"--generate must be at least 0, not {arguments.generate}")
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens must be at least 1, not {arguments.max_new_tokens}")
    output = arguments.output
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ValueError(f"--output {output}: name a file in a folder that exists")
