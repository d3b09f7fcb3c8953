"""`python -m finetune generate RUN --input ROWS --output FILE`: answer the rows of a file, in batches.

Answers are kept line by line in FILE.partial, beside the output: if killed, rerun the same command to resume.
The output itself is written once, at the end.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from finetune.data.reading.sources import FILE_SUFFIXES, kind_of
from finetune.data.rows import read_questions
from finetune.data.splits import in_words
from finetune.model.generate import multiply_dequantized
from finetune.run.adapter import Trained, load_trained, parse_trained, trained_parser
from finetune.run.answers import (
    MODELS,
    Record,
    Request,
    add_answer_options,
    answer_rows,
    check_answer_options,
    choose_system_prompt,
    encode_questions,
    format_answers,
    read_partial,
    settings_of,
)
from finetune.runtime.console import say
from finetune.runtime.files import write_atomically

OUTPUT_SUFFIXES = (".jsonl", ".csv")
MAX_ROWS_NAMED = 10


def command(argv: Sequence[str]) -> None:
    """Answer the rows of a file.

    Raises:
        ValueError: invalid arguments; rows, a run or a model that cannot be used; a row that leaves no room
            for its answer; or existing answers with other settings.
    """
    parser = trained_parser(
        "generate",
        "--input ROWS --output FILE [options]",
        "Answer the rows of a file, in batches. If killed, rerun the same command to resume.",
    )
    parser.add_argument(
        "--input",
        required=True,
        type=Path,
        metavar="ROWS",
        help="a file as train.py reads; answers are optional",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="a new .jsonl or .csv file"
    )
    parser.add_argument(
        "--which", choices=MODELS, default="tuned", help="which answers: the tuned model, its base, or both"
    )
    add_answer_options(parser, "rows")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 picks the most likely token (the default), above 0 samples",
    )
    parser.add_argument("--seed", type=int, default=0, help="sampling seed, used with the row number (0)")
    arguments, trained = parse_trained(parser, argv)
    _check(arguments)
    with _only_writer(arguments.output):
        _generate(arguments, trained)


def _generate(arguments: argparse.Namespace, trained: Trained) -> None:
    """Answer the rows that are not answered yet, and write the output."""
    request = Request(
        arguments.which,
        arguments.max_new_tokens,
        arguments.temperature,
        arguments.seed,
        choose_system_prompt(arguments, trained),
    )
    rows, left_out, unused = read_questions(str(arguments.input), trained.config.data.columns)
    if unused:
        say(f"Not used: {in_words(unused)}")
    for reason, numbers in left_out.items():
        say(f"Left out, {reason}: {_rows_in_words(numbers)}")
    if len(rows) == 0:
        raise ValueError(f"{arguments.input} has no row to answer")
    partial = arguments.output.with_name(f"{arguments.output.name}.partial")
    settings = settings_of(request, arguments.input, trained)
    records = read_partial(partial, settings)
    if len(records) > 0:
        say(f"Resuming: {len(records):,} of {len(rows):,} rows are answered.")
    model = load_trained(trained)
    multiply_dequantized(model.model, model.precision.actual)
    questions = [q for q in encode_questions(model, rows, request) if q.row_number not in records]
    try:
        records |= answer_rows(model, questions, partial, settings, request, arguments.batch_size)
    except KeyboardInterrupt:
        say(f"The answers so far are kept in {partial}; rerun the same command to resume.")
        raise
    write_atomically(arguments.output, format_answers(rows, records, arguments.output.suffix.lower()))
    partial.unlink()
    _show_end(list(records.values()), arguments.output)


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for invalid arguments, before anything is loaded."""
    check_answer_options(arguments, arguments.temperature)
    if arguments.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {arguments.seed}")
    rows, output = arguments.input, arguments.output
    if not rows.is_file() or kind_of(str(rows)) is None:
        raise ValueError(f"--input {rows} is not a file that ends in {', '.join(FILE_SUFFIXES)}")
    if output.suffix.lower() not in OUTPUT_SUFFIXES:
        raise ValueError(f"--output {output}: name a file that ends in {' or '.join(OUTPUT_SUFFIXES)}")
    _require_new(output)
    if not os.access(output.parent, os.W_OK):
        raise ValueError(f"--output {output}: {output.parent} is not a writable folder")


def _require_new(output: Path) -> None:
    if os.path.lexists(output):
        raise ValueError(f"--output {output} exists already; choose another, or delete it")


@contextmanager
def _only_writer(output: Path) -> Iterator[None]:
    """Lock the output against a second `generate`, for as long as this one lives.

    Raises:
        ValueError: another one writes it, or has just written it.
    """
    lock = FileLock(output.with_name(f".{output.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"--output {output} is being written by another generate; wait for it, or choose another"
        ) from None
    try:
        _require_new(output)
        yield
    finally:
        lock.release()
    # Removed only beside an output: whoever still gets hold of this file then finds that one. Windows removes
    # no file that somebody has open.
    with suppress(FileNotFoundError, PermissionError):
        os.unlink(lock.lock_file)


def _rows_in_words(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"row {numbers[0]}"
    more = f" and {len(numbers) - MAX_ROWS_NAMED:,} more" if len(numbers) > MAX_ROWS_NAMED else ""
    return f"rows {', '.join(map(str, numbers[:MAX_ROWS_NAMED]))}{more}"


def _show_end(records: Sequence[Record], output: Path) -> None:
    """Print how many answers there are, how long, and how many were cut."""
    for prefix, who in (("", ""), ("base_", " of the base")):
        if f"{prefix}answer" not in records[0]:
            continue
        num_cut = sum(not record[f"{prefix}ended"] for record in records)
        mean = sum(record[f"{prefix}num_tokens"] for record in records) / len(records)
        say(f"{len(records):,} answers{who} of {mean:.0f} tokens on average; {num_cut:,} cut at the limit")
    say(f"answers      {output}")
