"""Conversations: what a row of any format becomes before a chat template renders it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""`role` and `content` (text, or None beside tool calls or reasoning), and where the row has them
`reasoning_content`, `tool_calls`, `tool_call_id`, `name`, and `train`: False for an assistant turn that is no
target."""

Row = dict[str, Any]
"""A row in the one form that it has after reading, and its `row_number`. It is one of

- {"messages": [Message, ...]}, and where the row has them "tools" (a list of JSON schemas), "system" (text)
  and "chat_template_kwargs" (an object);
- {"instruction": text, "input": text or None, "output": text}, and where the row has them "history" (a list
  of [question, answer]) and "system";
- {"prompt": text, "completion": text};
- {"text": text}.

Texts of rows that `reason_to_drop` has not yet seen may be None."""

SYSTEM_ROLES = ("system", "developer")
OPTIONAL_KEYS = ("reasoning_content", "tool_calls", "tool_call_id", "name", "train")  # of a Message


@dataclass(frozen=True)
class Conversation:
    """What a chat template renders.

    `tools` are JSON schemas of functions, `template_kwargs` the row's own arguments of the template, such as
    enable_thinking. A plain text to continue has `text`, and no messages.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    text: str | None = None


def to_conversation(row: Mapping[str, Any], system_prompt: str | None) -> Conversation:
    """A row as the conversation that a chat template renders.

    The user turn of an Alpaca row is its instruction and, when there is an input, a second line ` Context:`
    with it; its history goes before, question by answer. The row's system text, or else the system prompt,
    goes before rows that have no system turn of their own.
    """
    if "text" in row:
        return Conversation([], text=row["text"])
    if "messages" in row:
        messages = [_canonical(message) for message in row["messages"]]
    elif "completion" in row:
        messages = _turns(row["prompt"], row["completion"])
    else:
        context = row["input"] or ""
        user = f"{row['instruction']}\n Context:{context}" if context.strip() else row["instruction"]
        past = [turn for question, answer in row.get("history", ()) for turn in _turns(question, answer)]
        messages = [*past, *_turns(user, row["output"])]
    system = row.get("system", system_prompt)
    if system is not None and not (messages and messages[0]["role"] in SYSTEM_ROLES):
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(messages, row.get("tools"), dict(row.get("chat_template_kwargs", {})))


def to_messages(row: Mapping[str, Any], system_prompt: str | None) -> list[Message]:
    """The messages of `to_conversation`."""
    return to_conversation(row, system_prompt).messages


def _canonical(message: Mapping[str, Any]) -> Message:
    """A copy with the keys of a Message alone; content is "" where the turn says nothing at all."""
    more = {key: message[key] for key in OPTIONAL_KEYS if message.get(key) is not None}
    content = message.get("content")
    if content is None and not ("tool_calls" in more or "reasoning_content" in more):
        content = ""
    return {"role": message["role"], "content": content, **more}


def _turns(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
