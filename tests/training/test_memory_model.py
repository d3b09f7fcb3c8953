"""The arithmetic of the memory model, the parts it predicts, and which update and batch are measured."""

import math
import shutil
from collections.abc import Callable
from dataclasses import astuple, fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from command_line import config_arguments
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, Qwen2ForCausalLM

from finetune.config import FastConfig
from finetune.config_checks import LARGEST_WHOLE_NUMBER
from finetune.config_parsing import parse_config
from finetune.data.collate import collate
from finetune.data.plan import make_plan
from finetune.model.fast_paths import choose_fast_paths
from finetune.runtime.memory import GIB
from finetune.training.memory_model import (
    Prediction,
    kept_bytes,
    measure_evaluation,
    measure_update,
    predict,
    storage_bytes,
)
from finetune.training.setup import Parts, load_parts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of a processor's memory and layers")

NO_FAST_PATHS = [f"--fast.{f.name}=false" for f in fields(FastConfig) if f.default is True]
IN_BF16 = ["--train.mixed_precision=bf16"]

# Of the tiny model: vocabulary 800, width 64, 2 layers, 4 heads and 2 keys of 16, MLP 128.
VOCABULARY, WIDTH, NUM_LAYERS = 800, 64, 2
LINEAR_SHAPES = NUM_LAYERS * [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
NUM_LINEAR = sum(rows * columns for rows, columns in LINEAR_SHAPES)
NUM_LORA = 4 * sum(rows + columns for rows, columns in LINEAR_SHAPES)  # at rank 4


@pytest.fixture
def arguments(tmp_path, tiny_model_dir, rows_file) -> list[str]:
    """The configuration of 16 train and 4 eval rows of the tiny model."""
    keys = {
        "model.name_or_path": tiny_model_dir,
        "model.quantization": "none",
        "lora.r": 4,
        "data.path": rows_file,
        "data.max_length": 128,
        "train.num_epochs": 3,
        "train.mixed_precision": "no",
        "optim.name": "adamw",
    }
    return config_arguments(tmp_path, keys)


@pytest.fixture
def predicted(arguments) -> Callable[..., tuple[Prediction, Parts]]:
    def run(*more: str) -> tuple[Prediction, Parts]:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        config = parse_config([*arguments, *more])
        parts = load_parts(config)
        paths = choose_fast_paths(config, parts.accelerator, parts.token_loss, parts.train_set)
        return predict(config, parts.accelerator, parts.token_loss, paths.packed), parts

    return run


# The arithmetic


sizes = st.integers(0, 40 * GIB)
predictions = st.builds(
    Prediction,
    process=sizes,
    base=sizes,
    adapter=sizes,
    optimizer=sizes,
    kept_per_token=st.floats(100, 1e8),
    per_layer_and_token=st.floats(0, 1e7),
    weight=st.integers(0, GIB),
    head_per_token=st.floats(0, 1e7),
    head_most=st.floats(0, 4 * GIB) | st.just(math.inf),
)


@given(predictions, st.floats(0.01, 400))
def test_the_budget_is_the_most_tokens_that_fit(prediction, gib):
    budget = prediction.largest_budget(gib)
    assert budget >= 0
    rounding = 1 + 1e-12
    if budget > 0:
        assert prediction.of_update(budget) <= gib * GIB * rounding
    largest_that_a_config_takes = budget == LARGEST_WHOLE_NUMBER - 1
    assert largest_that_a_config_takes or prediction.of_update(budget + 1) * rounding > gib * GIB


@given(predictions)
def test_what_stays_allocated_is_the_sum_of_its_parts(prediction):
    assert prediction.held == sum(astuple(prediction)[:4])
    assert prediction.of_update(0) == prediction.held + prediction.weight


@given(predictions, st.integers(0, 10**6))
def test_an_update_takes_what_is_held_what_is_kept_and_the_larger_of_layer_and_head(prediction, num_tokens):
    kept, at_layer = num_tokens * prediction.kept_per_token, num_tokens * prediction.per_layer_and_token
    at_head = min(num_tokens * prediction.head_per_token, prediction.head_most)
    assert prediction.of_update(num_tokens) == pytest.approx(
        prediction.held + kept + max(prediction.weight + at_layer, at_head)
    )


# What is predicted of a model


@pytest.mark.parametrize(
    ("quantization", "linear_bytes"),
    [
        ("none", 2 * NUM_LINEAR),
        # A byte each, and a scale for each row.
        ("int8", NUM_LINEAR + 4 * sum(rows for rows, _ in LINEAR_SHAPES)),
        # Half a byte each, a scale for each block of 64, and a table of 16 numbers for each layer.
        ("nf4", NUM_LINEAR // 2 + 4 * NUM_LINEAR // 64 + 4 * 16 * len(LINEAR_SHAPES)),
    ],
)
def test_the_base_is_the_bytes_of_its_weights(predicted, quantization, linear_bytes):
    prediction, parts = predicted(*IN_BF16, f"--model.quantization={quantization}")
    embedding = 2 * VOCABULARY * WIDTH  # the head's too
    norms = 2 * (2 * NUM_LAYERS + 1) * WIDTH
    biases = 2 * NUM_LAYERS * (64 + 32 + 32)
    buffers = sum(buffer.numel() * buffer.itemsize for buffer in parts.model.buffers())
    assert prediction.base == embedding + norms + biases + linear_bytes + buffers


@pytest.mark.parametrize(
    ("optimizer", "state_bytes"),
    [("sgd", 0), ("adamw", 8), ("adamw_8bit", 2), ("paged_adamw_8bit", 2), ("paged_adamw", 8)],
)
def test_adapter_and_optimizer_are_the_bytes_of_the_trainable_weights(predicted, optimizer, state_bytes):
    prediction, parts = predicted(*IN_BF16, f"--optim.name={optimizer}")
    trainable = [p for p in parts.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == NUM_LORA
    # Weights and gradients in fp32, and the weights in bf16. Where they are views of one tensor, each may be
    # filled up to a whole block of 256.
    padding = 2 * 4 * 256 * len(trainable)
    assert 0 <= prediction.adapter - (4 + 4 + 2) * NUM_LORA < padding
    assert prediction.optimizer == state_bytes * NUM_LORA
    in_fp32, _ = predicted(f"--optim.name={optimizer}")
    assert 0 <= in_fp32.adapter - (4 + 4) * NUM_LORA < padding


@pytest.mark.parametrize("more", [[], IN_BF16, [*IN_BF16, "--model.quantization=int8"]])
def test_twice_the_layers_keep_about_twice_as_much_of_a_token(predicted, tiny_model_dir, tmp_path, more):
    shutil.copytree(tiny_model_dir, tmp_path / "deep")
    config = AutoConfig.from_pretrained(
        tiny_model_dir, num_hidden_layers=2 * NUM_LAYERS, layer_types=2 * NUM_LAYERS * ["full_attention"]
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "deep")
    shallow, _ = predicted(*more)
    deep, _ = predicted(*more, f"--model.name_or_path={tmp_path / 'deep'}")
    assert 1.7 < deep.kept_per_token / shallow.kept_per_token < 2.1


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_fast_paths_and_gradient_checkpointing_keep_less_of_a_token(predicted, quantization):
    more = [*IN_BF16, f"--model.quantization={quantization}"]
    fast, _ = predicted(*more)
    reference, _ = predicted(*more, *NO_FAST_PATHS)
    checkpointed, _ = predicted(*more, "--train.gradient_checkpointing=true")
    assert reference.kept_per_token > 1.5 * fast.kept_per_token
    assert 0 < checkpointed.kept_per_token < fast.kept_per_token / 2


def test_what_is_kept_grows_linearly_with_the_tokens(predicted):
    """It is counted on short sequences and holds for longer ones."""
    prediction, parts = predicted(*IN_BF16)

    def kept(num_tokens: int) -> int:
        labels = [-100] * (num_tokens - 1) + [5]
        examples = [{"input_ids": [5] * num_tokens, "labels": labels}]
        return kept_bytes(parts.accelerator, parts.token_loss, collate(examples, packing=True))

    assert (kept(512) - kept(128)) / 384 == pytest.approx(prediction.kept_per_token, rel=1e-3)


class _Keeps(torch.autograd.Function):
    """Keeps x: as autograd's functions are to, or as an attribute of `ctx`, alone or among others."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, how: str) -> torch.Tensor:
        if how == "saved":
            ctx.save_for_backward(x)
        else:
            ctx.kept = x if how == "attribute" else (0.5, [x])
        return x.sum()


@pytest.mark.parametrize("how", ["saved", "attribute", "in a tuple"])
def test_what_a_function_keeps_is_counted_wherever_it_keeps_it(predicted, how):
    _, parts = predicted()

    class Keeping(torch.nn.Module):
        def forward(self, batch: Any) -> Any:
            with torch.no_grad():
                x = torch.ones(batch.num_tokens, 10)
            return SimpleNamespace(nll=_Keeps.apply(x.requires_grad_(), how) + 1)

    batch = collate([{"input_ids": [1] * 7, "labels": [-100] * 7}], packing=True)
    assert kept_bytes(parts.accelerator, Keeping(), batch) == 7 * 10 * 4


def test_what_a_process_holds_besides_its_model_is_counted_with_gradients_and_without(
    predicted, arguments, monkeypatch
):
    """On a card these are tensors, such as the noise of dropout."""
    prediction, parts = predicted()
    trainable = [parameter for parameter in parts.model.parameters() if parameter.requires_grad]
    weights = storage_bytes(trainable)

    def other_bytes(held: int) -> int:
        monkeypatch.setattr("finetune.training.memory_model.held_bytes", lambda device: held)
        return predict(parse_config(arguments), parts.accelerator, parts.token_loss, True).process

    for parameter in trainable:
        parameter.grad = None
    assert other_bytes(prediction.base + weights + 12345) == 12345
    assert other_bytes(0) == 0
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    gradients = sum(parameter.numel() * 4 for parameter in trainable)
    assert other_bytes(prediction.base + weights + gradients + 12345) == 12345


def test_counting_leaves_no_gradient_and_no_other_weights(predicted):
    _, parts = predicted()
    gradients = [p.grad for p in parts.model.parameters() if p.grad is not None]
    assert not any(gradient.any() for gradient in gradients)
    assert all(not p.detach().any() for n, p in parts.model.named_parameters() if "lora_B" in n)


def test_logits_in_chunks_take_less_than_all_of_them(predicted):
    chunks, _ = predicted("--fast.head_mib=1", "--train.max_tokens_per_micro_batch=100000")
    all_of_them, _ = predicted("--fast.head=false", "--train.max_tokens_per_micro_batch=100000")
    assert 2**20 * 0.9 < chunks.head_most < 1.5 * 2**20
    assert (all_of_them.head_per_token, all_of_them.head_most) == (VOCABULARY * 16, math.inf)


@pytest.mark.parametrize("fast", [[], ["--fast.head=false"]])
def test_a_run_with_the_budget_that_is_proposed_is_predicted_to_fit(predicted, fast):
    before, _ = predicted(*fast, "--train.max_tokens_per_micro_batch=128")
    gib = before.of_update(20_000) / GIB
    budget = before.largest_budget(gib)
    after, _ = predicted(*fast, f"--train.max_tokens_per_micro_batch={budget}")
    after = replace(after, process=before.process)
    assert after.of_update(budget) <= gib * GIB * 1.001


# What is measured


@pytest.mark.parametrize("packing", [True, False])
def test_the_update_and_the_batch_that_are_measured_are_the_largest(arguments, packing):
    budget = ["--train.micro_batch_size=2", "--train.gradient_accumulation_steps=2"]
    config = parse_config([*arguments, *budget, f"--train.packing={packing}".lower()])
    parts = load_parts(config)
    plan = make_plan(config, parts.train_set, packing, 0, 1)

    def size(lengths: Any, batch: list[int]) -> int:
        taken = [int(lengths[index]) for index in batch]
        shared = plan.shared_prefix * (len(taken) - 1)  # once in a packed sequence
        return sum(taken) - shared if packing else len(taken) * max(taken)

    updates = [plan.update(step) for step in range(plan.steps_per_epoch)]
    largest = max(size(plan.lengths, batch) for update in updates for batch in update.micro_batches)
    measured = measure_update(config, parts, plan)
    assert measured.largest_batch == largest
    assert measured.num_tokens in {
        update.num_tokens
        for update in updates
        if any(size(plan.lengths, batch) == largest for batch in update.micro_batches)
    }
    evaluation = measure_evaluation(parts, plan, parts.eval_set)
    longest = int(parts.eval_set.lengths.max())
    assert evaluation is not None
    assert longest <= evaluation.largest_batch <= plan.layout.max_tokens
