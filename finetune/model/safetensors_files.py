"""The weights of a model in its safetensors files, read one by one: nothing else of it is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_reader(source: str, arguments: dict[str, Any]) -> Callable[[str], Tensor]:
    """A function that returns a weight by its name in the model, on the CPU, in the data type of the file.

    `source` is a folder or the name of a model on the hub, whose files are there already; `arguments` are
    those to load it with, such as its `revision`.

    The function raises ValueError: there is no safetensors file, or no such weight in it.
    """

    def file_of(name: str) -> Path | None:
        found = cached_file(
            source,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **arguments,
        )
        return None if found is None else Path(found)

    index = file_of(INDEX)
    parts = {} if index is None else json.loads(index.read_text(encoding="utf-8"))["weight_map"]

    def read(name: str) -> Tensor:
        # A model that was saved without its head names its weights without the first part.
        for own_name in (name, name.partition(".")[2]):
            file = file_of(parts.get(own_name, WEIGHTS))
            if file is None:
                continue
            try:
                with safe_open(file, "pt") as weights:
                    tensor: Tensor = weights.get_tensor(own_name)
                    return tensor
            except SafetensorError:
                continue
        raise ValueError(f"{source} has no safetensors file with the weight {name}")

    return read
