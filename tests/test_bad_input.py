"""What a user can get wrong, each through the real command line: one line that says what, and nothing lost.

A case is a process of its own in a folder of its own. The first of each kind is one of `python train.py`; the
others are forked from one that has the imports done. Some, whose way is that of another case, are tried in
this process.
"""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from conftest import QWEN2_TEMPLATE, ROOT
from forked import Forks, forks
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import train
from finetune.run.folder import keep_lines_until

Setup = Callable[[Path, "Given"], None]


@dataclass(frozen=True)
class Given:
    """What is made once for all cases, and only copied."""

    model: Path
    run: Path
    """A finished run of two updates, and what it was made of"""
    cache: Path


@dataclass(frozen=True, kw_only=True)
class Case:
    """`settings` and `files` come over those of every case; `argv` replaces the whole command line."""

    name: str
    says: tuple[str, ...]
    settings: dict[str, str] = field(default_factory=dict)
    files: dict[str, str | bytes] = field(default_factory=dict)
    setup: Setup | None = None
    argv: tuple[str, ...] = ()


def case(
    name: str,
    *says: str,
    settings: dict[str, str] | None = None,
    files: dict[str, str | bytes] | None = None,
    setup: Setup | None = None,
    argv: tuple[str, ...] = (),
) -> Case:
    return Case(name=name, says=says, settings=settings or {}, files=files or {}, setup=setup, argv=argv)


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


ROWS = [{"instruction": f"What is {n} plus {n}?", "output": f"It is {2 * n}."} for n in range(12)]
BASE: dict[str, Any] = {
    "model": {"quantization": "none"},
    "lora": {"r": 4},
    "data": {"path": "rows.jsonl", "max_length": 128},
    "train": {"max_steps": 2, "mixed_precision": "no"},
    "optim": {"name": "adamw"},
    "checkpoint": {"every_steps": 1},
    "log": {"every_steps": 1},
    "output_dir": "run",
}


def rows_of(*rows: object) -> dict[str, str | bytes]:
    return {"rows.jsonl": jsonl(*rows)}


def data(name: str, content: str | bytes, *says: str, of: str = "", setup: Setup | None = None) -> Case:
    """A data file that is wrong."""
    files: dict[str, str | bytes] = {of or name: content}
    return case(f"data: {name}", *says, settings={"data.path": of or name}, files=files, setup=setup)


def key(setting: str, *says: str, files: dict[str, str | bytes] | None = None) -> Case:
    """One argument `key=value` that is wrong."""
    name, _, value = setting.partition("=")
    return case(f"key: {setting[:60]}", *says, settings={name: value}, files=files)


def config(name: str, text: str | bytes, *says: str) -> Case:
    """A config file that is wrong; what is said names it."""
    return case(
        f"config: {name}", "wrong.yaml", *says, files={"wrong.yaml": text}, argv=("--config", "wrong.yaml")
    )


def make_fifo(folder: Path, _: Given) -> None:
    os.mkfifo(folder / "pipe.csv")


def link_to_itself(folder: Path, _: Given) -> None:
    (folder / "loop.csv").symlink_to("loop.csv")
    (folder / "loop").symlink_to("loop")


def truncated_parquet(folder: Path, _: Given) -> None:
    path = folder / "rows.parquet"
    pd.DataFrame(ROWS).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-200])


# Models: a copy of the good one with one thing wrong.


def model_with(change: Callable[[Path], object]) -> Setup:
    def setup(folder: Path, given: Given) -> None:
        shutil.copytree(given.model, folder / "model")
        change(folder / "model")

    return setup


def truncate_weights(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def lose_a_weight(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def turn_into_adapter(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text("{}")


def turn_into_bert(model: Path) -> None:
    (model / "config.json").unlink()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=1000, **sizes)).save_pretrained(model)


def turn_into_t5(model: Path) -> None:
    (model / "config.json").unlink()
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=1000, **sizes)).save_pretrained(model)


def with_template(template: str | None) -> Setup:
    def change(model: Path) -> None:
        (model / "chat_template.jinja").unlink()
        if template is not None:
            (model / "chat_template.jinja").write_text(template)

    return model_with(change)


def model(name: str, setup: Setup, *says: str, settings: dict[str, str] | None = None) -> Case:
    return case(
        f"model: {name}", *says, settings={"model.name_or_path": "model", **(settings or {})}, setup=setup
    )


# Folders of runs: a copy of the finished one with one thing changed.


