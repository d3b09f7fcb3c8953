"""A model's chat template: how it wants its messages, and what it writes of them.

Templates are programs, and differ in what they read: the arguments of a tool call as an object or as JSON
text, a content as text or as parts, a reasoning under one of several names. What a template wants is found
out by rendering a few small conversations, once for each template.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import product
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from finetune.data.conversations import Conversation, Message

NO_CHAT_TEMPLATE = (
    "the model's tokenizer has no chat template; set data.chat_template to the one to train with (chatml, "
    "llama3, gemma, mistral, or a Jinja file), or take the model's instruct or chat version"
)
# What a template is rendered with beside a row's own arguments.
RESERVED = {"conversations", "messages", "tools", "documents", "chat_template", "add_generation_prompt"} | {
    "continue_final_message",
    "return_assistant_tokens_mask",
}
_ABSENT = object()  # the key is left out


class Habits(NamedTuple):
    """How a template wants its messages."""

    reasoning: str
    """The name under which it reads a reasoning; reasoning_content where it reads none"""
    arguments_as_text: bool
    """Whether the arguments of a tool call are to be JSON text rather than an object"""
    no_content: Any
    """What stands for the content of a turn that has none beside its tool calls: "", None, or _ABSENT"""
    parts: frozenset[str]
    """The roles whose content it wants as a list of parts"""


class ChatTemplate:
    """A template as one tokenizer uses it.

    Attributes:
        source: The template's text.
        turn_shapes: What `targets` has found out about the turns that this template writes.
    """

    ANSWER = "rowan"

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        self.source = source
        self.turn_shapes: dict[Any, Any] = {}
        self._special_tokens = dict(special_tokens)

    @cached_property
    def is_tagged(self) -> bool:
        """Whether it marks what the model writes, by {% generation %}."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    @cached_property
    def _compiled(self) -> Any:
        compiled = _compile_jinja_template(self.source)
        compiled.globals = dict(compiled.globals)  # each rendering copies them: of a chain of maps, slowly
        return compiled

    @cached_property
    def habits(self) -> Habits:
        """How it wants its messages: found out when first asked for."""
        no_content, as_text = self._habit_of_calls()
        return Habits(
            self._habit_of_reasoning(no_content, as_text),
            as_text,
            no_content,
            frozenset(
                role
                for role, turns in _surroundings(_calling(as_text, no_content)).items()
                if self._wants_parts(role, turns)
            ),
        )

    @cached_property
    def writes_tools(self) -> bool:
        """Whether it writes the tools that a conversation may call."""
        tool = {"name": _CALL_WORDS[0], "description": _CALL_WORDS[2], "parameters": _NO_PARAMETERS}
        tools = [{"type": "function", "function": tool}]
        beginnings = [_USER], [{"role": "system", "content": "sloe"}, _USER]
        return any(
            _CALL_WORDS[0] in (self._try(self.prepare(turns), True, tools) or "") for turns in beginnings
        )

    @cached_property
    def examples(self) -> tuple[str, str, str]:
        """A question as it writes it: alone, asking for an answer, and with the answer ANSWER. Empty where it
        fails."""
        question, answer = self.prepare([_USER, {"role": "assistant", "content": self.ANSWER}])
        return (
            self._try([question]) or "",
            self._try([question], True) or "",
            self._try([question, answer]) or "",
        )

    @cached_property
    def examples_of_next_turn(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """An answer, and it with a question behind; a tool call, and it with its result behind. Empty where
        the template fails."""
        question, answer, calling, result = self.prepare(
            [_USER, {"role": "assistant", "content": self.ANSWER}, _calling(False, None), _RESULT]
        )
        turns = [[question, answer, question], [question, calling, result]]
        plain, called = ((self._try(some[:2]) or "", self._try(some) or "") for some in turns)
        return plain, called

    def prepare(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as this template reads them.

        Raises:
            ValueError: the arguments of a tool call are no JSON, and the template wants them as an object.
        """
        return [_prepared(message, self.habits) for message in messages]

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        """The conversation as text.

        Raises:
            ValueError: the template fails on it.
        """
        return self._render(conversation, add_generation_prompt, tagged=False)[0]

    def generation_spans(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and where in it {% generation %} stands: [start, end) of each.

        Raises:
            ValueError: the template fails on it.
        """
        return self._render(conversation, False, tagged=True)

    def _render(
        self, conversation: Conversation, add_generation_prompt: bool, tagged: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        if taken := RESERVED & conversation.template_kwargs.keys():
            raise ValueError(f"chat_template_kwargs may not hold {', '.join(sorted(taken))}")
        messages = self.prepare(conversation.messages)
        try:
            return self._render_prepared(
                messages, add_generation_prompt, tagged, conversation.tools, conversation.template_kwargs
            )
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template is wrong in its line {error.lineno}: {error}") from error
        except Exception as error:  # a template is a program: it can fail in every way that one can
            roles = ", ".join(message["role"] for message in conversation.messages)
            raise ValueError(f"the chat template refuses the turns {roles}: {error!s:.200}") from error

    def _render_prepared(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = False,
        tagged: bool = False,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        others = {**self._special_tokens, **(template_kwargs or {})}
        if tagged:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools or None,
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                add_generation_prompt=add_generation_prompt,
                **others,
            )
            return texts[0], list(spans[0])
        # The same but for a copy of each value, which takes as long as rendering: ours are plain JSON.
        text: str = self._compiled.render(
            messages=messages,
            tools=tools or None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **others,
        )
        return text, []

    def _try(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
    ) -> str | None:
        """What the template writes of prepared messages; None where it fails."""
        try:
            return self._render_prepared(messages, add_generation_prompt, tools=tools)[0]
        except Exception:  # as in `_render`
            return None

    def _habit_of_calls(self) -> tuple[Any, bool]:
        """What stands for no content beside tool calls, and whether arguments are to be JSON text."""
        for as_text, no_content in product((False, True), (_ABSENT, "", None)):
            written = self._try([_USER, _calling(as_text, no_content)])
            if written is None or not all(word in written for word in _CALL_WORDS):
                continue
            is_python = f"'{_CALL_WORDS[1]}':" in written
            is_escaped = f'\\"{_CALL_WORDS[1]}' in written
            says_none = "None" in written and "None" not in (self._try([_USER, _calling(as_text, "")]) or "")
            if not (is_python or is_escaped or says_none):
                return no_content, as_text
        return "", False  # it writes no tool calls, or fails on these

    def _habit_of_reasoning(self, no_content: Any, as_text: bool) -> str:
        answer = {"role": "assistant", "content": "quince"}
        for name in ("reasoning_content", "reasoning", "thinking"):
            for turn in (answer, _calling(as_text, no_content)):
                if "medlar" in (self._try([_USER, {**turn, name: "medlar"}]) or ""):
                    return name
        return "reasoning_content"

    def _wants_parts(self, role: str, turns: list[dict[str, Any]]) -> bool:
        """Whether it writes a content of `role` only where that is a list of parts; `turns` hold one."""

        def is_written(as_parts: Iterable[str]) -> bool:
            text = self._try([_as_parts(turn) if turn["role"] in as_parts else turn for turn in turns])
            return _CONTENT in (text or "")

        every = {turn["role"] for turn in turns}
        if is_written(()) or is_written(every - {role}):
            return False
        return is_written({role}) or is_written(every)


# --- Small conversations, whose words no template writes by itself ---

_CALL_WORDS = ("hawthorn", "elderberry", "damson")
_CONTENT = ChatTemplate.ANSWER
_USER: dict[str, Any] = {"role": "user", "content": "sloe"}
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "required": []}


def _calling(as_text: bool, no_content: Any) -> dict[str, Any]:
    name, key, value = _CALL_WORDS
    arguments = json.dumps({key: value}) if as_text else {key: value}
    call = {"id": "abc123def", "type": "function", "function": {"name": name, "arguments": arguments}}
    turn = {"role": "assistant", "content": no_content, "tool_calls": [call]}
    return {key: value for key, value in turn.items() if value is not _ABSENT}


_RESULT = {"role": "tool", "name": _CALL_WORDS[0], "tool_call_id": "abc123def", "content": _CONTENT}


def _surroundings(calling: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """For each role a conversation in which it says _CONTENT."""
    return {
        "system": [{"role": "system", "content": _CONTENT}, _USER],
        "developer": [{"role": "developer", "content": _CONTENT}, _USER],
        "user": [{"role": "user", "content": _CONTENT}],
        "assistant": [_USER, {"role": "assistant", "content": _CONTENT}],
        "tool": [_USER, calling, _RESULT],
    }


def _as_parts(turn: dict[str, Any]) -> dict[str, Any]:
    content = turn.get("content")
    return {**turn, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else turn


# --- Messages as a template reads them ---


def _prepared(message: Message, habits: Habits) -> dict[str, Any]:
    turn = {key: value for key, value in message.items() if value is not None and key != "train"}
    if "reasoning_content" in turn:
        turn[habits.reasoning] = turn.pop("reasoning_content")
    if calls := turn.pop("tool_calls", None):
        turn["tool_calls"] = [_prepared_call(call, habits.arguments_as_text) for call in calls]
    content = turn.get("content")
    if not content and "tool_calls" in turn:
        turn["content"] = habits.no_content
        if habits.no_content is _ABSENT:
            del turn["content"]
    elif content is None:
        turn["content"] = ""
    if isinstance(turn.get("content"), str) and turn["role"] in habits.parts:
        turn = _as_parts(turn)
    return turn


def function_of(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The name and the arguments of a tool call."""
    function: Mapping[str, Any] = call.get("function") or call
    return function


def _prepared_call(call: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    function = dict(function_of(call))
    arguments = function.get("arguments", {})
    if isinstance(arguments, str) and not as_text:
        try:
            function["arguments"] = json.loads(arguments or "{}")
        except ValueError:
            raise ValueError(
                f"the arguments of the tool call {function.get('name')!r} are no JSON: {arguments:.60}"
            ) from None
    elif not isinstance(arguments, str) and as_text:
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return {
        **{k: call[k] for k in ("id",) if call.get(k) is not None},
        "type": "function",
        "function": function,
    }


def common_start(first: str, *others: str) -> str:
    """What all the texts begin with."""
    for other in others:
        low, high = 0, min(len(first), len(other))
        while low < high:  # a comparison of slices is far faster than one of characters
            middle = (low + high + 1) // 2
            low, high = (middle, high) if first[:middle] == other[:middle] else (low, middle - 1)
        first = first[:low]
    return first


# --- The template of a tokenizer ---


def template_of(tokenizer: Any, tools: list[dict[str, Any]] | None = None) -> ChatTemplate:
    """The tokenizer's template; of several, the one for tools where there are any.

    Raises:
        ValueError: the tokenizer has no template.
    """
    if not tokenizer.chat_template:
        raise ValueError(NO_CHAT_TEMPLATE)
    source = tokenizer.get_chat_template(None, tools or None)
    return _template(source, json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str))


@lru_cache(maxsize=64)
def _template(source: str, special_tokens: str) -> ChatTemplate:
    return ChatTemplate(source, json.loads(special_tokens))


def as_conversation(conversation: Conversation | Sequence[Message]) -> Conversation:
    """Messages as a conversation without tools."""
    return conversation if isinstance(conversation, Conversation) else Conversation(list(conversation))


def render(
    tokenizer: Any, conversation: Conversation | Sequence[Message], add_generation_prompt: bool = False
) -> str:
    """The conversation as the chat template renders it.

    Raises:
        ValueError: no template, or the template fails on these messages.
    """
    conversation = as_conversation(conversation)
    return template_of(tokenizer, conversation.tools).render(conversation, add_generation_prompt)


# --- Where generation stops ---


def stop_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens at which generation stops: the tokenizer's EOS, and those set by `set_stop_ids`."""
    eos = {tokenizer.eos_token_id} - {None}
    return frozenset(eos | getattr(tokenizer, "generation_stop_ids", frozenset()))


def set_stop_ids(tokenizer: Any, ids: Iterable[int]) -> None:
    """Let generation stop at these tokens too: those of the model's generation config."""
    tokenizer.generation_stop_ids = frozenset(ids)
