"""`python -m finetune generate RUN --input ROWS --output FILE`: answers to the rows of a file, in batches.

What is answered is kept line by line in FILE.partial, beside the output: a generation that was killed goes on
when launched again. The output itself is written at the end, whole.
"""

import argparse
import csv
import hashlib
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from finetune.data.cleaning import turns_asked
from finetune.data.files import FILE_SUFFIXES
from finetune.data.rows import read_questions
from finetune.data.tokenize import to_messages
from finetune.model.generate import (
    Sampler,
    answer_prompts,
    check_limits,
    dequantize_on_cpu,
    encode_prompt,
    require_room,
)
from finetune.run.adapter import Trained, TrainedModel, load_trained, parse_trained, trained_parser
from finetune.run.checkpoint import ADAPTER_WEIGHTS
from finetune.runtime.console import console, say
from finetune.runtime.files import write_atomically

WRITTEN = (".jsonl", ".csv")
PROMPT_COLUMNS = ("messages", "instruction", "input", "prompt")
MODELS = {"tuned": ("tuned",), "base": ("base",), "both": ("tuned", "base")}
ANSWER_COLUMNS = ("answer", "num_tokens", "ended")
ROWS_NAMED = 10

Record = dict[str, Any]


class Question(NamedTuple):
    row_number: int
    prompt: list[int]
    """Token ids"""


