"""Whether what a conversation says stands in what the chat template wrote of it."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from finetune.data.conversations import Conversation, Message
from finetune.data.templates.chat_template import ChatTemplate, function_of

THOUGHT_END = "</think>"


class Written(NamedTuple):
    """What the template made of an assistant's turn: the text that the model writes, and how often it writes
    a content and a reasoning there, whatever they are."""

    text: str
    times_content: int
    times_reasoning: int


def check_turn(message: Message, number: int, written: Written, whole: Callable[[], str]) -> list[str]:
    """Remarks on what the template left out of the turn of that number, from 1.

    `whole` gives the text with what the generation prompt gives of the turn, such as the beginning of a
    thought.

    Raises:
        ValueError: the template drops, repeats or rewrites an answer, a reasoning that it writes, or a tool
            call.
    """
    remarks = []
    content = message.get("content") or ""
    if content.strip():
        if written.times_content == 0 and message.get("tool_calls"):
            remarks.append("content beside tool_calls is not written")
        elif written.times_content != 1:
            raise _refusal(
                number, "leaves it out" if written.times_content == 0 else "writes it more than once"
            )
        elif not holds(written.text, content):
            remarks += _check_thought(content, number, whole())
    if reasoning := message.get("reasoning_content"):
        if written.times_reasoning == 0:
            remarks.append("reasoning_content is not written")
        elif not holds(written.text, reasoning):
            raise ValueError(f"the chat template does not render the reasoning of turn {number} as it is")
    for call in message.get("tool_calls") or []:
        _check_call(function_of(call), number, written.text)
    return remarks


def check_tagged(message: Message, number: int, tagged: str) -> list[str]:
    """Remarks on what the {% generation %} tags leave out of the turn of that number, from 1; `tagged` is all
    that they mark.

    Raises:
        ValueError: they leave out an answer or a tool call, or the template rewrites it.
    """
    remarks = []
    content = message.get("content") or ""
    if not holds(tagged, content):
        if message.get("tool_calls"):
            remarks.append("content beside tool_calls is not written")
        else:
            remarks += _check_thought(content, number, tagged)
    if not holds(tagged, message.get("reasoning_content") or ""):
        remarks.append("reasoning_content is not written")
    for call in message.get("tool_calls") or []:
        _check_call(function_of(call), number, tagged)
    return remarks


def remarks_on_prompt(template: ChatTemplate, conversation: Conversation, text: str) -> Iterator[str]:
    """What of the other turns and of the tools the template left out or changed in `text`."""
    # The name alone proves nothing: it stands in the text of a call too.
    names = [function_of_tool(tool).get("name", "") for tool in conversation.tools or []]
    if names and not (template.writes_tools and all(name in text for name in names)):
        yield "tools are not written"
    for message in conversation.messages:
        content = message.get("content")
        if message["role"] == "assistant" or not isinstance(content, str) or content.strip() in text:
            continue
        squeezed = _squeeze(text)
        if not any(_squeeze(form) in squeezed for form in _forms(content.strip())):
            yield f"the text of a {message['role']} turn is not written as it is"


def is_left_out(remark: str) -> bool:
    """Whether a remark is on what the template left out, rather than on what it added."""
    return "not written" in remark


def function_of_tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The name, description and parameters of a tool."""
    function: Mapping[str, Any] = tool.get("function") or tool
    return function


def says_anything_of(message: Message, text: str) -> bool:
    """Whether a text holds a part of what a message says."""
    said = [message.get("content"), message.get("reasoning_content")]
    said += [function_of(call)["name"] for call in message.get("tool_calls") or []]
    squeezed = _squeeze(text)
    return any(_squeeze(part) in squeezed for part in said if isinstance(part, str) and part.strip())


def holds(text: str, part: str) -> bool:
    """Whether a text holds another, but for white space."""
    return part.strip() in text or _squeeze(part) in _squeeze(text)


def _check_thought(content: str, number: int, text: str) -> list[str]:
    """Of a content with a thought in it a template may write the thought elsewhere, or leave it out."""
    if holds(text, content):
        return []
    thought, closed, answer = content.rpartition(THOUGHT_END)
    before, opened, inside = thought.partition("<think>")
    if not closed or not holds(text, answer) or (opened and not holds(text, before)):
        raise _refusal(number, "changes it")
    return [] if holds(text, inside if opened else thought) else ["the thought in an answer is not written"]


def _check_call(function: Mapping[str, Any], number: int, text: str) -> None:
    name, arguments = function["name"], function.get("arguments") or {}
    if name not in text:
        raise ValueError(
            f"the chat template leaves out the tool call {name!r} of turn {number}; set one that writes tool "
            "calls, such as --data.chat_template chatml"
        )
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    squeezed = _squeeze(text)
    for leaf in _leaves(arguments):
        if not any(_squeeze(form) in squeezed for form in _forms(leaf)):
            raise ValueError(
                f"the chat template does not render the arguments of the tool call {name!r} of turn {number} "
                f"as they are: {leaf!r:.60} is missing; use another chat template"
            )


def _leaves(value: Any) -> Iterator[Any]:
    """The keys and the values of a JSON value that are no containers."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _forms(leaf: Any) -> Iterator[str]:
    """How a template may write a key, a value, or what a tool gave."""
    yield str(leaf)
    yield json.dumps(leaf)
    if isinstance(leaf, str):
        yield json.dumps(leaf, ensure_ascii=False)[1:-1]
        yield json.dumps(leaf)[1:-1]
        yield repr(leaf)[1:-1]


def _refusal(number: int, did: str) -> ValueError:
    return ValueError(
        f"the chat template does not render the assistant's text as it is (turn {number}): it {did}; "
        "use another chat template or data.train_on all"
    )


def _squeeze(text: str) -> str:
    return "".join(text.split())
