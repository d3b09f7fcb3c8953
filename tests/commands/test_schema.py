"""The schema takes what the program takes: an editor completes keys, and marks those that are wrong."""

import json
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from conftest import ROOT
from jsonschema import Draft202012Validator

from finetune.__main__ import main
from finetune.config import Config
from finetune.config_parsing import _load_yaml, config_to_dict


@pytest.fixture
def validator(tmp_path, monkeypatch, capsys) -> Draft202012Validator:
    monkeypatch.chdir(tmp_path)
    assert main(["schema", "finetune.schema.json"]) == 0
    assert "# yaml-language-server: $schema=finetune.schema.json" in capsys.readouterr().out
    schema = json.loads((tmp_path / "finetune.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_every_preset_and_every_default_is_valid(validator):
    for file in (ROOT / "configs").glob("*.yaml"):
        validator.validate(_load_yaml(file.read_text(encoding="utf-8")))
    validator.validate(json.loads(json.dumps(config_to_dict(Config()))))


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": {"rank": 8}},
        {"lor": {}},
        {"model": {"quantization": "int3"}},
        {"train": {"num_epochs": "three"}},
        {"data": {"path": [{"name": "no path"}]}},
    ],
)
def test_what_the_program_refuses_is_marked(validator, settings):
    assert not validator.is_valid(settings)


def test_every_key_has_the_text_of_its_help(validator):
    def described(kind: Any) -> None:
        properties = validator.schema["$defs"][kind.__name__]["properties"]
        for field in fields(kind):
            assert properties[field.name]["description"], field.name

    for section in fields(Config):
        if is_dataclass(section.type):
            described(section.type)
        else:
            assert validator.schema["properties"][section.name]["description"]


def test_a_file_of_another_kind_is_refused(tmp_path, capsys):
    assert main(["schema", str(tmp_path / "mine.yaml")]) == 2
    assert "name a file that ends in .json" in capsys.readouterr().err
