"""`python -m finetune compare RUN RUN ...`: runs side by side, in the terminal and as a page.

Where runs were evaluated on the same tokens, the difference of their last losses is taken example by example.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from finetune.config import flatten
from finetune.config_parsing import config_to_dict
from finetune.report.charts import NUM_COLOURS, STYLE, Chart, draw
from finetune.report.html import check_page_path, visible, write_page
from finetune.report.page import between, line_of, signed
from finetune.report.records import (
    Record,
    changes,
    difference,
    have_same_eval_data,
    median,
    peak_memory_gib,
    read_record,
)
from finetune.runtime.cli import CommandParser, parse_arguments
from finetune.runtime.console import console, say

# Keys that say where a run lies and what it keeps, not what it is.
LEFT_OUT = ("output_dir", "resume", "strict", "log.", "checkpoint.")


COLUMNS = ["updates", "eval loss", "accuracy", "change", "tokens/s", "GiB"]


class Cell(NamedTuple):
    """A figure and, below it, its interval or what it means."""

    text: str
    below: str = ""


class Row(NamedTuple):
    """A run. `settings` are the keys in which the runs differ, `against` says how it did beside the first."""

    name: str
    settings: Sequence[tuple[str, str]]
    cells: Sequence[Cell]
    against: str
    colour: int
    dashed: bool


def command(argv: Sequence[str]) -> None:
    """Raises ValueError where an argument is wrong, or a folder holds no run."""
    parser = CommandParser(
        prog="python -m finetune compare", usage="%(prog)s RUN RUN ... [--page FILE]", description=__doc__
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run's folder")
    parser.add_argument(
        "--page", metavar="FILE", type=Path, default=Path("compare.html"), help="where the page is written"
    )
    arguments = parse_arguments(parser, argv)
    if len(arguments.runs) < 2:
        raise ValueError("name two runs or more; `python -m finetune report RUN` shows one")
    check_page_path(arguments.page)
    rows = write_comparison(arguments.runs, arguments.page)
    show_rows(rows)
    say(f"page  {arguments.page}")


def write_comparison(run_dirs: Sequence[Path], page: Path) -> list[Row]:
    """Write the page of the runs side by side, finished or not, and return its table.

    Losses are compared with those of the first run.

    Raises:
        ValueError: a folder that holds no run, or files of one that cannot be read.
    """
    records = [read_record(folder) for folder in run_dirs]
    rows = compare(records)
    write_page(
        page,
        _TEMPLATE,
        title=f"{len(rows)} runs side by side",
        chart_style=STYLE,
        columns=COLUMNS,
        rows=rows,
        charts=curves(records, rows),
    )
    return rows


def compare(records: Sequence[Record]) -> list[Row]:
    """The table: a row for each run, in the order given."""
    names, settings = _names(records), differing_settings(records)
    return [
        Row(
            names[place],
            settings[place],
            [*_figures(record), *_costs(record)],
            _against(record, names[place], records[0], names[0]) if place > 0 else "",
            colour=place % NUM_COLOURS + 1,
            dashed=place // NUM_COLOURS % 2 == 1,
        )
        for place, record in enumerate(records)
    ]


def _names(records: Sequence[Record]) -> list[str]:
    """The names of the folders; where two have the same, their paths."""
    count = Counter(record.name for record in records)
    return [record.name if count[record.name] == 1 else str(record.folder) for record in records]


def differing_settings(records: Sequence[Record]) -> list[list[tuple[str, str]]]:
    """Of each run, the keys of the configuration in which the runs differ, and what they are there."""
    configs = [flatten(config_to_dict(record.config)) for record in records]
    keys = [
        key
        for key in configs[0]
        if not key.startswith(LEFT_OUT) and any(config[key] != configs[0][key] for config in configs)
    ]
    return [[(key, _as_typed(config[key])) for key in keys] for config in configs]


def _as_typed(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _figures(record: Record) -> list[Cell]:
    steps, planned = record.num_steps, record.planned_steps
    state = "" if record.is_finished else "not finished"
    updates = Cell(f"{steps:,}" if steps == planned else f"{steps:,} of {planned:,}", state)
    found = changes(record)
    if not found:
        return [updates, Cell("none"), Cell(""), Cell("")]
    loss, accuracy = found["loss"], found["mean_token_accuracy"]
    change = loss.change if record.eval_lines[0]["step"] == 0 else None
    return [
        updates,
        Cell(f"{loss.last.value:.4f}", between(loss.last, 3)),
        Cell(f"{accuracy.last.value:.4f}"),
        Cell("") if change is None else Cell(signed(change.value, 3), between(change, 3, sign=True)),
    ]


def _against(record: Record, name: str, first: Record, first_name: str) -> str:
    """What the last eval losses of two runs say of them, in a sentence."""
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
    else:  # no bounds, of a single example, tell nothing either
        said = f"{name} and {first_name} cannot be told apart"
    interval = between(found, 3, sign=True) or "none, of one example"
    return f"{said}: its eval loss differs by {signed(found.value, 3)} (95 % interval: {interval})."


def _costs(record: Record) -> list[Cell]:
    speed, memory = median(record, "useful_tokens_per_second"), peak_memory_gib(record)
    return [
        Cell("" if speed is None else f"{speed:,.0f}"),
        Cell("" if memory is None else f"{memory:.2f}"),
    ]


def show_rows(rows: Sequence[Row]) -> None:
    """Print what the runs differ in, and the table."""
    if rows[0].settings:
        settings = Table("run", "where the runs differ", box=SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            values = ", ".join(f"{key} {value}" for key, value in row.settings)
            settings.add_row(Text(visible(row.name)), Text(visible(values)))
        console.print(settings)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("run", overflow="fold")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in rows:
        cells = [Text(cell.text).append(f"\n{cell.below}" if cell.below else "", "dim") for cell in row.cells]
        table.add_row(Text(visible(row.name)), *cells)
    console.print(table)
    for row in rows[1:]:
        say(visible(row.against))


def curves(records: Sequence[Record], rows: Sequence[Row]) -> list[Chart]:
    """Loss and accuracy of all runs by epoch: updates of different sizes cannot lie side by side."""

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
            ("Token accuracy", "share of target tokens", "mean_token_accuracy"),
        )
        for split in ("eval", "train")
    ]
    return [chart for chart in drawn if chart is not None]


_TEMPLATE = """\
{% extends "page" %}
{% block style %}
{{ chart_style }}
.runs { width: 100%; }
.runs td { vertical-align: top; }
.runs td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
.runs small { display: block; color: var(--dim); font-size: .75rem; }
.runs th { white-space: normal; overflow-wrap: anywhere; vertical-align: bottom; }
.runs i { display: inline-block; width: 1.3rem; border-top: 3px solid; vertical-align: .25rem;
  margin-right: .35rem; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.legend { margin: .4rem 0 1rem; }
@media (max-width: 48rem) {
  .runs, .runs tbody { display: block; }
  .runs tr { display: block; border: 1px solid var(--line); border-radius: .5rem; padding: .6rem;
    margin: .8rem 0; background: var(--card); break-inside: avoid; }
  .runs tr:first-child { display: none; }
  .runs td, .runs td:first-child { display: flex; gap: .3rem 1rem; justify-content: space-between;
    border: 0; padding: .15rem 0; white-space: normal; }
  .runs td:first-child { display: block; padding-bottom: .3rem; }
  .runs td[data-label]::before { content: attr(data-label); color: var(--dim); text-align: left;
    overflow-wrap: anywhere; }
}
{% endblock %}
{% block content %}
{% macro swatch(row) %}
<i style="border-color: var(--c{{ row.colour }});
border-top-style: {{ 'dashed' if row.dashed else 'solid' }}"></i>
{%- endmacro %}
<h1>{{ title }}</h1>
<table class="runs"><tbody>
<tr><th>run</th>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr><td>{{ swatch(row) }}<b>{{ row.name }}</b>
{% for key, value in row.settings %}<small>{{ key }} {{ value }}</small>{% endfor %}</td>
{% for cell in row.cells %}
<td data-label="{{ columns[loop.index0] }}"><span>{{ cell.text }}<small>{{ cell.below }}</small></span></td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table>
{% for row in rows[1:] %}<p class="against">{{ row.against }}</p>{% endfor %}
<p class="note">Eval loss (nats per target token) and accuracy are those of the last evaluation; the change
is that of the loss since before training. Intervals hold 95 % of what examples drawn anew would give
(bootstrap). They cover the choice of the examples, not that of the training's seed.</p>
{% if charts %}
<h2>Curves</h2>
<p class="legend">{% for row in rows %}<span>{{ swatch(row) }}{{ row.name }}</span> {% endfor %}</p>
<div class="charts">
{% for chart in charts %}
<figure><figcaption><b>{{ chart.title }}</b> <span class="legend">{{ chart.unit }}</span></figcaption>
{{ chart.svg }}</figure>
{% endfor %}
</div>
{% endif %}
{% endblock %}
"""
