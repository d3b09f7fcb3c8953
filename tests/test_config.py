"""What a user types, on the command line and in a file, and what the program says when it is wrong."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from conftest import ROOT

from finetune.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    FastConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
    examples_per_update,
    flatten,
)
from finetune.config_parsing import config_to_dict, config_to_yaml, parse_config, unused_preset_settings
from finetune.runtime.cli import check_settings

CONFIG_FILES = sorted((ROOT / "configs").glob("*.yaml"))

# Every key at another value than its default.
OTHER_VALUES = Config(
    model=ModelConfig(
        name_or_path="Qwen/Qwen2-0.5B-Instruct",
        revision="123",
        quantization="nf4",
        trust_remote_code=True,
    ),
    lora=LoraConfig(
        r=4,
        lora_alpha=0.5,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj"],
        use_rslora=True,
        use_dora=True,
        exclude_modules=["up_proj"],
        layers_to_transform=[0, 3],
        modules_to_save=["lm_head", "norm"],
        init_lora_weights="eva",
    ),
    data=DataConfig(
        path=[
            SourceConfig(path=["a.csv", "b c.jsonl"], name="a", columns={"q: 1": "instruction"}, share=0.25),
            SourceConfig(path="someone/rows", subset="no", split="test", revision="123", share=0.75),
        ],
        columns={"вопрос": "instruction", "no": "output"},
        eval_path=["d.csv"],
        chat_template="chatml",
        system_prompt="Zwei Zeilen: ja, 100 %\n  - “и” 是 # kein Kommentar",
        num_samples=6000,
        sample_seed=1,
        eval_fraction=0.0,
        split_seed=2,
        split_by="instruction",
        max_length=64,
        overlong="drop",
        train_on="all",
    ),
    train=TrainConfig(
        num_epochs=1,
        max_steps=10,
        early_stopping_patience=2,
        micro_batch_size=3,
        gradient_accumulation_steps=None,
        global_batch_size=12,
        packing=False,
        max_tokens_per_micro_batch=4096,
        mixed_precision="fp16",
        gradient_checkpointing=True,
        shard_over="all",
        seed=2**32 - 1,
    ),
    fast=FastConfig(
        attention=False,
        head=False,
        head_mib=32,
        lora=False,
        elementwise=False,
        kernels=False,
        int8_matmul="int8",
    ),
    optim=OptimConfig(
        name="sgd",
        learning_rate=1e-4,
        betas=(0.8, 0.99),
        eps=1e-20,
        weight_decay=0.01,
        max_grad_norm=0.0,
        lora_b_lr_ratio=16.0,
        schedule="warmup_stable_decay",
        min_lr_ratio=0.1,
        decay_ratio=0.2,
        warmup_steps=3,
    ),
    eval=EvalConfig(at_start=False, every=7, sets={"math": ["e.csv"]}, precision="fp32", answers=5),
    checkpoint=CheckpointConfig(every_steps=5, keep=1, keep_best=True, best_by="chrf"),
    log=LogConfig(every_steps=1, trackers=["mlflow", "wandb"], progress=False),
    output_dir="runs/мой прогон",
    resume="never",
    strict=True,
)


def keys_of(section: type, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all keys, with their types."""
    keys: dict[str, Any] = {}
    for field in fields(section):
        if is_dataclass(field.type):
            keys |= keys_of(field.type, f"{prefix}{field.name}.")
        else:
            keys[prefix + field.name] = field.type
    return keys


KEYS = keys_of(Config)


@pytest.fixture
def config_file(tmp_path: Path):
    """Write a config file; returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def parse(config_file):
    """Parse command-line arguments over the dataclasses' own defaults."""

    def run(*arguments: str) -> Config:
        return parse_config(["--config", config_file("{}\n"), *arguments])

    return run


