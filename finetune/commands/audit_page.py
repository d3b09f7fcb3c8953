"""The page of an audit: one HTML file that needs nothing but itself, on a screen, a phone or paper."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from finetune.report.html import write_page

LONG = 12  # a list of more entries is folded


class Table(NamedTuple):
    """Its first column names what the others give figures for."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


class Entry(NamedTuple):
    """One row, or rows that belong together, by their numbers."""

    numbers: Sequence[int]
    note: str = ""


class Listing(NamedTuple):
    """Rows that share a finding. `joint` stands between the numbers of one entry."""

    title: str
    entries: Sequence[Entry]
    joint: str = ", "


class Segment(NamedTuple):
    """Neighbouring tokens of one kind. `role` is one of chat.ROLES; what max_length cuts is not `kept`."""

    text: str
    role: str
    trained: bool
    kept: bool


class ShownRow(NamedTuple):
    """A row as it is trained on, with all that is wrong with it. `split` is train, eval or dropped."""

    number: int
    split: str
    problems: Sequence[str]
    segments: Sequence[Segment]


class Report(NamedTuple):
    """All that is shown of an audit. `rows` are the worst first, `note` says how many of all they are;
    `names` says of each row number how it is written."""

    title: str
    tables: Sequence[Table]
    histogram: str
    listings: Sequence[Listing]
    rows: Sequence[ShownRow]
    note: str
    names: Mapping[int, str]


def write_audit(path: Path, report: Report) -> None:
    """Write the page whole or not at all."""
    shown = {row.number for row in report.rows}
    write_page(path, "audit.html", **report._asdict(), shown=shown, long=LONG)
