"""How an audit looks: its tables, the rows with their trained tokens marked, the terminal and the page."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from finetune.config import DataConfig
from finetune.data.audit import SCOPES, Audit, same_in_scope
from finetune.data.duplicates import NEAR
from finetune.data.files import described, read_rows
from finetune.data.findings import Entry, Listing, Problem, find_listings, find_problems
from finetune.data.tokenize import IGNORE, ROLES, dissect, encode, to_messages
from finetune.report.html import visible, write_page
from finetune.runtime.console import console

MOST_SHOWN_ROWS = 200  # on the page
SOUND_ROWS = 10  # on the page, behind the rows with a finding: to see what the mask is elsewhere
ROWS_IN_TERMINAL = 3
ENTRIES_IN_TERMINAL = 10
CHARACTERS_IN_TERMINAL = 400  # of each segment of a row
HISTOGRAM_BINS, HISTOGRAM_WIDTH = 16, 40
LONG_LIST = 12  # a list of more entries is folded on the page


class Table(NamedTuple):
    """The first column names what the others give figures for."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


class Segment(NamedTuple):
    """Adjacent tokens of one kind. `role` is one of tokenize.ROLES; what max_length cuts is not `kept`."""

    text: str
    role: str
    trained: bool
    kept: bool


class ShownRow(NamedTuple):
    """A row as it is trained on, with all its problems. `split` is train, eval or dropped."""

    number: int
    split: str
    problems: Sequence[str]
    segments: Sequence[Segment]


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
        histogram=length_histogram(audit.examples["num_tokens"].to_numpy()),
        listings=find_listings(audit),
        rows=rows,
        note=_what_is_shown(len(problems), rows),
        names=row_names(audit),
    )


def summary(audit: Audit) -> list[Table]:
    """All tables about the data set as a whole."""
    return [
        _facts_table(audit),
        _roles_table(audit.examples),
        _ends_table(audit.examples),
        _lengths_table(audit.examples),
        _likeness_table(audit),
    ]


def _facts_table(audit: Audit) -> Table:
    rows, data = audit.rows, audit.config.data
    taken = len(rows.train) + len(rows.eval)
    counts, cut = audit.examples["split"].value_counts(), audit.cut_rows()
    facts = [
        ("data", described(data.path)),
        ("tokenizer", audit.config.model.name_or_path),
        ("system prompt", "the chat template's own" if data.system_prompt is None else data.system_prompt),
        ("rows", f"{rows.num_read:,} read, {rows.num_kept:,} usable, {taken:,} taken"),
        ("dropped", ", ".join(f"{len(n):,} {reason}" for reason, n in audit.dropped.items()) or "none"),
        ("examples", f"{counts.get('train', 0):,} train, {counts.get('eval', 0):,} eval"),
        (f"cut at {data.max_length}", f"{len(cut):,}, {sum(lost for _, lost, *_ in cut):,} tokens lost"),
        ("trained on", "every token" if data.train_on == "all" else "the answers and what ends them"),
    ]
    return Table("What is trained on", (), facts)


def _roles_table(examples: pd.DataFrame) -> Table:
    rows = []
    for split, part in _parts(examples):
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
        "template: what the chat template writes, ends of turns among it.",
    )


def _ends_table(examples: pd.DataFrame) -> Table:
    rows = []
    for split, part in _parts(examples):
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
    columns = ("", "examples", "last one trained", "every one trained", "last one not", "none written")
    return Table("End-of-turn tokens of the answers", columns, rows)


def _lengths_table(examples: pd.DataFrame) -> Table:
    rows = []
    for split, part in _parts(examples):
        for name, column in (("tokens", "num_tokens"), ("target tokens", "num_targets")):
            lengths = part[column].to_numpy()
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


