"""Which rows can be trained on, and why the others are dropped."""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.conversations import SYSTEM_ROLES, Message


def reason_to_drop(row: Mapping[str, Any]) -> str | None:
    """Why a Row cannot be trained on; None where it can."""
    if "messages" in row:
        return _reason_to_drop_messages(row["messages"])
    if "text" in row:
        return None if _says(row["text"]) else "without text"
    question, answer = ("instruction", "output") if "output" in row else ("prompt", "completion")
    if not _says(row[answer]):
        return f"without {answer}"
    if not _says(row[question]):
        return f"without {question}"
    return None


def _reason_to_drop_messages(messages: Sequence[Message]) -> str | None:
    if not messages:
        return "without messages"
    answers = [message for message in messages if message["role"] == "assistant"]
    trained = [message for message in answers if message.get("train") is not False]
    if answers and not trained:
        return "without a turn to train on"
    # A turn that only calls tools, or only thinks, is something to learn too.
    if not trained or not all(
        _says(turn["content"]) or turn.get("tool_calls") or _says(turn.get("reasoning_content"))
        for turn in trained
    ):
        return "without text in an assistant turn"
    return None


def reason_to_ask_nothing(row: Mapping[str, Any]) -> str | None:
    """Why a Row holds no question that a model could be asked; its last answer does not matter."""
    if "messages" in row:
        if not row["messages"]:
            return "without messages"
        asked = [turn for turn in turns_asked(row["messages"]) if turn["role"] not in SYSTEM_ROLES]
        return None if asked else "without a question"
    if "text" in row:
        return "without a question"
    question = "instruction" if "output" in row else "prompt"
    return None if _says(row[question]) else f"without {question}"


def turns_asked(turns: list[Message]) -> list[Message]:
    """The messages before the last answer, which may be calls of tools; all of them if the user or a tool has
    the last word."""
    if not turns or turns[-1]["role"] in ("user", "tool", "function"):
        return turns
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
    return turns[:last]


def _says(text: str | None) -> bool:
    return bool((text or "").strip())
