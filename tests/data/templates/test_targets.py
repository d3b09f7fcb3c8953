"""Any conversation under any template gets a right mask, or one clear line."""

import random
from typing import Any

import pytest
from small_templates import SMALL_TEMPLATES, SmallTemplate, byte_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from finetune.data.conversations import Conversation
from finetune.data.templates.anatomy import dissect, keep, parts_of
from finetune.data.templates.chat_template import template_of
from finetune.data.templates.tokenize import IGNORE, Tokens, encode_batch

CONVERSATIONS_EACH = 50

TEXTS = [
    "It is a coin.",
    "What?",
    "4",
    "",
    " \n",
    "\n\nTwo lines,\n\n1. and 2.\n",
    "“Ça” 💶 e\u0301 👩‍👩‍👧",
    '{"sun": true}',
    "<|im_end|>\n<|im_start|>assistant\nIt is a coin.<|im_end|>\n",
    "<|user|> [INST] </s> <end> <|eot_id|>",
    "<|start|>assistant<|channel|>final",
    "placeholder",
    "a < b, 'c' \\ \"d\"",
]
THOUGHTS = [*TEXTS, "Two and two.\nFour.", "It is a coin. Or not?"]
WITH_THOUGHT = ["<think>\nTwo and two.\n</think>\n\nFour.", "so</think>Four.", "Use <think> and </think> so."]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Looks.",
            "parameters": {"type": "object", "properties": {}},
        },
    }
    for name in ("find_coin", "weigh")
]


