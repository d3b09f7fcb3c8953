"""Load what a command needs: the tokenized rows of a configuration, and its model with a fresh adapter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config import Config
from finetune.data.preparing.examples import Examples
from finetune.data.rows import load_rows
from finetune.data.splits import tokenize_splits
from finetune.data.templates.named_templates import added_token_ids
from finetune.model.flat_adapter import FlatAdapter
from finetune.model.load import check_vocabulary, load_model, load_tokenizer
from finetune.model.loss import TokenLoss
from finetune.runtime.accelerator import choose_precision, create_accelerator
from finetune.runtime.choice import Choice


@dataclass(frozen=True)
class Parts:
    """The objects that `train.py` creates one by one."""

    accelerator: Any
    precision: Choice
    tokenizer: Any
    train_set: Examples
    eval_set: Examples
    model: Any
    adapter: FlatAdapter
    token_loss: TokenLoss


def load_parts(config: Config, source: Path | None = None) -> Parts:
    """Load the rows, the tokenizer and the model as train.py does. The weights of the adapter are new.

    `source` is as in `load_model`.

    Raises:
        ValueError: the rows, the tokenizer or the model cannot be used.
    """
    precision = choose_precision(config.train.mixed_precision)
    accelerator = create_accelerator(config, precision.actual)
    tokenizer = load_tokenizer(config)
    train_set, eval_set = tokenize_splits(load_rows(config.data, config.eval.sets), tokenizer, config.data)
    model = load_model(config, precision.actual, accelerator.device, added_token_ids(tokenizer), source)
    check_vocabulary(model, tokenizer)
    adapter, token_loss = FlatAdapter(model, bool(config.optim.lora_b_lr_ratio)), TokenLoss(model).train()
    return Parts(accelerator, precision, tokenizer, train_set, eval_set, model, adapter, token_loss)