def finished(change: Callable[[Path], object] = lambda run: None) -> Setup:
    def setup(folder: Path, given: Given) -> None:
        shutil.copytree(given.run / "run", folder / "run")
        change(folder / "run")

    return setup


def unfinished(change: Callable[[Path], object] = lambda run: None) -> Setup:
    def stop(run: Path) -> None:
        shutil.rmtree(run / "adapter")
        change(run)

    return finished(stop)


def link_elsewhere(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        shutil.move(run / name, run.parent / "elsewhere")
        (run / name).symlink_to(run.parent / "elsewhere")

    return change


def replace_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(text) and None


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def run(name: str, setup: Setup, *says: str, **more: Any) -> Case:
    return case(f"run: {name}", *says, setup=setup, **more)


CHECKPOINT = "first/checkpoints/step_000002"


def resume(name: str, *says: str, change: Callable[[Path], object] = lambda run: None, **more: str) -> Case:
    """Another run that is to go on from a checkpoint of the finished one."""

    def setup(folder: Path, given: Given) -> None:
        shutil.copytree(given.run / "run", folder / "first")
        change(folder / "first")

    return case(f"resume: {name}", *says, setup=setup, settings={"resume": CHECKPOINT, **more})


TURN = {"role": "user", "content": "Hello"}
NO_END_OF_TURN = "{% for turn in messages %}{{ turn.role ~ ': ' ~ turn.content ~ '\n' }}{% endfor %}"
LONG = "What is the meaning of it all? " * 40

CASES = [
    # Data files
    case("data: missing", "nowhere.csv", "No such file", settings={"data.path": "nowhere.csv"}),
    data("empty.csv", b"", "empty.csv is empty"),
    data("latin1.csv", "instruction,output\ncafé,oui\n".encode("latin1"), "latin1.csv", "UTF-8", "byte 22"),
    data("ragged.csv", "instruction,output\na,b\nc,d,e\n", "ragged.csv", "line 3"),
    data(
        "broken.json", '[\n{"instruction": "a", "output": "b"},\n{"instruction": ]\n', "broken.json, line 3"
    ),
    data("broken.jsonl", jsonl(*ROWS[:2]) + '{"instruction": "a\n', "broken.jsonl, line 3"),
    case(
        "data: truncated.parquet",
        "rows.parquet",
        setup=truncated_parquet,
        settings={"data.path": "rows.parquet"},
    ),
    data("names.csv", "Instruction,outputs\na,b\n", "names.csv", "'outputs' is near 'output'"),
    data("number.jsonl", jsonl(*ROWS[:2], {"instruction": "a", "output": 3}), "row 3: output", "text", "3"),
    data("half.jsonl", jsonl(ROWS[0], {"instruction": "\ud800", "output": "b"}), "row 2: instruction"),
    data("chat.jsonl", jsonl({"messages": [TURN]}, {"messages": "hello"}), "row 2: messages", "list"),
    data("one.jsonl", jsonl(ROWS[0]), "1 row", "data.eval_fraction"),
    key("data.eval_fraction=0.99", "data.eval_fraction 0.99", "12"),
    case(
        "data: a folder",
        "folder.csv is a folder",
        files={"folder.csv/x": ""},
        settings={"data.path": "folder.csv"},
    ),
    case("data: a pipe", "pipe.csv", "no ordinary file", setup=make_fifo, settings={"data.path": "pipe.csv"}),
    case(
        "data: mixed columns",
        "other.jsonl has the columns",
        settings={"data.path": "[rows.jsonl, other.jsonl]"},
        files={"other.jsonl": jsonl({"prompt": "a", "completion": "b"})},
    ),
    key("data.path=someone/something", "someone/something", "hub data set"),
    key("data.path=../../etc", "../../etc"),
    # Keys and values
    key("optim.lr=1", "unknown key optim.lr", "optim.learning_rate"),
    key("optimm.learning_rate=1", "unknown key optimm.learning_rate", "nearest is optim.learning_rate"),
    key("train.num_epochs=2.5", "train.num_epochs", "2.5"),
    key("data.num_samples=many", "data.num_samples", "int or null", "many"),
    key("train.max_steps=1" + "0" * 30, "train.max_steps must be at most"),
    key("optim.learning_rate=1e400", "optim.learning_rate must be a finite number"),
    key("model.quantization=nf4", "model.quantization nf4", "train.mixed_precision"),
    key(
        "train.max_tokens_per_micro_batch=100",
        "train.max_tokens_per_micro_batch (100)",
        "data.max_length (128)",
    ),
    key("output_dir=", "output_dir is empty"),
    case("argument: without a value", "optim.learning_rate", argv=("--optim.learning_rate",)),
    case("argument: without dashes", "optim.learning_rate=1", "--", argv=("optim.learning_rate=1",)),
    # Config files
    case("config: missing", "nowhere.yaml", argv=("--config", "nowhere.yaml")),
    case("config: a pipe", "pipe.csv", "no ordinary file", setup=make_fifo, argv=("--config", "pipe.csv")),
    case(
        "config: the second of two",
        "second.yaml",
        "lora.rank",
        files={"first.yaml": "lora: {r: 2}", "second.yaml": "lora: {rank: 2}"},
        argv=("--config", "first.yaml", "--config=second.yaml"),
    ),
    config("not UTF-8", b"output_dir: \xff\n", "UTF-8"),
    config("an unknown section", "optimm:\n  learning_rate: 1\n", "unknown key optimm", "nearest is optim"),
    case(
        "config: a NUL in a name",
        r"output_dir holds a character that is no text: 'a\x00b'",
        files={"wrong.yaml": 'output_dir: "a\\0b"\n'},
        argv=("--config", "wrong.yaml"),
    ),
    # Models
    key("model.name_or_path=nobody/nothing", "model.name_or_path nobody/nothing could not be loaded"),
    model("truncated weights", model_with(truncate_weights), "model.name_or_path model could not be loaded"),
    model("an adapter", model_with(turn_into_adapter), "model.name_or_path model holds an adapter"),
    model("Bert", model_with(turn_into_bert), "model.name_or_path model", "causal"),
    key("lora.target_modules=[q_proj,nope]", "lora.target_modules", "the model has no nope"),
    model("no chat template", with_template(None), "no chat template", "data.chat_template", "chatml"),
    model("no end of turn", with_template(NO_END_OF_TURN), "end-of-turn token", "data.train_on all"),
    case(
        "model: a template that refuses",
        "row 2",
        "refuses the turns tool, assistant",
        "no tools",
        setup=with_template(
            "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + QWEN2_TEMPLATE
        ),
        settings={"model.name_or_path": "model", "data.eval_fraction": "0"},
        files=rows_of(
            *[
                {"messages": [{"role": role, "content": "a"}, {"role": "assistant", "content": "b"}]}
                for role in ("user", "tool")
            ]
        ),
    ),
    key("data.max_length=10", "train split", "data.max_length"),
    # The split of seed 42 puts the second of two rows aside.
    case(
        "data: eval rows too long",
        "eval split",
        "data.max_length",
        settings={"data.eval_fraction": "0.5"},
        files=rows_of(ROWS[0], {**ROWS[1], "instruction": LONG}),
    ),
    # Folders of runs
    case("output: a file", "output_dir run", "file", files={"run": "mine"}),
    # A disk without room, which only root may write to at all.
    key(
        "output_dir=/proc/nothing/run",
        "/proc/nothing/run",
        "room" if os.geteuid() == 0 else "/proc cannot be written",
    ),
    case("output: other files", "output_dir run", "other files", files={"run/photo.jpg": b"\xff\xd8"}),
    run("finished, another config", finished(), "lora.r was 4, is 8", settings={"lora.r": "8"}),
    run("resume never", unfinished(), "output_dir run", "resume is never", settings={"resume": "never"}),
    run("config.yaml damaged", unfinished(replace_text("config.yaml", "a: [")), "config.yaml"),
    run("environment.json damaged", unfinished(replace_text("environment.json", "{")), "environment.json"),
    run("other rows", unfinished(), "rows.jsonl", "trained and evaluated on", files=rows_of(*ROWS[::-1])),
    run(
        "another size of updates",
        unfinished(),
        "8 examples per update",
        "16",
        settings={"train.micro_batch_size": "4"},
    ),
    run(
        "a checkpoint is a link",
        unfinished(link_elsewhere("checkpoints/step_000002")),
        "step_000002 is a link",
    ),
    run("a checkpoint is a file", unfinished(replace_text("checkpoints/step_000009", "x")), "step_000009 is"),
    # Checkpoints of other runs
    key("resume=nowhere", "resume nowhere", "manifest.json"),
    resume(
        "altered",
        f"resume {CHECKPOINT}",
        "adapter_model.safetensors was altered",
        change=lambda run: alter(run / "checkpoints/step_000002/adapter_model.safetensors"),
    ),
    resume("another rank", CHECKPOINT, "another rank", **{"lora.r": "8"}),
    resume("another optimizer", CHECKPOINT, "torch AdamW", "SGD", **{"optim.name": "sgd"}),
    case(
        "strict",
        "strict",
        "optimizer: requested paged_adamw_8bit, actual adamw_8bit",
        argv=("--config", "base.yaml", "--optim.name", "paged_adamw_8bit", "--strict"),
    ),
]

# These end as the others do, and are tried in this process: a start takes seconds.
QUICK_CASES = [
    data("wide.csv", "instruction,output\na,b,c\nd,e,f\n", "wide.csv", "more cells"),
    data("list.jsonl", jsonl(ROWS[0], ["a", "b"]), "list.jsonl, line 2", "expected an object"),
    data("deep.json", "[" * 100_000, "deep.json", "nested"),
    data("text.parquet", "instruction,output\na,b\n", "text.parquet cannot be read"),
    data("infinite.json", '[{"instruction": "a", "output": 1e400}]', "row 1: output", "inf"),
    data("turn.jsonl", jsonl({"messages": [TURN, {"role": 3}]}), "row 1: messages", "role"),
    key("data.split_by=instruction", "data.split_by", files=rows_of(*[ROWS[0]] * 5)),
    key("data.path=/dev/null", "/dev/null"),
    key("data.path=a//b", "a//b", "neither"),
    key("chekpoint.keep=1", "unknown key chekpoint.keep", "nearest is checkpoint.keep"),
    key("model=x", "model", "section", "model.name_or_path"),
    key("lora.lora_dropout=1", "lora.lora_dropout must be at least 0 and below 1"),
    key("train.seed=-1", "train.seed must be at least 0"),
    key("data.max_length=1", "data.max_length must be at least 2"),
    key("optim.betas=[0.9]", "optim.betas", "2 elements"),
    key("train.packing=perhaps", "train.packing", "perhaps"),
    key("model.quantization=int4", "model.quantization", "int4"),
    key("lora.target_modules=q_proj", "lora.target_modules", "[q_proj, v_proj]"),
    key("model.name_or_path=", "model.name_or_path is empty"),
    case("argument: one = too many", "lora.r", "=3", argv=("--lora.r==3",)),
    case("argument: two values", "2", "--", argv=("--lora.r", "1", "2")),
    case("config: a folder", "config file .", "directory", argv=("--config", ".")),
    config("a list", "- lora\n", "no keys"),
    config("a doubled key", "lora:\n  r: 4\n  r: 5\n", "r stands twice", "line 2"),
    config("within itself", "lora: &lora\n  r: *lora\n", "lora"),
    key("model.name_or_path=a/../b", "model.name_or_path 'a/../b'", "nor a Hub model name"),
    key("model.name_or_path=~nobody-here/model", "~nobody-here/model"),
    case(
        "model: a leading dash",
        "model.name_or_path '-a/b'",
        "nor a Hub model name",
        argv=("--config", "base.yaml", "--model.name_or_path=-a/b"),
    ),
    key("model.name_or_path=a.gguf", "model.name_or_path a.gguf does not exist"),
    model("empty weights", model_with(replace_text("model.safetensors", "")), "model.name_or_path model"),
    model("no weights", model_with(lambda m: (m / "model.safetensors").unlink()), "model.name_or_path model"),
    model("a weight missing", model_with(lose_a_weight), "lacks 1 weights", "layers.1.mlp.up_proj.weight"),
    model(
        "a template that divides by zero", with_template("{{ 1 / 0 }}"), "chat template", "row ", "division"
    ),
    key("output_dir=rows.jsonl/below", "output_dir rows.jsonl/below"),
    case(
        "output: a link to itself", "output_dir loop", setup=link_to_itself, settings={"output_dir": "loop"}
    ),
    run("all checkpoints are a link", unfinished(link_elsewhere("checkpoints")), "checkpoints is a link"),
    key("resume=rows.jsonl", "resume rows.jsonl"),
    key("resume=.", "resume .", "manifest.json"),
    key("resume=", "resume is empty"),
    data("blank.jsonl", jsonl({"instruction": "a", "output": " "}), "blank.jsonl", "1 without output"),
    case("data: a link to itself", "loop.csv", setup=link_to_itself, settings={"data.path": "loop.csv"}),
    key("learning_rate=1", "unknown key learning_rate", "nearest is optim.learning_rate"),
    key("optim.learning_rate=-0.0", "optim.learning_rate must be above 0"),
    config("a null", "optim:\n  learning_rate: null\n", "optim.learning_rate must have a value"),
    model("empty folder", lambda folder, _: (folder / "model").mkdir(), "model.name_or_path model could not"),
    model("broken config.json", model_with(replace_text("config.json", "{")), "model.name_or_path model"),
    model("T5", model_with(turn_into_t5), "model.name_or_path model could not be loaded"),
    model("a template that is no jinja", with_template("{% for %}"), "chat template", "line 1"),
    run("unfinished, another config", unfinished(), "train.seed was 42, is 1", settings={"train.seed": "1"}),
    data("header.csv", "instruction,output\n", "header.csv is empty"),
    data("other.txt", "a\n", "other.txt", ".csv, .parquet, .json, .jsonl"),
    key("data.num_samples=13", "data.num_samples", "13", "12 rows"),
    config("not YAML", "lora: [\n", "line 2"),
    case(
        "model: a GGUF file that is none",
        "model.name_or_path a.gguf could not be loaded",
        settings={"model.name_or_path": "a.gguf"},
        files={"a.gguf": b"GGUF" + b"x" * 100},
    ),
    resume("other modules", CHECKPOINT, "other modules", **{"lora.target_modules": "[q_proj]"}),
]


# Conversations, tools, sources, eval sets, templates and adapters. They too are tried in this process.

ANSWER = {"role": "assistant", "content": "Hello!"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def answer(name: str, message: dict[str, Any], *says: str) -> Case:
    """The third row of a file has an assistant turn that is wrong."""
    rows = [{"messages": [TURN, turn]} for turn in (ANSWER, ANSWER, {"role": "assistant", **message})]
    return data(f"answer: {name}", jsonl(*rows), "row 3: messages", *says, of="chat.jsonl")


def calling(name: str, calls: Any, *says: str) -> Case:
    return answer(name, {"content": None, "tool_calls": calls}, *says)


def conversation(name: str, beside: dict[str, Any], *says: str) -> Case:
    """The second row of a file has something wrong beside its messages."""
    rows = [{"messages": [TURN, ANSWER]}, {"messages": [TURN, ANSWER], **beside}]
    return data(f"conversation: {name}", jsonl(*rows), "row 2", *says, of="chat.jsonl")


def second_row(name: str, good: dict[str, Any], wrong: dict[str, Any], *says: str) -> Case:
    return data(f"row: {name}", jsonl(good, {**good, **wrong}), "row 2", *says, of="rows2.jsonl")


def source(name: str, path: str, *says: str, setup: Setup | None = None) -> Case:
    """`data.path` is a list of sources; other.jsonl has 12 rows, as rows.jsonl has."""
    return case(
        f"sources: {name}",
        *says,
        settings={"data.path": path},
        files={"other.jsonl": jsonl(*ROWS)},
        setup=setup,
    )


def template(name: str, text: str | bytes, *says: str, rows: list[object] | None = None) -> Case:
    """`data.chat_template` is a file that is wrong."""
    files = {"own.jinja": text, **rows_of(*(ROWS if rows is None else rows))}
    return case(f"template: {name}", *says, settings={"data.chat_template": "own.jinja"}, files=files)


def adapter(name: str, change: Callable[[Path], object], *says: str, **settings: str) -> Case:
    """A copy of the finished run's adapter with one thing wrong, to train on from."""

    def setup(folder: Path, given: Given) -> None:
        shutil.copytree(given.run / "run" / "adapter", folder / "before")
        change(folder / "before")

    return case(
        f"adapter: {name}",
        "before",
        *says,
        settings={"model.adapter": "before", **settings},
        setup=setup,
    )


def change_adapter_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def change_adapter_weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def change_file(folder: Path) -> None:
        weights = load_file(folder / "adapter_model.safetensors")
        change(weights)
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    return change_file


def pickle_weights(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    torch.save(weights, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def shorten_a_weight(weights: dict[str, Any]) -> None:
    name = next(name for name in weights if "layers.1.mlp.up_proj.lora_B" in name)
    weights[name] = weights[name][:-1].clone()


def lose_lora_weight(weights: dict[str, Any]) -> None:
    del weights[next(name for name in weights if "layers.1.mlp.up_proj.lora_B" in name)]


SHAREGPT = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello!"}]}


def sharegpt(name: str, turn: Any, *says: str) -> Case:
    rows = [SHAREGPT, {"conversations": [*SHAREGPT["conversations"], turn]}]
    return data(f"sharegpt: {name}", jsonl(*rows), "row 2: conversations", *says, of="sharegpt.jsonl")


QUESTION_ONLY = (
    "{% for turn in messages if turn.role != 'assistant' %}<|im_start|>{{ turn.role ~ '\n' ~ turn.content }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

REWRITING = QWEN2_TEMPLATE.replace("turn.content", "turn.content | replace('It', 'Perhaps it')")

NEW_CASES = [
    # Turns
    calling("calls are text", "call me", "tool_calls"),
    calling("calls are a number", 3, "tool_calls"),
    calling("a call is text", ["add"], "tool call 1", "add"),
    calling("a call without a name", [{"function": {"arguments": {}}}], "tool call 1", "name"),
    calling("a call whose name is a number", [{"function": {"name": 3, "arguments": {}}}], "name"),
    calling("arguments are no JSON", [{"function": {"name": "add", "arguments": '{"a": '}}], "arguments"),
    calling("arguments are a list", [{"function": {"name": "add", "arguments": [1, 2]}}], "arguments"),
    answer("a part of an unknown type", {"content": [{"type": "image_url", "image_url": "x"}]}, "image_url"),
    answer("a part that is no object", {"content": [3]}, "content"),
    answer("a text part without text", {"content": [{"type": "text"}]}, "text"),
    answer("content is an object", {"content": {"text": "Hello!"}}, "content"),
    answer("a weight of one half", {"content": "Hello!", "weight": 0.5}, "weight", "0.5"),
    answer("a weight in words", {"content": "Hello!", "weight": "high"}, "weight", "high"),
    answer("train in words", {"content": "Hello!", "train": "no"}, "train", "no"),
    answer("reasoning is a number", {"content": "Hello!", "reasoning_content": 3}, "reasoning_content"),
    answer("reasoning twice", {"content": "a", "reasoning": "b", "thinking": "c"}, "reasoning", "thinking"),
    # What stands beside messages
    conversation("tools are a number", {"tools": 3}, "tools"),
    conversation("tools are no JSON", {"tools": '[{"type": '}, "tools"),
    conversation("a tool is a number", {"tools": [3]}, "tool 1", "3"),
    conversation("template arguments are text", {"chat_template_kwargs": "fast"}, "chat_template_kwargs"),
    conversation(
        "template arguments of the program's own",
        {"chat_template_kwargs": {"add_generation_prompt": True}},
        "chat_template_kwargs",
        "add_generation_prompt",
    ),
    conversation("system is a number", {"system": 3}, "system"),
    # Other formats
    sharegpt("an unknown speaker", {"from": "wizard", "value": "Hello"}, "wizard"),
    sharegpt("a number as value", {"from": "gpt", "value": 3}, "turn 3", "text"),
    sharegpt("a turn is text", "Hello", "Hello"),
    sharegpt("a call that is no JSON", {"from": "function_call", "value": "add 1"}, "function_call"),
    data("sharegpt: text", jsonl(SHAREGPT, {"conversations": "a"}), "row 2: conversations", of="a.jsonl"),
    second_row("half a pair of history", ROWS[0], {"history": [["Hello"]]}, "history"),
    second_row("history is text", ROWS[0], {"history": "Hello"}, "history"),
    second_row("plain text is a number", {"text": "Once."}, {"text": 3}, "text"),
    second_row("the prompt is an object", {"prompt": "a", "completion": "b"}, {"prompt": {"a": 1}}, "prompt"),
    data("unknown columns", jsonl({"foo": "a", "bar": "b"}), "rows3.jsonl", "data.columns", of="rows3.jsonl"),
    case(
        "data: two formats in one file",
        "rows.jsonl, row ",
        "instruction and output",
        "messages",
        files=rows_of(ROWS[0], {"messages": [TURN, ANSWER]}),
    ),
    key("data.columns={nope: instruction}", "data.columns", "nope"),
    key("data.columns={instruction: output, output: output}", "data.columns", "output"),
    key("data.columns={instruction: frage}", "data.columns", "frage"),
    key("data.columns={instruction: 3}", "data.columns"),
    # Sources
    data("no gzip", b"no gzip", "rows.jsonl.gz", of="rows.jsonl.gz"),
    data("torn.jsonl.gz", gzip.compress(jsonl(*ROWS).encode())[:-12], "torn.jsonl.gz"),
    data("no.jsonl.zst", b"no zstd", "no.jsonl.zst"),
    source("an empty folder", "folder", "folder", setup=lambda at, _: (at / "folder").mkdir()),
    case(
        "sources: a folder without rows",
        "folder",
        settings={"data.path": "folder"},
        files={"folder/notes.md": "Notes"},
    ),
    source("a pattern without a match", "nothing/*.jsonl", "nothing/*.jsonl"),
    source("a subset, offline", "[{path: someone/something, subset: en}]", "someone/something"),
    source("a subset of a file", "[{path: rows.jsonl, subset: en}]", "subset", "rows.jsonl"),
    source("shares above 1", "[{path: rows.jsonl, share: 0.7}, {path: other.jsonl, share: 0.7}]", "share"),
    source("shares of nothing", "[{path: rows.jsonl, share: 0}, {path: other.jsonl, share: 0}]", "share"),
    source("a share below 0", "[{path: rows.jsonl, share: -1}, {path: other.jsonl}]", "share", "-1"),
    source(
        "a share and a number", "[{path: rows.jsonl, share: 0.5, num_samples: 3}]", "share", "num_samples"
    ),
    source("more rows than there are", "[{path: rows.jsonl, num_samples: 50}]", "num_samples", "50", "12"),
    source("no path", "[{name: mine}]", "data.path"),
    source("an unknown key", "[{path: rows.jsonl, weight: 1}]", "data.path", "weight"),
    source(
        "one name twice",
        "[{path: rows.jsonl, name: mine}, {path: other.jsonl, name: mine}]",
        "name",
        "mine",
    ),
    source("a source that is missing", "[{path: rows.jsonl}, {path: nowhere.jsonl}]", "nowhere.jsonl"),
    source("no source", "[]", "data.path"),
    # Eval rows
    key("data.eval_path=nowhere.jsonl", "nowhere.jsonl"),
    case(
        "eval_path: with a fraction",
        "data.eval_path",
        "data.eval_fraction",
        settings={"data.eval_path": "eval.jsonl", "data.eval_fraction": "0.3"},
        files={"eval.jsonl": jsonl(*ROWS[:2])},
    ),
    case(
        "eval_path: no usable row",
        "eval.jsonl",
        "1 without output",
        settings={"data.eval_path": "eval.jsonl"},
        files={"eval.jsonl": jsonl({"instruction": "a", "output": ""})},
    ),
    key("eval.sets={math: nowhere.jsonl}", "nowhere.jsonl"),
    key('eval.sets={"a/b": rows.jsonl}', "eval.sets", "a/b"),
    key('eval.sets={"": rows.jsonl}', "eval.sets"),
    key("eval.sets=[rows.jsonl]", "eval.sets"),
    # Templates
    key("data.chat_template=chatlm", "data.chat_template chatlm", "chatml"),
    key("data.chat_template=nowhere.jinja", "data.chat_template nowhere.jinja"),
    key("data.chat_template=.", "data.chat_template ."),
    template("no Jinja", "{% for %}", "chat template", "line 1"),
    template("not UTF-8", b"\xff\xfe\xff", "own.jinja", "cannot be read as text"),
    template("empty", "", "own.jinja"),
    template("drops the answer", QUESTION_ONLY, "own.jinja"),
    template("fails", "{{ messages[7].content }}", "own.jinja", "chat template"),
    template("says nothing of the turns", "Hello<|im_end|>", "own.jinja"),
    template("rewrites some answers", REWRITING, "row ", "chat template", "changes it"),
    model("a template that drops answers", with_template(QUESTION_ONLY), "row ", "leaves it out"),
    model("a template that rewrites answers", with_template(REWRITING), "row ", "changes it"),
    model(
        "a template that writes answers twice",
        with_template(QWEN2_TEMPLATE.replace("turn.content", "turn.content ~ ' ' ~ turn.content")),
        "row ",
        "more than once",
    ),
    case(
        "model: a template that drops tool calls",
        "row ",
        "add",
        files=rows_of(*[{"messages": [TURN, {**ANSWER, "tool_calls": [CALL]}]}] * 4),
    ),
    # Adapters to begin from
    key("model.adapter=nowhere", "model.adapter nowhere"),
    key("model.adapter=rows.jsonl", "model.adapter rows.jsonl"),
    key("model.adapter=.", "model.adapter .", "adapter_config.json"),
    adapter("another rank", lambda _: None, "lora.r is 16", "has 4", **{"lora.r": "16"}),
    adapter("other modules", lambda _: None, "q_proj", **{"lora.target_modules": "[q_proj]"}),
    adapter("no LoRA", change_adapter_config(peft_type="IA3"), "IA3"),
    adapter("a broken configuration", replace_text("adapter_config.json", "{"), "adapter_config.json"),
    adapter("pickled weights", pickle_weights, "adapter_model.bin", "safetensors"),
    adapter("torn weights", replace_text("adapter_model.safetensors", "torn"), "adapter_model.safetensors"),
    adapter("a weight missing", change_adapter_weights(lose_lora_weight), "layers.1.mlp.up_proj"),
    adapter("a weight of another base", change_adapter_weights(shorten_a_weight), "layers.1.mlp.up_proj"),
    adapter(
        "a weight too many",
        change_adapter_weights(lambda weights: weights.update({"more": torch.zeros(2)})),
        "more",
    ),
    # What is not used, under --strict
    case(
        "strict: a column",
        "strict",
        "topic",
        files=rows_of(*({**row, "topic": "sums"} for row in ROWS)),
        argv=("--config", "base.yaml", "--strict"),
    ),
    case(
        "strict: a key of a message",
        "strict",
        "mood",
        files=rows_of(*[{"messages": [TURN, {**ANSWER, "mood": "good"}]}] * 4),
        argv=("--config", "base.yaml", "--strict"),
    ),
]


def put_together(case: Case, folder: Path, given: Given) -> list[str]:
    """Lay out the folder of a case; returns its command line."""
    files: dict[str, str | bytes] = {"rows.jsonl": jsonl(*ROWS), **case.files}
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    base = {**BASE, "model": {**BASE["model"], "name_or_path": str(given.model)}}
    (folder / "base.yaml").write_text(yaml.dump(base))
    if case.setup is not None:
        case.setup(folder, given)
    settings = [text for key, value in case.settings.items() for text in (f"--{key}", value)]
    return list(case.argv) or ["--config", "base.yaml", *settings]


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder by its place, with a hash; links and folders too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            what = f"link to {path.readlink()}"
        elif path.is_file():
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            what = "folder" if path.is_dir() else "pipe"
        found[str(path.relative_to(folder))] = what
    return found


def environment(cache: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cache / "hub"),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "OMP_NUM_THREADS": "1",
    }


def command_line(argv: list[str], folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *argv],
        cwd=folder,
        env=environment(cache),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="session")
def given(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("good")
    given = Given(tiny_model_dir, folder, tmp_path_factory.mktemp("cache"))
    argv = put_together(case("good"), folder, given)
    ended = command_line(argv, folder, given.cache)
    assert ended.returncode == 0, ended.stderr
    return given


@pytest.fixture(scope="module")
def forked(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forks(environment(given.cache), tmp_path_factory.mktemp("printed")) as process:
        yield process


def assert_one_line(bad: Case, code: int, said: str) -> None:
    """The last line is the program's; a library may have said something before it."""
    assert code == 2
    assert "Traceback" not in said
    assert [line for line in said.splitlines() if line.startswith("error: ")] == said.splitlines()[-1:], said
    said = said.splitlines()[-1]
    for words in bad.says:
        assert words in said


FIRST_OF_KIND = {bad.name.partition(":")[0]: bad for bad in reversed(CASES)}.values()


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(bad, given, forked, tmp_path):
    argv = put_together(bad, tmp_path, given)
    before = contents(tmp_path)
    ended = command_line(argv, tmp_path, given.cache) if bad in FIRST_OF_KIND else forked.run(argv, tmp_path)
    assert_one_line(bad, ended.returncode, ended.stderr)
    assert "Traceback" not in ended.stdout
    assert contents(tmp_path) == before


@pytest.mark.parametrize("quick", [*QUICK_CASES, *NEW_CASES], ids=lambda quick: quick.name)
def test_so_it_is_for_what_is_tried_in_this_process(quick, given, tmp_path, monkeypatch, capfd):
    argv = put_together(quick, tmp_path, given)
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    code = train.main(argv)
    assert_one_line(quick, code, capfd.readouterr().err)
    assert contents(tmp_path) == before


def test_lines_of_metrics_that_are_none_of_a_run_s_are_dropped(tmp_path):
    lines = ['{"step": 1}', "[]", "3", '{"loss": 1}', "{", '{"step": 2}', '{"step": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    keep_lines_until(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_without_a_home_the_line_says_where_to_keep_the_starter_model(monkeypatch, capfd, tmp_path):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert train.main([f"--output_dir={tmp_path / 'run'}"]) == 2
    assert "XDG_CACHE_HOME" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
