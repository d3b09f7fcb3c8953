"""What a message, a tool and a tool call may hold, and the one form that each of them takes when read.

Whatever is not used is named: `unused` lists are in words, such as `message key "logprobs"`.
"""

import json
from collections.abc import Mapping
from typing import Any

from finetune.data.conversations import Message

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
REASONING_PARTS = ("reasoning", "thinking")
KEYS_OF_AN_ASSISTANT = {*REASONING_KEYS, "tool_calls", "function_call", "train", "weight"}
USED_KEYS = {"role", "content", "tool_call_id", "name", *KEYS_OF_AN_ASSISTANT}
OWN_ARGUMENTS = ("messages", "tools", "add_generation_prompt", "continue_final_message")  # of every template

# Who speaks in ShareGPT's `from`, and whose turn that is in a chat template.
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    **dict.fromkeys(("observation", "tool", "function_response", "tool_response"), "tool"),
    "system": "system",
    "developer": "developer",
    "function": "function",
}


def read_messages(cell: Any, place: str, column: str = "messages") -> tuple[list[Message], list[str]]:
    """Messages of OpenAI's form in the one form that a template is given, and what of them is unused.

    A message has `role` and `content` (text, or None), and where the row has them `reasoning_content`,
    `tool_calls` (of {type, function: {name, arguments}, id}, arguments an object), `tool_call_id`, `name`,
    and `train` (False for an assistant's turn that is no target). None is no messages.

    Raises:
        ValueError: a message of another form, named by row and turn.
    """
    if cell is None:
        return [], []
    expected = f"{place}: {column} must be a list of objects with role and content"
    if not isinstance(cell, list):
        raise ValueError(f"{expected}, not {cell!r:.60}")
    messages: list[Message] = []
    unused: list[str] = []
    for number, raw in enumerate(cell, 1):
        if not (isinstance(raw, dict) and isinstance(raw.get("role"), str)):
            raise ValueError(f"{expected}, not {raw!r:.60}")
        messages.append(_read_message(raw, f"{place}: {column}, turn {number}", unused))
    return messages, unused


def read_sharegpt(cell: Any, place: str, column: str = "conversations") -> tuple[list[Message], list[str]]:
    """Turns of ShareGPT's form ({from, value}) as `read_messages` gives them.

    A function_call becomes a tool call of an assistant's turn: of the turn before it, where that is the
    assistant's too (it speaks, then calls; several calls are made at once), else of a turn without text. What
    the assistant says right after a call is a turn of its own.

    Raises:
        ValueError: a turn of another form, named by row and turn.
    """
    if cell is None:
        return [], []
    expected = f"{place}: {column} must be a list of objects with from and value"
    if not isinstance(cell, list):
        raise ValueError(f"{expected}, not {cell!r:.60}")
    if cell and isinstance(cell[0], dict) and "role" in cell[0]:
        return read_messages(cell, place, column)
    messages: list[Message] = []
    unused: list[str] = []
    for number, raw in enumerate(cell, 1):
        if not (isinstance(raw, dict) and isinstance(raw.get("from"), str)):
            raise ValueError(f"{expected}, not {raw!r:.60}")
        turn = f"{place}: {column}, turn {number}"
        role = SHAREGPT_ROLES.get(raw["from"])
        if role is None:
            raise ValueError(
                f"{turn}: from must be one of {', '.join(SHAREGPT_ROLES)}, not {raw['from']!r:.60}"
            )
        message = {key: value for key, value in raw.items() if key not in ("from", "value")}
        if role != "function_call":
            message |= {"role": role, "content": raw.get("value")}
            messages.append(_read_message(message, turn, unused))
            continue
        message |= {"role": "assistant", "content": None, "tool_calls": _calls_in(raw.get("value"), turn)}
        calling = _read_message(message, turn, unused)
        before = messages[-1] if messages else None
        if before and before["role"] == "assistant" and before.get("train") == calling.get("train"):
            before["tool_calls"] = [*before.get("tool_calls", ()), *calling["tool_calls"]]
        else:
            messages.append(calling)
    return messages, unused


