"""What the model has to write of a conversation, found in the text that the chat template renders.

An assistant's turn is rendered when it is the last one, as it is when the model writes it. What the model
writes begins where the generation prompt ends, and ends with the token at which generation stops. A template
may render the turn otherwise once others follow it: the turn is then not in the text of the whole
conversation, and gets a text of its own, which ends with it.
"""

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from finetune.data.conversations import Conversation, Message
from finetune.data.templates.chat_template import ChatTemplate, common_start
from finetune.data.templates.written import (
    THOUGHT_END,
    Written,
    check_tagged,
    check_turn,
    remarks_on_prompt,
    says_anything_of,
)

# What stands for the texts of a turn to see what the template writes around them. Private characters: no text
# of a row ends or begins with a part of them.
_CONTENT, _REASONING, _ARGUMENT = "\ue0f1\ue0f2", "\ue0f3\ue0f4", "\ue0f5\ue0f6"


# The keys of an answer that is nothing but its content.
_PLAIN = {"role", "content", "train", "name"}
MAX_SHAPES = 1000  # that are remembered of a template


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
    remarks.extend(remarks_on_prompt(template, conversation, texts[0].text))
    return texts, remarks


def is_trained(message: Message) -> bool:
    """Whether a turn is the assistant's, and to be trained on."""
    return message["role"] == "assistant" and message.get("train") is not False


def with_messages(conversation: Conversation, messages: list[Message]) -> Conversation:
    """The conversation with these messages instead of its own."""
    return Conversation(messages, conversation.tools, conversation.template_kwargs)


def up_to(conversation: Conversation, end: int) -> Conversation:
    """The first `end` messages of a conversation."""
    return with_messages(conversation, conversation.messages[:end])


def _find_turn(
    template: ChatTemplate, conversation: Conversation, i: int, stops: StopTokens, remarks: list[str]
) -> tuple[str, Span, int]:
    """The conversation up to turn `i` as text, what of it the model writes, and where its stop token ends."""
    turn = _Turn(template, up_to(conversation, i + 1), stops)
    known: _Shape | None = template.turn_shapes.get(turn.key)
    if known is not None and turn.may_have(known):
        try:
            return turn.find(known, remarks)
        except ValueError:
            pass  # Turns like it are of that shape, this one may be of another.
    if len(template.turn_shapes) >= MAX_SHAPES:  # template arguments may differ in every row
        template.turn_shapes.clear()
    shape = template.turn_shapes[turn.key] = turn.shape()
    return turn.find(shape, remarks)