def error_of(*arguments: str) -> str:
    """What the user reads: always one line, without Python's names for types."""
    with pytest.raises(ValueError, match=r".") as caught:
        parse_config(arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert "<class" not in message
    return message


def test_without_config_the_quickstart_file_is_read_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_config([])
    assert config == parse_config(["--config", str(ROOT / "configs" / "quickstart.yaml")])
    assert config != Config()
    assert config.optim.learning_rate == 5e-4
    assert parse_config(["--train.seed", "7"]).optim.learning_rate == 5e-4


def test_an_empty_file_gives_the_defaults_of_the_dataclasses_and_not_the_quickstart(parse):
    assert parse() == Config()


def test_a_file_named_after_an_equals_sign_is_read_instead_of_the_quickstart_too(config_file):
    assert parse_config([f"--config={config_file('lora: {r: 3}')}"]) == Config(lora=LoraConfig(r=3))


def test_a_file_sets_its_keys_and_the_command_line_overrides_them(config_file):
    file = config_file("lora:\n  r: 3\n  lora_alpha: 5\ntrain:\n  seed: 4\n")
    config = parse_config(["--config", file, "--lora.r", "6", "--data.path=[a.csv, b.csv]"])
    assert config.lora == LoraConfig(r=6, lora_alpha=5)
    assert config.train == TrainConfig(seed=4)
    assert config.data == DataConfig(path=["a.csv", "b.csv"])


def test_the_later_of_two_files_wins_where_both_name_a_key(config_file, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text("lora:\n  r: 9\n", encoding="utf-8")
    config = parse_config(["--config", config_file("lora:\n  r: 3\n  lora_alpha: 5\n"), f"--config={second}"])
    assert config.lora == LoraConfig(r=9, lora_alpha=5)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".0001"])
def test_every_way_to_write_a_small_number_in_a_file_is_a_float(text, config_file):
    """PyYAML reads 1e-4 as a string."""
    rate = parse_config(["--config", config_file(f"optim:\n  learning_rate: {text}\n")]).optim.learning_rate
    assert isinstance(rate, float)
    assert rate == 0.0001


def test_a_precision_of_no_in_a_file_is_the_word_and_not_yaml_s_false(config_file):
    config = parse_config(["--config", config_file("train:\n  mixed_precision: no\n")])
    assert config.train.mixed_precision == "no"


UNKNOWN_KEYS = [
    ("optim.lr", "optim.learning_rate"),
    ("optim.learning_rates", "optim.learning_rate"),
    ("lora.rank", "lora.r"),
    ("lora.alpha", "lora.lora_alpha"),
    ("train.batch_size", "train.micro_batch_size"),
    ("train.epochs", "train.num_epochs"),
    ("data.seed", "data.split_seed"),
    ("learning_rate", "optim.learning_rate"),
    ("lr", "optim.learning_rate"),
    ("seed", "train.seed"),
    ("outputs", "output_dir"),
]


@pytest.mark.parametrize(("unknown", "nearest"), UNKNOWN_KEYS)
def test_an_unknown_key_on_the_command_line_names_itself_and_the_nearest_right_key(unknown, nearest):
    assert error_of(f"--{unknown}", "1") == f"unknown key {unknown}; the nearest is {nearest}"


def test_an_unknown_key_written_with_an_equals_sign_is_named_without_its_value():
    assert error_of("--lora.rank=1") == "unknown key lora.rank; the nearest is lora.r"


@pytest.mark.parametrize(("unknown", "nearest"), [*UNKNOWN_KEYS[:3], ("seed", "train.seed")])
def test_an_unknown_key_in_a_file_names_itself_the_file_and_the_nearest_right_key(
    unknown, nearest, config_file
):
    section, _, key = unknown.rpartition(".")
    file = config_file(f"{section}:\n  {key}: 1\n" if section else f"{key}: 1\n")
    assert error_of("--config", file) == (
        f"config file {file}: unknown key {unknown}; the nearest is {nearest}"
    )


def test_a_key_like_no_other_is_sent_to_help():
    assert error_of("--zzz", "1") == "unknown key zzz; --help lists all"


@pytest.mark.parametrize("abbreviation", ["optim.learning", "lora.lora_al", "output", "deb"])
def test_an_abbreviated_key_is_an_unknown_key(abbreviation):
    """What is accepted today would become ambiguous with the next key."""
    assert error_of(f"--{abbreviation}", "1").startswith(f"unknown key {abbreviation};")


def test_an_abbreviated_config_flag_does_not_mix_in_the_quickstart_file(config_file):
    assert "conf" in error_of("--conf", config_file("lora:\n  r: 3\n"))


