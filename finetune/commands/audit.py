"""What would be trained on: tokens by role, cut and dropped rows, ends of turns, duplicates and leaks.

`python -m finetune audit --config FILE`. Rows, tokens and labels are those of train.py: the same calls give
them. No model is loaded but its tokenizer, and nothing is written but the page.
"""

import textwrap
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from datasets import Dataset
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from finetune.commands.audit_page import (
    Entry,
    Listing,
    Report,
    Segment,
    ShownRow,
    Table,
    write_audit,
)
from finetune.config import Config, DataConfig
from finetune.config_parsing import parse_config
from finetune.data.duplicates import NEAR, most_similar, same_after_normalizing
from finetune.data.files import read_rows
from finetune.data.rows import Rows, answer_of, instruction_of, load_rows, prompt_of
from finetune.data.splits import tokenize_splits
from finetune.data.tokenize import IGNORE, ROLES, Examples, dissect, encode, to_messages
from finetune.report.html import check_page_path, visible
from finetune.runtime.cli import config_parser, split_arguments

FEW_TARGETS = 2  # such an example teaches a word, and to stop
MOST_SHOWN_ROWS = 200  # on the page
SOUND_ROWS = 10  # on the page, behind the rows with a finding: to see what the mask is elsewhere
ROWS_IN_TERMINAL = 3
ENTRIES_IN_TERMINAL = 10
CHARACTERS_IN_TERMINAL = 400  # of each segment of a row
HISTOGRAM_BINS, HISTOGRAM_WIDTH = 16, 40

console = Console(highlight=False)

# What is compared of two rows, the stronger first, and in what words.
COMPARED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "prompt and answer": lambda row: f"{prompt_of(row)}\n\N{RIGHTWARDS ARROW}\n{answer_of(row)}",
    "prompt": prompt_of,
    "instruction": instruction_of,
}
# Rows are compared within a split, and eval rows with train rows: there a likeness is a leak.
SCOPES = ("train", "eval", "leak")


class Severity(IntEnum):
    """The worse, the lower."""

    DROPPED = 0
    NO_END = 1
    CUT = 2
    LEAK = 3
    SAME = 4
    NEAR = 5
    FEW_TARGETS = 6


class Problem(NamedTuple):
    """Of two of one severity the one with more `tokens_lost` is the worse."""

    severity: Severity
    text: str
    tokens_lost: int = 0


class Likeness(NamedTuple):
    """Row numbers of rows that are alike in one of COMPARED.

    `same`: groups of rows of any split, the same after `normalize`. `near`: for each of SCOPES, row -> the
    most similar row and how similar (at least NEAR), of the rows that have no same one there.
    """

    same: list[list[int]]
    near: dict[str, dict[int, tuple[int, float]]]


@dataclass(frozen=True)
class Audit:
    """What was found. `examples` has a line for each example, indexed by row number:

    split; full_length, num_tokens, num_targets (before and after cutting, and of these trained on);
    num_ends, num_trained_ends (assistant turns with an end-of-turn token, and those whose it is trained) and
    last_end ("trained", "untrained", or "none" where the template writes none); for each role its tokens
    (`user`) and those of them trained on (`user trained`).

    `dropped` (row numbers, by reason) holds both rows without text and those left without a target.
    """

    config: Config
    rows: Rows
    examples: pd.DataFrame
    dropped: dict[str, list[int]]
    likeness: dict[str, Likeness]

    @cached_property
    def split_of(self) -> dict[int, str]:
        """train or eval, of each row that was taken."""
        splits = {"train": self.rows.train, "eval": self.rows.eval}
        return {number: split for split, rows in splits.items() for number in rows["row_number"]}

    def cut_rows(self) -> list[tuple[int, int, int, str]]:
        """(row number, tokens lost, full length, last_end) of the examples that were cut, by row number."""
        figures = self.examples.assign(lost=self.examples["full_length"] - self.examples["num_tokens"])
        cut = figures[figures["lost"] > 0].sort_index()
        return list(zip(cut.index, cut["lost"], cut["full_length"], cut["last_end"], strict=True))


def command(argv: Sequence[str]) -> None:
    """Audit the rows of a configuration: show it in the terminal and write the page.

    Raises:
        ValueError: arguments, rows or a tokenizer that cannot be used, as for train.py; a page that cannot be
            written.
    """
    parser = config_parser(
        "audit",
        "[--page FILE]",
        "What would be trained on: tokens by role, cut and dropped rows, duplicates and leaks. "
        "Loads no model but its tokenizer.",
    )
    parser.add_argument("--page", metavar="FILE", default="audit.html", help="where the HTML page is written")
    arguments, settings = split_arguments(parser, argv)
    config = parse_config(settings)
    page = Path(arguments.page)
    check_page_path(page)

    from finetune.model.load import load_tokenizer

    with console.status("reading the rows"):
        tokenizer = load_tokenizer(config.model)
        audit = run_audit(config, tokenizer)
    problems = find_problems(audit)
    shown = pick_rows(audit, tokenizer, problems)
    report = Report(
        title=f"Audit of {_path_in_words(config.data)}",
        tables=summary(audit),
        histogram=length_histogram(audit.examples["num_tokens"].to_numpy()),
        listings=find_listings(audit),
        rows=shown,
        note=_what_is_shown(len(problems), shown),
        names=row_names(audit),
    )
    write_audit(page, report)
    print_report(report)
    console.print(f"page  {page}", soft_wrap=True, markup=False)