def command(argv: Sequence[str]) -> None:
    """Answer the rows of a file.

    Raises:
        ValueError: arguments, rows, a run or a model that cannot be used; a row that leaves no room for its
            answer; or what is already answered is of other settings.
    """
    parser = trained_parser(
        "generate",
        "--input ROWS --output FILE [options]",
        "Answers to the rows of a file, in batches. Killed and launched again, it goes on.",
    )
    parser.add_argument(
        "--input", required=True, type=Path, metavar="ROWS", help="a file as train.py reads; needs no answers"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help=".jsonl or .csv, not there yet"
    )
    parser.add_argument(
        "--which", choices=MODELS, default="tuned", help="who answers: the trained model, its base, or both"
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer (default 256)")
    parser.add_argument("--batch_size", type=int, default=16, help="rows answered at once (default 16)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0, the default, takes the likeliest token; above it draws",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws, with the row's number (default 0)")
    parser.add_argument("--system_prompt", help="instead of the run's")
    arguments, trained = parse_trained(parser, argv)
    _check(arguments)
    if arguments.system_prompt is None:
        arguments.system_prompt = trained.config.data.system_prompt
    rows, left_out = read_questions(str(arguments.input))
    for reason, numbers in left_out.items():
        say(f"Left out, {reason}: {_rows_in_words(numbers)}")
    if len(rows) == 0:
        raise ValueError(f"{arguments.input} has no row to answer")
    partial = arguments.output.with_name(f"{arguments.output.name}.partial")
    settings = _settings(arguments, trained)
    records = _read_partial(partial, settings)
    if len(records) > 0:
        say(f"Going on: {len(records):,} of {len(rows):,} rows are answered.")
    model = load_trained(trained)
    dequantize_on_cpu(model.model, model.precision.actual)
    questions = _questions(model, rows, arguments)
    try:
        records |= _answer_rows(
            model, [q for q in questions if q.row_number not in records], partial, settings, arguments
        )
    except KeyboardInterrupt:
        say(f"What is answered is kept in {partial}; the same command goes on.")
        raise
    write_atomically(arguments.output, _written(rows, records, arguments.output.suffix.lower()))
    partial.unlink()
    _show_end(list(records.values()), arguments.output)


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for what no generation can be made with, before anything is loaded."""
    check_limits(arguments.temperature, arguments.max_new_tokens)
    if arguments.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, not {arguments.batch_size}")
    if arguments.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {arguments.seed}")
    rows, output = arguments.input, arguments.output
    if not rows.is_file() or rows.suffix.lower() not in FILE_SUFFIXES:
        raise ValueError(f"--input {rows} is no file that ends in {', '.join(FILE_SUFFIXES)}")
    if output.suffix.lower() not in WRITTEN:
        raise ValueError(f"--output {output}: name a file that ends in {' or '.join(WRITTEN)}")
    if os.path.lexists(output):
        raise ValueError(f"--output {output} is there already; choose another, or delete it")
    if not os.access(output.parent, os.W_OK):
        raise ValueError(f"--output {output}: {output.parent} is no folder that can be written")


def _rows_in_words(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"row {numbers[0]}"
    more = f" and {len(numbers) - ROWS_NAMED:,} more" if len(numbers) > ROWS_NAMED else ""
    return f"rows {', '.join(map(str, numbers[:ROWS_NAMED]))}{more}"


def _settings(arguments: argparse.Namespace, trained: Trained) -> Record:
    """All that the answers depend on. Not the batch size: it changes no more than rounding."""
    model = trained.config.model
    return {
        "rows": file_sha256(arguments.input),
        "adapter": file_sha256(trained.adapter / ADAPTER_WEIGHTS),
        "model": model.name_or_path,
        "revision": model.revision,
        "quantization": model.quantization,
        "mixed_precision": trained.config.train.mixed_precision,
        **{key: getattr(arguments, key) for key in ("which", "max_new_tokens", "temperature", "seed")},
        "system_prompt": arguments.system_prompt,
    }


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_partial(path: Path, settings: Record) -> dict[int, Record]:
    """By row number, what an earlier start has answered; a last line that a kill has torn is cut off.

    Raises:
        ValueError: it was answered with other settings, or the file is none of ours.
    """
    if not path.exists():
        return {}
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    try:
        lines = [json.loads(line) for line in whole.split(b"\n")]
        before, records = dict(lines[0]["settings"]), {record["row_number"]: record for record in lines[1:]}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no record of a generation; delete it, or choose another --output"
        ) from error
    if before != settings:
        differing = [
            _difference(key, before.get(key), now) for key, now in settings.items() if before.get(key) != now
        ]
        raise ValueError(
            f"{path} holds answers that were made otherwise ({'; '.join(differing)}); delete it, or choose "
            "another --output"
        )
    os.truncate(path, path.stat().st_size - len(torn))
    return records


def _difference(key: str, before: Any, now: Any) -> str:
    if key in ("rows", "adapter"):
        return f"the {key} {'were' if key == 'rows' else 'was'} another"
    short = [textwrap.shorten(str(value), 60, placeholder=" ...") for value in (before, now)]
    return f"{key} was {short[0]}, is {short[1]}"


def _questions(model: TrainedModel, rows: Dataset, arguments: argparse.Namespace) -> list[Question]:
    """The longest first: batches waste little, and memory that does not suffice shows at once."""
    questions = []
    for row in rows:
        try:
            asked = turns_asked(to_messages(row, arguments.system_prompt))
            question = Question(row["row_number"], encode_prompt(model.tokenizer, asked))
            require_room(model.model, len(question.prompt), arguments.max_new_tokens)
        except ValueError as error:
            raise ValueError(f"row {row['row_number']}: {error}") from error
        questions.append(question)
    return sorted(questions, key=lambda question: (-len(question.prompt), question.row_number))


def _answer_rows(
    model: TrainedModel,
    questions: Sequence[Question],
    partial: Path,
    settings: Record,
    arguments: argparse.Namespace,
) -> dict[int, Record]:
    """By row number, the answers to these questions, each batch of which is kept in `partial` at once."""
    records: dict[int, Record] = {}
    bar = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    if not partial.exists():
        write_atomically(partial, json.dumps({"settings": settings}) + "\n")
    with (
        partial.open("a", encoding="utf-8") as file,
        Progress(*bar, console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("", total=len(questions))
        for first in range(0, len(questions), arguments.batch_size):
            batch = questions[first : first + arguments.batch_size]
            made = _answer_batch(model, batch, arguments)
            file.write("".join(json.dumps(record) + "\n" for record in made))
            file.flush()
            records |= {record["row_number"]: record for record in made}
            progress.advance(task, len(batch))
    return records


def _answer_batch(
    model: TrainedModel, batch: Sequence[Question], arguments: argparse.Namespace
) -> list[Record]:
    records: list[Record] = [{"row_number": question.row_number} for question in batch]
    for which in MODELS[arguments.which]:
        sampler = None
        if arguments.temperature > 0:
            seeds = [_seed_of(arguments.seed, question.row_number) for question in batch]
            sampler = Sampler(arguments.temperature, seeds, model.accelerator.device)
        try:
            with model.model.disable_adapter() if which == "base" else nullcontext():
                answers = answer_prompts(
                    model.accelerator,
                    model.model,
                    model.tokenizer,
                    [question.prompt for question in batch],
                    arguments.max_new_tokens,
                    sampler,
                )
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the memory does not hold {len(batch)} prompts of {len(batch[0].prompt):,} tokens and their "
                "answers; lower --batch_size"
            ) from error
        prefix = "base_" if which == "base" and arguments.which == "both" else ""
        for record, answer in zip(records, answers, strict=True):
            names = zip(ANSWER_COLUMNS, answer, strict=True)
            record.update({f"{prefix}{name}": value for name, value in names})
    return records


def _seed_of(seed: int, row_number: int) -> int:
    """Of a row's draws: so they are the same in any batch, and after a kill."""
    return int(np.random.SeedSequence([seed, row_number]).generate_state(1, np.uint64)[0])


def _written(rows: Dataset, records: Mapping[int, Record], suffix: str) -> str:
    """The output: a line for each row, in the order of the file, with the prompt's columns as they came."""
    columns = [column for column in rows.column_names if column in PROMPT_COLUMNS]
    lines = []
    for row in rows:
        answers = records[row["row_number"]]
        prompt = {column: row[column] for column in columns}
        lines.append({"row_number": row["row_number"], **prompt, **answers})
    if suffix == ".jsonl":
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    frame = pd.DataFrame(lines)
    if "messages" in columns:
        frame["messages"] = [json.dumps(messages, ensure_ascii=False) for messages in frame["messages"]]
    # A carriage return in an answer would end the line, unquoted.
    return frame.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)


def _show_end(records: Sequence[Record], output: Path) -> None:
    """Print how many answers there are, how long, and how many were cut."""
    for prefix, who in (("", ""), ("base_", " of the base")):
        if f"{prefix}answer" not in records[0]:
            continue
        num_cut = sum(not record[f"{prefix}ended"] for record in records)
        mean = sum(record[f"{prefix}num_tokens"] for record in records) / len(records)
        say(f"{len(records):,} answers{who} of {mean:.0f} tokens on average; {num_cut:,} cut at the limit")
    say(f"answers      {output}")
