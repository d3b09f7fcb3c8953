"""The findings of an audit: the problems of each row, and the rows that share a problem."""

import textwrap
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

from finetune.data.audit import SCOPES, Audit, same_in_scope
from finetune.data.rows import instruction_of, iterate_rows

FEW_TARGETS = 2  # too few to teach more than a word


class Severity(IntEnum):
    """The lowest value is the most severe."""

    DROPPED = 0
    NO_END = 1
    CUT = 2
    LEAK = 3
    SAME = 4
    NEAR = 5
    FEW_TARGETS = 6


class Problem(NamedTuple):
    """A problem of a row. At the same severity, more `tokens_lost` are worse."""

    severity: Severity
    text: str
    tokens_lost: int = 0


class Entry(NamedTuple):
    """The number of a row, or the numbers of rows that belong together."""

    numbers: Sequence[int]
    note: str = ""


class Listing(NamedTuple):
    """Rows that share a finding. `joint` separates the numbers of an entry."""

    title: str
    entries: Sequence[Entry]
    joint: str = ", "


def find_problems(audit: Audit) -> dict[int, list[Problem]]:
    """Return the problems of each row that has any, the worst first."""
    problems: dict[int, list[Problem]] = defaultdict(list)
    for reason, numbers in audit.dropped.items():
        for number in numbers:
            problems[number].append(Problem(Severity.DROPPED, f"dropped: {reason}"))
    for number, lost, full_length, last_end in audit.cut_rows():
        text = f"cut: {lost} of {full_length} tokens lost"
        if last_end == "untrained":
            problem = Problem(Severity.NO_END, f"{text}, the last end-of-turn token with them", lost)
        else:
            problem = Problem(Severity.CUT, text, lost)
        problems[number].append(problem)

    def add_likeness(severity: Severity, scope: str, number: int, text: str) -> None:
        leak = Problem(Severity.LEAK, f"leak: {text} in train")
        problems[number].append(leak if scope == "leak" else Problem(severity, text))

    # A weaker likeness is reported only if it adds a row.
    num_said: dict[tuple[int, str], int] = defaultdict(int)
    nearest_said = set()
    for name, alike in audit.likeness.items():
        for scope in SCOPES:
            for group in alike.same:
                rows, others = same_in_scope(group, scope, audit.split_of)
                for number in rows:
                    if len(others) > num_said[number, scope]:
                        num_said[number, scope] = len(others)
                        add_likeness(
                            Severity.SAME, scope, number, f"same {name} as row {_some(others, number)}"
                        )
            for number, (other, similarity) in alike.near[scope].items():
                if (number, scope, other) not in nearest_said:
                    nearest_said.add((number, scope, other))
                    text = f"{name} much like that of row {other} ({similarity:.2f})"
                    add_likeness(Severity.NEAR, scope, number, text)

    for number, count in zip(audit.figures.index, audit.figures["num_targets"], strict=True):
        if count <= FEW_TARGETS:
            problems[number].append(Problem(Severity.FEW_TARGETS, f"only {count} target tokens"))
    return {number: sorted(found, key=lambda p: p.severity) for number, found in problems.items()}


def find_listings(audit: Audit) -> list[Listing]:
    """Return a listing of the rows for each kind of finding that occurs."""
    figures, last_end = audit.figures, audit.figures["last_end"]
    inner_end_lost = (figures["num_trained_ends"] < figures["num_ends"]) & (last_end != "untrained")
    cut = [Entry([number], f"{lost} of {full} lost") for number, lost, full, _ in audit.cut_rows()]
    listings = [
        *(Listing(f"Dropped: {reason}", _entries(numbers)) for reason, numbers in audit.dropped.items()),
        Listing(f"Cut at {audit.config.data.max_length} tokens", cut),
        Listing("Last end-of-turn token not trained", _entries(figures.index[last_end == "untrained"])),
        Listing("Another end-of-turn token not trained", _entries(figures.index[inner_end_lost])),
        Listing("Template writes no end-of-turn token", _entries(figures.index[last_end == "none"])),
    ]
    texts = _instructions(audit)
    for name, alike in audit.likeness.items():
        groups = [
            Entry(group, textwrap.shorten(texts[group[0]], 80, placeholder=" ..."))
            for group in sorted(alike.same)
        ]
        mixed = [len({audit.split_of[number] for number in group.numbers}) > 1 for group in groups]
        leaks, others = (
            [g for g, is_mixed in zip(groups, mixed, strict=True) if is_mixed is w] for w in (True, False)
        )
        listings.append(Listing(f"Leak: same {name} in train and eval", leaks, " = "))
        listings.append(Listing(f"Same {name} within a split", others, " = "))
    for name, alike in audit.likeness.items():
        for scope, where in (
            ("leak", "in eval and train"),
            ("train", "within train"),
            ("eval", "within eval"),
        ):
            pairs = {
                (number, other) if scope == "leak" else (min(number, other), max(number, other)): similarity
                for number, (other, similarity) in alike.near[scope].items()
            }
            entries = [Entry(pair, f"{similarity:.2f}") for pair, similarity in sorted(pairs.items())]
            title = f"{'Leak: much' if scope == 'leak' else 'Much'} the same {name} {where}"
            listings.append(Listing(title, entries, " ~ "))
    few = figures.index[figures["num_targets"] <= FEW_TARGETS]
    listings.append(Listing(f"At most {FEW_TARGETS} target tokens", _entries(few)))
    return [listing for listing in listings if listing.entries]


def _entries(numbers: Iterable[int]) -> list[Entry]:
    return [Entry([number]) for number in sorted(numbers)]


def _instructions(audit: Audit) -> dict[int, str]:
    tables = (audit.rows.train, audit.rows.eval)
    return {row["row_number"]: instruction_of(row) for table in tables for row in iterate_rows(table)}


def _some(numbers: list[int], but: int, most: int = 10) -> str:
    """The first of the sorted numbers, except `but`, and how many more there are."""
    first = [number for number in numbers[: most + 1] if number != but][:most]
    place = bisect_left(numbers, but)
    more = len(numbers) - (numbers[place : place + 1] == [but]) - len(first)
    return ", ".join(map(str, first)) + (f" and {more} more" if more else "")