def run_audit(config: Config, tokenizer: Any) -> Audit:
    """Read, tokenize and compare the rows that train.py would take.

    Raises:
        ValueError: as `load_rows` and `tokenize_splits`.
    """
    rows = load_rows(config.data)
    splits = {"train": rows.train, "eval": rows.eval}
    sets = dict(zip(splits, tokenize_splits(rows, tokenizer, config.data), strict=True))
    examples = pd.DataFrame(
        [
            figures
            for split in splits
            for figures in measure_examples(split, splits[split], sets[split], tokenizer, config.data)
        ]
    ).set_index("row_number")
    dropped: dict[str, list[int]] = defaultdict(list)
    for reasons in (rows.dropped, *(split.dropped for split in sets.values())):
        for reason, numbers in reasons.items():
            dropped[reason] = sorted(dropped[reason] + numbers)
    likeness = {name: compare_rows(rows, text_of) for name, text_of in COMPARED.items()}
    return Audit(config, rows, examples, dict(dropped), likeness)


def measure_examples(
    split: str, rows: Dataset, examples: Examples, tokenizer: Any, config: DataConfig
) -> Iterator[dict[str, Any]]:
    """The line of `Audit.examples` for each example of a split."""
    row_of = {row["row_number"]: row for row in rows}
    for example in examples.dataset:
        messages = to_messages(row_of[example["row_number"]], config.system_prompt)
        tokens = encode(tokenizer, messages, config.train_on)
        anatomy = dissect(tokenizer, messages, config.train_on)
        cut = slice(config.max_length)
        # What is counted here is what is trained: the example's own labels beside the roles of its tokens.
        assert len(anatomy.roles) == len(tokens.input_ids)
        assert example["input_ids"] == tokens.input_ids[cut]
        assert example["labels"] == tokens.labels[cut]
        trained = [label != IGNORE for label in example["labels"]]
        roles = anatomy.roles[cut]
        of_trained = [role for role, is_trained in zip(roles, trained, strict=True) if is_trained]
        ends = [end is not None and end < len(trained) and trained[end] for end in anatomy.ends_of_turn]
        written = [end is not None for end in anatomy.ends_of_turn]
        yield {
            "row_number": example["row_number"],
            "split": split,
            "full_length": len(tokens.input_ids),
            "num_tokens": len(trained),
            "num_targets": len(of_trained),
            "num_ends": sum(written),
            "num_trained_ends": sum(ends),
            "last_end": "none" if not any(written[-1:]) else "trained" if ends[-1] else "untrained",
            **{role: roles.count(role) for role in ROLES},
            **{f"{role} trained": of_trained.count(role) for role in ROLES},
        }


def compare_rows(rows: Rows, text_of: Callable[[Mapping[str, Any]], str]) -> Likeness:
    """Rows of both splits that are alike in `text_of`."""
    splits = {"train": rows.train, "eval": rows.eval}
    texts = {name: [text_of(row) for row in split] for name, split in splits.items()}
    numbers = {name: list(split["row_number"]) for name, split in splits.items()}
    every = [*numbers["train"], *numbers["eval"]]
    groups = same_after_normalizing([*texts["train"], *texts["eval"]])
    near: dict[str, dict[int, tuple[int, float]]] = {}
    for scope, of, among in (("train", "train", None), ("eval", "eval", None), ("leak", "eval", "train")):
        matches = most_similar(texts[of], texts[among] if among else None)
        near[scope] = {
            number: (numbers[among or of][match.position], match.similarity)
            for number, match in zip(numbers[of], matches, strict=True)
            if match is not None and not match.exact
        }
    return Likeness([sorted(every[position] for position in group) for group in groups], near)


def same_in_scope(
    group: Sequence[int], scope: str, split_of: Mapping[int, str]
) -> tuple[list[int], list[int]]:
    """Of a group of same rows those that the scope is about, and those that it sets them beside.

    Both are empty where no row has another one beside it.
    """
    of, among = ("eval", "train") if scope == "leak" else (scope, scope)
    rows = [number for number in group if split_of[number] == of]
    others = [number for number in group if split_of[number] == among]
    return (rows, others) if rows and others and (of != among or len(rows) > 1) else ([], [])


def find_problems(audit: Audit) -> dict[int, list[Problem]]:
    """What is wrong with each row, the worst first; a row with nothing is not in it."""
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

    # A weaker likeness to no more rows, or to the same nearest row, says nothing new.
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

    for number, count in zip(audit.examples.index, audit.examples["num_targets"], strict=True):
        if count <= FEW_TARGETS:
            problems[number].append(Problem(Severity.FEW_TARGETS, f"only {count} target tokens"))
    return {number: sorted(found, key=lambda p: p.severity) for number, found in problems.items()}


