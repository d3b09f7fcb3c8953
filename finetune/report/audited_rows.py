"""The rows that an audit shows: with their problems, and with the tokens that are trained on marked."""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from rich.text import Text

from finetune.config import DataConfig
from finetune.data.audit import Audit, find_rows
from finetune.data.conversations import Row, to_conversation
from finetune.data.findings import Problem
from finetune.data.rows import text_of
from finetune.data.templates.anatomy import Part, Segment, dissect, keep, parts_of
from finetune.report.html import visible
from finetune.runtime.console import console

MOST_SHOWN_ROWS = 200  # on the page
SOUND_ROWS = 10  # on the page, behind the rows with a finding: to see what the mask is elsewhere
CHARACTERS_IN_TERMINAL = 400  # of each segment of a row


class ShownRow(NamedTuple):
    """A row as it is trained on, with all its problems.

    `split` is train, eval or dropped, `place` where the row was read ("" where that is plain). `remarks` say
    what the chat template did with it, `facts` have the row's tools and template arguments by name.
    """

    number: int
    split: str
    place: str
    problems: Sequence[str]
    remarks: Sequence[str]
    facts: Mapping[str, str]
    parts: Sequence[Part]


def pick_rows(audit: Audit, tokenizer: Any, problems: Mapping[int, Sequence[Problem]]) -> list[ShownRow]:
    """The rows to show: the worst first, then one for each thing that the chat template does, and a few more
    without a problem."""
    worst_of = {number: found[0] for number, found in problems.items()}
    worst = sorted(worst_of, key=lambda n: (worst_of[n].severity, -worst_of[n].tokens_lost, n))
    picked = worst[:MOST_SHOWN_ROWS]
    figures = audit.figures
    examples_of = [min(numbers) for numbers in audit.remarks.values()]
    examples_of += figures.index[figures["num_branches"] > 0].tolist()[:1]
    sound = [number for number in figures.index if number not in problems][:SOUND_ROWS]
    picked += [number for number in dict.fromkeys([*examples_of, *sound]) if number not in picked]
    rows = find_rows(audit, picked)
    return [_shown(audit, tokenizer, rows[number], problems.get(number, ())) for number in picked]


def _shown(audit: Audit, tokenizer: Any, row: Row, problems: Sequence[Problem]) -> ShownRow:
    number = row["row_number"]
    split = audit.split_of.get(number, "dropped")
    remarks: Sequence[str] = ()
    if split == "dropped":
        parts = [Part(_columns_of(row))]
    else:
        parts, remarks = trained_parts(row, tokenizer, audit.config.data)
        if len(parts) > 1:
            remarks = [
                *remarks,
                "answers are rewritten once others follow; as they were, they are trained below",
            ]
    facts = {}
    if row.get("tools"):
        names = ", ".join(str(tool["function"]["name"]) for tool in row["tools"])
        facts[f"tools: {names}"] = json.dumps(row["tools"], indent=1, ensure_ascii=False)
    if row.get("chat_template_kwargs"):
        arguments = json.dumps(row["chat_template_kwargs"], ensure_ascii=False)
        facts["arguments of the template"] = arguments
    texts = [problem.text for problem in problems]
    return ShownRow(number, split, audit.rows.place_of(number), texts, remarks, facts, parts)


def trained_parts(row: Row, tokenizer: Any, config: DataConfig) -> tuple[list[Part], Sequence[str]]:
    """The row as the template writes it, in segments of one role, and what the template did with it."""
    anatomy = dissect(tokenizer, to_conversation(row, config.system_prompt), config.train_on)
    return parts_of(tokenizer, anatomy, keep(anatomy.tokens, config.max_length)), anatomy.tokens.remarks


def _columns_of(row: Row) -> list[Segment]:
    """A row that has no tokens, column by column."""
    texts = {
        name: cell if isinstance(cell, str | None) else json.dumps(cell, ensure_ascii=False)
        for name, cell in row.items()
        if name not in ("row_number", "messages", "tools", "chat_template_kwargs")
    }
    for turn, message in enumerate(row.get("messages") or [], 1):
        texts[f"turn {turn}, {message['role']}"] = text_of(message)
    return [
        segment
        for name, cell in texts.items()
        for segment in (
            Segment(f"{name}: ", "template", trained=False, kept=True),
            Segment(f"{cell or ''}\n", "user", trained=False, kept=True),
        )
    ]


def print_row(row: ShownRow) -> None:
    """Print a row with marks that can be read without colour as well."""
    place = f" ({row.place})" if row.place else ""
    console.print(Text(visible(f"\nRow {row.number}, {row.split}{place}"), style="bold"))
    for problem in row.problems:
        console.print(Text(visible(problem), style="red"))
    for note in [*(f"chat template: {remark}" for remark in row.remarks), *row.facts]:
        console.print(Text(_shortened(visible(note)), style="cyan"))
    for part in row.parts:
        if part.context:
            console.print(Text(heading(part), style="bold"))
        console.print(_marked(part.segments))


def heading(part: Part) -> str:
    """What a branch of a row is."""
    return f"Earlier answers as they were, after the first {part.num_context_tokens:,} tokens above:"


def _marked(segments: Sequence[Segment]) -> Text:
    text = Text()
    # Trained text is marked as one piece, although answer and end of turn differ in role.
    for (trained, kept, _), run in groupby(
        segments, key=lambda s: (s.trained, s.kept, "" if s.trained else s.role)
    ):
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