BAD_VALUES = [
    ("optim.learning_rate", "fast"),
    ("lora.r", "2.5"),
    ("lora.r", "true"),
    ("train.max_steps", "some"),
    ("train.packing", "perhaps"),
    ("train.mixed_precision", "fp8"),
    ("model.quantization", "int4"),
    ("optim.name", "adam"),
    ("optim.betas", "[0.9]"),
    ("optim.betas", "0.9"),
    ("optim.betas", "[0.9, x]"),
    ("eval.every", "day"),
    ("eval.every", "1.5"),
    ("data.overlong", "wrap"),
    ("data.train_on", "prompt"),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_a_bad_value_on_the_command_line_names_the_key(key, value):
    assert key in error_of(f"--{key}", value)


@pytest.mark.parametrize(("key", "value"), BAD_VALUES[::3])
def test_a_bad_value_in_a_file_names_the_key_and_the_file(key, value, config_file):
    section, _, name = key.rpartition(".")
    file = config_file(f"{section}:\n  {name}: {value}\n")
    message = error_of("--config", file)
    assert key in message
    assert file in message


MUST_HAVE_A_VALUE = {kind: key for key, kind in KEYS.items() if type(None) not in get_args(kind)}


@pytest.mark.parametrize("key", MUST_HAVE_A_VALUE.values())  # one of each type
def test_a_key_that_must_have_a_value_refuses_null_in_a_file(key, config_file):
    section, _, name = key.rpartition(".")
    file = config_file(f"{section}:\n  {name}: null\n" if section else f"{name}: null\n")
    message = error_of("--config", file)
    assert key in message
    assert file in message


@pytest.mark.parametrize("text", ["optim: 3\n", "optim: [1]\n", "lora:\n  r: 4\noptim: fast\n"])
def test_a_value_in_place_of_a_section_names_the_section_and_the_file(text, config_file):
    file = config_file(text)
    message = error_of("--config", file)
    assert "optim" in message
    assert file in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "my.yaml: it holds no keys"),
        ("# all of it is commented out\n", "my.yaml: it holds no keys"),
        ("optim:\n  # learning_rate: 1e-4\nlora:\n  r: 4\n", "my.yaml: optim holds no keys"),
    ],
)
def test_a_file_or_a_section_that_holds_no_keys_is_named(text, named, config_file):
    assert named in error_of("--config", config_file(text))


def test_a_key_that_stands_twice_in_a_file_is_named(config_file):
    """The second would win without a word."""
    file = config_file("lora:\n  r: 4\n  lora_alpha: 8\n  r: 16\n")
    message = error_of("--config", file)
    assert message.startswith(f"config file {file}: ")
    assert re.search(r"\br\b.* twice", message)


@pytest.mark.parametrize(
    "text", ["- 1\n", "lora: [\n", "\tlora: 3\n", "lora:\n  r: 8\n r: 3\n", "just words\n", "3: 4\n"]
)
def test_a_file_that_is_not_yaml_with_keys_is_named(text, config_file):
    file = config_file(text)
    assert error_of("--config", file).startswith(f"config file {file}: ")


@pytest.mark.parametrize("text", ["~", "&a", "null # not", "# Rules", "2020-99-99", "!!bool maybe"])
def test_on_the_command_line_a_text_that_yaml_takes_for_nothing_or_fails_on_is_a_text(text, parse):
    assert parse("--data.system_prompt", text).data.system_prompt == text
    assert parse("--data.system_prompt", "null").data.system_prompt is None


def test_a_file_that_is_not_there_not_a_file_or_not_text_is_named(tmp_path):
    missing, binary = tmp_path / "nowhere.yaml", tmp_path / "binary.yaml"
    binary.write_bytes(b"lora:\n  r: \xff\xfe\n")
    assert error_of("--config", str(missing)) == f"config file {missing}: No such file or directory"
    assert error_of("--config", str(tmp_path)) == f"config file {tmp_path}: Is a directory"
    assert error_of("--config", str(binary)) == f"config file {binary}: it is not UTF-8 text"
    assert "--config" in error_of("--config")


OUT_OF_RANGE = [
    ("lora.r", "0", "at least 1"),
    ("lora.lora_alpha", "0", "above 0"),
    ("lora.lora_dropout", "-0.1", "at least 0 and below 1"),
    ("lora.lora_dropout", "1", "at least 0 and below 1"),
    ("data.num_samples", "0", "at least 1"),
    ("data.sample_seed", "-1", "at least 0 and below 2^32"),
    ("data.sample_seed", "4294967296", "at least 0 and below 2^32"),
    ("data.eval_fraction", "-0.1", "at least 0 and below 1"),
    ("data.eval_fraction", "1", "at least 0 and below 1"),
    ("data.split_seed", "-1", "at least 0 and below 2^32"),
    ("data.split_seed", "4294967296", "at least 0 and below 2^32"),
    ("data.max_length", "1", "at least 2"),
    ("train.num_epochs", "0", "at least 1"),
    ("train.max_steps", "0", "at least 1"),
    ("train.early_stopping_patience", "0", "at least 1"),
    ("eval.answers", "-1", "at least 0"),
    ("train.micro_batch_size", "0", "at least 1"),
    ("train.gradient_accumulation_steps", "0", "at least 1"),
    ("train.global_batch_size", "0", "at least 1"),
    ("train.seed", "-1", "at least 0 and below 2^32"),
    ("train.seed", "4294967296", "at least 0 and below 2^32"),
    ("fast.head_mib", "0", "at least 1"),
    ("optim.learning_rate", "0", "above 0"),
    ("optim.betas", "[-0.1, 0.9]", "at least 0 and below 1"),
    ("optim.betas", "[0.9, 1]", "at least 0 and below 1"),
    ("optim.eps", "0", "above 0"),
    ("optim.weight_decay", "-0.1", "at least 0"),
    ("optim.max_grad_norm", "-0.1", "at least 0"),
    ("optim.lora_b_lr_ratio", "0", "above 0"),
    ("optim.min_lr_ratio", "-0.1", "between 0 and 1"),
    ("optim.min_lr_ratio", "1.1", "between 0 and 1"),
    ("optim.decay_ratio", "0", "above 0 and at most 1"),
    ("optim.decay_ratio", "1.1", "above 0 and at most 1"),
    ("optim.warmup_steps", "0", "at least 1"),
    ("lora.layers_to_transform", "[-1]", "numbers from 0"),
    ("optim.warmup_ratio", "-0.1", "between 0 and 1"),
    ("optim.warmup_ratio", "1.1", "between 0 and 1"),
    ("eval.every", "0", "at least 1"),
    ("checkpoint.every_steps", "0", "at least 1"),
    ("checkpoint.keep", "0", "at least 1"),
    ("log.every_steps", "0", "at least 1"),
]
# Refused by a message of its own: see the contradictions.
BOUNDED_BY_OTHER_KEYS = {"train.max_tokens_per_micro_batch"}


