"""Random rows and random configurations end in what was asked for or in one line, never in a traceback.

The draws are seeded: a failure names the number of its draw, and comes again.
"""

import csv
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import yaml
from conftest import tiny_tokenizer

from finetune.config import Config, DataConfig, flatten
from finetune.config_checks import check_config
from finetune.config_parsing import _parser, config_to_dict, parse_config
from finetune.data.rows import load_rows
from finetune.data.splits import tokenize_splits
from finetune.data.templates.tokenize import IGNORE
from finetune.runtime.cli import run_command

NUM_FILES, MOST_ROWS_IN_FILE = 500, 8  # 4.5 rows a file: more than 2,000 rows
NUM_CONFIGS = 500
COLUMNS = [
    ["instruction", "output"],
    ["instruction", "input", "output"],
    ["messages"],
    ["messages", "tools", "system", "chat_template_kwargs"],
    ["conversations", "tools"],
    ["prompt", "completion"],
    ["instruction", "output", "history", "system"],
    ["question", "answer"],
    ["text"],
]
PLAIN = ["What is a bond?", "A loan.", "Add 2 and 2", "4", "Hallo, wie geht's?", "a", "Yes.\nNo.\n"]
NASTY = [
    "", " ", "\n", "\t\r\n", "\0", "\x07\x1b[31m", "\ufeff", "\u200b", "\x85\u2028",
    "\ud800", "a\udfff", "\U0010ffff", "👩‍👩‍👧‍👦", "שלום, עולם", "\u202ex", "漢字", "e\u0301",
    "<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "placeholder",
    "{{ messages }}", "{% for %}", "{# #}", "nan", "NULL", "n/a", "true", '"', "'", ",",
    '","', "\\", "\\ud800", "%s %d {0}", "../../etc", "word " * 2000, "x" * 5000, "[" * 300,
    "-", "---", "~", "# no", "1e400",
]  # fmt: skip
NUMBERS = [
    0,
    1,
    -1,
    2**31,
    2**63,
    10**30,
    -(10**400),
    0.0,
    -0.0,
    0.5,
    1e-4,
    1e308,
    float("inf"),
    float("nan"),
]


def random_text(draw: random.Random) -> str:
    if draw.random() < 0.5:
        return draw.choice(PLAIN)
    return "".join(draw.choice(PLAIN + NASTY) for _ in range(draw.randint(1, 3)))


