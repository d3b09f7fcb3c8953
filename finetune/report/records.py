"""Read the record of a run, finished or not, and compute how its metrics changed."""

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from finetune.config import Config
from finetune.config_parsing import parse_config
from finetune.data.by_source import is_main
from finetune.report.intervals import Interval, difference_interval, mean_interval
from finetune.run.answer_files import read_answer_scores
from finetune.run.bad_update import RECORD as BAD_UPDATE
from finetune.run.folder import (
    ANSWERS,
    CONFIG,
    METRICS,
    RESULT,
    SOURCE,
    example_sums_file,
    read_environment,
    read_example_sums,
)

# Each eval metric, and the column of per-example sums that it is the mean of.
SUMS_OF = {"loss": "nll", "mean_token_accuracy": "correct", "entropy": "entropy"}
# Each metric of the answers, and the columns of its sum and its count; None counts answers.
SCORES_OF = {
    "exact_match": ("exact_match", None),
    "chrf": ("chrf", None),
    "ended": ("ended", None),
    "tool_call_accuracy": ("num_right_calls", "num_calls"),
}
# Their names, and their unit and decimal places where they are shown.
ANSWERS_IN_WORDS = {
    "exact_match": ("exact match", "share of answers", 3),
    "chrf": ("chrF", "0 to 100, likeness of the texts", 1),
    "ended": ("end by themselves", "share of answers", 3),
    "tool_call_accuracy": ("right tool calls", "share with the right name and arguments", 3),
}