@pytest.mark.parametrize(("key", "value", "rule"), OUT_OF_RANGE)
def test_a_value_out_of_range_names_the_key_the_rule_and_the_value(key, value, rule, parse):
    with pytest.raises(ValueError, match=re.escape(f"{key} must be {rule}, not ")) as caught:
        parse(f"--{key}", value)
    got = float(str(caught.value).rpartition(" not ")[2])
    assert got in numbers_in(value)


def numbers_in(text: str) -> list[float]:
    """The numbers of a value as typed: one, or a pair in brackets."""
    return [float(part) for part in text.strip("[]").split(",")]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora.r", "1"),
        ("lora.lora_alpha", "0.01"),
        ("lora.lora_dropout", "0"),
        ("lora.lora_dropout", "0.99"),
        ("data.num_samples", "1"),
        ("data.sample_seed", "0"),
        ("data.sample_seed", "4294967295"),
        ("data.eval_fraction", "0"),
        ("data.eval_fraction", "0.99"),
        ("data.split_seed", "0"),
        ("data.max_length", "2"),
        ("train.num_epochs", "1"),
        ("train.max_steps", "1"),
        ("train.max_tokens_per_micro_batch", "512"),
        ("train.seed", "4294967295"),
        ("optim.betas", "[0, 0]"),
        ("optim.weight_decay", "0"),
        ("optim.max_grad_norm", "0"),
        ("optim.warmup_ratio", "0"),
        ("optim.warmup_ratio", "1"),
        ("eval.every", "1"),
        ("checkpoint.every_steps", "1"),
        ("checkpoint.keep", "1"),
    ],
)
def test_a_value_at_the_edge_of_its_range_is_taken(key, value, parse):
    taken = flatten(config_to_dict(parse(f"--{key}", value)))[key]
    assert (taken if isinstance(taken, list) else [taken]) == numbers_in(value)


def test_every_key_that_holds_a_number_has_a_range_in_the_table_above():
    def kinds(kind: Any) -> set[Any]:
        return {kind}.union(*(kinds(part) for part in get_args(kind)))

    numbers = {key for key, kind in KEYS.items() if kinds(kind) & {int, float}}
    assert numbers == {key for key, _, _ in OUT_OF_RANGE} | BOUNDED_BY_OTHER_KEYS


