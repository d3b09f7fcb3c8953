"""Which rows can be trained on, and why the others are dropped."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset


def clean_rows(table: Dataset) -> tuple[Dataset, dict[str, list[int]]]:
    """The rows that can be trained on, and the numbers of the others, by reason."""
    return sort_out(table, reason_to_drop)


def sort_out(
    table: Dataset, reason_to_drop: Callable[[Mapping[str, Any]], str | None]
) -> tuple[Dataset, dict[str, list[int]]]:
    """The rows without a reason to drop them, and the numbers of the others, by reason."""
    kept: list[int] = []
    dropped: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(table):
        if reason := reason_to_drop(row):
            dropped[reason].append(row["row_number"])
        else:
            kept.append(index)
    return table.select(kept), dict(dropped)


def reason_to_drop(row: Mapping[str, Any]) -> str | None:
    if "messages" in row:
        return _reason_to_drop_messages(row)
    question, answer = ("instruction", "output") if "output" in row else ("prompt", "completion")
    for column in (question, answer, "input"):
        _require_text(row.get(column), f"row {row['row_number']}: {column}")
    if not (row[answer] or "").strip():
        return f"without {answer}"
    if not (row[question] or "").strip():
        return f"without {question}"
    return None


def _reason_to_drop_messages(row: Mapping[str, Any]) -> str | None:
    place, messages = f"row {row['row_number']}: messages", row["messages"]
    if messages is None:
        return "without messages"
    if not isinstance(messages, list):
        raise ValueError(f"{place} must be a list of objects with role and content, not {messages!r:.60}")
    if not messages:
        return "without messages"
    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
            raise ValueError(f"{place} must be a list of objects with role and content, not {message!r:.60}")
        _require_text(message["role"], f"{place}: role")
        _require_text(message.get("content"), f"{place}: content")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers or any(not (message["content"] or "").strip() for message in answers):
        return "without text in an assistant turn"
    return None


def reason_to_ask_nothing(row: Mapping[str, Any]) -> str | None:
    """As `reason_to_drop`, ignoring the row's last answer."""
    if "messages" not in row:
        return reason_to_drop({**row, "output" if "output" in row else "completion": "an answer"})
    turns = row["messages"]
    if not turns or not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return reason_to_drop(row)
    asked = turns_asked(turns)
    if all(turn.get("role") == "system" for turn in asked):
        return "without a question"
    return reason_to_drop({**row, "messages": [*asked, {"role": "assistant", "content": "an answer"}]})


def turns_asked(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages before the last answer; all of them if the last one is no answer."""
    if not turns or turns[-1].get("role") in ("user", "tool"):
        return turns
    last = max((i for i, turn in enumerate(turns) if turn.get("role") == "assistant"), default=len(turns))
    return turns[:last]


def _require_text(cell: Any, place: str) -> None:
    if not isinstance(cell, str | None):
        raise ValueError(f"{place} must be text, not {cell!r:.60}")
    try:
        (cell or "").encode()
    except UnicodeEncodeError as error:  # a JSON escape can encode half of a surrogate pair
        raise ValueError(f"{place} holds {error.object[error.start]!r}, which is no character") from error
