"""TRL's SFTTrainer on a fake card: the second of two updates on the examples of `device_budget`.

pip install trl==1.16.0
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partialmethod
from typing import Any
from unittest.mock import patch

import peft
import torch
from counting import Counting
from datasets import Dataset
from fake_model import CARD
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback
from triton.runtime.jit import JITFunction
from trl import SFTConfig, SFTTrainer

from finetune.config import Config
from finetune.data.templates.tokenize import IGNORE


class CountUpdate(TrainerCallback):
    """Counts the second update: the first one makes the optimizer's state."""

    def __init__(self, counting: Counting) -> None:
        self._counting, self._stack = counting, ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self._stack.enter_context(self._counting.part("update"))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stack.close()


class IndexByMask:
    """x[mask] as a card computes it: the host waits for the number of places. It is known from the labels.

    TRL scores the places with a label, given by a mask over all places but the first of each sequence.
    """

    def __init__(self, collate: Any) -> None:
        self._collate = collate
        self._counts: dict[tuple[int, ...], int] = {}  # by the shape of the mask

    def collate(self, examples: Any) -> Any:
        batch = self._collate(examples)
        is_target = batch["labels"][:, 1:] != IGNORE
        self._counts[tuple(is_target.shape)] = int(is_target.sum())
        return batch

    def __call__(self, x: Tensor, indices: Sequence[Tensor | None]) -> Any:
        mask = indices[0]
        if mask is None or mask.dtype != torch.bool:
            return NotImplemented
        assert bool(mask.any())  # as nonzero does: an operation, and a wait
        rows = torch.empty(self._counts[tuple(mask.shape)], dtype=torch.long, device=x.device)
        return x.flatten(0, mask.dim() - 1).index_select(0, rows)


def train(
    config: Config, base: Any, rows: Sequence[dict[str, Any]], counting: Counting, micro_batches: int
) -> None:
    """Two updates, each of all rows in so many micro-batches. The part "update" is the second one."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    tokenized = [
        {"input_ids": row["input_ids"], "completion_mask": [int(label >= 0) for label in row["labels"]]}
        for row in rows
    ]
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="trl-"),
        num_train_epochs=2,
        per_device_train_batch_size=len(rows) // micro_batches,
        gradient_accumulation_steps=micro_batches,
        learning_rate=config.optim.learning_rate,
        optim=config.optim.name,
        bf16=True,
        max_length=config.data.max_length,
        completion_only_loss=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,  # fake tensors have nothing to pin
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    adapter = peft.LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.lora_alpha,
        lora_dropout=config.lora.lora_dropout,
        target_modules=config.lora.target_modules,
        task_type="CAUSAL_LM",
    )
    with CARD:  # PEFT would make the adapter on the CPU, and real parameters cannot become fake ones
        trainer = SFTTrainer(
            model=base,
            args=settings,
            train_dataset=Dataset.from_list(tokenized),
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[CountUpdate(counting)],
        )
    index = IndexByMask(trainer.data_collator)
    trainer.data_collator = index.collate
    counting.decompositions["aten::index"] = index
    with patch.object(JITFunction, "run", partialmethod(launched, counting)):
        trainer.train()


def launched(kernel: Any, counting: Counting, *arguments: Any, **others: Any) -> None:
    """Instead of starting a Triton kernel, count it."""
    given = [*arguments, *others.values()]
    counting.launch(kernel.__name__, [value for value in given if isinstance(value, Tensor)])