@pytest.mark.parametrize("key", [key for key, kind in KEYS.items() if kind is float or key == "optim.betas"])
@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_a_number_that_is_not_finite_is_refused(key, value, config_file):
    section, _, name = key.rpartition(".")
    text = f"[0.9, {value}]" if key == "optim.betas" else value
    assert key in error_of("--config", config_file(f"{section}:\n  {name}: {text}\n"))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["--train.max_tokens_per_micro_batch", "511"],
            ["train.max_tokens_per_micro_batch (511)", "at least data.max_length (512)"],
        ),
        (
            ["--model.quantization", "nf4", "--train.mixed_precision", "no"],
            ["model.quantization nf4", "train.mixed_precision"],
        ),
        (["--checkpoint.keep_best", "true", "--data.eval_fraction", "0"], ["checkpoint.keep_best"]),
        (
            ["--train.early_stopping_patience", "2", "--data.eval_fraction", "0"],
            ["train.early_stopping_patience", "data.eval_fraction"],
        ),
        (
            # No number of processes makes 12 of products of 8.
            ["--train.global_batch_size", "12", "--train.gradient_accumulation_steps", "4"],
            ["train.global_batch_size is 12", "train.gradient_accumulation_steps 4", "is 8"],
        ),
        (
            ["--train.gradient_accumulation_steps", "null"],
            ["train.gradient_accumulation_steps is null", "train.global_batch_size"],
        ),
        (["--data.streaming", "true"], ["data.streaming", "streaming is not supported", "kept on disk"]),
        (["--lora.target_modules", "q_proj"], ["lora.target_modules", "all-linear", "'q_proj'"]),
        (
            ["--optim.warmup_steps", "3", "--optim.warmup_ratio", "0.1"],
            ["optim.warmup_steps is 3", "optim.warmup_ratio 0.1"],
        ),
        (["--optim.decay_ratio", "0.1"], ["optim.decay_ratio", "optim.schedule is linear"]),
        (["--optim.min_lr_ratio", "0.1", "--optim.schedule", "constant"], ["optim.min_lr_ratio"]),
        (
            [
                *("--optim.schedule", "warmup_stable_decay", "--optim.decay_ratio", "0.6"),
                *("--optim.warmup_ratio", "0.5"),
            ],
            ["optim.warmup_ratio 0.5", "optim.decay_ratio 0.6"],
        ),
        (["--lora.exclude_modules", "[]"], ["lora.exclude_modules is an empty list"]),
        (
            ["--lora.init_lora_weights", "pissa", "--optim.weight_decay", "0.1"],
            ["lora.init_lora_weights pissa", "optim.weight_decay"],
        ),
        (
            ["--lora.init_lora_weights", "eva", "--model.adapter", "runs/before"],
            ["lora.init_lora_weights", "model.adapter"],
        ),
        (["--lora.modules_to_save", "[]"], ["lora.modules_to_save is empty"]),
        (["--lora.modules_to_save", "['']"], ["lora.modules_to_save is empty"]),
        (
            ["--lora.modules_to_save", "[lm_head]", "--lora.target_modules", "[q_proj, lm_head]"],
            ["lora.target_modules and lora.modules_to_save both name lm_head"],
        ),
        (
            ["--lora.init_lora_weights", "loftq", "--model.quantization", "int8"],
            ["lora.init_lora_weights loftq", "model.quantization int8", "nf4"],
        ),
        (
            ["--lora.init_lora_weights", "loftq", "--model.quantization", "none"],
            ["lora.init_lora_weights loftq", "model.quantization none", "nf4"],
        ),
        (
            [
                *("--lora.init_lora_weights", "loftq", "--model.quantization", "nf4"),
                *("--lora.use_dora", "true"),
            ],
            ["lora.init_lora_weights loftq", "lora.use_dora"],
        ),
        (["--lora.target_modules", "[]"], ["lora.target_modules is an empty list"]),
        (["--data.path", ""], ["data.path is empty"]),
        (["--data.path", "[]"], ["data.path is empty"]),
        (["--output_dir", ""], ["output_dir is empty"]),
    ],
    ids=" ".join,
)
def test_settings_that_cannot_hold_together_are_refused_with_their_keys(arguments, parts, config_file):
    message = error_of("--config", config_file("{}\n"), *arguments)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("given", "accumulation", "sizes"),
    [
        ([], 4, [8, 16, 128]),
        (["--train.global_batch_size", "12"], None, [12, 12, 12]),
        (["--train.global_batch_size", "1"], None, [1, 1, 1]),
        (
            ["--train.global_batch_size", "16", "--train.gradient_accumulation_steps", "4"],
            4,
            [None, 16, None],
        ),
    ],
)
def test_an_update_takes_as_many_examples_as_the_keys_say_on_1_2_and_16_processes(given, accumulation, sizes):
    train = parse_config(given).train
    assert train.gradient_accumulation_steps == accumulation
    for num_processes, size in zip((1, 2, 16), sizes, strict=True):
        if size is not None:
            assert examples_per_update(train, num_processes) == size
            continue
        with pytest.raises(ValueError, match=r"train.global_batch_size is 16, but .*accumulation_steps 4"):
            examples_per_update(train, num_processes)


