"""Write an Ollama Modelfile for a GGUF file: https://docs.ollama.com/modelfile."""

import re
from collections.abc import Sequence
from typing import Any

from finetune.data.conversations import Conversation, Message
from finetune.data.templates.chat_template import render, stop_ids

# A Go text/template that renders the same text as `_chatml`. In Ollama the system turn, including that of
# SYSTEM, is the first of .Messages.
CHATML_IN_GO = """\
{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
_PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": " Two\n\nlines \n"}],
    [{"role": "system", "content": " s "}, {"role": "user", "content": "q"}],
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q1 "},
        {"role": "assistant", "content": " a1\n"},
        {"role": "user", "content": "q2"},
    ],
    [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
    ],
)


def modelfile(
    gguf_name: str, tokenizer: Any, system_prompt: str | None, context_length: int
) -> tuple[str, list[str]]:
    """Return the Modelfile for the GGUF file of that name, and a description of each line it leaves out.

    It has a TEMPLATE if the chat template is ChatML, without its tools: Ollama writes those in a form of its
    own. It has a SYSTEM if there is a system prompt that can be quoted: the run's, or else the default of the
    chat template. It stops where `generate` does. `context_length` is in tokens.
    """
    lines, left_out = [f"FROM ./{gguf_name}"], []
    default = chatml_default(tokenizer)
    if default is None:
        left_out.append(
            "TEMPLATE: the chat template is not ChatML; Ollama guesses one or uses none: add the right one"
        )
    else:
        lines.append(f'TEMPLATE """{CHATML_IN_GO}"""')
    if writes_tools(tokenizer):
        left_out.append(
            "tools: Ollama writes them in a form of its own, not in that of the chat template; to use them, "
            "serve with llama.cpp or vLLM"
        )
    stops = tokenizer.convert_ids_to_tokens(sorted(stop_ids(tokenizer)))
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines.append(f"PARAMETER num_ctx {context_length}")
    system = system_prompt if system_prompt is not None else default
    if system and not _can_be_quoted(system):
        left_out.append("SYSTEM: a Modelfile cannot hold this system prompt; send it with each request")
    elif system:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n", left_out


def chatml_default(tokenizer: Any) -> str | None:
    """Return the chat template's default system prompt, or "" if it has none.

    Returns None if the template is not ChatML.
    """
    try:
        rendered = [render(tokenizer, probe, add_generation_prompt=True) for probe in _PROBES]
    except ValueError:  # the template rejects such a conversation
        return None
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", rendered[0], re.DOTALL)
    default = found[1] if found else ""
    return default if rendered == [_chatml(probe, default) for probe in _PROBES] else None


def writes_tools(tokenizer: Any) -> bool:
    """Whether the chat template writes tools."""
    tool = {"type": "function", "function": {"name": "placeholder", "parameters": {"type": "object"}}}
    try:
        return "placeholder" in render(tokenizer, Conversation([{"role": "user", "content": "q"}], [tool]))
    except ValueError:  # the template refuses them
        return False


def _chatml(messages: Sequence[Message], default: str) -> str:
    turns = list(messages)
    if default and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": default})
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return text + "<|im_start|>assistant\n"


def _can_be_quoted(text: str) -> bool:
    """Whether a Modelfile can hold the text between quotes.

    Ollama has no escapes within quotes, and drops unprintable characters except ASCII white space
    (github.com/ollama/ollama, parser/parser.go).
    """
    return '"""' not in text and all(letter.isprintable() or letter in "\n\t" for letter in text)
