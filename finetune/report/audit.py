"""How an audit looks: its tables, lists and rows, in the terminal and on the page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from finetune.config import described
from finetune.data.audit import SCOPES, Audit, same_in_scope
from finetune.data.duplicates import NEAR
from finetune.data.findings import Entry, Listing, find_listings, find_problems
from finetune.data.templates.anatomy import ROLES
from finetune.report.audited_rows import ShownRow, heading, pick_rows, print_row
from finetune.report.html import visible, write_page
from finetune.runtime.console import console

ROWS_IN_TERMINAL = 3
ENTRIES_IN_TERMINAL = 10
ROWS_NAMED = 5  # of those with which the template does something
HISTOGRAM_BINS, HISTOGRAM_WIDTH = 16, 40
LONG_LIST = 12  # a list of more entries is folded on the page
LONG_TEXT, SHOWN_TEXT = 2_000, 600  # characters: the middle of a longer text that is only read is folded
DEFAULT_SYSTEM = "the chat template's default, if it has one"
MOVED = "an answer is rewritten once others follow; it is trained as it was"


class Table(NamedTuple):
    """The first column names what the others give figures for."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


class AuditView(NamedTuple):
    """All that is shown of an audit. `rows` are the worst first, `note` says how many of all they are;
    `names` says how each row number is written."""

    title: str
    tables: Sequence[Table]
    histogram: str
    listings: Sequence[Listing]
    rows: Sequence[ShownRow]
    note: str
    names: Mapping[int, str]


def make_view(audit: Audit, tokenizer: Any) -> AuditView:
    """Put together all that is shown of an audit."""
    problems = find_problems(audit)
    rows = pick_rows(audit, tokenizer, problems)
    return AuditView(
        title=f"Audit of {described(audit.config.data.path)}",
        tables=summary(audit),
        histogram=length_histogram(np.concatenate([examples.lengths for examples in audit.sets.values()])),
        listings=find_listings(audit),
        rows=rows,
        note=_what_is_shown(len(problems), rows),
        names=row_names(audit),
    )


def summary(audit: Audit) -> list[Table]:
    """All tables about the data set as a whole."""
    return [
        _facts_table(audit),
        *_tables_if_any(_sources_table(audit), _template_table(audit), _unused_table(audit)),
        _roles_table(audit.figures),
        _ends_table(audit.figures),
        _lengths_table(audit),
        _likeness_table(audit),
    ]


def _tables_if_any(*tables: Table) -> list[Table]:
    return [table for table in tables if table.rows]


def _facts_table(audit: Audit) -> Table:
    rows, data = audit.rows, audit.config.data
    taken = len(rows.train) + len(rows.eval)
    counts = {split: len(examples.dataset) for split, examples in audit.sets.items()}
    cut = audit.cut_rows()
    facts = [
        ("data", described(data.path)),
        ("format", ", ".join(dict.fromkeys(rows.formats))),
        ("tokenizer", audit.config.model.name_or_path),
        ("chat template", data.chat_template or "the model's own"),
        ("system prompt", DEFAULT_SYSTEM if data.system_prompt is None else data.system_prompt),
        ("rows", f"{rows.num_read:,} read, {rows.num_kept:,} usable, {taken:,} taken"),
        ("dropped", ", ".join(f"{len(n):,} {reason}" for reason, n in audit.dropped.items()) or "none"),
        ("examples", f"{counts['train']:,} train, {counts['eval']:,} eval"),
        (f"cut at {data.max_length}", f"{len(cut):,}, {sum(lost for _, lost, *_ in cut):,} tokens lost"),
        (
            "trained on",
            "every token" if data.train_on == "all" else "what the model writes, to its end of turn",
        ),
    ]
    return Table("What is trained on", (), facts)


def _sources_table(audit: Audit) -> Table:
    """One line for each source, if there are several."""
    rows = []
    names = audit.rows.source_names if len(audit.rows.source_names) > 1 else ()
    all_targets = int(audit.figures["num_targets"].sum())
    for place, (name, format_) in enumerate(zip(names, audit.rows.formats, strict=False)):
        own = audit.figures[audit.figures["source"] == place]
        counts = [int((own["split"] == split).sum()) for split in ("train", "eval")]
        tokens, targets = int(own["num_tokens"].sum()), int(own["num_targets"].sum())
        figures = (*counts, tokens, targets)
        rows.append((name, format_, *(f"{figure:,}" for figure in figures), f"{targets / all_targets:.1%}"))
    columns = ("source", "format", "train rows", "eval rows", "tokens", "trained on", "of all")
    return Table("Sources", columns, rows)