def test_examples_per_update_on_the_command_line_have_the_accumulation_of_a_file_follow():
    preset, size = ["--config", str(ROOT / "configs" / "alpaca.yaml")], "--train.global_batch_size"
    for given in ([size, "32"], [f"{size}=32"]):
        train = parse_config([*preset, *given]).train
        assert (train.global_batch_size, train.gradient_accumulation_steps) == (32, None)
    for given in ([*preset, size, "null"], [f"{size}=32", *preset]):  # no number, or the file comes later
        assert parse_config(given).train.gradient_accumulation_steps == 4
    with pytest.raises(ValueError, match=r"train.global_batch_size is 12, but .*accumulation_steps 4"):
        parse_config([*preset, size, "12", "--train.gradient_accumulation_steps", "4"])


def test_the_value_on_the_command_line_is_checked_against_the_file(config_file):
    file = config_file("train:\n  max_tokens_per_micro_batch: 600\n")
    assert parse_config(["--config", file]).train.max_tokens_per_micro_batch == 600
    assert "data.max_length (601)" in error_of("--config", file, "--data.max_length", "601")


def test_the_token_budget_is_a_number_auto_or_null(config_file):
    def budget_in(text: str) -> object:
        file = config_file(f"train:\n  max_tokens_per_micro_batch: {text}\n")
        return parse_config(["--config", file]).train.max_tokens_per_micro_batch

    assert [budget_in(text) for text in ("auto", "null", "600")] == ["auto", None, 600]
    assert Config().train.max_tokens_per_micro_batch is None
    message = error_of("--train.max_tokens_per_micro_batch", "most")
    for part in ("train.max_tokens_per_micro_batch", "'auto'", "int", "null", "most"):
        assert part in message


def test_the_config_used_for_the_round_trip_differs_from_the_defaults_in_every_key():
    default, other = flatten(config_to_dict(Config())), flatten(config_to_dict(OTHER_VALUES))
    assert list(default) == list(other) == list(KEYS)
    # Of pairs that exclude each other, one has another value.
    contradicting = ["model.adapter", "train.sharding", "optim.warmup_ratio"]
    assert [key for key in KEYS if default[key] == other[key]] == contradicting


@pytest.mark.parametrize("config", [Config(), OTHER_VALUES], ids=["defaults", "other values"])
def test_a_config_written_to_a_file_is_read_back_as_it_was(config, config_file):
    """A run's folder holds such a file, to be launched again."""
    assert parse_config(["--config", config_file(config_to_yaml(config))]) == config


@pytest.mark.parametrize(
    "text", ["1e-4", "no", "2024-01-01", "12:30:00", "a: b", "# a", "[x", " padded ", "0x1f"]
)
def test_text_that_yaml_could_take_for_something_else_is_read_back_as_it_was(text, config_file):
    config = Config(model=ModelConfig(revision=text), data=DataConfig(system_prompt=text), output_dir=text)
    assert parse_config(["--config", config_file(config_to_yaml(config))]) == config


def test_a_config_as_a_dict_is_what_json_can_hold():
    plain = config_to_dict(OTHER_VALUES)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["optim"]["betas"] == [0.8, 0.99]


def test_flatten_joins_the_names_of_sections_with_dots_and_keeps_lists():
    nested = {"optim": {"name": "sgd", "inner": {"deep": [1, 2]}}, "resume": "auto"}
    assert flatten(nested) == {"optim.name": "sgd", "optim.inner.deep": [1, 2], "resume": "auto"}


def documented_keys() -> dict[str, str]:
    """The text under each field of config.py, by dotted key."""
    tree = ast.parse((ROOT / "finetune" / "config.py").read_text(encoding="utf-8"))
    sections = {field.type: f"{field.name}." for field in fields(Config) if is_dataclass(field.type)}
    prefixes = {cls.__name__: prefix for cls, prefix in sections.items()} | {"Config": ""}
    documented: dict[str, str] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name not in prefixes:
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    documented[prefixes[node.name] + name] = doc
    return documented


def test_help_documents_every_key(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"])
    assert caught.value.code == 0
    options = capsys.readouterr().out.partition("\noptions:")[2]
    # `--key+ VALUE` adds to a list; since Python 3.13 only the last of an option's names has the value.
    options = re.sub(r"(--[\w.]+), --[\w.]+\+ (\S+)", r"\1 \2", options)
    options = re.sub(r", --[\w.]+\+ \S+", "", options)
    text = re.sub(r"\s", "", options)  # its lines are broken at the terminal's width
    documented = documented_keys()
    assert list(documented) == list(KEYS)
    metavar = r"(?:[A-Z_]+|\{[^}]*\}|\[[^]]*\])"
    for key, doc in documented.items():
        squeezed = re.sub(r"\s", "", doc)
        entry = rf"--{re.escape(key)}{metavar}{re.escape(squeezed)}\("
        assert re.search(entry, text), f"--help does not say of {key}: {doc}"


@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda file: file.name)
def test_each_file_in_configs_opens_with_the_command_that_launches_it(file, monkeypatch):
    first_line = file.read_text(encoding="utf-8").splitlines()[0]
    assert first_line.startswith("# python train.py")
    command = shlex.split(first_line.removeprefix("# "))
    monkeypatch.chdir(ROOT)
    launched = parse_config(command[command.index("train.py") + 1 :])
    assert launched == parse_config(["--config", str(file)])