class _Turn:
    """The last turn of a conversation, an assistant's."""

    def __init__(self, template: ChatTemplate, conversation: Conversation, stops: StopTokens) -> None:
        self.template, self.conversation, self.stops = template, conversation, stops
        *self.before, self.message = conversation.messages
        self.has_calls = bool(self.message.get("tool_calls"))
        self.text = template.render(conversation)
        self.prompt = self._prompt()

    @property
    def key(self) -> tuple[Any, ...]:
        """Turns with the same are almost always of one shape."""
        content = self.message.get("content") or ""
        kwargs = self.conversation.template_kwargs
        return (
            self.before[-1]["role"] if self.before else None,
            bool(content),
            THOUGHT_END in content,
            bool(self.message.get("reasoning_content")),
            len(self.message.get("tool_calls") or []),
            bool(self.conversation.tools),
            json.dumps(kwargs, sort_keys=True, default=str) if kwargs else "",
        )

    def may_have(self, shape: _Shape) -> bool:
        """Whether it ends as turns of that shape do, and nothing of it would be left out."""
        content, thought = self.message.get("content"), self.message.get("reasoning_content")
        is_whole = (not content or shape.times_content > 0) and (not thought or shape.times_reasoning > 0)
        return is_whole and self.text.endswith(shape.tail)

    def shape(self) -> _Shape:
        """What the template writes around the turn's texts."""
        start = len(common_start(self.prompt, self.text, self.probe))
        written = self.probe[start:]
        places = [place for mark in (_CONTENT, _REASONING) if (place := written.find(mark)) >= 0]
        return _Shape(
            common_start(self.text[::-1], self.probe[::-1])[::-1],
            written.count(_CONTENT),
            written.count(_REASONING),
            written[: min(places)] if places and start == len(self.prompt) else "",
        )

    @cached_property
    def probe(self) -> str:
        """The conversation as text, with placeholders for the turn's own texts."""
        message = dict(self.message)
        if message.get("content") or not (self.has_calls or message.get("reasoning_content")):
            message["content"] = _CONTENT
        if message.get("reasoning_content"):
            message["reasoning_content"] = _REASONING
        if self.has_calls:
            function = {"name": _ARGUMENT, "arguments": {_ARGUMENT: _ARGUMENT}}
            message["tool_calls"] = [{**call, "function": function} for call in message["tool_calls"]]
        return self.template.render(with_messages(self.conversation, [*self.before, message]))

    @property
    def own_start(self) -> int:
        """Where in `text` the turn's own texts begin."""
        return len(common_start(self.text, self.probe))

    def find(self, shape: _Shape, remarks: list[str]) -> tuple[str, Span, int]:
        """The text, what of it the model writes of this turn, and where its stop token ends."""
        text, start = self._behind_prompt()
        written = Written(text[start:], shape.times_content, shape.times_reasoning)
        own_remarks = check_turn(
            self.message, len(self.before) + 1, written, lambda: self.text[self.own_start :]
        )
        lead = shape.lead.strip()
        if lead and text.startswith(shape.lead, start) and set(self.message) <= _PLAIN:
            own_remarks.append(f"{lead!r} is added before an answer")
        if missing := self.prompt[start:].strip():
            own_remarks.append(f"{missing!r} of the generation prompt is missing before an answer")
        tail_start = max(start, len(text) - len(shape.tail))
        stop = _find_stop(self.template, text, tail_start, self.has_calls, self.stops)
        if stop is None and (next_turn := _next_turn_start(self.template, self.has_calls, self.stops)):
            text += next_turn
            stop = len(text) - len(next_turn.lstrip()), len(text)
        if stop is None:
            raise ValueError(
                "the chat template ends an assistant's turn with no special token, so the model would not "
                "learn to stop; use a chat template that writes an end-of-turn token, or data.train_on all"
            )
        remarks += own_remarks
        return text, Span(start, stop[0]), stop[1]

    def _prompt(self) -> str:
        """What the model is given before it writes the turn."""
        try:
            prompt = self.template.render(self._history, add_generation_prompt=True)
        except ValueError:
            if self.before:
                raise
            prompt = None
        if prompt is not None and (self.before or self.text.startswith(prompt)):
            return prompt
        # Nobody asks for an answer to nothing: a template may fail on it, or leave out how all texts begin.
        for asked in _asking(self.template, self.stops):
            place = self.text.rfind(asked, 0, self.own_start)
            if asked and place >= 0:
                return self.text[: place + len(asked)]
        return self.text[: self.own_start]

    @property
    def _history(self) -> Conversation:
        return with_messages(self.conversation, self.before)

    def _behind_prompt(self) -> tuple[str, int]:
        """A text with the turn as the model writes it, and where in it the model begins to write.

        That is the rendered text, where it begins with the prompt. Otherwise either the prompt says more than
        the finished turn has, such as the beginning of a thought, or it renders the turns before otherwise.
        """
        text, prompt = self.text, self.prompt
        if text.startswith(prompt):
            return text, len(prompt)
        history = self.template.render(self._history)
        history_end = _before_token(self.stops, prompt, len(common_start(history, prompt)))
        parting = _before_token(self.stops, text, len(common_start(prompt, text)))
        if parting >= history_end:
            return text, min(parting, self.own_start)
        # The turn is put behind the prompt. In the text it stands behind what asks for it there.
        asking, kept = _asking(self.template, self.stops)
        for asked in (prompt[history_end:], asking, kept):
            place = text.rfind(asked, 0, self.own_start)
            start = place + len(asked)
            lead = text[start : self.own_start]
            is_own = not (self.before and says_anything_of(self.before[-1], lead))
            if asked and place >= 0 and is_own:
                given = prompt.removesuffix(asking.removeprefix(kept)) if asked == kept else prompt
                return given + text[start:], len(given)
        if parting >= self.own_start:  # the turn goes on behind the one before, and nothing begins it
            return text, self.own_start
        raise ValueError(
            f"the chat template renders the turns before turn {len(self.before) + 1} in another way once "
            "that is written, and what the model writes of it cannot be told; use another chat template or "
            "data.train_on all"
        )


def _asking(template: ChatTemplate, stops: StopTokens) -> tuple[str, str]:
    """What the generation prompt usually is, and the part of it that finished turns begin with too."""
    alone, asking, answered = template.examples
    start = _before_token(stops, asking, len(common_start(alone, asking)))
    kept = asking[start : _before_token(stops, answered, len(common_start(asking, answered)))]
    return asking[start:], kept


def _before_token(stops: StopTokens, text: str, place: int) -> int:
    """The place, or the beginning of the special token that it lies within."""
    for match in stops.pattern.finditer(text, max(0, place - stops.longest)):
        if match.start() >= place:
            break
        if match.end() > place:
            return match.start()
    return place


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
        remarks += check_tagged(conversation.messages[i], i + 1, own)
    remarks.extend(remarks_on_prompt(template, conversation, text))
    return [Text(text, [Span(start, end - 1) for start, end in tagged if end > start])], remarks