def _template_table(audit: Audit) -> Table:
    moved = audit.figures.index[audit.figures["num_branches"] > 0].tolist()
    found = {**audit.remarks, **({MOVED: moved} if moved else {})}
    rows = [
        (remark, f"{len(numbers):,}", f"{len(numbers) / len(audit.figures):.1%}", _such_as(numbers))
        for remark, numbers in sorted(found.items(), key=lambda item: -len(item[1]))
    ]
    note = f"{int(audit.figures['num_branches'].sum()):,} answers are trained as they were." if moved else ""
    return Table("What the chat template does with rows", ("", "rows", "of all", "such as"), rows, note)


def _such_as(numbers: Sequence[int]) -> str:
    first = ", ".join(map(str, sorted(numbers)[:ROWS_NAMED]))
    return first if len(numbers) <= ROWS_NAMED else f"{first}, ..."


def _unused_table(audit: Audit) -> Table:
    rows = [(name, f"{count:,}") for name, count in audit.rows.unused.most_common()]
    note = "With --strict they stop a run. data.columns gives a column the name that it has here."
    return Table("Not used of the rows", ("", "rows"), rows, note)


def _roles_table(figures: pd.DataFrame) -> Table:
    rows = []
    for split, part in _parts(figures):
        total, trained_total = int(part["num_tokens"].sum()), int(part["num_targets"].sum())
        for role in ROLES:
            tokens, trained = int(part[role].sum()), int(part[f"{role} trained"].sum())
            if tokens > 0:
                share, of_them = f"{tokens / total:.1%}", f"{trained / tokens:.1%}"
                rows.append((f"{split}, {role}", f"{tokens:,}", share, f"{trained:,}", of_them))
        of_all = f"{trained_total / total:.1%}"
        rows.append((f"{split}, all", f"{total:,}", "100.0%", f"{trained_total:,}", of_all))
    return Table(
        "Tokens by role",
        ("", "tokens", "share", "trained on", "of them"),
        rows,
        "template: what the chat template writes by itself, such as tools and ends of turns.",
    )


def _ends_table(figures: pd.DataFrame) -> Table:
    rows = []
    for split, part in _parts(figures):
        last = part["last_end"].value_counts()
        every = (part["num_ends"] > 0) & (part["num_ends"] == part["num_trained_ends"])
        counts = (
            len(part),
            last.get("trained", 0),
            every.sum(),
            last.get("untrained", 0),
            last.get("none", 0),
        )
        rows.append((split, *(f"{count:,}" for count in counts)))
    columns = ("", "rows", "last one trained", "every one trained", "last one not", "none written")
    return Table("End-of-turn tokens of the answers", columns, rows)


def _lengths_table(audit: Audit) -> Table:
    rows = []
    parts = [(split, [examples]) for split, examples in audit.sets.items() if len(examples.dataset) > 0]
    parts += [("both", list(audit.sets.values()))] if len(parts) > 1 else []
    for split, sets in parts:
        by_name = {
            "tokens": np.concatenate([examples.lengths for examples in sets]),
            "target tokens": np.concatenate([examples.target_counts for examples in sets]),
        }
        for name, lengths in by_name.items():
            p90, p99 = np.quantile(lengths, [0.9, 0.99], method="inverted_cdf")
            figures = (lengths.min(), np.median(lengths), lengths.mean(), p90, p99, lengths.max())
            rows.append((f"{split}, {name}", *(_figure(figure) for figure in figures)))
    columns = ("", "min", "median", "mean", "90%", "99%", "max")
    return Table("Lengths of the examples", columns, rows, "90%: nine of ten examples are at most this long.")