def pick_rows(audit: Audit, tokenizer: Any, problems: Mapping[int, Sequence[Problem]]) -> list[ShownRow]:
    """The rows to show: the worst first, and a few sound ones behind them."""
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
    """The row as the template writes it, in pieces of one role and all or none of them trained on."""
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


# --- Tables and lists, for the terminal and the page ---


def summary(audit: Audit) -> list[Table]:
    """All figures that go for the whole data set."""
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
        ("data", _path_in_words(data)),
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


def find_listings(audit: Audit) -> list[Listing]:
    """Row numbers of all that was found."""
    examples, last_end = audit.examples, audit.examples["last_end"]
    inner_end_lost = (examples["num_trained_ends"] < examples["num_ends"]) & (last_end != "untrained")
    cut = [Entry([number], f"{lost} of {full} lost") for number, lost, full, _ in audit.cut_rows()]
    listings = [
        *(Listing(f"Dropped: {reason}", _entries(numbers)) for reason, numbers in audit.dropped.items()),
        Listing(f"Cut at {audit.config.data.max_length} tokens", cut),
        Listing("Last end-of-turn token not trained", _entries(examples.index[last_end == "untrained"])),
        Listing("Another end-of-turn token not trained", _entries(examples.index[inner_end_lost])),
        Listing("Template writes no end-of-turn token", _entries(examples.index[last_end == "none"])),
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
    few = examples.index[examples["num_targets"] <= FEW_TARGETS]
    listings.append(Listing(f"At most {FEW_TARGETS} target tokens", _entries(few)))
    return [listing for listing in listings if listing.entries]


def length_histogram(lengths: np.ndarray) -> str:
    """Lines of a histogram: how many examples have so many tokens."""
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
    """How each row that was read is written: its number, with its split where it is kept for evaluation."""
    names = {number: str(number) for number in range(1, audit.rows.num_read + 1)}
    return names | {number: f"eval {number}" for number in audit.rows.eval["row_number"]}


def _parts(examples: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The examples by split and, where there are two splits, together."""
    parts = [(str(split), examples[examples["split"] == split]) for split in examples["split"].unique()]
    return [*parts, ("both", examples)] if len(parts) > 1 else parts


def _entries(numbers: Iterable[int]) -> list[Entry]:
    return [Entry([number]) for number in sorted(numbers)]


def _instructions(audit: Audit) -> dict[int, str]:
    return {
        row["row_number"]: instruction_of(row) for rows in (audit.rows.train, audit.rows.eval) for row in rows
    }


def _figure(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def _some(numbers: list[int], but: int, most: int = 10) -> str:
    """The sorted numbers but for one, in words: the first ones, and how many more."""
    first = [number for number in numbers[: most + 1] if number != but][:most]
    place = bisect_left(numbers, but)
    more = len(numbers) - (numbers[place : place + 1] == [but]) - len(first)
    return ", ".join(map(str, first)) + (f" and {more} more" if more else "")


def _path_in_words(data: DataConfig) -> str:
    return data.path if isinstance(data.path, str) else ", ".join(data.path)


# --- The terminal ---


def print_report(report: Report) -> None:
    """Print the figures, the first row numbers of each finding, and a few of the worst rows."""
    for table in report.tables:
        rich_table = RichTable(title=table.title, title_justify="left", show_header=bool(table.columns))
        for position, column in enumerate(table.columns):
            rich_table.add_column(column, justify="right" if position else "left")
        for cells in table.rows:
            rich_table.add_row(*(Text(visible(cell)) for cell in cells))
        console.print(rich_table)
        if table.note:
            console.print(Text(table.note, style="dim"))
    console.print(Text(f"Examples by length in tokens\n{report.histogram}"))
    for listing in report.listings:
        console.print(Text(f"{listing.title} ({len(listing.entries):,})", style="bold"))
        entries = [_entry_in_words(entry, listing.joint, report.names) for entry in listing.entries]
        separator = ", " if listing.joint == ", " else "\n"
        text = separator.join(entries[:ENTRIES_IN_TERMINAL])
        if len(entries) > ENTRIES_IN_TERMINAL:
            text += f"{separator}and {len(entries) - ENTRIES_IN_TERMINAL:,} more, on the page"
        console.print(Padding(Text(visible(text)), (0, 0, 0, 2)))
    for row in [row for row in report.rows if row.split != "dropped"][:ROWS_IN_TERMINAL]:
        console.print(Text(f"\nRow {row.number}, {row.split}", style="bold"))
        for problem in row.problems:
            console.print(Text(visible(problem), style="red"))
        console.print(_marked(row.segments))
    console.print(Text("\n[[trained on]] {{cut away}}: the rest is read, not learnt", style="dim"))


def _entry_in_words(entry: Entry, joint: str, names: Mapping[int, str]) -> str:
    numbers = joint.join(names[number] for number in entry.numbers)
    return f"{numbers} ({entry.note})" if entry.note else numbers


def _marked(segments: Sequence[Segment]) -> Text:
    """The row with marks that can be read without colour too."""
    text = Text()
    # What is trained on is marked as one piece, though answer and end of turn differ in role.
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
