"""Tool calls in the text that a model writes.

The forms are those of the chat templates of this program and of many models: Hermes and Qwen
(<tool_call>{...}</tool_call>), Mistral ([TOOL_CALLS] [{...}, ...]), and Llama 3 (JSON objects alone).
"""

import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

_MARKERS = ("<tool_call>", "[TOOL_CALLS]")
_START = re.compile(r"<tool_call>|\[TOOL_CALLS\]|^[ \t]*\{", flags=re.MULTILINE)
_BETWEEN = re.compile(r"(?:[\s;,]|</?tool_call>|\[TOOL_CALLS\])*")


class Parts(NamedTuple):
    """An answer, taken apart."""

    content: str
    """What is said before the calls; the whole text if there is none"""
    calls: list[dict[str, Any]]
    """Each with `name` and `arguments`, an object"""


def split_calls(text: str, names: Collection[str]) -> Parts:
    """The calls of tools with these names at the end of a text, and what is said before them.

    Text that looks like a call and is none, such as one that was cut, stays what it is: text.
    """
    for start in _START.finditer(text):
        calls = _calls_in(text[start.start() :], names)
        if calls:
            return Parts(text[: start.start()].strip(), calls)
    return Parts(text, [])


def length_before_calls(text: str) -> int:
    """How much of the start of a text, which is still being written, cannot be a part of a call."""
    if found := _START.search(text):
        return found.start()
    for marker in _MARKERS:
        for length in range(min(len(marker) - 1, len(text)), 0, -1):
            if text.endswith(marker[:length]):
                return len(text) - length
    return len(text)


def _calls_in(text: str, names: Collection[str]) -> list[dict[str, Any]]:
    """The calls that a text consists of; none if anything else is in it."""
    calls: list[dict[str, Any]] = []
    decoder, position = json.JSONDecoder(), 0
    while (position := _end_of(_BETWEEN, text, position)) < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            return []
        for one in value if isinstance(value, list) else [value]:
            call = _call(one)
            if call is None or call["name"] not in names:
                return []
            calls.append(call)
    return calls


def _end_of(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    assert found is not None  # it also matches nothing
    return found.end()


def _call(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if not (isinstance(name, str) and isinstance(arguments, dict)):
        return None
    return {"name": name, "arguments": arguments}
