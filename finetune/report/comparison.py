"""Compare runs side by side, as a page and in the terminal.

If two runs were evaluated on the same tokens, the difference of their last losses is paired by example.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from finetune.config import flatten
from finetune.config_parsing import config_to_dict
from finetune.report.charts import NUM_COLOURS, Chart, draw
from finetune.report.html import visible, write_page
from finetune.report.intervals import Interval, between, signed
from finetune.report.page import line_of
from finetune.report.records import (
    ANSWERS_IN_WORDS,
    SCORES_OF,
    Change,
    Record,
    answer_changes,
    are_same_rows,
    changes,
    difference,
    have_same_eval_data,
    median,
    peak_memory_gib,
    read_record,
    rounding,
)
from finetune.runtime.console import console, say

# Keys that say where a run is stored and what it keeps, not how it was trained.
IGNORED_KEYS = ("output_dir", "resume", "strict", "log.", "checkpoint.")


class Cell(NamedTuple):
    """A figure and, below it, its interval or a remark."""

    text: str
    below: str = ""


class RunRow(NamedTuple):
    """A run as a line of the table: `settings` are the keys in which the runs differ, `against` compares its
    loss with that of the first run, `against_by_source` that of each source and eval set of both."""

    name: str
    settings: Sequence[tuple[str, str]]
    cells: Mapping[str, Cell]
    """By their columns, which are the same in all rows"""
    against: str
    against_by_source: Sequence[str]
    colour: int
    dashed: bool


def write_comparison(run_dirs: Sequence[Path], page: Path) -> list[RunRow]:
    """Write the page of the runs side by side, finished or not, and return its table.

    Each loss is compared with that of the first run.

    Raises:
        ValueError: a folder that holds no run, or files of one that cannot be read.
    """
    records = [read_record(folder) for folder in run_dirs]
    rows = compare(records)
    write_page(
        page,
        "comparison.html",
        title=f"{len(rows)} runs side by side",
        columns=list(rows[0].cells),
        rows=rows,
        charts=curves(records, rows),
    )
    return rows


def compare(records: Sequence[Record]) -> list[RunRow]:
    """The table: one line for each run, in the order given."""
    names, settings = _names(records), differing_settings(records)
    answers = [answer_changes(record) for record in records]
    scores = [metric for metric in SCORES_OF if any(metric in changed for changed in answers)]
    return [
        RunRow(
            names[place],
            settings[place],
            {**_figures(record), **_answer_figures(answers[place], scores), **_costs(record)},
            _against(record, names[place], records[0], names[0]) if place > 0 else "",
            _against_by_source(record, records[0]) if place > 0 else [],
            colour=place % NUM_COLOURS + 1,
            dashed=place // NUM_COLOURS % 2 == 1,
        )
        for place, record in enumerate(records)
    ]


def _names(records: Sequence[Record]) -> list[str]:
    """The names of the folders, or their paths where two folders have the same name."""
    count = Counter(record.name for record in records)
    return [record.name if count[record.name] == 1 else str(record.folder) for record in records]


def differing_settings(records: Sequence[Record]) -> list[list[tuple[str, str]]]:
    """For each run, the keys of the configuration in which the runs differ, and their values."""
    configs = [flatten(config_to_dict(record.config)) for record in records]
    keys = [
        key
        for key in configs[0]
        if not key.startswith(IGNORED_KEYS) and any(config[key] != configs[0][key] for config in configs)
    ]
    return [[(key, _as_typed(config[key])) for key in keys] for config in configs]


def _as_typed(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _figures(record: Record) -> dict[str, Cell]:
    steps, planned = record.num_steps, record.planned_steps
    state = "" if record.is_finished else "not finished"
    updates = Cell(f"{steps:,}" if steps == planned else f"{steps:,} of {planned:,}", state)
    found = changes(record)
    if not found:
        return {"updates": updates, "eval loss": Cell("none"), "accuracy": Cell(""), "change": Cell("")}
    loss, accuracy, last = found["loss"], found["mean_token_accuracy"], record.eval_lines[-1]
    change = loss.change if record.eval_lines[0]["step"] == 0 else None
    bounds = "; ".join(filter(None, (between(loss.last, 3), rounding(last))))
    return {
        "updates": updates,
        "eval loss": Cell(f"{loss.last.value:.4f}", bounds),
        "accuracy": Cell(f"{accuracy.last.value:.4f}"),
        "change": Cell("")
        if change is None
        else Cell(signed(change.value, 3), between(change, 3, sign=True)),
    }


def _answer_figures(found: Mapping[str, Change], metrics: Sequence[str]) -> dict[str, Cell]:
    """The answers' metrics at the last evaluation; empty cells for those that the run does not have."""
    cells = {}
    for metric in metrics:
        name, _, digits = ANSWERS_IN_WORDS[metric]
        last = found[metric].last if metric in found else None
        cells[name] = (
            Cell("") if last is None else Cell(f"{last.value:.{digits}f}", between(last, digits - 1))
        )
    return cells


