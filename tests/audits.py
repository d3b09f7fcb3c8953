"""Rows, and their audits, for tests of the audit."""

import json
from pathlib import Path

from conftest import ROOT, tiny_tokenizer

from finetune.config import Config, DataConfig, ModelConfig, SourceConfig
from finetune.data.audit import measure
from finetune.data.conversations import Conversation
from finetune.data.findings import find_listings
from finetune.data.templates.anatomy import ROLES, Anatomy, dissect

SAMPLE = str(ROOT / "data" / "finance_sample.csv")
TOKENIZER = tiny_tokenizer()
LONG_TEXT = "Explain in two or three sentences what a bond is, who issues it, and why anybody would buy one"


def turns(*contents: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [
        {"role": "assistant" if number % 2 else "user", "content": content}
        for number, content in enumerate(contents)
    ]


def dissect_messages(messages: list[dict], train_on: str = "completion", tokenizer=TOKENIZER) -> Anatomy:
    return dissect(tokenizer, Conversation(messages), train_on)


def row(instruction: str, answer: str = "It is a coin, or a note.", text: str = "") -> dict[str, str]:
    return {"instruction": instruction, "input": text, "output": answer}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def audit_of(path: str | list[SourceConfig], tokenizer=TOKENIZER, **data):
    return measure(Config(model=ModelConfig(), data=DataConfig(path=path, **data)), tokenizer)


def listed(audit) -> dict[str, list[tuple[int, ...]]]:
    """The row numbers of each listing."""
    return {
        listing.title: [tuple(entry.numbers) for entry in listing.entries] for listing in find_listings(audit)
    }


def texts_by_role(tokenizer, messages, train_on="completion") -> dict[str, str]:
    """The tokens of each role, decoded one behind the other."""
    anatomy = dissect_messages(messages, train_on, tokenizer)
    input_ids = anatomy.tokens.input_ids
    ids = {role: [i for i, r in zip(input_ids, anatomy.roles, strict=True) if r == role] for role in ROLES}
    return {role: tokenizer.decode(tokens) for role, tokens in ids.items() if tokens}
