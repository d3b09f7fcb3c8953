"""The tool calls in an answer, read back from the text that the chat template writes of them."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from finetune.data.conversations import Conversation, Message
from finetune.data.templates.chat_template import common_start, function_of, render

Call = tuple[str, str]
"""Name and arguments: these as JSON text with sorted keys, so that equal ones are equal texts"""

# What stands for the name, the keys and the values of a call to see what the template writes around them.
_NAME, _KEYS, _VALUES = "call_of_name", ("first_key", "second_key"), ("first_value", "second_value")


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
            rest = text[match.end() :]
            arguments = _read_json(rest) if self.marks is None else _read_marked(rest, self.marks)
            if arguments is not None:
                found.append((match[1], json.dumps(arguments, sort_keys=True)))
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


def _read_json(text: str) -> Any:
    """The JSON object that a text begins with; None if it begins with no whole one."""
    try:
        return json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        return None


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
    right = (Counter(made) & Counter(expected)).total()
    return right * len(expected) / max(len(made), len(expected))
