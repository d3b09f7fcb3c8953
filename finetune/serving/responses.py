"""The form in which answers are sent: OpenAI's chat completion, and the chunks of its stream."""

import json
import time
from typing import Any

from finetune.data.templates.answer_parts import length_before_calls, split_calls
from finetune.serving.engine import Progress
from finetune.serving.requests import ChatRequest


class Answering:
    """One answer in the form in which it is sent, whole or as a stream."""

    def __init__(self, request: ChatRequest, identifier: str) -> None:
        self._request = request
        self._identifier = identifier
        self._created = int(time.time())
        self._sent = ""

    def whole(self, answer: Progress) -> dict[str, Any]:
        """The chat completion that a finished answer is."""
        content, calls = self._parts(answer)
        message = {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}
        choice = {"index": 0, "message": message, "finish_reason": _finish_reason(answer, calls)}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage(answer)}

    def first_event(self) -> str:
        return self._event({"role": "assistant"})

    def events(self, progress: Progress) -> str:
        """What the progress adds to the stream; of a finished answer, also the end of the stream."""
        if progress.end is None:
            text = progress.text
            return self._text_event(
                text[: length_before_calls(text)].rstrip() if self._request.tool_names else text
            )
        content, calls = self._parts(progress)
        events = self._text_event(content or "")
        if calls:
            numbered = [{"index": index, **call} for index, call in enumerate(calls)]
            events += self._event({"tool_calls": numbered})
        events += self._event({}, _finish_reason(progress, calls))
        if self._request.include_usage:
            usage = {"choices": [], "usage": self._usage(progress)}
            events += _as_event({**self._head("chat.completion.chunk"), **usage})
        return f"{events}data: [DONE]\n\n"

    def _text_event(self, text: str) -> str:
        """What of the text is not sent yet."""
        new, self._sent = text[len(self._sent) :], max(text, self._sent, key=len)
        return self._event({"content": new}) if new else ""

    def _event(self, delta: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return _as_event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def _parts(self, answer: Progress) -> tuple[str | None, list[dict[str, Any]]]:
        """The content of an answer, None beside calls alone, and its tool calls."""
        content, calls = split_calls(answer.text, self._request.tool_names)
        if not calls:
            return content, []
        return content or None, [
            {
                "id": f"call_{self._identifier}_{number}",
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False),
                },
            }
            for number, call in enumerate(calls)
        ]

    def _head(self, kind: str) -> dict[str, Any]:
        model = self._request.asked.which
        return {
            "id": f"chatcmpl-{self._identifier}",
            "object": kind,
            "created": self._created,
            "model": model,
        }

    def _usage(self, answer: Progress) -> dict[str, int]:
        asked, written = len(self._request.asked.prompt), answer.num_tokens
        return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}


def error_body(message: str, kind: str) -> dict[str, Any]:
    """OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def error_event(error: Exception) -> str:
    """An error in the middle of a stream."""
    return _as_event(error_body(str(error), "server_error"))


def _finish_reason(answer: Progress, calls: list[dict[str, Any]]) -> str | None:
    return "tool_calls" if calls else answer.end


def _as_event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