def _calls_in(value: Any, turn: str) -> list[Any]:
    """The call, or the list of calls, that the text of a function_call is."""
    calls = _parsed(value, f"{turn}: a function_call") if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise ValueError(
            f"{turn}: a function_call must be an object with name and arguments, not {value!r:.60}"
        )
    return calls


def _read_message(raw: Mapping[str, Any], turn: str, unused: list[str]) -> Message:
    used = USED_KEYS if raw["role"] == "assistant" else USED_KEYS - KEYS_OF_AN_ASSISTANT
    content, thoughts = _content(raw.get("content"), turn, unused)
    message: Message = {"role": raw["role"], "content": content}
    if raw["role"] == "assistant":
        message |= _reasoning(raw, thoughts, turn)
        if calls := _tool_calls(raw, turn, unused):
            message["tool_calls"] = calls
        if not _is_trained(raw, turn):
            message["train"] = False
    elif thoughts:
        unused.append(f"reasoning of a turn of {raw['role']}")
    for key in ("tool_call_id", "name"):
        text = _text(raw.get(key), f"{turn}: {key}")
        if text is not None:
            message[key] = text
    for key, value in raw.items():
        # Of a turn that is no target anyway, `train: false` says nothing new, and an empty list nothing.
        says_nothing = key in KEYS_OF_AN_ASSISTANT and not value
        if key not in used and value is not None and not says_nothing:
            unused.append(f'message key "{key}"')
    return message


def _reasoning(raw: Mapping[str, Any], thoughts: str, turn: str) -> Message:
    said = {key: text for key in REASONING_KEYS if (text := _text(raw.get(key), f"{turn}: {key}"))}
    if thoughts:
        said["the parts of content"] = thoughts
    if len(set(said.values())) > 1:
        raise ValueError(f"{turn}: the reasoning in {' and in '.join(said)} differs; keep one")
    return {"reasoning_content": next(iter(said.values()))} if said else {}


def _content(cell: Any, turn: str, unused: list[str]) -> tuple[str | None, str]:
    """The text of a content, whole or in parts, and that of its parts of reasoning."""
    if cell is None or isinstance(cell, str):
        return cell, ""
    if not isinstance(cell, list):
        raise ValueError(f"{turn}: content must be text, or a list of parts, not {cell!r:.60}")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in cell:
        kind, key, text = _part(part, turn)
        if kind == "text":
            texts.append(text)
        elif texts:
            raise ValueError(f"{turn}: a part of {kind} stands behind text; a turn thinks first, then speaks")
        else:
            thoughts.append(text)
        if isinstance(part, dict):
            others = [name for name in part if name not in ("type", key) and part[name] is not None]
            unused += [f'part key "{name}"' for name in others]
    return "".join(texts) if texts else None, "".join(thoughts)


def _part(part: Any, turn: str) -> tuple[str, str, str]:
    """The type of a part, the key of its text, and the text."""
    if isinstance(part, str):
        return "text", "", part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"{turn}: a part of content must be an object with a type, not {part!r:.60}")
    if kind != "text" and kind not in REASONING_PARTS:
        raise ValueError(
            f"{turn}: content has a part of type {kind!r:.60}; only text and reasoning can be used"
        )
    for key in ("text",) if kind == "text" else (kind, "text"):
        if isinstance(part.get(key), str):
            return kind, key, part[key]
    raise ValueError(f"{turn}: a part of type {kind} has no text: {part!r:.60}")


def _tool_calls(raw: Mapping[str, Any], turn: str, unused: list[str]) -> list[dict[str, Any]]:
    calls = raw.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise ValueError(f"{turn}: tool_calls must be a list, not {calls!r:.60}")
    if raw.get("function_call") is not None:  # as OpenAI's API had it before there were several
        if calls:
            raise ValueError(
                f"{turn}: function_call and tool_calls are two names of one thing; keep tool_calls"
            )
        calls = [raw["function_call"]]
    return [
        _tool_call(call, f"{turn}: tool call {number}", unused) for number, call in enumerate(calls or (), 1)
    ]