def _parts(examples: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The examples by split and, where there are two splits, together."""
    parts = [(str(split), examples[examples["split"] == split]) for split in examples["split"].unique()]
    return [*parts, ("both", examples)] if len(parts) > 1 else parts


def _figure(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def pick_rows(audit: Audit, tokenizer: Any, problems: Mapping[int, Sequence[Problem]]) -> list[ShownRow]:
    """The rows to show: the worst first, then a few without a problem."""
    worst_of = {number: found[0] for number, found in problems.items()}
    worst = sorted(worst_of, key=lambda n: (worst_of[n].severity, -worst_of[n].tokens_lost, n))
    sound = [number for number in audit.examples.index if number not in problems]
    picked = [*worst[:MOST_SHOWN_ROWS], *sound[:SOUND_ROWS]]
    everything = read_rows(audit.config.data.path)  # the dropped ones too
    shown = []
    for number, row in zip(picked, everything.select([number - 1 for number in picked]), strict=True):
        taken = number in audit.split_of
        segments = segments_of(row, tokenizer, audit.config.data) if taken else _columns_of(row)
        texts = [problem.text for problem in problems.get(number, ())]
        shown.append(ShownRow(number, audit.split_of.get(number, "dropped"), texts, segments))
    return shown


def segments_of(row: Mapping[str, Any], tokenizer: Any, config: DataConfig) -> list[Segment]:
    """The row as the template writes it, in segments of one role, each wholly trained on or not at all."""
    messages = to_messages(row, config.system_prompt)
    labels = encode(tokenizer, messages, config.train_on).labels
    anatomy = dissect(tokenizer, messages, config.train_on)
    kinds = [
        (role, label != IGNORE and position < config.max_length, position < config.max_length)
        for position, (role, label) in enumerate(zip(anatomy.roles, labels, strict=True))
    ]
    runs = [(kind, next(run)) for kind, run in groupby(range(len(kinds)), key=kinds.__getitem__)]
    starts = [0, *(anatomy.offsets[first][0] for _, first in runs[1:]), len(anatomy.text)]
    return [
        Segment(anatomy.text[start:end], *kind)
        for (kind, _), start, end in zip(runs, starts, starts[1:], strict=False)
        if end > start
    ]


def _columns_of(row: Mapping[str, Any]) -> list[Segment]:
    """A row that has no tokens, column by column."""
    texts = {name: cell for name, cell in row.items() if name not in ("row_number", "messages")}
    for turn, message in enumerate(row.get("messages") or [], 1):
        texts[f"turn {turn}, {message['role']}"] = message["content"]
    return [
        segment
        for name, cell in texts.items()
        for segment in (
            Segment(f"{name}: ", "template", trained=False, kept=True),
            Segment(f"{cell or ''}\n", "user", trained=False, kept=True),
        )
    ]


def write_view(path: Path, view: AuditView) -> None:
    """Write the page whole or not at all."""
    shown = {row.number for row in view.rows}
    write_page(path, "audit.html", **view._asdict(), shown=shown, long=LONG_LIST)


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
    for row in [row for row in view.rows if row.split != "dropped"][:ROWS_IN_TERMINAL]:
        console.print(Text(f"\nRow {row.number}, {row.split}", style="bold"))
        for problem in row.problems:
            console.print(Text(visible(problem), style="red"))
        console.print(_marked(row.segments))
    console.print(Text("\n[[trained on]] {{cut away}}: the rest is read, not learnt", style="dim"))


def _entry_in_words(entry: Entry, joint: str, names: Mapping[int, str]) -> str:
    numbers = joint.join(names[number] for number in entry.numbers)
    return f"{numbers} ({entry.note})" if entry.note else numbers


def _marked(segments: Sequence[Segment]) -> Text:
    """The row with marks that can be read without colour as well."""
    text = Text()
    # Trained text is marked as one piece, although answer and end of turn differ in role.
    for (trained, kept), run in groupby(segments, key=lambda s: (s.trained, s.kept)):
        piece = _shortened(visible("".join(segment.text for segment in run)))
        if not kept:
            text.append(f"{{{{{piece}}}}}", style="dim strike")
        elif trained:
            text.append(f"[[{piece}]]", style="bold green")
        else:
            text.append(piece, style="dim")
    return text


def _shortened(text: str) -> str:
    half = CHARACTERS_IN_TERMINAL // 2
    return text if len(text) <= 2 * half else f"{text[:half]} ... {text[-half:]}"