@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda file: file.name)
def test_each_file_in_configs_gives_the_run_what_it_says(file):
    said = flatten(yaml.safe_load(file.read_text(encoding="utf-8")))
    got = flatten(config_to_dict(parse_config(["--config", str(file)])))
    wrong = {
        key: (value, got[key]) for key, value in said.items() if got[key] not in (value, as_float(value))
    }
    assert wrong == {}


def as_float(value: Any) -> Any:
    """PyYAML reads 5e-4 as a string."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


PRESETS = [
    [],
    *(["--config", str(file)] for file in CONFIG_FILES),
    *([f"--config={file}"] for file in CONFIG_FILES),
]


@pytest.mark.parametrize("preset", PRESETS, ids=" ".join)
def test_own_rows_are_taken_whole_and_without_a_system_prompt_under_each_preset(preset):
    """Nothing that a preset says of its rows, or counts in their updates, is said of others."""
    own, as_written = parse_config([*preset, "--data.path", "my.csv"]), parse_config(preset)
    assert own.data == DataConfig(path="my.csv")
    assert (own.eval, own.checkpoint, own.log) == (EvalConfig(), CheckpointConfig(), LogConfig())
    assert (own.model, own.lora, own.train, own.optim) == (
        as_written.model,
        as_written.lora,
        as_written.train,
        as_written.optim,
    )


@pytest.mark.parametrize("preset", PRESETS, ids=" ".join)
def test_each_setting_of_a_preset_that_is_not_used_is_named_in_one_line(preset):
    as_written = flatten(config_to_dict(parse_config(preset)))
    own = flatten(config_to_dict(parse_config([*preset, "--data.path", "my.csv"])))
    (line,) = unused_preset_settings([*preset, "--data.path", "my.csv"])
    assert line.startswith("not used for my.csv: ")
    differing = {key for key in KEYS if own[key] != as_written[key]} - {"data.path"}
    assert "data.num_samples" in differing
    assert set(re.findall(r"\b\w+\.\w+\b", line)) & set(KEYS) == differing
    assert str(as_written["data.path"]) in line
    assert unused_preset_settings(preset) == []


def test_what_the_command_line_says_beside_another_path_is_kept():
    arguments = [
        "--data.num_samples",
        "9",
        "--data.path",
        "my.csv",
        "--data.system_prompt=Be brief.",
        "--log.every_steps",
        "3",
    ]
    config = parse_config(arguments)
    assert config.data == DataConfig(path="my.csv", num_samples=9, system_prompt="Be brief.")
    assert config.log == LogConfig(every_steps=3)
    (line,) = unused_preset_settings(arguments)
    assert "num_samples" not in line
    assert "system_prompt" not in line


def test_a_preset_whose_own_path_is_given_again_is_used_as_it_is():
    assert parse_config(["--data.path", "data/finance_sample.csv"]) == parse_config([])


def test_a_second_file_with_rows_of_its_own_is_used_whole_beside_a_preset(config_file):
    own = config_file("data:\n  path: my.csv\n  num_samples: 5\n")
    config = parse_config(["--config", str(ROOT / "configs" / "finance_alpaca.yaml"), "--config", own])
    assert config.data == DataConfig(path="my.csv", num_samples=5)
    assert config.optim.learning_rate == 2e-5


def test_a_file_of_ones_own_is_used_as_it_is_written_whatever_the_path(config_file):
    file = config_file(
        "data:\n  path: my.csv\n  system_prompt: Be brief.\n  num_samples: 5\neval:\n  every: 3\n"
    )
    expected = DataConfig(path="my.csv", system_prompt="Be brief.", num_samples=5)
    assert parse_config(["--config", file]).data == expected
    other = ["--config", file, "--data.path", "other.csv"]
    assert parse_config(other).data == DataConfig(path="other.csv", system_prompt="Be brief.", num_samples=5)
    assert parse_config(other).eval == EvalConfig(every=3)
    assert unused_preset_settings(other) == []


def test_the_folder_of_configs_holds_the_default():
    assert ROOT / "configs" / "quickstart.yaml" in CONFIG_FILES


def run_program(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The real command line, in an empty folder that is also the home and the cache."""
    return run_command([sys.executable, str(ROOT / "train.py"), *arguments], folder, folder)


