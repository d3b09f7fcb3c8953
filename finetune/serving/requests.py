"""What a request may ask: the fields of OpenAI's chat completions that are served, checked and read."""

import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune.data.conversations import to_conversation
from finetune.data.reading.messages import read_messages, read_template_kwargs, read_tools
from finetune.model.generate import check_limits
from finetune.run.adapter import TrainedModel
from finetune.run.answers import encode_question
from finetune.serving.engine import Asked

ONE = Annotated[float, Field(ge=1, le=1)]
ZERO = Annotated[float, Field(ge=0, le=0)]


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool | None = None


class _ResponseFormat(BaseModel):
    type: Literal["text"]


class _Body(BaseModel):
    """The fields of a request. A field that would change the answer, and is not served, is an error."""

    model_config = ConfigDict(extra="forbid")

    model: Literal["tuned", "base"]
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    # Served only as they are by default.
    n: ONE | None = None
    top_p: ONE | None = None
    presence_penalty: ZERO | None = None
    frequency_penalty: ZERO | None = None
    logprobs: Literal[False] | None = None
    response_format: _ResponseFormat | None = None

    # They have no influence on an answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    parallel_tool_calls: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


@dataclass(frozen=True)
class ChatRequest:
    """A request that can be answered."""

    asked: Asked
    tool_names: frozenset[str]
    stream: bool
    include_usage: bool
    """Whether a stream ends with the numbers of tokens"""
    unused: list[str]
    """What of its messages is not used, in words"""


def read_request(
    body: Any, model: TrainedModel, system_prompt: str | None, max_new_tokens: int
) -> ChatRequest:
    """Check and read the JSON body of a request; without a limit of its own, an answer has `max_new_tokens`.

    Raises:
        ValueError: a field of another form, a value that is not served, messages that the chat template
            refuses, or a prompt that leaves no room for the answer.
    """
    try:
        fields = _Body.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the request"
        raise ValueError(f"{place}: {first['msg']}") from error
    messages, unused = read_messages(fields.messages, "the request")
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's: there is nothing to answer")
    tools = read_tools(fields.tools, "the request") if fields.tool_choice != "none" else []
    row: dict[str, Any] = {"messages": messages}
    if tools:
        row["tools"] = tools
    if fields.chat_template_kwargs:
        row["chat_template_kwargs"] = read_template_kwargs(
            fields.chat_template_kwargs, "the request", "chat_template_kwargs"
        )
    length = fields.max_completion_tokens or fields.max_tokens or max_new_tokens
    temperature = fields.temperature or 0.0
    check_limits(temperature, length)
    asked = Asked(
        prompt=encode_question(model, to_conversation(row, system_prompt), length),
        which=fields.model,
        max_new_tokens=length,
        temperature=temperature,
        seed=secrets.randbits(63) if fields.seed is None else fields.seed % 2**63,
        stop=tuple(filter(None, [fields.stop] if isinstance(fields.stop, str) else fields.stop or [])),
    )
    options = fields.stream_options
    return ChatRequest(
        asked=asked,
        tool_names=frozenset(tool["function"]["name"] for tool in tools),
        stream=bool(fields.stream),
        include_usage=bool(options and options.include_usage),
        unused=unused,
    )
