"""`data.chat_template`: a chat template from a file, or one of our own by name, and the tokens it needs."""

import difflib
import re
from pathlib import Path
from typing import Any

from transformers import AddedToken

from finetune.data.conversations import Conversation
from finetune.data.templates.chat_template import render

FOLDER = Path(__file__).parent / "named"
NAMES = ("chatml", "llama3", "gemma", "mistral")
# What a template writes as one token by the custom of its family: <|im_end|>, <start_of_turn>.
SPECIAL = re.compile(r"<[|\uff5c][^<>|\uff5c\s]+[|\uff5c]>|<(?:start|end)_of_\w+>")
QUESTION, ANSWER = "placeholder of a question", "placeholder of an answer"
_TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
_CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
_TOOL = {
    "name": "f",
    "description": "a function",
    "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
}
_PROBES = (
    Conversation(_TURNS),
    Conversation([{"role": "system", "content": "placeholder of a system prompt"}, *_TURNS, *_TURNS]),
    Conversation(
        [
            _TURNS[0],
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "content": "1", "tool_call_id": "call00001", "name": "f"},
            _TURNS[1],
        ],
        tools=[{"type": "function", "function": _TOOL}],
    ),
)


def read_template(setting: str) -> str:
    """The text of the template that `data.chat_template` names.

    Raises:
        ValueError: it is neither a readable file nor one of NAMES.
    """
    if setting in NAMES:
        return (FOLDER / f"{setting}.jinja").read_text(encoding="utf-8")
    path = Path(setting).expanduser()
    if not path.is_file():
        nearest = difflib.get_close_matches(setting, NAMES, 1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(
            f"data.chat_template {setting} is neither a file nor one of {', '.join(NAMES)}{hint}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.chat_template {setting} cannot be read as text: {error}") from error
    if not text.strip():
        raise ValueError(f"data.chat_template {setting} is an empty file")
    return text


def use_template(tokenizer: Any, setting: str) -> None:
    """Give the tokenizer this chat template, and the special tokens that the template writes and it lacks.

    The token that ends an assistant's turn becomes its EOS token, unless the template names EOS itself. Where
    the tokenizer begins every text with its BOS token, a template of ours does so too.

    Raises:
        ValueError: as `read_template`, or the file is no chat template.
    """
    tokenizer.chat_template = read_template(setting)
    rendered = _rendered_probes(tokenizer, setting)
    bos = tokenizer.bos_token
    begins_with_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if setting in NAMES and begins_with_bos and not rendered[0].startswith(bos):
        tokenizer.chat_template = "{{- bos_token -}}\n" + tokenizer.chat_template
    missing = [token for token in _special_in(rendered) if not _is_special(tokenizer, token)]
    known = tokenizer.get_vocab().keys()
    new = [token for token in missing if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing], True)
    tokenizer.added_for_template = tuple(tokenizer.convert_tokens_to_ids(new))
    end = end_of_turn(tokenizer)
    if end is not None and "eos_token" not in tokenizer.chat_template:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)


def _rendered_probes(tokenizer: Any, setting: str) -> list[str]:
    """The probes as the template writes them, without those that it refuses.

    Raises:
        ValueError: it does not write what a user and an assistant say.
    """
    try:
        plain = render(tokenizer, _PROBES[0])
    except ValueError as error:
        raise ValueError(f"data.chat_template {setting}: {error}") from error
    if not (QUESTION in plain and ANSWER in plain):
        raise ValueError(
            f"data.chat_template {setting} is no chat template: it does not write what the turns of a "
            "conversation say"
        )
    rendered = [plain]
    for probe in _PROBES[1:]:
        try:
            rendered.append(render(tokenizer, probe))
        except ValueError:  # a template may have no system turn, or no tools
            continue
    return rendered


def _special_in(rendered: list[str]) -> list[str]:
    return list(dict.fromkeys(token for text in rendered for token in SPECIAL.findall(text)))


def _is_special(tokenizer: Any, token: str) -> bool:
    return any(added.content == token and added.special for added in tokenizer.added_tokens_decoder.values())


def added_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """The ids of the tokens that `use_template` added to the vocabulary: nothing has trained their rows."""
    ids: tuple[int, ...] = getattr(tokenizer, "added_for_template", ())
    return ids


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that ends an assistant's turn in the tokenizer's chat template, found by rendering.

    None where no special token follows the answer, but for white space, or the template refuses a question
    and an answer.
    """
    try:
        text = render(tokenizer, _PROBES[0])
    except ValueError:
        return None
    rest = text.rpartition(ANSWER)[2]
    special = {added.content: i for i, added in tokenizer.added_tokens_decoder.items() if added.special}
    ends = [token for token in special if rest.lstrip().startswith(token)]
    return special[max(ends, key=len)] if ends else None


def describe_template(setting: str | None, tokenizer: Any) -> str:
    """Which chat template is used, and how many tokens were added for it, in words."""
    if setting is None:
        return "the model's own" if tokenizer.chat_template else "none"
    added = tokenizer.convert_ids_to_tokens(list(added_token_ids(tokenizer)))
    tokens = f"{len(added)} tokens added: {' '.join(added)}" if added else "no token added"
    return f"{setting} ({tokens})"
