"""The chat template: rendering, and the tokens at which generation stops."""

from collections.abc import Iterable
from typing import Any

from jinja2 import TemplateSyntaxError

from finetune.data.conversations import Conversation, Message

NO_CHAT_TEMPLATE = (
    "the model's tokenizer has no chat template; set data.chat_template to the one to train with (chatml, "
    "llama3, gemma, mistral, or a Jinja file), or take the model's instruct or chat version"
)


def stop_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens at which generation stops."""
    default = frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])
    ids: frozenset[int] = getattr(tokenizer, "stop_ids", default)
    return ids


def set_stop_ids(tokenizer: Any, ids: Iterable[int]) -> None:
    tokenizer.stop_ids = frozenset(ids)


def render(
    tokenizer: Any, conversation: Conversation | list[Message], add_generation_prompt: bool = False
) -> str:
    """The conversation as the chat template renders it."""
    if not tokenizer.chat_template:
        raise ValueError(NO_CHAT_TEMPLATE)
    if not isinstance(conversation, Conversation):
        conversation = Conversation(conversation)
    try:
        text: str = tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **conversation.template_kwargs,
        )
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template is wrong in its line {error.lineno}: {error}") from error
    except Exception as error:  # a template is a program: it can fail in every way that one can
        roles = ", ".join(message["role"] for message in conversation.messages)
        raise ValueError(f"the chat template refuses the turns {roles}: {error!s:.200}") from error
    return text
