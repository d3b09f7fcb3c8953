"""Eight conversations with tools, for tests that train on them and ask for their calls."""

import json
from pathlib import Path
from typing import Any

Message = dict[str, Any]

_WHAT = (
    ("weather", "city", "Paris"),
    ("weather", "city", "Köln"),
    ("price", "ticker", "ACME"),
    ("price", "ticker", 'A "quoted" one'),
    ("convert", "amount", 12.5),
    ("convert", "amount", -3),
    ("search", "words", ["bond", "yield"]),
    ("search", "words", []),
)


def tool(name: str, argument: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {argument: {}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": schema}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool_rows() -> list[dict[str, Any]]:
    """Each asks, calls a tool (some of them twice, or with their reasoning), hears, and answers."""
    rows = []
    for number, (name, argument, value) in enumerate(_WHAT):
        calls = [call(name, **{argument: value})] * (1 + number % 2)
        thought = {"reasoning_content": f"I need {name}."} if number % 4 == 0 else {}
        turns = [
            {"role": "user", "content": f"{name} of {value}?"},
            {"role": "assistant", "content": None, "tool_calls": calls, **thought},
            *({"role": "tool", "content": f"{number} {name}", "name": name} for _ in calls),
            {"role": "assistant", "content": f"It is {number}, says {name}."},
        ]
        rows.append({"messages": turns, "tools": [tool(name, argument)]})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
