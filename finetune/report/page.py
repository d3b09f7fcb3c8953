"""Write the report of a run as one page: data, settings, curves, and what training changed."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.config_parsing import config_to_yaml
from finetune.report import statements
from finetune.report.charts import NUM_COLOURS, Chart, Line, draw
from finetune.report.html import write_page
from finetune.report.published import comparable_metrics, published_note
from finetune.report.records import Record, changes, read_record
from finetune.run import summary
from finetune.runtime.console import say

PAGE = "report.html"
LOSS_OF = "loss/"  # and the name of a source or eval set: the key of its loss in a log line
TRAIN, EVAL, PUBLISHED = 1, 2, 3  # colours


def show_finished(run_dir: Path) -> None:
    """Say that a run has ended before, and write its report if a kill came between the result and that."""
    summary.show_finished(run_dir)
    if not (run_dir / PAGE).exists():
        leave_report(run_dir)


def leave_report(run_dir: Path) -> None:
    """Write the report of a run that has just ended.

    The run is already saved, so a failure to write the report must not end it with an error.
    """
    try:
        write_report(run_dir, run_dir / PAGE)
    except Exception as error:
        say(
            f"The report could not be written ({type(error).__name__}: {' '.join(str(error).split())}). "
            f"The run is saved; `python -m finetune report {shlex.quote(str(run_dir))}` tries again."
        )
    else:
        say(f"report       {run_dir / PAGE}")


def write_report(run_dir: Path, page: Path) -> None:
    """Write the report of a run, finished or not, to `page`.

    Raises:
        ValueError: `run_dir` holds no run, or files of it that cannot be read.
    """
    record = read_record(run_dir)
    found = changes(record)
    write_page(
        page,
        "report.html",
        title=f"Run {record.name}",
        lead=statements.lead(record),
        state=record.state,
        is_finished=record.is_finished,
        verdict=statements.verdict(found),
        columns=statements.columns(record),
        rows=statements.metric_rows(found),
        source_rows=statements.source_rows(record),
        answer_rows=statements.answer_rows(record),
        num_answers=record.eval_lines[-1].get("num_answers") if record.eval_lines else None,
        notes=statements.notes(record),
        charts=curves(record),
        published_note=published_note(record.config),
        evaluations=record.eval_lines,
        answers=statements.pair_answers(record),
        data=statements.data_facts(record),
        settings=statements.setting_facts(record.config),
        ran=record.environment.get("settings", []),
        machine=statements.machine_facts(record),
        command=statements.repeating_command(record),
        config=config_to_yaml(record.config),
    )


def curves(record: Record) -> list[Chart]:
    """Draw a chart of each metric that has a value."""
    published = comparable_metrics(record.config)
    train, evals = record.train_lines, record.eval_lines

    def both(title: str, unit: str, metric: str) -> Chart | None:
        lines = [line_of(train, metric, "train", TRAIN), line_of(evals, metric, "eval", EVAL, dotted=True)]
        if metric in published and record.num_steps > 0:
            value = published[metric]
            ends = [0, record.num_steps]
            lines.append(Line(f"published: {value}", ends, [value, value], PUBLISHED, dashed=True))
        return _draw(title, unit, lines)

    def alone(title: str, unit: str, metric: str, scale: float = 1) -> Chart | None:
        return _draw(title, unit, [line_of(train, metric, "", TRAIN, scale=scale)], from_zero=True)

    def by_source(title: str, entries: Sequence[dict[str, Any]], dotted: bool) -> Chart | None:
        lines = [
            line_of(entries, f"{LOSS_OF}{name}", name, place % NUM_COLOURS + 1, dotted)._replace(
                dashed=place // NUM_COLOURS % 2 == 1
            )
            for place, name in enumerate(source_names(record))
        ]
        return _draw(title, "nats per target token", lines)

    shares = {"exact_match": "exact match", "ended": "end by themselves", "tool_call_accuracy": "right calls"}
    of_answers = [line_of(evals, key, name, colour) for colour, (key, name) in enumerate(shares.items(), 1)]
    drawn = [
        both("Loss", "nats per target token", "loss"),
        by_source("Train loss by source", train, dotted=False),
        by_source("Eval loss by source", evals, dotted=True),
        both("Token accuracy", "fraction of target tokens", "mean_token_accuracy"),
        both("Entropy", "nats, of the predictions", "entropy"),
        _draw("Answers", "share", of_answers, from_zero=True),
        _draw("chrF", "0 to 100, of the answers", [line_of(evals, "chrf", "", EVAL)]),
        alone("Gradient norm", "before clipping", "grad_norm"),
        alone("Learning rate", "", "learning_rate"),
        alone("Speed", "useful tokens per second", "useful_tokens_per_second"),
        alone("MFU", "% of the device's matmul rate", "mfu", scale=100),
        alone("Memory", "GiB, peak so far", "peak_memory_gib"),
    ]
    return [chart for chart in drawn if chart is not None]


def source_names(record: Record) -> list[str]:
    """The sources and eval sets that have a loss of their own in some log line."""
    keys = (key for line in (*record.train_lines, *record.eval_lines) for key in line)
    return [key.removeprefix(LOSS_OF) for key in dict.fromkeys(keys) if key.startswith(LOSS_OF)]


def line_of(
    entries: Sequence[dict[str, Any]],
    metric: str,
    name: str,
    colour: int,
    dotted: bool = False,
    scale: float = 1,
    per_epoch: bool = False,
) -> Line:
    """Return a metric of log lines as a line of a chart, by update or by epoch."""
    known = [entry for entry in entries if metric in entry]
    xs = [entry["epoch" if per_epoch else "step"] for entry in known]
    ys = [None if entry[metric] is None else scale * entry[metric] for entry in known]
    return Line(name, xs, ys, colour, dotted)


def _draw(title: str, unit: str, lines: Sequence[Line], from_zero: bool = False) -> Chart | None:
    lines = [line for line in lines if any(y is not None for y in line.ys)]
    return draw(title, unit, lines, from_zero=from_zero) if lines else None
