"""What to say of columns that no format has: the nearest names, and the line of YAML that would map them."""

import difflib
import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

KNOWN = ("messages", "conversations", "instruction", "output", "prompt", "completion")
ASKING = ("instruction", "question", "query", "problem", "prompt", "input", "user", "human", "ask", "q")
ANSWERING = ("output", "answer", "response", "reply", "completion", "solution", "target", "assistant", "a")


def unknown_columns(
    columns: Sequence[str], mapping: Mapping[str, str], where: str, row: Mapping[str, Any] | None
) -> str:
    """One line: the columns, a row shortened, the nearest format and the line of YAML that would map it."""
    shown = "" if row is None else f" (a row: {_shortened(row)})"
    near = {column: difflib.get_close_matches(column.strip().lower(), KNOWN, n=1) for column in columns}
    hints = ", ".join(f"{c!r} is near {match[0]!r}" for c, match in near.items() if match and match[0] != c)
    guess = _guess(columns, mapping, row)
    line = yaml.safe_dump(guess, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    nearest = f"; if these are {' and '.join(guess.values())}, set data.columns: {line.strip()}"
    return (
        f"{where} has the columns {list(columns)}{shown}; expected instruction and output (input optional), "
        "messages, or prompt and completion (or conversations, question and answer or a like pair, or text)"
        f"{nearest if guess else ''}{'; ' + hints if hints else ''}"
    )


def _shortened(row: Mapping[str, Any]) -> str:
    cells = {
        column: textwrap.shorten(cell, 30, placeholder=" ...") if isinstance(cell, str) else cell
        for column, cell in row.items()
    }
    text = " ".join(json.dumps(cells, ensure_ascii=True, default=str).split())
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _guess(
    columns: Sequence[str], mapping: Mapping[str, str], row: Mapping[str, Any] | None
) -> dict[str, str]:
    """What the columns could be, by the mapping, the row's cells and the names; empty where nothing fits."""
    cells = dict.fromkeys(columns, "") if row is None else row
    for column in columns:
        cell = cells.get(column)
        if isinstance(cell, list) and cell and isinstance(cell[0], dict):
            if "role" in cell[0]:
                return {column: "messages"}
            if "from" in cell[0]:
                return {column: "conversations"}
    named = {ours: theirs for theirs, ours in mapping.items()}
    texts = [column for column in columns if isinstance(cells.get(column), str) and column not in mapping]
    asking = named.get("instruction") or _closest(texts, ASKING)
    answering = named.get("output") or _closest([column for column in texts if column != asking], ANSWERING)
    rest = [column for column in texts if column not in (asking, answering)]
    asking = asking or (rest.pop(0) if rest else None)
    answering = answering or (rest.pop(0) if rest else None)
    if asking and answering:
        return {asking: "instruction", answering: "output"}
    only = asking or answering
    return {only: "text"} if only else {}


def _closest(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column whose name is nearest to one of the names, if one is near."""
    scores = {
        column: max(difflib.SequenceMatcher(None, column.strip().lower(), name).ratio() for name in names)
        for column in columns
    }
    best = max(scores, key=lambda column: scores[column], default=None)
    return best if best is not None and scores[best] >= 0.6 else None
