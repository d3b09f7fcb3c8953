"""Real conversations with tools and reasoning: each answer, thought and call is trained, nothing else."""

import json
import re
from typing import Any

import pytest
from conftest import tiny_tokenizer
from small_templates import CONCATENATING, QWEN3

from finetune.data.conversations import Conversation
from finetune.data.templates.tokenize import IGNORE, cut, encode_batch

MAX_LENGTH = 8192


def openai_rows(path) -> list[Conversation]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Conversation(row["messages"], row["tools"]) for row in rows]


def sharegpt_rows(path) -> list[Conversation]:
    roles = {"human": "user", "gpt": "assistant", "observation": "tool", "system": "system"}
    conversations = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        messages: list[dict[str, Any]] = []
        for turn in row["conversations"]:
            if turn["from"] == "function_call":
                calls = [{"type": "function", "function": json.loads(turn["value"])}]
                messages.append({"role": "assistant", "content": None, "tool_calls": calls})
            else:
                messages.append({"role": roles[turn["from"]], "content": turn["value"]})
        tools = [{"type": "function", "function": tool} for tool in json.loads(row["tools"] or "[]")]
        conversations.append(Conversation(messages, tools or None))
    return conversations


SOURCES = {"reasoning_tools_25.jsonl": openai_rows, "glaive_toolcall_300.json": sharegpt_rows}


def parse_qwen3(written: str) -> dict[str, Any]:
    """A turn as the model writes it under Qwen3's template, taken apart by a reader of that format."""
    match = re.fullmatch(r"<think>\n(.*?)\n</think>\n\n(.*)<\|im_end\|>", written, re.DOTALL)
    assert match, written
    thought, rest = match.groups()
    said, *blocks = re.split(r"\n?<tool_call>\n", rest)
    calls = [json.loads(block.removesuffix("\n</tool_call>")) for block in blocks]
    return {"thought": thought.strip(), "said": said.strip(), "calls": calls}


def parse_chatml(written: str) -> dict[str, Any]:
    said, *blocks = written.removesuffix("<|im_end|>").split("<call>")
    calls = [json.loads(block.removesuffix("</call>")) for block in blocks]
    return {"thought": "", "said": said.strip(), "calls": calls}


def as_given(message: dict[str, Any], with_thought: bool) -> dict[str, Any]:
    calls = [call["function"] for call in message.get("tool_calls") or []]
    calls = [
        {
            **call,
            "arguments": json.loads(call["arguments"])
            if isinstance(call["arguments"], str)
            else call["arguments"],
        }
        for call in calls
    ]
    thought = (message.get("reasoning_content") or "").strip() if with_thought else ""
    return {"thought": thought, "said": (message["content"] or "").strip(), "calls": calls}


def turns_in(tokenizer, examples) -> list[str]:
    """What is trained, turn by turn: each ends with <|im_end|>, which no text of these rows holds."""
    texts = []
    for tokens in examples:
        assert len(tokens.input_ids) <= MAX_LENGTH
        run: list[int] = []
        for t, label in enumerate([*tokens.labels, IGNORE]):
            if label != IGNORE:
                assert label == tokens.input_ids[t]
                run.append(label)
            elif run:
                texts.append(tokenizer.decode(run))
                run = []
    return [part + "<|im_end|>" for text in texts for part in text.split("<|im_end|>")[:-1]]


@pytest.mark.parametrize(
    ("template", "parse", "with_thought"),
    [(QWEN3, parse_qwen3, True), (CONCATENATING, parse_chatml, False)],
    ids=["qwen3", "chatml"],
)
@pytest.mark.parametrize("name", SOURCES)
def test_every_answer_thought_and_call_is_trained_and_nothing_else(
    shared_data, name, template, parse, with_thought
):
    tokenizer = tiny_tokenizer(template)
    conversations = SOURCES[name](shared_data / name)
    encoded = encode_batch(tokenizer, conversations, "completion")
    assert not [tokens for tokens in encoded if isinstance(tokens, ValueError)]
    for conversation, tokens in zip(conversations, encoded, strict=True):
        written = [parse(text) for text in turns_in(tokenizer, cut(tokens, MAX_LENGTH))]
        given = [as_given(m, with_thought) for m in conversation.messages if m["role"] == "assistant"]
        assert sorted(map(repr, written)) == sorted(map(repr, given))
        if name.startswith("reasoning") and not with_thought:
            assert "reasoning_content is not written" in tokens.remarks
