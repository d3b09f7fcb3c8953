"""Sources, columns and eval sets in the configuration: what is taken, and what is refused with its key."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from finetune.config import Config, DataConfig, SourceConfig, described, evaluates, flatten, paths_of
from finetune.config_parsing import config_to_dict, config_to_yaml, parse_config, unused_preset_settings

Parse = Callable[..., Config]


@pytest.fixture
def parse(tmp_path) -> Parse:
    """Parse YAML, and arguments over it."""

    def run(text: str, *arguments: str) -> Config:
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        return parse_config(["--config", str(path), *arguments])

    return run


def refusal(parse: Parse, text: str, *arguments: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse(text, *arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


SOURCES = """
data:
  path:
    - {path: a.csv, share: 0.25, columns: {question: instruction}}
    - {path: [b.csv, c.csv], name: other, share: 0.5}
    - {path: someone/rows, subset: main, split: test, revision: v1, system_prompt: Be brief., share: 0.25}
  columns: {reply: output}
eval:
  sets: {math: data/math.jsonl, code: [a.csv, b.csv]}
"""


def test_sources_columns_and_eval_sets_are_read_and_written_as_they_were(parse):
    config = parse(SOURCES)
    assert config.data.path == [
        SourceConfig(path="a.csv", share=0.25, columns={"question": "instruction"}),
        SourceConfig(path=["b.csv", "c.csv"], name="other", share=0.5),
        SourceConfig(
            path="someone/rows",
            subset="main",
            split="test",
            revision="v1",
            system_prompt="Be brief.",
            share=0.25,
        ),
    ]
    assert config.data.columns == {"reply": "output"}
    assert config.eval.sets == {"math": "data/math.jsonl", "code": ["a.csv", "b.csv"]}
    assert parse(config_to_yaml(config)) == config
    assert paths_of(config.data.path) == ["a.csv", "b.csv", "c.csv", "someone/rows"]
    assert described(config.data.path) == "a.csv, b.csv, c.csv, someone/rows"


def test_columns_and_eval_sets_are_values_not_sections(parse):
    flat = flatten(config_to_dict(parse(SOURCES)))
    assert flat["data.columns"] == {"reply": "output"}
    assert flat["eval.sets"] == {"math": "data/math.jsonl", "code": ["a.csv", "b.csv"]}
    assert set(flat) == set(flatten(config_to_dict(Config())))


def test_sources_can_be_given_on_the_command_line(parse):
    arguments = [
        "--data.path",
        "[{path: a.csv}, {path: b.csv, name: x}]",
        "--data.columns",
        "{q: instruction}",
    ]
    config = parse("{}\n", *arguments)
    assert config.data.path == [SourceConfig(path="a.csv"), SourceConfig(path="b.csv", name="x")]
    assert config.data.columns == {"q": "instruction"}


def test_a_preset_that_does_not_apply_is_named_beside_the_sources_that_replace_its_rows():
    arguments = ["--data.path", "[{path: a.csv}, {path: b.csv}]"]
    (line,) = unused_preset_settings(arguments)
    assert line.startswith("not used for a.csv, b.csv: data.")
    assert line.endswith("of configs/quickstart.yaml, which is for data/finance_sample.csv")
    assert parse_config(arguments).data.num_samples is None


# --- What is evaluated on ---


@pytest.mark.parametrize(
    ("text", "fraction"),
    [
        ("{}", 0.2),
        ("data: {eval_path: a.csv}", 0),
        ("data: {eval_path: a.csv, eval_fraction: 0}", 0),
        ("eval: {sets: {math: a.csv}}", 0),
        ("{data: {eval_path: b.csv}, eval: {sets: {math: a.csv}}}", 0),
        ("{data: {eval_fraction: 0.2}, eval: {sets: {math: a.csv}}}", 0.2),
        ("{data: {eval_fraction: 0.1}, eval: {sets: {}}}", 0.1),
    ],
)
def test_rows_are_split_off_where_no_others_are_named(parse, text, fraction):
    config = parse(text)
    assert config.data.eval_fraction == fraction
    assert evaluates(config)
    assert parse(config_to_yaml(config)) == config


def test_eval_rows_on_the_command_line_go_with_a_presets_rows_only_without_its_fraction():
    alpaca = ["--config", str(ROOT / "configs" / "alpaca.yaml"), "--data.eval_path", "mine.csv"]
    with pytest.raises(ValueError, match=r"data.eval_fraction is 0.2, but data.eval_path"):
        parse_config(alpaca)
    assert parse_config([*alpaca, "--data.eval_fraction", "0"]).data.eval_path == "mine.csv"
    assert parse_config(["--data.eval_path", "mine.csv"]).data.eval_fraction == 0


@pytest.mark.parametrize("by", ["--checkpoint.keep_best=true", "--train.early_stopping_patience=2"])
def test_what_goes_by_the_eval_loss_is_content_with_any_eval_rows(parse, by):
    for text in ("data: {eval_path: a.csv}", "eval: {sets: {math: a.csv}}"):
        assert evaluates(parse(text, by))
    assert "data.eval_fraction 0 does not evaluate" in refusal(parse, "data: {eval_fraction: 0}", by)
    assert not evaluates(Config(data=DataConfig(eval_fraction=0)))


# --- What is refused ---


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        # Entries
        (
            "data: {path: [a.csv, {path: b.csv}]}",
            ["data.path has files and sources", "{path: a.csv}", "entry 1"],
        ),
        ("data: {path: [{path: b.csv, nmae: x}]}", ["data.path, entry 1: unknown key nmae", "name"]),
        (
            "data: {path: [{path: b.csv, streaming: true}]}",
            ["data.path, entry 1: streaming is not supported"],
        ),
        ("data: {path: [{path: a}, {name: x}]}", ["data.path, entry 2: path is missing"]),
        (
            "data: {eval_path: [{path: a}, b]}",
            ["data.eval_path has files and sources in one list", "entry 2"],
        ),
        ("data: {path: {path: x}}", ["data.path", "a list of {path: ...}"]),
        ("data: {path: [{path: ''}]}", ["data.path: a source has an empty path"]),
        ("data: {path: [{path: [a, '']}]}", ["data.path: a source has an empty path"]),
        ("data: {path: [a, '']}", ["data.path is empty"]),
        ("data: {eval_path: ''}", ["data.eval_path is empty"]),
        ("data: {eval_path: []}", ["data.eval_path is empty"]),
        ('data: {path: [{path: "a\\0"}]}', ["data.path holds a character that is no text"]),
        # Names
        ("data: {path: [{path: a, name: x/y}]}", ["data.path a: name", "'x/y'"]),
        (
            "data: {path: [{path: a, name: x}, {path: b, name: x}]}",
            ["data.path: x is the name of two sources"],
        ),
        ("{data: {eval_path: [{path: a, name: x}]}, eval: {sets: {x: b}}}", ["x is the name of two"]),
        ("eval: {sets: {'ma th': a.csv}}", ["eval.sets: a name", "'ma th'"]),
        ("eval: {sets: {'': a.csv}}", ["eval.sets: a name", "''"]),
        ("eval: {sets: {math: ''}}", ["eval.sets.math is empty"]),
        ("eval: {sets: {math: []}}", ["eval.sets.math is empty"]),
        ("eval: {sets: {math: {path: a}}}", ["eval.sets", "str or list[str]"]),
        # Columns
        (
            "data: {columns: {a: instructoin}}",
            ["data.columns: a cannot be 'instructoin'", "instruction, input"],
        ),
        ("data: {columns: {a: text, b: text}}", ["data.columns: two columns are text"]),
        ("data: {columns: {'': text}}", ["data.columns has an empty name"]),
        ("data: {columns: {a: ''}}", ["data.columns: a cannot be ''"]),
        ("data: {columns: [a]}", ["data.columns"]),
        ("data: {path: [{path: x.csv, columns: {a: b}}]}", ["data.path x.csv: columns: a cannot be 'b'"]),
        # Numbers and shares
        ("data: {path: [{path: a, num_samples: 0}]}", ["data.path a: num_samples must be at least 1, not 0"]),
        (
            "data: {path: [{path: a, num_samples: 1000000000000}]}",
            ["data.path a: num_samples must be at most"],
        ),
        (
            "data: {num_samples: 5, path: [{path: a, num_samples: 5}]}",
            ["data.num_samples is 5", "a has a num_samples"],
        ),
        ("data: {path: [{path: a, share: 0}, {path: b, share: 0}]}", ["data.path a: share must be above 0"]),
        ("data: {path: [{path: a, share: 0}, {path: b, share: 1}]}", ["data.path a: share must be above 0"]),
        ("data: {path: [{path: a, share: -1}, {path: b, share: 2}]}", ["data.path a: share must be above 0"]),
        ("data: {path: [{path: a, share: .nan}]}", ["data.path a: share must be above 0"]),
        (
            "data: {path: [{path: a, share: 0.5}, {path: b, share: 0.6}]}",
            ["add up to 1, not 1.1", "a 0.5, b 0.6"],
        ),
        ("data: {path: [{path: a, share: 0.5}, {path: b, share: 0.4999}]}", ["add up to 1, not 0.9999"]),
        ("data: {path: [{path: a, share: 0.5}, {path: b}]}", ["data.path b has no share"]),
        (
            "data: {path: [{path: a, share: 0.5}, {path: b, num_samples: 5}]}",
            ["data.path: b has num_samples"],
        ),
        ("data: {path: [{path: a, share: 1, num_samples: 4}]}", ["a has num_samples and a share"]),
        ("data: {eval_path: [{path: a, share: 1}]}", ["data.eval_path: an eval set has no share"]),
        # Both kinds of eval rows
        ("data: {eval_path: a, eval_fraction: 0.1}", ["data.eval_fraction is 0.1, but data.eval_path"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused_with_its_key(parse, text, parts):
    message = refusal(parse, text)
    assert [part for part in parts if part not in message] == []


def test_shares_that_add_up_but_for_rounding_are_taken(parse):
    thirds = ", ".join(f"{{path: {name}, share: 0.3333333}}" for name in "abc")
    assert len(parse(f"data: {{path: [{thirds}]}}").data.path) == 3


def test_a_source_among_files_on_the_command_line_is_refused(parse):
    for wrong in ("[a.csv, {path: b.csv}]", "{path: b.csv}", "[{path: b.csv, nmae: x}]"):
        message = refusal(parse, "{}", "--data.path", wrong)
        assert "data.path" in message
        assert "of sources {path: ...}" in message


def test_an_entry_of_a_file_is_named_with_the_file(parse, tmp_path):
    message = refusal(parse, "data: {path: [{name: x}]}")
    assert message.startswith(f"config file {Path(tmp_path / 'my.yaml')}: ")