def _against(record: Record, name: str, first: Record, first_name: str) -> str:
    """Compare the last eval losses of two runs, in a sentence."""
    for run, run_name in ((first, first_name), (record, name)):
        if not run.eval_lines:
            return f"{name} and {first_name} cannot be compared: {run_name} evaluated nothing."
    if not have_same_eval_data(first, record):
        return f"{name} was evaluated on other rows than {first_name}: their losses cannot be compared."
    assert first.last_sums is not None
    assert record.last_sums is not None
    found = difference(first.last_sums, record.last_sums)
    if found.low > 0 or found.high < 0:
        said = f"{name} is {'better' if found.value < 0 else 'worse'} than {first_name}"
    else:  # a single example has no bounds
        said = f"{name} and {first_name} cannot be told apart"
    return f"{said}: its eval loss differs by {_with_interval(found)}."


def _against_by_source(record: Record, first: Record) -> list[str]:
    """Compare the last eval losses of two runs on each source and eval set that both have."""
    if not have_same_eval_data(first, record):
        return []
    ours, theirs = record.sums_by_source, first.sums_by_source
    return [
        f"On {name} the loss differs by {_with_interval(difference(theirs[name][-1], ours[name][-1]))}."
        for name in ours
        if name in theirs and are_same_rows(theirs[name][-1], ours[name][-1])
    ]


def _with_interval(found: Interval) -> str:
    interval = between(found, 3, sign=True) or "none, of one example"
    return f"{signed(found.value, 3)} (95 % interval: {interval})"


def _costs(record: Record) -> dict[str, Cell]:
    speed, memory = median(record, "useful_tokens_per_second"), peak_memory_gib(record)
    return {
        "tokens/s": Cell("" if speed is None else f"{speed:,.0f}"),
        "GiB": Cell("" if memory is None else f"{memory:.2f}"),
    }


def show_comparison(rows: Sequence[RunRow]) -> None:
    """Print the settings in which the runs differ, the table, and how their losses compare."""
    if rows[0].settings:
        settings = Table("run", "where the runs differ", box=SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            values = ", ".join(f"{key} {value}" for key, value in row.settings)
            settings.add_row(Text(visible(row.name)), Text(visible(values)))
        console.print(settings)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("run", overflow="fold")
    for column in rows[0].cells:
        table.add_column(column, justify="right")
    for row in rows:
        cells = [
            Text(cell.text).append(f"\n{cell.below}" if cell.below else "", "dim")
            for cell in row.cells.values()
        ]
        table.add_row(Text(visible(row.name)), *cells)
    console.print(table)
    for row in rows[1:]:
        for sentence in (row.against, *row.against_by_source):
            say(visible(sentence))


def curves(records: Sequence[Record], rows: Sequence[RunRow]) -> list[Chart]:
    """Loss and accuracy of all runs, by epoch: an update is not of the same size in all of them."""

    def overlaid(title: str, unit: str, metric: str, split: str) -> Chart | None:
        lines = [
            line_of(
                record.train_lines if split == "train" else record.eval_lines,
                metric,
                row.name,
                row.colour,
                dotted=split == "eval",
                per_epoch=True,
            )._replace(dashed=row.dashed)
            for record, row in zip(records, rows, strict=True)
        ]
        lines = [line for line in lines if line.xs]
        return draw(f"{title}, {split}", unit, lines, x_name="epoch") if lines else None

    drawn = [
        overlaid(title, unit, metric, split)
        for title, unit, metric in (
            ("Loss", "nats per target token", "loss"),
            ("Token accuracy", "fraction of target tokens", "mean_token_accuracy"),
        )
        for split in ("eval", "train")
    ]
    return [chart for chart in drawn if chart is not None]
