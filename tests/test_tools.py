"""What is trained with a chat template, tools and reasoning is asked for in the same way afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState
from conftest import tiny_model, tiny_tokenizer
from tools import tool_rows, write_rows

from finetune.__main__ import main
from finetune.data.chat_template import render
from finetune.data.conversations import Conversation
from finetune.run.adapter import find_trained, load_trained_tokenizer

MEMORISE = {
    "data__chat_template": "chatml",
    "data__max_length": 1024,
    "data__eval_fraction": 0,
    "lora__r": 32,
    "lora__lora_alpha": 64,
    "lora__lora_dropout": 0,
    "optim__name": "adamw",
    "optim__learning_rate": 1e-2,
    "optim__schedule": "cosine",
    "train__num_epochs": 80,
    "train__micro_batch_size": 8,
    "train__gradient_accumulation_steps": 1,
    "checkpoint__every_steps": 1000,
    "log__every_steps": 20,
}


def writing_base(folder: Path) -> Path:
    """The tiny model without a chat template, and with an embedding of the end of a turn: a model's padding
    token, which it is too, has zeros."""
    tokenizer = tiny_tokenizer(None)
    model = tiny_model(len(tokenizer))
    model.get_input_embeddings().weight.data[tokenizer.eos_token_id].normal_(std=0.2)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def memorised(run_train, tmp_path, made_once) -> Path:
    """A run that has learned the eight conversations by heart; made once, and only read."""
    if "run" not in made_once:
        rows = write_rows(tmp_path / "tools.jsonl", tool_rows())
        base = writing_base(tmp_path / "base")
        made_once["run"] = run_train(model__name_or_path=base, data__path=rows, **MEMORISE)
    return made_once["run"]


def ask(run_dir: Path, rows: list[dict[str, Any]], folder: Path, *options: str) -> list[dict[str, Any]]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    folder.mkdir()
    output = folder / "answers.jsonl"
    files = ["--input", str(write_rows(folder / "asked.jsonl", rows)), "--output", str(output)]
    assert main(["generate", str(run_dir), *files, "--max_new_tokens", "200", *options]) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def written(tokenizer: Any, row: dict[str, Any], turn: int) -> str:
    """What the model has to write as this turn, without the token that ends it."""
    messages, tools = row["messages"], row["tools"]
    prompt = render(tokenizer, Conversation(messages[:turn], tools), add_generation_prompt=True)
    text = render(tokenizer, Conversation(messages[: turn + 1], tools))
    assert text.startswith(prompt)
    return text.removeprefix(prompt).removesuffix("<|im_end|>\n")


def test_the_calls_and_answers_that_were_trained_are_generated(memorised, tmp_path):
    tokenizer = load_trained_tokenizer(find_trained(memorised))
    rows = tool_rows()
    for turn in (1, -1):
        asked = [{**row, "messages": row["messages"][:turn]} for row in rows]
        lines = ask(memorised, asked, tmp_path / f"turn{turn}")
        turns = [range(len(row["messages"]))[turn] for row in rows]
        assert [line["answer"] for line in lines] == [
            written(tokenizer, row, place) for row, place in zip(rows, turns, strict=True)
        ]
        assert all(line["ended"] for line in lines)
