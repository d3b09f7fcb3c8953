"""Rows of several sources, for tests of what is given by source."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import train
from finetune.config import DataConfig
from finetune.data.splits import Data, load_data
from finetune.data.tokenize import Examples

NAMES = ("most", "few", "rest")


def source_of_row(row_number: int) -> int:
    """Rows 3 and 4 are of the source `few`, every other row from 5 on of `rest`."""
    return 1 if row_number in (3, 4) else 2 if row_number > 4 and row_number % 2 == 0 else 0


def of_sources(examples: Examples, names: Sequence[str] = NAMES) -> Examples:
    """The same examples, of several sources."""
    sources = np.array([source_of_row(number) for number in examples.dataset["row_number"]], dtype=np.int32)
    dataset = examples.dataset.add_column("source", sources)
    return replace(examples, dataset=dataset, source_names=list(names))


def load_data_of_sources(config: DataConfig, tokenizer: Any) -> Data:
    """As `load_data`, from several sources."""
    data = load_data(config, tokenizer)
    return replace(data, train=of_sources(data.train), eval=of_sources(data.eval))


def train_on_sources(patch: pytest.MonkeyPatch) -> None:
    """From now on train.py finds its rows to be of several sources."""
    patch.setattr(train, "load_data", load_data_of_sources)