def run_command(command: list[str], cwd: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """A command of a user who has set up nothing."""
    places = {"HOME": str(home), "XDG_CACHE_HOME": str(home), "HF_HOME": str(home)}
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **places},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_mistake_on_the_real_command_line_is_one_line_and_exit_code_2_and_writes_nothing(tmp_path):
    ended = run_program(tmp_path, "--optim.lr", "1e-4")
    assert ended.returncode == 2
    assert ended.stderr == "error: unknown key optim.lr; the nearest is optim.learning_rate\n"
    assert ended.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_with_debug_the_real_command_line_shows_the_traceback_as_well(tmp_path):
    ended = run_program(tmp_path, "--debug", "--lora.r", "0")
    assert ended.returncode == 2
    assert ended.stderr.startswith("Traceback (most recent call last):\n")
    assert "check_config" in ended.stderr
    assert ended.stderr.endswith("\nerror: lora.r must be at least 1, not 0\n")
    assert list(tmp_path.iterdir()) == []


def documented_commands() -> list[list[str]]:
    """The ways to start train.py that the project's files name, without its arguments."""
    files = [*CONFIG_FILES, ROOT / "accelerate_config.yaml", ROOT / "train.py"]
    texts = [file.read_text(encoding="utf-8").splitlines()[0] for file in files]
    found = [re.search(r"(?:python|accelerate launch).*?train\.py", text) for text in texts]
    return [shlex.split(command) for command in sorted({match[0] for match in found if match})]


def installed(command: list[str]) -> list[str]:
    """The command as this environment has it."""
    program, *rest = command
    return (
        [sys.executable, *rest]
        if program == "python"
        else [str(Path(sys.executable).parent / program), *rest]
    )


def test_the_project_names_a_command_without_the_launcher_and_one_with_it():
    assert sorted(command[0] for command in documented_commands()) == ["accelerate", "python"]


@pytest.mark.parametrize("command", documented_commands(), ids=" ".join)
def test_each_documented_command_answers_a_mistake_with_one_line_and_nothing_else(command, tmp_path):
    ended = run_command([*installed(command), "--optim.lr", "1"], ROOT, tmp_path)
    assert ended.returncode != 0
    assert ended.stderr == "error: unknown key optim.lr; the nearest is optim.learning_rate\n"
    assert ended.stdout == ""


@pytest.mark.parametrize("command", documented_commands(), ids=" ".join)
def test_each_documented_command_shows_nothing_before_what_the_program_says(command, tmp_path):
    ended = run_command([*installed(command), "--help"], ROOT, tmp_path)
    assert ended.returncode == 0
    assert ended.stdout.startswith("usage: train.py ")
    assert ended.stderr == ""


def test_the_launcher_without_any_option_starts_the_program_too(tmp_path):
    ended = run_command([*installed(["accelerate", "launch", "train.py"]), "--help"], ROOT, tmp_path)
    assert ended.returncode == 0
    assert ended.stdout.startswith("usage: train.py ")


SLOW_IMPORTS = {"torch", "transformers", "datasets", "pandas", "numpy", "accelerate", "scipy"}


@pytest.mark.parametrize(
    "command",
    [
        ["train.py", "--optim.lr", "1"],
        ["train.py", "--lora.r", "0"],
        ["train.py", "--help"],
        *(["-m", "finetune", name, "--optim.lr", "1"] for name in ("audit", "plan", "verify")),
        ["-m", "finetune", "plan", "--gib", "6", "--lora.r=x"],
        ["-m", "finetune", "--help"],
    ],
    ids=" ".join,
)
def test_a_mistake_and_help_are_answered_before_the_slow_imports(command, tmp_path):
    ended = run_command([sys.executable, "-X", "importtime", *command], ROOT, tmp_path)
    assert ended.returncode == (0 if "--help" in command else 2)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in ended.stderr.splitlines()}
    assert "finetune" in imported
    assert imported & SLOW_IMPORTS == set()


def test_a_run_on_other_rows_than_the_presets_says_what_is_not_used_before_it_starts(capfd):
    check_settings(["--data.path", "my.csv"])
    printed = capfd.readouterr()
    assert printed.err.startswith("not used for my.csv: data.system_prompt, data.num_samples, eval.every")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_of_the_ranks_of_a_run_the_first_one_alone_answers_a_mistake(tmp_path, monkeypatch):
    """All get the same arguments, and the launcher ends the others when one has failed."""
    monkeypatch.setenv("RANK", "1")
    assert check_settings(["--optim.lr", "1"]) == 0
    monkeypatch.setenv("RANK", "0")
    assert check_settings(["--optim.lr", "1"]) == 2