@dataclass(frozen=True)
class Record:
    """What a run recorded. Lines are in the order of metrics.jsonl; null is None."""

    folder: Path
    config: Config
    environment: dict[str, Any]
    train_lines: list[dict[str, Any]]
    eval_lines: list[dict[str, Any]]
    answer_lines: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def is_finished(self) -> bool:
        return (self.folder / RESULT).is_dir()

    @property
    def num_steps(self) -> int:
        """The last update that was logged"""
        return max((int(line["step"]) for line in (*self.train_lines, *self.eval_lines)), default=0)

    @property
    def steps_per_epoch(self) -> int:
        num_examples: int = self.environment["data"]["train_examples"]
        return -(-num_examples // int(self.environment["global_batch_size"]))

    @property
    def planned_steps(self) -> int:
        train = self.config.train
        steps = self.steps_per_epoch * train.num_epochs
        return steps if train.max_steps is None else min(steps, train.max_steps)

    @property
    def state(self) -> str:
        """A sentence that says whether the run is finished"""
        steps, planned = self.num_steps, self.planned_steps
        if self.is_finished and steps < planned:
            return f"Finished early, after update {steps:,} of {planned:,}."
        if self.is_finished:
            return f"Finished, after {steps:,} updates."
        if (self.folder / BAD_UPDATE).exists():
            return "Stopped: a loss or gradient was not finite."
        return f"Not finished: logged up to update {steps:,} of {planned:,}."

    @cached_property
    def first_sums(self) -> pd.DataFrame | None:
        """Per-example sums of the first evaluation, of the main examples (`is_main`); None if the run did not
        record them"""
        return self._main(self._all_sums(0))

    @cached_property
    def last_sums(self) -> pd.DataFrame | None:
        """Those of the last evaluation"""
        return self._main(self._all_sums(-1))

    @cached_property
    def sums_by_source(self) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
        """Per-example sums of the first and the last evaluation of each source and eval set; empty if the run
        evaluated on one alone"""
        first, last = self._all_sums(0), self._all_sums(-1)
        if first is None or last is None or SOURCE not in last or not are_same_rows(first, last):
            return {}
        return {name: (_of_source(first, name), _of_source(last, name)) for name in last[SOURCE].unique()}

    @property
    def num_eval_examples(self) -> int:
        """The main eval examples: those that the overall figures are of"""
        sums = self.last_sums if self.eval_lines else None
        return int(self.environment["data"]["eval_examples"]) if sums is None else len(sums)

    def _all_sums(self, place: int) -> pd.DataFrame | None:
        step = self.eval_lines[place]["step"]
        return read_example_sums(self.folder, step) if example_sums_file(self.folder, step).exists() else None

    def _main(self, sums: pd.DataFrame | None) -> pd.DataFrame | None:
        if sums is None or SOURCE not in sums:
            return sums
        main = is_main(sums[SOURCE].to_numpy(dtype=object), self.config.eval.sets or ())
        return sums[main].reset_index(drop=True)


def _of_source(sums: pd.DataFrame, name: str) -> pd.DataFrame:
    return sums[sums[SOURCE] == name].reset_index(drop=True)


def read_record(folder: Path) -> Record:
    """Read the record of the run in `folder`.

    Raises:
        ValueError: `folder` holds no run, or a file of it cannot be read.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no run: {folder / CONFIG} is not there")
    config = parse_config(["--config", str(folder / CONFIG)])
    metrics = _whole_lines(folder / METRICS)
    return Record(
        folder,
        config,
        read_environment(folder),
        [line for line in metrics if line["split"] == "train"],
        [line for line in metrics if line["split"] == "eval"],
        _whole_lines(folder / ANSWERS),
    )


def until_result(record: Record) -> Record:
    """The record up to the evaluation of the adapter that is the run's result: with `checkpoint.keep_best`
    others may follow it."""
    step = record.environment.get("adapter_step")
    if step is None:
        return record
    return replace(record, eval_lines=[line for line in record.eval_lines if line["step"] <= step])


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON Lines file, except an incomplete last line: it may be in writing."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        *lines, _ = text.split("\n")
        return [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


class Change(NamedTuple):
    """A metric at the first and at the last evaluation, and the change between them.

    The bounds are NaN if the run did not record the per-example sums. `first` and `change` are None if there
    was only one evaluation.
    """

    first: Interval | None
    last: Interval
    change: Interval | None


def changes(record: Record) -> dict[str, Change]:
    """Compute the change of each metric in SUMS_OF; empty if nothing was evaluated."""
    lines = record.eval_lines
    if not lines:
        return {}
    before, after = record.first_sums, record.last_sums
    if after is None or (len(lines) > 1 and (before is None or not are_same_rows(before, after))):
        return {metric: _without_sums(lines, metric) for metric in SUMS_OF}
    return {metric: _change(lines, before, after, column) for metric, column in SUMS_OF.items()}


def loss_changes_by_source(record: Record) -> dict[str, Change]:
    """Compute the change of the loss of each source and eval set; empty if there are not several, or if the
    run did not record the per-example sums."""
    if not record.eval_lines:
        return {}
    return {
        name: _change(record.eval_lines, before, after, "nll")
        for name, (before, after) in record.sums_by_source.items()
    }


def answer_changes(record: Record) -> dict[str, Change]:
    """Compute the change of each metric of the answers to eval rows; empty if none were answered
    (`eval.answers`)."""
    lines = record.eval_lines
    found = [metric for metric in SCORES_OF if lines and metric in lines[0] and metric in lines[-1]]
    if not found:
        return {}
    first, last = (read_answer_scores(record.folder, lines[place]["step"]) for place in (0, -1))
    if first is None or last is None or not first["row_number"].equals(last["row_number"]):
        return {metric: _without_sums(lines, metric) for metric in found}
    return {metric: _answer_change(lines, first, last, *SCORES_OF[metric]) for metric in found}


def _answer_change(
    lines: list[dict[str, Any]], before: pd.DataFrame, after: pd.DataFrame, column: str, counted: str | None
) -> Change:
    counts = np.ones(len(after)) if counted is None else _column(after, counted)
    last = mean_interval(_column(after, column), counts)
    if len(lines) == 1:
        return Change(None, last, None)
    first = mean_interval(_column(before, column), counts)
    return Change(first, last, difference_interval(_column(before, column), _column(after, column), counts))


def _change(
    lines: list[dict[str, Any]], before: pd.DataFrame | None, after: pd.DataFrame, column: str
) -> Change:
    if before is None or len(lines) == 1:
        return Change(None, _mean(after, column), None)
    return Change(_mean(before, column), _mean(after, column), difference(before, after, column))


def _without_sums(lines: list[dict[str, Any]], metric: str) -> Change:
    first, last = (Interval(lines[place][metric], math.nan, math.nan) for place in (0, -1))
    if len(lines) == 1:
        return Change(None, last, None)
    return Change(first, last, Interval(last.value - first.value, math.nan, math.nan))


def _mean(sums: pd.DataFrame, column: str) -> Interval:
    return mean_interval(_column(sums, column), _column(sums, "num_target_tokens"))


def difference(before: pd.DataFrame, after: pd.DataFrame, column: str = "nll") -> Interval:
    """Compute the change of a mean per target token between two evaluations of the same rows."""
    counts = _column(before, "num_target_tokens")
    return difference_interval(_column(before, column), _column(after, column), counts)


def _column(sums: pd.DataFrame, column: str) -> Any:
    return sums[column].to_numpy(dtype=np.float64)


def are_same_rows(sums: pd.DataFrame, others: pd.DataFrame) -> bool:
    """Whether two evaluations cover the same rows with the same numbers of target tokens."""
    columns = ["row_number", "num_target_tokens"]
    return sums[columns].equals(others[columns])


def have_same_eval_data(record: Record, other: Record) -> bool:
    """Whether the last evaluations of two runs cover the same tokens, so that they can be paired by row."""
    if not (record.eval_lines and other.eval_lines):
        return False
    eval_data, other_data = (
        (data["eval_examples"], data["fingerprint"].rpartition("-")[2])  # of the form TRAIN-EVAL
        for data in (record.environment["data"], other.environment["data"])
    )
    sums, others = record.last_sums, other.last_sums
    return eval_data == other_data and sums is not None and others is not None and are_same_rows(sums, others)


def rounding(line: dict[str, Any]) -> str:
    """The measured rounding error of an eval line's loss, as text; empty if it was computed in fp32."""
    return f"± {line['loss_error']:.4f} by rounding" if "loss_error" in line else ""


def median(record: Record, metric: str) -> float | None:
    """The median of a metric over the train lines; None if no line has it."""
    values = [line[metric] for line in record.train_lines if line.get(metric) is not None]
    return float(np.median(values)) if values else None


def peak_memory_gib(record: Record) -> float | None:
    values = [line["peak_memory_gib"] for line in record.train_lines]
    return max(values, default=None)
