"""What the model has to write of a conversation, found in the text that the chat template renders.

An assistant's turn is rendered when it is the last one, as it is when the model writes it. What the model
writes begins where the generation prompt ends, and ends with the token at which generation stops. A template
may render the turn otherwise once others follow it: the turn is then not in the text of the whole
conversation, and gets a text of its own, which ends with it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from finetune.data.chat_template import ChatTemplate, common_start, function_of
from finetune.data.conversations import Conversation, Message

# What stands for the texts of a turn to see what the template writes around them. Private characters: no text
# of a row ends or begins with a part of them.
_CONTENT, _REASONING, _ARGUMENT = "\ue0f1\ue0f2", "\ue0f3\ue0f4", "\ue0f5\ue0f6"
_THOUGHT_END = "</think>"


class Span(NamedTuple):
    """Characters that the model writes: [start, stop_start) and the token that begins at stop_start."""

    start: int
    stop_start: int


@dataclass
class Text:
    """A rendered text, and what of it the model writes; the first turn first."""

    text: str
    spans: list[Span] = field(default_factory=list)


class _Shape(NamedTuple):
    """What the template writes around the texts of turns that have the same fields in the same place."""

    tail: str
    """Behind the last of the turn's own texts, to the end"""
    times_content: int
    times_reasoning: int
    lead: str
    """Between the generation prompt and the turn's first own text"""


