"""`python -m finetune schema FILE`: write a JSON schema of the configuration, for editors."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter

from finetune.config import Config
from finetune.runtime.cli import CommandParser, parse_arguments
from finetune.runtime.console import say
from finetune.runtime.files import write_atomically


def command(argv: Sequence[str]) -> None:
    """Write the schema, and print the line with which a YAML file names it.

    Raises:
        ValueError: an invalid argument.
    """
    parser = CommandParser(prog="python -m finetune schema", description=__doc__)
    parser.add_argument("file", metavar="FILE", type=Path, help="a .json file; an older one is replaced")
    file: Path = parse_arguments(parser, argv).file
    if file.suffix.lower() != ".json":
        raise ValueError(f"{file}: name a file that ends in .json")
    write_atomically(file, json.dumps(config_schema(), indent=1, ensure_ascii=False) + "\n")
    say(f"schema       {file}")
    say(f"first line of a YAML file, for editors: # yaml-language-server: $schema={file}")


def config_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, from the dataclasses: keys, types, defaults, and what `--help`
    says of each."""
    for section in _sections(Config):
        # How pydantic reads a dataclass: the texts below its fields describe them, and no other key is one.
        section.__pydantic_config__ = {"use_attribute_docstrings": True, "extra": "forbid"}
    return TypeAdapter(Config).json_schema()


def _sections(kind: Any) -> Iterator[Any]:
    """The dataclass, and all that its fields hold."""
    if is_dataclass(kind):
        yield kind
        for field in fields(kind):
            yield from _sections(field.type)
    for part in get_args(kind):
        yield from _sections(part)
