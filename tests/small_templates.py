"""Twenty small chat templates in the manner of real ones, and for each, in Python, what the model writes."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finetune.data.templates.chat_template import set_stop_ids

Message = dict[str, Any]
# Of the last message and those before it; None where the template leaves out a part of it.
WrittenBy = Callable[[Message, list[Message]], str | None]


class SmallTemplate(NamedTuple):
    source: str
    written: WrittenBy
    eos: str
    special: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    unprompted: str = ""
    """What the generation prompt ends with and the finished turn does not begin with"""
    whole_only: bool = False
    """Whether the targets are those of the whole conversation, whatever became of earlier turns: tags"""


def content(message: Message) -> str:
    return message.get("content") or ""


def calls(message: Message) -> list[Message]:
    return [call["function"] for call in message.get("tool_calls") or []]


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# --- ChatML ---

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|endoftext|>")


def chatml(message: Message, before: list[Message]) -> str | None:
    return None if calls(message) else f"{content(message)}<|im_end|>"


def chatml_trimmed(message: Message, before: list[Message]) -> str | None:
    return None if calls(message) else f"{content(message).strip()}<|im_end|>"


TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content ~ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content ~ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PARTS = CHATML.replace("m.content", "m.content[0].text")
# Fails where there is no content, as string concatenation does.
CONCATENATING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + (c.function | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def concatenating(message: Message, before: list[Message]) -> str:
    made = "".join(f"<call>{dumped(call)}</call>" for call in calls(message))
    return f"{content(message)}{made}<|im_end|>"


# --- Hermes and Qwen ---

HERMES_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages and messages[0].role == 'system' %}"
    "{{ messages[0].content ~ '\n\n' }}{% endif %}{{ '# Tools\n' }}"
    "{% for t in tools %}{{ t | tojson ~ '\n' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% elif messages and messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' ~ messages[0].content ~ '<|im_end|>\n' }}{% endif %}"
)
HERMES_CALLS = (
    "{% for c in m.tool_calls or [] %}{% if not loop.first or content %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' ~ c.function.name ~ \'", "arguments": \' }}'
    "{% if c.function.arguments is string %}{{ c.function.arguments }}"
    "{% else %}{{ c.function.arguments | tojson }}{% endif %}{{ '}\n</tool_call>' }}{% endfor %}"
)
HERMES_RESULTS = (
    "{% elif m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
)
OTHER_ROLES = (
    "{% if m.role == 'user' or m.role == 'developer' or (m.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}"
)
ASKING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
HERMES = (
    f"{HERMES_TOOLS}{{% for m in messages %}}{OTHER_ROLES}"
    "{% elif m.role == 'assistant' %}{% set content = m.content or '' %}"
    "{{ '<|im_start|>assistant\n' ~ content }}"
    f"{HERMES_CALLS}{{{{ '<|im_end|>\n' }}}}{HERMES_RESULTS}{{% endif %}}{{% endfor %}}{ASKING}"
)


def hermes_calls(message: Message, said: str) -> str:
    made = [
        f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {dumped(call["arguments"])}}}\n</tool_call>'
        for call in calls(message)
    ]
    return said + "".join(("\n" if number or said else "") + call for number, call in enumerate(made))


def hermes(message: Message, before: list[Message]) -> str:
    return f"{hermes_calls(message, content(message))}<|im_end|>"


# Renders what Qwen3's own template renders: thoughts only behind the last question.
QWEN3 = (
    HERMES_TOOLS
    + "{% set ns = namespace(searching=true, last=messages | length - 1) %}"
    + "{% for m in messages[::-1] %}{% set index = (messages | length - 1) - loop.index0 %}"
    + "{% if ns.searching and m.role == 'user' and m.content is string "
    + "and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}"
    + "{% set ns.searching = false %}{% set ns.last = index %}{% endif %}{% endfor %}"
    + f"{{% for m in messages %}}{OTHER_ROLES}"
    + "{% elif m.role == 'assistant' %}{% set content = m.content if m.content is string else '' %}"
    + "{% set thought = '' %}{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    + "{% elif '</think>' in content %}"
    + "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    + "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    + "{{ '<|im_start|>assistant\n' }}"
    + "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    + "{{ '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' ~ content.lstrip('\n') }}"
    + "{% else %}{{ content }}{% endif %}"
    + f"{HERMES_CALLS}{{{{ '<|im_end|>\n' }}}}{HERMES_RESULTS}{{% endif %}}{{% endfor %}}{ASKING}"
)
QWEN3_WITHOUT_THINKING = QWEN3.replace(
    ASKING, "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)


def parted(message: Message) -> tuple[str, str]:
    """Thought and answer, as Qwen3 tells them apart."""
    said = content(message)
    if message.get("reasoning_content") is not None:
        return message["reasoning_content"], said
    if "</think>" not in said:
        return "", said
    thought = said.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return thought, said.split("</think>")[-1].lstrip("\n")


def asks(message: Message) -> bool:
    said = content(message)
    is_result = said.startswith("<tool_response>") and said.endswith("</tool_response>")
    return message["role"] == "user" and not is_result


def qwen3(message: Message, before: list[Message]) -> str:
    thought, said = parted(message)
    # Without any question the template takes the last message for one.
    begins = said
    if any(map(asks, before)):
        begins = "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + said.lstrip("\n")
    made = hermes_calls(message, said)[len(said) :]
    return f"{begins}{made}<|im_end|>"


# The thought under another name, and always written.
REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% if m.reasoning is string %}{{ '<think>' ~ m.reasoning ~ '</think>' }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '\n<function=' ~ c.function.name ~ '>\n' }}"
    "{% for k, v in c.function.arguments.items() %}{{ '<parameter=' ~ k ~ '>\n' }}"
    "{{ v if v is string else v | tojson }}{{ '\n</parameter>\n' }}{% endfor %}"
    "{{ '</function>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + ASKING
)


def reasoning(message: Message, before: list[Message]) -> str:
    thought = message.get("reasoning_content")
    made = ""
    for call in calls(message):
        values = [(k, v if isinstance(v, str) else dumped(v)) for k, v in call["arguments"].items()]
        parameters = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values)
        made += f"\n<function={call['name']}>\n{parameters}</function>"
    begins = f"<think>{thought}</think>" if thought is not None else ""
    return f"{begins}{content(message)}{made}<|im_end|>"


# --- Llama, Mistral, Gemma, Phi ---

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' ~ ('ipython' if m.role == 'tool' else m.role) ~ '<|end_header_id|>\n\n' }}"
    "{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    '{% set f = m.tool_calls[0].function %}{{ \'{"name": "\' ~ f.name ~ \'", "parameters": \' }}'
    "{{ f.arguments | tojson ~ '}' }}{% else %}{{ m.content | trim }}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def llama3(message: Message, before: list[Message]) -> str:
    for call in calls(message):
        return f'{{"name": "{call["name"]}", "parameters": {dumped(call["arguments"])}}}<|eot_id|>'
    return f"{content(message).strip()}<|eot_id|>"


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' ~ m.content ~ '[/TOOL_RESULTS]' }}"
    "{% elif m.role == 'assistant' %}{% if m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}"
    "{{ c.function | tojson }}{{ '' if loop.last else ', ' }}{% endfor %}{{ ']' ~ eos_token }}"
    "{% else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}"
    "{% else %}{{ raise_exception('only user, assistant and tool') }}{% endif %}{% endfor %}"
)


def mistral(message: Message, before: list[Message]) -> str:
    if made := calls(message):
        return f"[TOOL_CALLS] [{', '.join(map(dumped, made))}]</s>"
    return f" {content(message)}</s>"


GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{{ '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' }}"
    "{{ m.content | trim ~ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma(message: Message, before: list[Message]) -> str | None:
    return None if calls(message) else f"{content(message).strip()}<end_of_turn>"


# The EOS stands behind the whole conversation, and ends no turn.
PHI = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def phi(message: Message, before: list[Message]) -> str | None:
    return None if calls(message) else f"{content(message)}<|end|>"


# --- DeepSeek, gpt-oss, GLM ---

# Arguments are concatenated as text, and calls are seen only where there is no content.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<Assistant>' }}"
    "{% if m['content'] is none %}{% for c in m.tool_calls %}"
    "{{ '<call>' + c.type + '<sep>' + c.function.name }}"
    "{{ '\n```json\n' + c.function.arguments + '\n```</call>' }}"
    "{% endfor %}{% else %}{{ m['content'] }}{% endif %}{{ '<end>' }}"
    "{% else %}{{ '<' ~ m.role ~ '>' ~ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<Assistant>' }}{% endif %}"
)


def deepseek(message: Message, before: list[Message]) -> str | None:
    made = calls(message)
    if made and content(message):
        return None
    texts = [f"<call>function<sep>{c['name']}\n```json\n{dumped(c['arguments'])}\n```</call>" for c in made]
    return ("".join(texts) if made else content(message)) + "<end>"


# The prompt begins a thought that no finished turn has.
R1 = (
    "{{ bos_token }}{% for m in messages %}{{ '<' ~ m.role ~ '>' }}"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
    "{{ '<end>' if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant><think>\n' }}{% endif %}"
)


def r1(message: Message, before: list[Message]) -> str | None:
    return None if calls(message) else f"{content(message).split('</think>')[-1]}<end>"


# One block for each channel; thoughts only in the last turn, which alone ends with <|return|>.
GPTOSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking is string and (loop.last or m.tool_calls) and m.thinking %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' ~ m.thinking ~ '<|end|>' }}{% endif %}"
    "{% if m.tool_calls %}{{ '<|start|>assistant to=functions.' ~ m.tool_calls[0].function.name }}"
    "{{ '<|channel|>commentary json<|message|>' ~ m.tool_calls[0].function.arguments | tojson ~ '<|call|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' ~ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
    "{% else %}{{ '<|start|>' ~ m.role ~ '<|message|>' ~ m.content ~ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


def gptoss(message: Message, before: list[Message]) -> str | None:
    thought = message.get("reasoning_content")
    begins = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    if made := calls(message):
        if len(made) > 1:
            return None
        said = f" to=functions.{made[0]['name']}<|channel|>commentary json<|message|>"
        return f"{begins}{said}{dumped(made[0]['arguments'])}<|call|>"
    return f"{begins}<|channel|>final<|message|>{content(message)}<|return|>"


# No token ends a turn: generation stops where the next one would begin.
GLM = (
    "{% for m in messages %}"
    "{{ '<|observation|>' if m.role == 'tool' else '<|' ~ m.role ~ '|>' }}"
    "{{ '\n' ~ (m.content or '') }}{% for c in m.tool_calls or [] %}{{ '\n<tool_call>' ~ c.function.name }}"
    "{{ c.function.arguments | tojson ~ '</tool_call>' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def glm(message: Message, before: list[Message]) -> str:
    made = "".join(f"\n<tool_call>{c['name']}{dumped(c['arguments'])}</tool_call>" for c in calls(message))
    return f"\n{content(message)}{made}" + ("<|observation|>" if calls(message) else "<|user|>")


LLAMA3_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
GPTOSS_TOKENS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>")
GLM_TOKENS = ("<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "<|endoftext|>")
DEEPSEEK_TOKENS = ("<Assistant>", "<call>", "<sep>", "</call>", "<user>", "<assistant>")
SMALL_TEMPLATES: dict[str, SmallTemplate] = {
    "chatml": SmallTemplate(CHATML, chatml, "<|im_end|>", CHATML_TOKENS),
    "trimmed": SmallTemplate(
        CHATML.replace("m.content", "m.content | trim"), chatml_trimmed, "<|im_end|>", CHATML_TOKENS
    ),
    "not the eos": SmallTemplate(CHATML, chatml, "<|endoftext|>", (*CHATML_TOKENS, "<|im_end|>")),
    "tagged": SmallTemplate(TAGGED, chatml, "<|im_end|>", CHATML_TOKENS, whole_only=True),
    "parts": SmallTemplate(PARTS, chatml, "<|im_end|>", CHATML_TOKENS),
    "concatenating": SmallTemplate(CONCATENATING, concatenating, "<|im_end|>", CHATML_TOKENS),
    "hermes": SmallTemplate(HERMES, hermes, "<|im_end|>", CHATML_TOKENS),
    "qwen3": SmallTemplate(QWEN3, qwen3, "<|im_end|>", CHATML_TOKENS),
    "reasoning": SmallTemplate(REASONING, reasoning, "<|im_end|>", CHATML_TOKENS),
    "llama3": SmallTemplate(LLAMA3, llama3, "<|end_of_text|>", LLAMA3_TOKENS),
    "llama3 with stops": SmallTemplate(LLAMA3, llama3, "<|end_of_text|>", LLAMA3_TOKENS, ("<|eot_id|>",)),
    "mistral": SmallTemplate(
        MISTRAL, mistral, "</s>", ("<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[/TOOL_RESULTS]")
    ),
    "gemma": SmallTemplate(GEMMA, gemma, "<eos>", ("<bos>", "<start_of_turn>", "<end_of_turn>")),
    "phi": SmallTemplate(PHI, phi, "<|endoftext|>", ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")),
    "phi with stops": SmallTemplate(
        PHI, phi, "<|endoftext|>", ("<|end|>", "<|user|>", "<|assistant|>"), ("<|end|>",)
    ),
    "deepseek": SmallTemplate(DEEPSEEK, deepseek, "<end>", DEEPSEEK_TOKENS),
    "r1": SmallTemplate(R1, r1, "<end>", DEEPSEEK_TOKENS, unprompted="<think>\n"),
    "gptoss": SmallTemplate(GPTOSS, gptoss, "<|return|>", GPTOSS_TOKENS, ("<|call|>",)),
    "glm": SmallTemplate(GLM, glm, "<|endoftext|>", GLM_TOKENS, ("<|user|>", "<|observation|>")),
    "no end": SmallTemplate(
        CHATML.replace("<|im_end|>", ""), lambda message, before: None, "<|endoftext|>", CHATML_TOKENS
    ),
}


def byte_tokenizer(template: SmallTemplate) -> PreTrainedTokenizerFast:
    """A token for each byte, and the template's special tokens: what it decodes is what was encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    bos = next(
        (token for token in ("<s>", "<bos>", "<|begin_of_text|>") if token in template.special), template.eos
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=template.eos)
    special = [
        AddedToken(t, special=True, normalized=False)
        for t in template.special
        if t not in (bos, template.eos)
    ]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template.source
    set_stop_ids(tokenizer, tokenizer.convert_tokens_to_ids(list(template.stops)))
    return tokenizer