class StopTokens:
    """The special tokens of a tokenizer by their texts.

    Attributes:
        ids: Those at which generation stops.
        special: All special ones, and these.
        texts: The id of each special one by its text.
        pattern: Matches any special one, the longest first.
    """

    def __init__(self, tokenizer: Any, ids: frozenset[int]) -> None:
        added = tokenizer.added_tokens_decoder
        self.ids = ids
        self.special = frozenset(i for i, token in added.items() if token.special) | ids
        self.texts: dict[str, int] = {tokenizer.convert_ids_to_tokens(i): i for i in self.special}
        longest_first = sorted(self.texts, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.longest = max(map(len, self.texts), default=0)
        self.texts_key = tuple(longest_first)


def find_targets(
    template: ChatTemplate, conversation: Conversation, stops: StopTokens
) -> tuple[list[Text], list[str]]:
    """The texts to train on, and remarks on what the template did.

    The first text is the whole conversation up to its last trained turn. Each further one ends with an
    earlier turn that the first renders otherwise.

    Raises:
        ValueError: the template fails on the conversation, drops or rewrites an answer, or ends a turn with
            no special token.
    """
    messages = conversation.messages
    turns = [i for i, message in enumerate(messages) if is_trained(message)]
    remarks: list[str] = []
    texts: list[Text] = []
    for i in reversed(turns):
        text, span, end = _find_turn(template, conversation, i, stops, remarks)
        written = text[:end]
        holder = next((held for held in texts if held.text.startswith(written)), None)
        if holder is None:
            # The first text is the whole conversation; behind the turn of another one comes nothing.
            holder = Text(written if texts else text)
            texts.append(holder)
        holder.spans.insert(0, span)
    texts[1:] = reversed(texts[1:])
    remarks.extend(_remarks_on_prompt(template, conversation, texts[0].text))
    return texts, remarks


def is_trained(message: Message) -> bool:
    """Whether a turn is the assistant's, and to be trained on."""
    return message["role"] == "assistant" and message.get("train") is not False


def up_to(conversation: Conversation, end: int) -> Conversation:
    """The first `end` messages of a conversation."""
    return replace(conversation, messages=conversation.messages[:end])


def _find_turn(
    template: ChatTemplate, conversation: Conversation, i: int, stops: StopTokens, remarks: list[str]
) -> tuple[str, Span, int]:
    """The conversation up to turn `i` as text, what of it the model writes, and where its stop token ends."""
    message = conversation.messages[i]
    text = template.render(up_to(conversation, i + 1))
    prompt = _prompt(template, conversation, i)
    shape = _shape(template, conversation, i, text, prompt)
    start = len(prompt)
    if not text.startswith(prompt):
        text, start = _joined(template, conversation, i, text, prompt, stops)
    _check_turn(template, conversation, i, text[start:], shape, remarks)
    lead = shape.lead.strip()
    if lead and not message.get("reasoning_content") and not message.get("tool_calls"):
        remarks.append(f"{lead!r} is added before an answer")
    tail_start = max(start, len(text) - len(shape.tail))
    has_calls = bool(message.get("tool_calls"))
    stop = _find_stop(template, text, tail_start, has_calls, stops)
    if stop is None and (next_turn := _next_turn_start(template, has_calls, stops)):
        text += next_turn
        stop = len(text) - len(next_turn.lstrip()), len(text)
    if stop is None:
        raise ValueError(
            "the chat template ends an assistant's turn with no special token, so the model would not "
            "learn to stop; use a chat template that writes an end-of-turn token, or data.train_on all"
        )
    return text, Span(start, stop[0]), stop[1]


def _prompt(template: ChatTemplate, conversation: Conversation, i: int) -> str:
    """What the model is given before it writes turn `i`."""
    try:
        return template.render(up_to(conversation, i), add_generation_prompt=True)
    except ValueError:
        if i > 0:
            raise
        # Nobody asks for an answer to nothing, and a template may fail on it.
        return common_start(template.render(up_to(conversation, 1)), _probe(template, conversation, 0))


def _joined(
    template: ChatTemplate, conversation: Conversation, i: int, text: str, prompt: str, stops: StopTokens
) -> tuple[str, int]:
    """A text with turn `i` as the model writes it, and where it begins to write; `text`, which holds that
    turn, does not begin with `prompt`, which asks for it.

    Either the prompt says more than the finished turn has, such as the beginning of a thought, or it renders
    the turns before otherwise.
    """
    parting = _before_token(stops, text, len(common_start(prompt, text)))
    own_start = len(common_start(text, _probe(template, conversation, i)))
    if not _says_anything_of(conversation.messages[i - 1] if i else None, prompt[parting:]):
        return text, min(parting, own_start)
    # The generation prompt's own text stands before this turn too, unless no turn has it.
    history = template.render(up_to(conversation, i))
    asked = prompt[_before_token(stops, prompt, len(common_start(history, prompt))) :]
    place = text.rfind(asked, 0, own_start) if asked else -1
    start = place + len(asked)
    if place < 0 or _says_anything_of(conversation.messages[i - 1], text[start:own_start]):
        raise ValueError(
            f"the chat template renders the turns before turn {i + 1} in another way once that is written, "
            "and what the model writes of it cannot be told; use another chat template or data.train_on all"
        )
    return prompt + text[start:], len(prompt)


def _says_anything_of(message: Message | None, text: str) -> bool:
    """Whether a text holds what a message says, or may hold it."""
    if message is None:
        return False
    said = [message.get("content"), message.get("reasoning_content")]
    said += [function_of(call)["name"] for call in message.get("tool_calls") or []]
    words = [_squeeze(part) for part in said if isinstance(part, str) and part.strip()]
    squeezed = _squeeze(text)
    return not words or any(word in squeezed for word in words)


def _before_token(stops: StopTokens, text: str, place: int) -> int:
    """The place, or the beginning of the special token that it lies within."""
    for match in stops.pattern.finditer(text, max(0, place - stops.longest)):
        if match.start() >= place:
            break
        if match.end() > place:
            return match.start()
    return place


def _shape(template: ChatTemplate, conversation: Conversation, i: int, text: str, prompt: str) -> _Shape:
    """What the template writes around the texts of turn `i`, as `text` ends with it."""
    message = conversation.messages[i]
    key = (
        conversation.messages[i - 1]["role"] if i else None,
        bool(message.get("content")),
        _THOUGHT_END in (message.get("content") or ""),
        bool(message.get("reasoning_content")),
        len(message.get("tool_calls") or []),
        bool(conversation.tools),
        json.dumps(conversation.template_kwargs, sort_keys=True, default=str),
    )
    known: _Shape | None = template.turn_shapes.get(key)
    if known is not None and text.endswith(known.tail):
        return known
    probe = _probe(template, conversation, i)
    start = len(common_start(prompt, text, probe))
    written = probe[start:]
    places = [place for mark in (_CONTENT, _REASONING) if (place := written.find(mark)) >= 0]
    shape = _Shape(
        _common_suffix(text, probe),
        written.count(_CONTENT),
        written.count(_REASONING),
        written[: min(places)] if places and prompt == probe[:start] else "",
    )
    template.turn_shapes[key] = shape
    return shape


def _probe(template: ChatTemplate, conversation: Conversation, i: int) -> str:
    """The conversation up to turn `i` as text, with placeholders for that turn's texts."""
    message = dict(conversation.messages[i])
    calls = message.get("tool_calls")
    if message.get("content") or not (calls or message.get("reasoning_content")):
        message["content"] = _CONTENT
    if message.get("reasoning_content"):
        message["reasoning_content"] = _REASONING
    if calls:
        message["tool_calls"] = [
            {**call, "function": {**function_of(call), "arguments": {_ARGUMENT: _ARGUMENT}}} for call in calls
        ]
    return template.render(replace(conversation, messages=[*conversation.messages[:i], message]))


def _common_suffix(first: str, second: str) -> str:
    return common_start(first[::-1], second[::-1])[::-1]


def _find_stop(
    template: ChatTemplate, text: str, tail_start: int, has_calls: bool, stops: StopTokens
) -> tuple[int, int] | None:
    """Where the token that ends the turn stands: [start, end); None if nothing ends it.

    It is the first at which generation stops. Where there is none: the first special one, if nothing but
    white space stands between it and the answer. Behind a tool call the template writes more, so there it is
    the token that ends its answers, or else the last one.
    """
    end = len(text)
    conversation_end = _conversation_end(template, stops)
    if conversation_end and text.endswith(conversation_end):
        end = max(tail_start, end - len(conversation_end))
    found = [match.span() for match in stops.pattern.finditer(text, tail_start, end)]
    for start, stop in found:
        if stops.texts[text[start:stop]] in stops.ids:
            return start, stop
    if found and has_calls:
        answer_end = _answer_end(template, stops)
        return next((span for span in found if text[slice(*span)] == answer_end), found[-1])
    return found[0] if found and not text[tail_start : found[0][0]].strip() else None


def _conversation_end(template: ChatTemplate, stops: StopTokens) -> str:
    """What the template writes behind every conversation that does not ask for an answer: not the turn's."""
    known: str | None = template.turn_shapes.get(("conversation end", stops.texts_key))
    if known is None:
        whole, prompt = template.examples[:2]
        known = whole[_before_token(stops, whole, len(common_start(whole, prompt))) :] if prompt else ""
        template.turn_shapes[("conversation end", stops.texts_key)] = known
    return known


def _answer_end(template: ChatTemplate, stops: StopTokens) -> str:
    """The special token that ends an answer without tool calls; empty if none does."""
    answered = template.examples[2]
    match = stops.pattern.search(answered, answered.rfind(template.ANSWER) + len(template.ANSWER))
    return match[0] if match else ""


def _next_turn_start(template: ChatTemplate, has_calls: bool, stops: StopTokens) -> str:
    """What begins the turn behind an answer or tool calls, where generation stops at that; else empty."""
    key = ("next turn", has_calls, stops.texts_key)
    if key not in template.turn_shapes:
        whole, longer = template.examples_of_next_turn[has_calls]
        match = stops.pattern.search(longer, len(whole)) if longer.startswith(whole) else None
        begins = (
            match and stops.texts[match[0]] in stops.ids and not longer[len(whole) : match.start()].strip()
        )
        template.turn_shapes[key] = longer[len(whole) : match.end()] if match and begins else ""
    start: str = template.turn_shapes[key]
    return start


# --- What the template made of a turn ---


def _check_turn(
    template: ChatTemplate,
    conversation: Conversation,
    i: int,
    own: str,
    shape: _Shape,
    remarks: list[str],
) -> None:
    """Refuse a template that drops, repeats or rewrites what the turn says; `own` is what it made of it."""
    message = conversation.messages[i]
    content = message.get("content") or ""
    if content.strip():
        if shape.times_content == 0 and message.get("tool_calls"):
            remarks.append("content beside tool_calls is not written")
        elif shape.times_content != 1:
            did = "leaves it out" if shape.times_content == 0 else "writes it more than once"
            raise ValueError(_refusal(i, did))
        elif not _holds(own, content):
            _check_thought(template, conversation, i, content, remarks)
    if reasoning := (message.get("reasoning_content") or "").strip():
        if shape.times_reasoning == 0:
            remarks.append("reasoning_content is not written")
        elif not _holds(own, reasoning):
            raise ValueError(f"the chat template does not render the reasoning of turn {i + 1} as it is")
    for call in message.get("tool_calls") or []:
        _check_call(function_of(call), i, own)


def _check_thought(
    template: ChatTemplate, conversation: Conversation, i: int, content: str, remarks: list[str]
) -> None:
    """Of a content with a thought in it a template may write the thought elsewhere, or leave it out."""
    # The generation prompt may give the beginning of the content.
    text = template.render(up_to(conversation, i + 1))
    own = text[len(common_start(text, _probe(template, conversation, i))) :]
    if _holds(own, content):
        return
    thought, closed, answer = content.rpartition(_THOUGHT_END)
    if not closed or not _holds(own, answer):
        raise ValueError(_refusal(i, "changes it"))
    if not _holds(own, thought.partition("<think>")[2]):
        remarks.append("the thought in an answer is not written")


def _check_call(function: dict[str, Any], i: int, own: str) -> None:
    name, arguments = function["name"], function.get("arguments") or {}
    if name not in own:
        raise ValueError(
            f"the chat template leaves out the tool call {name!r} of turn {i + 1}; use another chat template"
        )
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    squeezed = _squeeze(own)
    for leaf in _leaves(arguments):
        if not any(_squeeze(form) in squeezed for form in _forms(leaf)):
            raise ValueError(
                f"the chat template does not render the arguments of the tool call {name!r} of turn {i + 1} "
                f"as they are: {leaf!r:.60} is missing; use another chat template"
            )


def _leaves(value: Any) -> Iterator[Any]:
    """The keys and values of a JSON value that are not containers."""
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
    """How a template may write a key or value."""
    yield str(leaf)
    if isinstance(leaf, str):
        yield json.dumps(leaf, ensure_ascii=False)[1:-1]
        yield json.dumps(leaf)[1:-1]
        yield repr(leaf)[1:-1]
    else:
        yield json.dumps(leaf)


def _refusal(i: int, did: str) -> str:
    return (
        f"the chat template does not render the assistant's text as it is (turn {i + 1}): it {did}; "
        "use another chat template or data.train_on all"
    )


def _holds(text: str, part: str) -> bool:
    """Whether a text holds another, but for white space."""
    return part.strip() in text or _squeeze(part) in _squeeze(text)


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _remarks_on_prompt(template: ChatTemplate, conversation: Conversation, text: str) -> Iterator[str]:
    """What of the other turns and of the tools the template leaves out or changes."""
    for tool in conversation.tools or []:
        if tool.get("function", tool).get("name", "") not in text:
            yield "tools is not written"
            break
    for message in conversation.messages:
        content = message.get("content")
        if message["role"] == "assistant" or not isinstance(content, str) or content.strip() in text:
            continue
        squeezed = _squeeze(text)
        if not any(_squeeze(form) in squeezed for form in _forms(content.strip())):
            yield f"the text of a {message['role']} turn is not written as it is"


# --- Templates that mark what the model writes ---


def find_tagged(template: ChatTemplate, conversation: Conversation) -> tuple[list[Text], list[str]]:
    """As `find_targets`, of a template with {% generation %} tags: the one text of the whole conversation.

    The spans end with the last tagged character.

    Raises:
        ValueError: the template fails on the conversation, tags not one span for each assistant's turn where
            one of these is not to be trained, or leaves an answer out of the tags.
    """
    text, tagged = template.generation_spans(conversation)
    turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    trained = [i for i in turns if is_trained(conversation.messages[i])]
    if len(trained) < len(turns):
        if len(tagged) != len(turns):
            raise ValueError(
                f"the chat template tags {len(tagged)} spans of {len(turns)} assistant's turns, so those "
                "with train: false cannot be told; use a template without {% generation %} tags"
            )
        tagged = [span for i, span in zip(turns, tagged, strict=True) if i in trained]
    remarks: list[str] = []
    own = "".join(text[start:end] for start, end in tagged)
    for i in trained:
        _check_tagged(conversation.messages[i], i, own, remarks)
    remarks.extend(_remarks_on_prompt(template, conversation, text))
    return [Text(text, [Span(start, end - 1) for start, end in tagged if end > start])], remarks


def _check_tagged(message: Message, i: int, own: str, remarks: list[str]) -> None:
    """Refuse tags that leave out a part of what the turn says; `own` is all that is tagged."""
    content = message.get("content") or ""
    if not _holds(own, content):
        thought, closed, answer = content.rpartition(_THOUGHT_END)
        if message.get("tool_calls") and answer == content:
            remarks.append("content beside tool_calls is not written")
        elif not closed or not _holds(own, answer):
            raise ValueError(_refusal(i, "leaves it out of its {% generation %} tags, or changes it"))
        elif not _holds(own, thought.partition("<think>")[2]):
            remarks.append("the thought in an answer is not written")
    if not _holds(own, message.get("reasoning_content") or ""):
        remarks.append("reasoning_content is not written")
    for call in message.get("tool_calls") or []:
        _check_call(function_of(call), i, own)
