"""Conversations: what a row of any format becomes before a chat template renders it."""

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""`role` and `content` (text, or None beside tool calls or reasoning), and where the row has them
`reasoning_content`, `tool_calls`, `tool_call_id`, `name`, and `train`: False for an assistant turn that is no
target."""

Row = dict[str, Any]
"""The columns of a row in one of the FORMATS, and its `row_number`."""


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