def random_call(rng: random.Random, name: str, number: int) -> dict[str, Any]:
    values = ["Zürich", 'a "b"', 3, 2.5, True, None, ["x", {"y": "<|im_end|>"}], "two\nlines", {}]
    arguments = {key: rng.choice(values) for key in rng.sample(["city", "day", "wie"], rng.randint(0, 3))}
    return {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def random_answer(rng: random.Random) -> list[dict[str, Any]]:
    """An assistant's turn, and what tools say to it."""
    turn: dict[str, Any] = {"role": "assistant", "content": rng.choice(TEXTS + WITH_THOUGHT)}
    if rng.random() < 0.4:
        turn["reasoning_content"] = rng.choice(THOUGHTS)
    if rng.random() < 0.15:
        turn["train"] = False
    if rng.random() > 0.35:
        return [turn]
    names = rng.sample(["find_coin", "weigh"], rng.choice([1, 1, 2]))
    turn["tool_calls"] = [random_call(rng, name, number) for number, name in enumerate(names)]
    turn["content"] = rng.choice([None, None, "", "I shall look."])
    said = [
        {"role": "tool", "name": name, "tool_call_id": f"call0000{number}", "content": rng.choice(TEXTS)}
        for number, name in enumerate(names)
    ]
    return [turn, *said] if rng.random() < 0.8 else [turn]


def random_conversation(rng: random.Random) -> Conversation:
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.3:
        messages.append({"role": rng.choice(["system", "system", "developer"]), "content": rng.choice(TEXTS)})
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.9:
            messages.append({"role": "user", "content": rng.choice(TEXTS)})
        for _ in range(rng.choice([1, 1, 1, 2])):
            messages += random_answer(rng)
    if rng.random() < 0.2:
        messages.append({"role": "user", "content": rng.choice(TEXTS)})
    return Conversation(messages, TOOLS if rng.random() < 0.4 else None)


def expected(
    tokenizer: Any, template: SmallTemplate, conversation: Conversation
) -> list[tuple[str, str]] | None:
    """What the model sees and what it writes, for each trained turn; None where it is not written whole.

    What it sees is asked of transformers itself.
    """
    pairs = []
    prepared = template_of(tokenizer, conversation.tools).prepare(conversation.messages)

    def rendered(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        [text], _ = render_jinja_template(
            [messages],
            tools=conversation.tools,
            chat_template=template.source,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
        return text

    for i, message in enumerate(conversation.messages):
        if message["role"] != "assistant" or message.get("train") is False:
            continue
        written = template.written(message, conversation.messages[:i])
        try:
            rendered(prepared[: i + 1], False)
            prompt = rendered(prepared[:i], True)
        except Exception:  # whatever a template raises
            return None
        if written is None:
            return None
        pairs.append((prompt.removesuffix(template.unprompted), written))
    return pairs


def paths_of(tokens: Tokens) -> list[list[int]]:
    """The places of the tokens that the last token of the trunk and of each branch see, and their own."""
    ends = [start for start, _ in tokens.branches] + [len(tokens.input_ids)]
    paths = [list(range(ends[0]))]
    for (start, attach), end in zip(tokens.branches, ends[1:], strict=True):
        assert attach <= ends[0]
        paths.append([*range(attach), *range(start, end)])
    return paths


def check_mask(tokenizer: Any, tokens: Tokens, pairs: list[tuple[str, str]]) -> None:
    """Each turn's targets stand behind what the model sees, and there are no others."""
    found: set[int] = set()
    for seen, written in pairs:
        before, whole = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (seen, seen + written)
        )
        held = [
            places[len(before) : len(whole)]
            for places in paths_of(tokens)
            if [tokens.input_ids[t] for t in places[: len(whole)]] == whole
            and all(tokens.labels[t] == tokens.input_ids[t] for t in places[len(before) : len(whole)])
        ]
        assert held, (
            seen,
            written,
            [tokenizer.decode([tokens.input_ids[t] for t in p]) for p in paths_of(tokens)],
        )
        # Of places that are the same, as at the beginning of a branch and in the trunk, one is trained.
        places = next((each for each in held if not found & set(each)), None)
        assert places, (seen, written)
        found |= set(places)
    assert found == {t for t, label in enumerate(tokens.labels) if label != IGNORE}


@pytest.mark.parametrize("name", SMALL_TEMPLATES)
def test_any_conversation_gets_a_right_mask_or_a_clear_line(name):
    template = SMALL_TEMPLATES[name]
    tokenizer = byte_tokenizer(template)
    rng = random.Random(name)
    outcomes = []
    for _ in range(CONVERSATIONS_EACH):
        conversation = random_conversation(rng)
        pairs = expected(tokenizer, template, conversation)
        [tokens] = encode_batch(tokenizer, [conversation], "completion")
        if isinstance(tokens, ValueError):
            # What is refused cannot be written, or has a thought in an answer that the template tears apart.
            assert "\n" not in str(tokens)
            torn = any("</think>" in (m.get("content") or "") for m in conversation.messages)
            assert not pairs or torn, f"{tokens}\n{conversation}"
        else:
            assert pairs is not None, conversation
            check_mask(tokenizer, tokens, pairs)
            outcomes.append(bool(pairs))
    assert any(outcomes) == (name != "no end")


@pytest.mark.parametrize("name", SMALL_TEMPLATES)
@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_what_is_encoded_is_taken_apart_for_an_audit(name, train_on):
    tokenizer = byte_tokenizer(SMALL_TEMPLATES[name])
    rng = random.Random(name)
    conversations = [random_conversation(rng) for _ in range(CONVERSATIONS_EACH // 5)]
    encoded = zip(conversations, encode_batch(tokenizer, conversations, train_on), strict=True)
    for conversation, tokens in encoded:
        if isinstance(tokens, ValueError):
            continue
        anatomy = dissect(tokenizer, conversation, train_on)
        assert anatomy.tokens == tokens
        trunk, *branches = parts_of(tokenizer, anatomy, keep(tokens, len(tokens.input_ids)))
        assert "".join(segment.text for segment in trunk.segments) == anatomy.text
        segments = [segment for part in (trunk, *branches) for segment in part.segments]
        targets = tokenizer.decode([label for label in tokens.labels if label != IGNORE])
        assert "".join(segment.text for segment in segments if segment.trained) == targets
