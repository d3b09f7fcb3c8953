"""Answers to the rows of a file, in batches; what is answered is kept line by line in a partial file.

A generation that was killed resumes from it.
"""

import argparse
import csv
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from finetune.data.conversations import Conversation, to_conversation
from finetune.data.reading.cleaning import turns_asked
from finetune.data.rows import iterate_rows
from finetune.model.generate import Answer, Sampler, answer_prompts, check_limits, encode_prompt, require_room
from finetune.model.given_adapter import ADAPTER_WEIGHTS
from finetune.run.adapter import Trained, TrainedModel
from finetune.runtime.cli import CommandParser
from finetune.runtime.console import console
from finetune.runtime.files import file_sha256, write_atomically

PROMPT_COLUMNS = (
    *("messages", "instruction", "input", "history", "prompt"),
    *("system", "tools", "chat_template_kwargs"),
)
MODELS = {"tuned": ("tuned",), "base": ("base",), "both": ("tuned", "base")}
ANSWER_COLUMNS = ("answer", "num_tokens", "ended")

Record = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """How the rows are answered."""

    which: str
    """A key of MODELS"""
    max_new_tokens: int
    temperature: float
    """0: the most likely token"""
    seed: int
    system_prompt: str | None


def add_answer_options(parser: CommandParser, batched: str | None = None, note: str = "") -> None:
    """Add --max_new_tokens and --system_prompt, with a note on both; and --batch_size if `batched`, such as
    "rows", says what is answered at once."""
    parser.add_argument(
        "--max_new_tokens", type=int, default=256, help=f"longest answer, in tokens (default 256){note}"
    )
    parser.add_argument("--system_prompt", help=f"system prompt (default: the run's){note}")
    if batched is not None:
        parser.add_argument(
            "--batch_size", type=int, default=16, help=f"{batched} answered at once (default 16)"
        )


def check_answer_options(arguments: argparse.Namespace, temperature: float) -> None:
    """Raise ValueError if the temperature, or a number of `add_answer_options`, is out of range."""
    check_limits(temperature, arguments.max_new_tokens)
    if "batch_size" in arguments and arguments.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, not {arguments.batch_size}")


def choose_system_prompt(arguments: argparse.Namespace, trained: Trained) -> str | None:
    """That of --system_prompt, else the run's."""
    given: str | None = arguments.system_prompt
    return trained.config.data.system_prompt if given is None else given


class Question(NamedTuple):
    row_number: int
    prompt: list[int]
    """Token ids"""


def settings_of(request: Request, rows: Path, trained: Trained) -> Record:
    """All that the answers depend on. The batch size is not part of it: it changes rounding only."""
    model = trained.config.model
    return {
        "rows": file_sha256(rows),
        "adapter": file_sha256(trained.adapter / ADAPTER_WEIGHTS),
        "model": model.name_or_path,
        "revision": model.revision,
        "quantization": model.quantization,
        "mixed_precision": trained.config.train.mixed_precision,
        "chat_template": trained.config.data.chat_template,
        "columns": trained.config.data.columns,
        **asdict(request),
    }


def read_partial(path: Path, settings: Record) -> dict[int, Record]:
    """The answers of an earlier launch by row number; a last line that a kill left incomplete is cut off.

    Raises:
        ValueError: the settings were different, or the file is no record of a generation.
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


def encode_question(model: TrainedModel, conversation: Conversation, max_new_tokens: int) -> list[int]:
    """The prompt, as token ids, that asks for the answer to a conversation.

    Raises:
        ValueError: the chat template refuses the conversation, or it leaves no room for an answer.
    """
    prompt = encode_prompt(model.tokenizer, conversation)
    require_room(model.model, len(prompt), max_new_tokens)
    return prompt


def answer(
    model: TrainedModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float,
    seeds: Sequence[int],
    **hooks: Any,
) -> list[Answer]:
    """Answers to prompts as one batch. With a temperature above 0, each draws from a seed of its own.

    `hooks` are `answer_prompts`' own: `streamer`, `prefix_cache` and `stopping`.
    """
    sampler = Sampler(temperature, seeds, model.accelerator.device) if temperature > 0 else None
    return answer_prompts(
        model.accelerator, model.model, model.tokenizer, prompts, max_new_tokens, sampler, **hooks
    )


def encode_questions(model: TrainedModel, rows: Dataset, request: Request) -> list[Question]:
    """The prompts, longest first: batches waste little padding, and too little memory shows immediately."""
    questions = []
    for row in iterate_rows(rows):
        try:
            conversation = to_conversation(row, request.system_prompt)
            asked = replace(conversation, messages=turns_asked(conversation.messages))
            prompt = encode_question(model, asked, request.max_new_tokens)
        except ValueError as error:
            raise ValueError(f"row {row['row_number']}: {error}") from error
        questions.append(Question(row["row_number"], prompt))
    return sorted(questions, key=lambda question: (-len(question.prompt), question.row_number))


def answer_rows(
    model: TrainedModel,
    questions: Sequence[Question],
    partial: Path,
    settings: Record,
    request: Request,
    batch_size: int,
) -> dict[int, Record]:
    """The answers to these questions by row number; each batch is appended to `partial` immediately."""
    records: dict[int, Record] = {}
    bar = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    if not partial.exists():
        write_atomically(partial, json.dumps({"settings": settings}) + "\n")
    with (
        partial.open("a", encoding="utf-8", newline="") as file,
        Progress(*bar, console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("", total=len(questions))
        for first in range(0, len(questions), batch_size):
            batch = questions[first : first + batch_size]
            made = answer_batch(model, batch, request)
            file.write("".join(json.dumps(record) + "\n" for record in made))
            file.flush()
            records |= {record["row_number"]: record for record in made}
            progress.advance(task, len(batch))
    return records


def answer_batch(model: TrainedModel, batch: Sequence[Question], request: Request) -> list[Record]:
    records: list[Record] = [{"row_number": question.row_number} for question in batch]
    for which in MODELS[request.which]:
        seeds = [_seed_of(request.seed, question.row_number) for question in batch]
        try:
            with model.model.disable_adapter() if which == "base" else nullcontext():
                prompts = [question.prompt for question in batch]
                answers = answer(model, prompts, request.max_new_tokens, request.temperature, seeds)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"out of memory for {len(batch)} prompts of {len(batch[0].prompt):,} tokens and their "
                "answers; lower --batch_size"
            ) from error
        prefix = "base_" if which == "base" and request.which == "both" else ""
        for record, made in zip(records, answers, strict=True):
            names = zip(ANSWER_COLUMNS, made, strict=True)
            record.update({f"{prefix}{name}": value for name, value in names})
    return records


def _seed_of(seed: int, row_number: int) -> int:
    """The seed of a row's draws: the same in any batch, and after a kill."""
    return int(np.random.SeedSequence([seed, row_number]).generate_state(1, np.uint64)[0])


def format_answers(rows: Dataset, records: Mapping[int, Record], suffix: str) -> str:
    """The text of the output file: a line for each row, in the file's order, with its prompt columns; in a
    CSV file, lists and objects are JSON text."""
    lines = []
    for row in iterate_rows(rows):
        answers = records[row["row_number"]]
        prompt = {column: row[column] for column in PROMPT_COLUMNS if column in row}
        lines.append({"row_number": row["row_number"], **prompt, **answers})
    if suffix == ".jsonl":
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    frame = pd.DataFrame([{column: _as_cell(value) for column, value in line.items()} for line in lines])
    # A carriage return in an answer would end the line, unquoted.
    return frame.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")


def _as_cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
