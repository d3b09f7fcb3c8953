"""A model's answer taken apart: what it says, and the tool calls that it writes.

There are two readers:

- `split_calls` knows the forms of the chat templates of this program and of many models: Hermes and Qwen
  (<tool_call>{...}</tool_call>), Mistral ([TOOL_CALLS] [{...}, ...]), and Llama 3 (JSON objects alone). With
  `length_before_calls` it also serves a text that is still being written.
- `call_format` learns from any chat template how it writes a call. It reads the calls, wherever they stand,
  and not what is said beside them.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from finetune.data.conversations import Conversation, Message
from finetune.data.templates.chat_template import common_start, function_of, render

# What stands for the name, the keys and the values of a call to see what the template writes around them.
_NAME, _KEYS, _VALUES = "call_of_name", ("first_key", "second_key"), ("first_value", "second_value")
_MARKERS = ("<tool_call>", "[TOOL_CALLS]")
_START = re.compile(r"<tool_call>|\[TOOL_CALLS\]|^[ \t]*\{", flags=re.MULTILINE)
_BETWEEN = re.compile(r"(?:[\s;,]|</?tool_call>|\[TOOL_CALLS\])*")


class Call(NamedTuple):
    """A tool call."""

    name: str
    arguments: dict[str, Any]


class Parts(NamedTuple):
    """An answer, taken apart."""

    content: str
    """What is said before the calls; the whole text if there is none"""
    calls: list[Call]


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


def _calls_in(text: str, names: Collection[str]) -> list[Call]:
    """The calls that a text consists of; none if anything else is in it."""
    calls: list[Call] = []
    position = 0
    while (position := _end_of(_BETWEEN, text, position)) < len(text):
        value, position = _json_at(text, position)
        for one in value if isinstance(value, list) else [value]:
            call = _call(one)
            if call is None or call.name not in names:
                return []
            calls.append(call)
    return calls


def _json_at(text: str, position: int) -> tuple[Any, int]:
    """The JSON value that stands at a position of a text, and where it ends; None if no whole one does."""
    try:
        return json.JSONDecoder().raw_decode(text, position)
    except (ValueError, RecursionError):
        return None, position


def _end_of(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    assert found is not None  # it also matches nothing
    return found.end()


def _call(value: Any) -> Call | None:
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if not (isinstance(name, str) and isinstance(arguments, dict)):
        return None
    return Call(name, arguments)


class CallFormat(NamedTuple):
    """How a chat template writes a call: `name`, a pattern, then the arguments, as a JSON object or, where
    there are `marks`, each in marks of its own."""

    name: str
    """A regular expression of all up to the arguments, with the function's name as its group 1"""
    marks: tuple[str, str, str] | None = None
    """Between key and value, behind a value, and before the next key"""

    def read(self, text: str) -> list[Call]:
        """The calls in an answer, in order. What is no whole call is passed over."""
        found = []
        for match in re.finditer(self.name, text):
            if self.marks is None:
                arguments, _ = _json_at(text, match.end())
            else:
                arguments = _read_marked(text[match.end() :], self.marks)
            if arguments is not None:
                found.append(Call(match[1], arguments))
        return found


def call_format(tokenizer: Any, tools: list[dict[str, Any]] | None) -> CallFormat | None:
    """How the tokenizer's chat template (that for `tools`, if there are several) writes calls.

    The form is a name with a JSON object behind it, or with keys and values each in marks of its own. None
    where the template writes none, or in another form.
    """
    function = {"name": _NAME, "arguments": dict(zip(_KEYS, _VALUES, strict=True))}
    calling = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": function}],
    }
    try:
        text = render(tokenizer, Conversation([{"role": "user", "content": "?"}, calling], tools))
    except ValueError:
        return None
    before, found, behind = text.partition(_NAME)
    if not found:
        return None
    # A mark such as `<function=` or a quotation mark, and what a name begins with, such as `functions.`
    lead = re.search(r"(?:<[^<>\s]*>?|\W)?[\w.:/-]*$", before)
    assert lead is not None, "an empty text matches"
    name = rf"{re.escape(lead[0])}([\w.:/-]+)"
    if json_object := re.search(rf'\{{\s*"{_KEYS[0]}"', behind):
        return CallFormat(name + _loosely(behind[: json_object.start()]) + r"(?=\{)")
    parts = re.fullmatch("(.*?)".join(["", *_interleaved(), ""]), behind, re.DOTALL)
    if parts is None:
        return None
    opening, to_value, joint, to_second_value, closing = parts.groups()
    value_end = common_start(joint, closing)
    if not (opening and to_value and value_end and to_value == to_second_value):
        return None
    return CallFormat(name + _loosely(opening), (to_value, value_end, joint.removeprefix(value_end)))


def _interleaved() -> list[str]:
    return [text for pair in zip(_KEYS, _VALUES, strict=True) for text in pair]


def _loosely(text: str) -> str:
    """A regular expression of a text, with any white space, or none, where the text has some."""
    return r"\s*".join(re.escape(word) for word in re.split(r"\s+", text))


def _read_marked(text: str, marks: tuple[str, str, str]) -> dict[str, str] | None:
    """The arguments that a text begins with, as texts; None if the first is not whole."""
    to_value, value_end, to_next_key = marks
    arguments: dict[str, str] = {}
    while True:
        key, has_value, text = text.partition(to_value)
        value, is_whole, text = text.partition(value_end)
        if not (has_value and is_whole):
            return arguments or None
        arguments[key] = value
        if not text.startswith(to_next_key):
            return arguments
        text = text.removeprefix(to_next_key)


def names_of_calls(message: Message) -> list[str]:
    """The names of the functions that a turn calls."""
    return [str(function_of(call)["name"]) for call in message.get("tool_calls") or ()]


def num_right_calls(made: Sequence[Call], expected: Sequence[Call]) -> float:
    """How many of the expected calls are made, with the same name and arguments, in any order. With more
    calls than expected it is less, in proportion: one right call beside a wrong one is half a call."""
    right = (Counter(map(_as_text, made)) & Counter(map(_as_text, expected))).total()
    return right * len(expected) / max(len(made), len(expected))


def _as_text(call: Call) -> str:
    """The same text for equal calls, whatever the order of their arguments."""
    return json.dumps(call, sort_keys=True)