def random_value(draw: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = draw.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return random_text(draw)
    if kind < 5:
        return draw.choice([None, True, False, draw.choice(NUMBERS)])
    if kind == 5:
        return {random_text(draw): random_value(draw, depth + 1) for _ in range(draw.randint(0, 3))}
    return [random_value(draw, depth + 1) for _ in range(draw.randint(0, 3))]


def random_call(draw: random.Random, cell: Callable[[], Any]) -> Any:
    arguments = draw.choice([{"a": cell()}, json.dumps({"a": draw.choice(PLAIN)}), {}, cell()])
    call = {"name": draw.choice(["add", cell()]), "arguments": arguments}
    return draw.choice([{"type": "function", "function": call}, {"function": call}, call, cell()])


def random_messages(draw: random.Random, cell: Callable[[], Any]) -> Any:
    roles = ["system", "developer", "user", "assistant", "assistant", "tool", ""]
    messages: list[Any] = [{"role": draw.choice(roles), "content": cell()} for _ in range(draw.randint(0, 4))]
    for message in messages:
        if message["role"] == "assistant" and draw.random() < 0.3:
            message[draw.choice(["reasoning_content", "reasoning", "thinking"])] = cell()
        if message["role"] == "assistant" and draw.random() < 0.3:
            message["tool_calls"] = [random_call(draw, cell) for _ in range(draw.randint(0, 2))]
            message["content"] = draw.choice([None, message["content"]])
        if draw.random() < 0.1:
            message["content"] = [{"type": draw.choice(["text", "thinking", "image"]), "text": cell()}]
        if draw.random() < 0.1:
            message[draw.choice(["train", "weight"])] = draw.choice([True, False, 0, 1, cell()])
    if messages and draw.random() < 0.1:
        messages[0]["extra"] = random_value(draw)
    return messages


def random_cell(draw: random.Random, name: str, cell: Callable[[], Any]) -> Any:
    """What may stand in a column of that name."""
    if name == "messages":
        return random_messages(draw, cell)
    if name == "conversations":
        speakers = ["human", "gpt", "gpt", "system", "function_call", "observation", ""]
        return [{"from": draw.choice(speakers), "value": cell()} for _ in range(draw.randint(0, 4))]
    if name == "tools":
        tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
        return draw.choice([None, [], [tool], json.dumps([tool]), cell()])
    if name == "history":
        return draw.choice([None, [], [[cell(), cell()]], cell()])
    if name == "chat_template_kwargs":
        return draw.choice([None, {}, {"enable_thinking": draw.choice([True, cell()])}, cell()])
    return cell()


def random_rows(draw: random.Random) -> list[dict[str, Any]]:
    """Rows of one format; in one file of three they hold more than text."""
    odd = draw.random() < 0.33

    def cell() -> Any:
        return random_value(draw) if odd and draw.random() < 0.2 else random_text(draw)

    columns = draw.choice(COLUMNS)
    rows: list[dict[str, Any]] = []
    for _ in range(draw.randint(1, MOST_ROWS_IN_FILE)):
        row = {name: random_cell(draw, name, cell) for name in columns}
        if odd and draw.random() < 0.1:
            row.pop(draw.choice(columns))
        if odd and draw.random() < 0.1:
            row[random_text(draw)] = random_value(draw)
        if odd and draw.random() < 0.05:
            row[draw.choice(columns)] = random_value(draw)
        rows.append(row)
    return rows


def write_rows(rows: list[dict[str, Any]], folder: Path, draw: random.Random) -> Path:
    """The rows as a file of a random kind; as JSON where they cannot be of that kind."""
    path = folder / f"rows.{draw.choice(['csv', 'parquet', 'json', 'jsonl'])}"
    if path.suffix == ".parquet":
        try:
            pd.DataFrame(rows).to_parquet(path)
        except (pa.ArrowException, UnicodeError, OverflowError, ValueError, TypeError):
            path = path.with_suffix(".json")
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            names = list(dict.fromkeys(name for row in rows for name in row))
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_random_rows_become_examples_or_one_line(tmp_path, capfd):
    tokenizer = tiny_tokenizer()
    num_rows = num_tokenized = num_refused = 0
    for number in range(NUM_FILES):
        draw = random.Random(number)
        rows = random_rows(draw)
        path = write_rows(rows, tmp_path, draw)
        num_rows += len(rows)
        config = DataConfig(
            path=str(path),
            system_prompt=draw.choice([None, "", "Be brief.", "<|im_end|>"]),
            eval_fraction=draw.choice([0, 0, 0.3]),
            split_by=draw.choice(["row", "instruction"]),
            max_length=draw.choice([2, 20, 512]),
            overlong=draw.choice(["truncate", "drop"]),
            train_on=draw.choice(["completion", "all"]),
        )
        done: list[int] = []

        def prepare(_: object, config: DataConfig = config, done: list[int] = done) -> None:
            rows = load_rows(config)
            sets = tokenize_splits(rows, tokenizer, config)
            for row in [row for examples in sets for row in examples.dataset]:
                assert len(row["input_ids"]) == len(row["labels"]) <= config.max_length
                assert any(label != IGNORE for label in row["labels"])
            kept = [number for examples in sets for number in set(examples.dataset["row_number"])]
            left_out = [number for examples in sets for some in examples.dropped.values() for number in some]
            assert len(set(kept)) == len(kept)  # a long text makes several examples, of one split
            assert len(kept) + len(left_out) == rows.num_kept
            done.append(rows.num_kept)

        code = run_command(prepare, [])
        said = capfd.readouterr().err
        num_tokenized += sum(done)
        num_refused += code == 2
        assert (code, len(said.splitlines())) in [(0, 0), (2, 1)], (number, said)
        assert said == "" or (said.startswith("error: ") and len(said) < 1000), number
    assert num_rows >= 2000
    assert num_tokenized > 300  # else it was all refused, and no row has been looked at
    assert num_refused > 100


# Configurations


KNOWN = flatten(config_to_dict(Config()))
SECTIONS = [name for name, value in config_to_dict(Config()).items() if isinstance(value, dict)]
UNKNOWN = [
    "",
    "x",
    "optim.lr",
    "optim.betas.x",
    "optimm.name",
    "3",
    ".",
    "..",
    "optim.",
    ".name",
    "a b",
    "config.x",
    "é",
]
WORDS = [
    "null", "~", "no", "[]", "{}", "[a, b]", "{a: b}", "a: b", "&a", "*a", "!!bool maybe",
    "!!timestamp x", "2020-99-99", "1:30", "0x1F", "0b", "1_0", "1e4", "0x" + "f" * 5000,
    "1" * 5000, "- x", "? x", "<<", "=", "==", "@", "`", "%", "|", ">", "!",
    "!!python/name:os.system", "\t", "'", '"', "[" * 2000, "{" * 2000,
    "[" * 9000 + "]" * 9000, "auto", "epoch", "-1", ".inf", "auto\n", "a\nb", "\ud800", "\0",
    "--", "-x", "null # x", "[null]", "[[1]]", "all-linear", "[0.5, 0.5]", "0.5", "3",
]  # fmt: skip


def random_key(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.75:
        return draw.choice(list(KNOWN))
    if kind < 0.85:
        return draw.choice(SECTIONS + UNKNOWN)
    return draw.choice(list(KNOWN)).replace(draw.choice("aeiorst_."), draw.choice(["", "x", "."]))


def random_setting(draw: random.Random, key: str) -> Any:
    """What the key is by default, or a value of any kind."""
    if draw.random() < 0.75 and key in KNOWN:
        return KNOWN[key]
    return draw.choice([random_value(draw), draw.choice(NUMBERS), draw.choice(WORDS)])


def random_arguments(draw: random.Random) -> list[str]:
    arguments = []
    for _ in range(draw.randint(1, 4)):
        key = random_key(draw)
        value = str(random_setting(draw, key))
        together = draw.random() < 0.5
        arguments += [f"--{key}={value}"] if together else [f"--{key}", value]
    if draw.random() < 0.1:
        arguments.insert(draw.randrange(len(arguments)), draw.choice(WORDS + UNKNOWN))
    return arguments


def random_yaml(draw: random.Random) -> str:
    """A file of random keys: as a program would write it, or as a hand would."""
    settings: dict[Any, Any] = {}
    lines = []
    for _ in range(draw.randint(1, 3)):
        key = random_key(draw)
        value = random_setting(draw, key)
        section, _, name = key.rpartition(".")
        text = "null" if value is None else value
        lines.append(f"{section}:\n  {name}: {text}" if section else f"{name}: {text}")
        inner = settings.setdefault(section, {}) if section else settings
        if isinstance(inner, dict):  # else a value was drawn for the section itself
            inner[name if draw.random() < 0.95 else draw.choice(NUMBERS)] = value
    if draw.random() < 0.5:
        return yaml.dump(settings)
    return "\n".join(draw.sample([*lines, draw.choice(WORDS)], len(lines)))


@pytest.mark.parametrize("kind", ["arguments", "file"])
def test_random_settings_become_a_config_or_one_line(kind, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(
        "finetune.config_parsing._parser", cache(_parser)
    )  # to build it takes longer than to parse
    num_refused = 0
    for number in range(NUM_CONFIGS // 2):
        draw = random.Random(number)
        if kind == "arguments":
            argv = random_arguments(draw)
        else:
            path = tmp_path / "random.yaml"
            path.write_text(random_yaml(draw), encoding="utf-8", errors="surrogatepass")
            argv = ["--config", str(path)]
        code = run_command(lambda argv: check_config(parse_config(argv)), argv)
        out, said = capfd.readouterr()
        num_refused += code == 2
        assert (code, len(said.splitlines())) in [(0, 0), (2, 1)], (number, argv, said)
        assert out == "", (number, argv)
        assert said == "" or (said.startswith("error: ") and len(said) < 1500), (number, argv, said)
    assert 20 < num_refused < NUM_CONFIGS // 2 - 20
