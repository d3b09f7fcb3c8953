"""Random examples, and adapters that do something, for tests on tiny models."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.config import LoraConfig
from finetune.data.plan import Layout
from finetune.data.templates.tokenize import IGNORE
from finetune.model.flat_adapter import FlatAdapter
from finetune.model.load import add_adapter

Example = dict[str, list[int]]


CPU = torch.device("cpu")


VOCABULARY = 20  # so few that a random model is sometimes right


NAMES = ("nll", "entropy", "correct", "count")


# Lengths and limits in tokens: one example per forward pass, some, and all at once.
LENGTHS = [5, 31, 2, 12, 12, 23, 8, 17, 3]


def random_examples(lengths: list[int], vocabulary: int = VOCABULARY, seed: int = 0) -> list[Example]:
    """Random tokens; about two thirds of them are targets, and at least one in each example."""
    generator = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        ids = generator.integers(0, vocabulary, length)
        labels = np.where(generator.random(length) < 0.67, ids, IGNORE)
        labels[0], labels[-1] = IGNORE, ids[-1]
        examples.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return examples


SMALL_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def built(architecture: str, **settings: Any) -> Any:
    """A frozen two-layer model of an architecture, with weights large enough that tokens matter."""
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(architecture, **{**SMALL_SIZES, **special, **settings})
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 2)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def with_adapter(base: Any, lora_dropout: float = 0.0) -> Any:
    """The base, frozen, with an adapter that does something."""
    config = LoraConfig(r=4, lora_dropout=lora_dropout)
    return fill_adapter(add_adapter(base.requires_grad_(False), config))


def fill_adapter(model: Any) -> Any:
    """Random B: while it is zero, as at first, A has no gradient and no effect."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def flat_adapter(*tensors: Tensor) -> FlatAdapter:
    """A flat adapter of these tensors."""
    return FlatAdapter(torch.nn.ParameterList(tensor.clone() for tensor in tensors))


def parameters_of(adapter: FlatAdapter) -> list[torch.nn.Parameter]:
    return [parameter for parameter in adapter.model.parameters() if parameter.requires_grad]


def adapter_gradients(model: Any) -> dict[str, Tensor]:
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients
    assert all("lora_" in name for name in gradients)
    return gradients


LAYOUTS = [
    Layout(packing=True, micro_batch_size=1, max_tokens=max(LENGTHS)),
    Layout(packing=True, micro_batch_size=1, max_tokens=2 * max(LENGTHS)),
    Layout(packing=True, micro_batch_size=1, max_tokens=sum(LENGTHS)),
    Layout(packing=False, micro_batch_size=1, max_tokens=max(LENGTHS)),
    Layout(packing=False, micro_batch_size=3, max_tokens=2 * max(LENGTHS)),
    Layout(packing=False, micro_batch_size=9, max_tokens=9 * max(LENGTHS)),
]


def sums_one_by_one(model: Any, examples: list[Example]) -> dict[str, Tensor]:
    """nll, entropy, correct and count of the target tokens, in fp64 from the model's fp32 logits."""
    sums = {name: torch.tensor(0.0, dtype=torch.float64) for name in NAMES}
    for example in examples:
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0].double()
        places = [t for t, label in enumerate(example["labels"]) if t > 0 and label != IGNORE]
        predicted = logits[[t - 1 for t in places]]
        targets = torch.tensor([example["input_ids"][t] for t in places])
        sums["nll"] = sums["nll"] + cross_entropy(predicted, targets, reduction="sum")
        sums["entropy"] += Categorical(logits=predicted).entropy().sum().detach()
        sums["correct"] += (predicted.argmax(-1) == targets).sum()
        sums["count"] += len(targets)
    return sums


def conversation(*turns: str) -> list[dict[str, str]]:
    return [
        {"role": "user" if number % 2 == 0 else "assistant", "content": text}
        for number, text in enumerate(turns)
    ]