def _tool_call(call: Any, place: str, unused: list[str]) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise ValueError(f"{place} must be an object with name and arguments, not {call!r:.60}")
    nested = call.get("function")
    function = call if nested is None else nested
    if not (isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]):
        raise ValueError(f"{place} must be an object with name and arguments, not {call!r:.60}")
    if call.get("type") not in (None, "function"):
        raise ValueError(f"{place} is of type {call['type']!r:.60}; only calls of a function are trained on")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{place}: arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict | None):
        raise ValueError(f"{place}: arguments must be an object, or one as JSON text, not {arguments!r:.60}")
    identifier = _text(call.get("id"), f"{place}: id")
    read = {} if identifier is None else {"id": identifier}
    known = {"id", "type", "name", "arguments"} if nested is None else {"id", "type", "function"}
    others = {key: call[key] for key in call if key not in known}
    if nested is not None:
        others |= {key: function[key] for key in function if key not in ("name", "arguments")}
    unused += [f'tool call key "{key}"' for key, value in others.items() if value is not None]
    return {**read, "type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}


def _is_trained(raw: Mapping[str, Any], turn: str) -> bool:
    """What `train` and `weight` say of a turn; without them it is."""
    train, weight = raw.get("train"), raw.get("weight")
    if not isinstance(train, bool | None):
        raise ValueError(f"{turn}: train must be true or false, not {train!r:.60}")
    if isinstance(weight, bool) or weight not in (None, 0, 1):
        raise ValueError(
            f"{turn}: weight must be 0 or 1, not {weight!r:.60}; other weights are not supported"
        )
    if train is not None and weight is not None and train != bool(weight):
        raise ValueError(f"{turn}: train is {str(train).lower()} and weight is {weight}; keep one of them")
    return train is not False and weight != 0


def read_tools(cell: Any, place: str) -> list[dict[str, Any]]:
    """Tools, as a list or as JSON text of one, in OpenAI's form {type: function, function: {name, ...}}.

    Raises:
        ValueError: tools of another form, named by row and number.
    """
    if isinstance(cell, str):
        cell = _parsed(cell, f"{place}: tools") if cell.strip() else None
    if cell is None:
        return []
    if not isinstance(cell, list):
        raise ValueError(f"{place}: tools must be a list, or one as JSON text, not {cell!r:.60}")
    return [_tool(tool, f"{place}: tool {number}") for number, tool in enumerate(cell, 1)]


def _tool(tool: Any, place: str) -> dict[str, Any]:
    tool = _parsed(tool, place) if isinstance(tool, str) else tool
    if isinstance(tool, dict) and "function" not in tool:
        tool = {
            "function": {key: value for key, value in tool.items() if (key, value) != ("type", "function")}
        }
    if not isinstance(tool, dict) or tool.get("type", "function") != "function":
        raise ValueError(f"{place} must be a function, not {tool!r:.60}")
    function = tool["function"]
    if not (isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]):
        raise ValueError(f"{place} must be an object with a name and parameters, not {function!r:.60}")
    return {"type": "function", **tool}


def read_template_kwargs(cell: Any, place: str, column: str) -> dict[str, Any]:
    """Arguments of the chat template, as an object or as JSON text of one.

    Raises:
        ValueError: anything else, or a name that the template is given anyway.
    """
    if isinstance(cell, str):
        cell = _parsed(cell, f"{place}: {column}") if cell.strip() else None
    if not isinstance(cell, dict | None):
        raise ValueError(f"{place}: {column} must be an object, or one as JSON text, not {cell!r:.60}")
    for name in OWN_ARGUMENTS:
        if name in (cell or {}):
            raise ValueError(f"{place}: {column} sets {name}, which the template is given anyway")
    return cell or {}


def _text(cell: Any, place: str) -> str | None:
    if not isinstance(cell, str | None):
        raise ValueError(f"{place} must be text, not {cell!r:.60}")
    return cell


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place} is no JSON ({error.msg} at character {error.pos + 1}): {text!r:.60}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{place} is nested too deep") from error