def _likeness_table(audit: Audit) -> Table:
    rows = []
    for name, alike in audit.likeness.items():
        counts = []
        for scope in SCOPES:
            same = sum(len(same_in_scope(group, scope, audit.split_of)[0]) for group in alike.same)
            counts += [f"{same:,}", f"{len(alike.near[scope]):,}"]
        rows.append((name, *counts))
    columns = ("rows that share", "same, train", "near", "same, eval", "near", "eval in train", "near")
    note = (
        "same: but for case, spaces and punctuation around words. near: at least "
        f"{NEAR:.0%} of the 5-character pieces in common. prompt: the instruction with its input. "
        "data.split_by instruction keeps rows of one instruction on one side."
    )
    return Table("Duplicates and leaks", columns, rows, note)


def length_histogram(lengths: NDArray[np.int64]) -> str:
    """A histogram of the lengths [E], one line for each bin."""
    width = -(-int(lengths.max()) // HISTOGRAM_BINS)
    counts = np.bincount((lengths - 1) // width)
    return "\n".join(
        f"{number * width + 1:>6} to {(number + 1) * width:<6} {count:>8,}  "
        + "#" * round(HISTOGRAM_WIDTH * count / counts.max())
        for number, count in enumerate(counts)
    )


def _what_is_shown(num_problems: int, shown: Sequence[ShownRow]) -> str:
    found = sum(bool(row.problems) for row in shown)
    which = "all of them" if found == num_problems else f"the worst {found:,} of them"
    return f"{num_problems:,} rows have a finding. Here are {which}, and {len(shown) - found} rows without."


def row_names(audit: Audit) -> dict[int, str]:
    """How each row that was read is written: its number, after "eval" if it is an eval row."""
    names = {number: str(number) for number in range(1, audit.rows.num_read + 1)}
    return names | {number: f"eval {number}" for number in audit.rows.eval["row_number"]}


def _parts(figures: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows by split and, where there are two splits, together."""
    parts = [(str(split), figures[figures["split"] == split]) for split in figures["split"].unique()]
    return [*parts, ("both", figures)] if len(parts) > 1 else parts


def _figure(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def write_view(path: Path, view: AuditView) -> None:
    """Write the page whole or not at all."""
    shown = {row.number for row in view.rows}
    values = {"shown": shown, "long": LONG_LIST, "long_text": LONG_TEXT, "shown_text": SHOWN_TEXT}
    write_page(path, "audit.html", **view._asdict(), **values, heading=heading)


def print_view(view: AuditView) -> None:
    """Print the figures, the first row numbers of each finding, and a few of the worst rows."""
    for table in view.tables:
        rich_table = RichTable(title=table.title, title_justify="left", show_header=bool(table.columns))
        for position, column in enumerate(table.columns):
            rich_table.add_column(column, justify="right" if position else "left")
        for cells in table.rows:
            rich_table.add_row(*(Text(visible(cell)) for cell in cells))
        console.print(rich_table)
        if table.note:
            console.print(Text(table.note, style="dim"))
    console.print(Text(f"Examples by length in tokens\n{view.histogram}"))
    for listing in view.listings:
        console.print(Text(f"{listing.title} ({len(listing.entries):,})", style="bold"))
        entries = [_entry_in_words(entry, listing.joint, view.names) for entry in listing.entries]
        separator = ", " if listing.joint == ", " else "\n"
        text = separator.join(entries[:ENTRIES_IN_TERMINAL])
        if len(entries) > ENTRIES_IN_TERMINAL:
            text += f"{separator}and {len(entries) - ENTRIES_IN_TERMINAL:,} more, on the page"
        console.print(Padding(Text(visible(text)), (0, 0, 0, 2)))
    worst = [row for row in view.rows if row.problems and row.split != "dropped"][: ROWS_IN_TERMINAL - 1]
    sound = [row for row in view.rows if not row.problems][: ROWS_IN_TERMINAL - len(worst)]
    for row in [*worst, *sound]:
        print_row(row)
    console.print(Text("\n[[trained on]] {{cut away}}: the rest is read, not learnt", style="dim"))


def _entry_in_words(entry: Entry, joint: str, names: Mapping[int, str]) -> str:
    numbers = joint.join(names[number] for number in entry.numbers)
    return f"{numbers} ({entry.note})" if entry.note else numbers
