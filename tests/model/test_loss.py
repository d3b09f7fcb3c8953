"""The sums and their gradients, on plain and fast paths, against a plain computation: one example at a time,
all logits, no masks."""

from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from tiny import (
    CPU,
    LAYOUTS,
    LENGTHS,
    NAMES,
    VOCABULARY,
    Example,
    adapter_gradients,
    fill_adapter,
    random_examples,
    sums_one_by_one,
    with_adapter,
)
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2ForCausalLM

from finetune.config import Config, LoraConfig, ModelConfig
from finetune.data.collate import collate, iterate_batches
from finetune.data.plan import Layout, Plan
from finetune.data.templates.tokenize import IGNORE
from finetune.model.fast_paths import use_reference_paths
from finetune.model.load import load_model, load_tokenizer
from finetune.model.loss import TokenLoss, TokenSums, sums_by_source
from finetune.ops import lora
from finetune.ops.attention import PACKED


def make_token_loss(model: Any, fast: bool, packing: bool) -> TokenLoss:
    """On the plain paths, or on all fast ones, with a head that takes few tokens at a time."""
    use_reference_paths(token_loss := TokenLoss(model))
    if fast:
        token_loss.head_mib = 1
        num_fast, num_all = lora.enable(model)
        assert num_fast == num_all or isinstance(token_loss.base, GPT2LMHeadModel)
        if packing:
            token_loss.base.set_attn_implementation(PACKED)
            token_loss.masks_packed_sequences = False
    return token_loss


def train_one_update(
    model: Any, examples: list[Example], layout: Layout, num_processes: int = 1, fast: bool = False
) -> Any:
    """Sums over the micro-batches of all processes of an update; gradients are those of its mean loss."""
    token_loss = make_token_loss(model, fast, layout.packing).train()
    plan = Plan(
        lengths=np.array([len(example["input_ids"]) for example in examples]),
        target_counts=np.array([sum(y != IGNORE for y in example["labels"]) for example in examples]),
        layout=layout,
        global_batch_size=len(examples),
        num_epochs=1,
        seed=3,
        num_processes=num_processes,
    )
    model.zero_grad()
    total = dict.fromkeys(NAMES, 0.0)
    for rank in range(num_processes):
        update = Plan(**{**vars(plan), "rank": rank}).update(0)
        for indices in update.micro_batches:
            sums = token_loss(collate([examples[i] for i in indices], layout.packing))
            (sums.nll / update.num_target_tokens).backward()
            for name in NAMES:
                total[name] += getattr(sums, name).item()
    return total


def assert_update_is_right(
    model: Any, examples: list[Example], layouts: list[Layout], num_processes: int = 1, fast: bool = False
) -> None:
    """Sums to 1e-4 and the gradient of every adapter tensor to 1e-3 of the plain computation's."""
    use_reference_paths(TokenLoss(model))
    model.zero_grad()
    expected = sums_one_by_one(model, examples)
    (expected["nll"] / expected["count"]).backward()
    expected_gradients = {name: gradient.clone() for name, gradient in adapter_gradients(model).items()}
    # A comparison with nothing proves nothing.
    assert 0 < expected["correct"] < expected["count"]
    assert all(gradient.norm() > 0 for gradient in expected_gradients.values())
    for layout in layouts:
        sums = train_one_update(model, examples, layout, num_processes, fast)
        assert sums == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-4)
        for name, gradient in adapter_gradients(model).items():
            distance = (gradient - expected_gradients[name]).norm() / expected_gradients[name].norm()
            assert distance < 1e-3, (name, layout)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("num_processes", [1, 3])
def test_sums_and_gradients_of_an_update_are_the_plain_ones_for_every_layout(num_processes, fast):
    model = with_adapter(tiny_model(VOCABULARY))
    assert_update_is_right(model, random_examples(LENGTHS), LAYOUTS, num_processes, fast)


@pytest.mark.parametrize("fast", [False, True])
def test_a_process_without_examples_changes_nothing(fast):
    model = with_adapter(tiny_model(VOCABULARY))
    layouts = [LAYOUTS[0], LAYOUTS[3]]
    assert_update_is_right(model, random_examples([7, 15]), layouts, num_processes=4, fast=fast)


@pytest.mark.parametrize("fast", [False, True])
def test_sums_and_gradients_are_the_plain_ones_on_the_starter_model(starter_dir, fast):
    source = ModelConfig(name_or_path=str(starter_dir), quantization="none")
    config = Config(model=source, lora=LoraConfig(lora_dropout=0.0))
    model = fill_adapter(load_model(config, "no", CPU))
    tokenizer = load_tokenizer(config)
    examples = []
    for text in (
        "The capital of France is Paris.",
        "One, two, three, four, five",
        "Save a part of your pay.",
    ):
        ids = tokenizer(text)["input_ids"]
        examples.append({"input_ids": ids, "labels": [IGNORE, IGNORE, *ids[2:]]})
    layouts = [Layout(True, 1, 64), Layout(False, 3, 64)]
    assert_update_is_right(model, examples, layouts, fast=fast)


@pytest.mark.parametrize("fast", [False, True])
def test_sums_and_gradients_are_the_plain_ones_on_a_model_that_learns_its_positions(fast):
    # Where positions are relative, as in Qwen2, it would not show if they did not start anew.
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=sum(LENGTHS),
        initializer_range=0.2,
        attn_pdrop=0,
        embd_pdrop=0,
        resid_pdrop=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = with_adapter(GPT2LMHeadModel(config))
    assert_update_is_right(model, random_examples(LENGTHS), LAYOUTS, fast=fast)


class WithoutLogitsToKeep(Qwen2ForCausalLM):
    """As models are whose forward knows only the older arguments."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **others):
        assert "logits_to_keep" not in others
        return super().forward(input_ids, attention_mask, position_ids, **others)


@pytest.mark.parametrize("fast", [False, True])
def test_a_model_that_cannot_leave_out_logits_gives_the_same(fast):
    base = tiny_model(VOCABULARY)
    model = WithoutLogitsToKeep(base.config)
    model.load_state_dict(base.state_dict())
    assert_update_is_right(with_adapter(model), random_examples(LENGTHS), LAYOUTS, fast=fast)


def test_of_a_packed_sequence_only_the_positions_that_predict_a_target_reach_the_head():
    model = with_adapter(tiny_model(VOCABULARY))
    shapes = []
    model.get_base_model().lm_head.register_forward_pre_hook(
        lambda _, inputs: shapes.append(tuple(inputs[0].shape))
    )
    batch = collate(random_examples(LENGTHS), packing=True)
    TokenLoss(model)(batch)
    assert 0 < len(batch.target_ids) < batch.input_ids.numel() - 1
    assert shapes == [(1, len(batch.target_ids), 64)]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("packing", [True, False])
def test_an_example_is_blind_to_what_lies_beside_it(packing, fast):
    token_loss = make_token_loss(with_adapter(tiny_model(VOCABULARY)), fast, packing).eval()

    def log_probs(examples: list[Example]) -> list[Tensor]:
        """Of the target tokens of each example."""
        batch = collate(examples, packing)
        logits = token_loss.target_logits(batch)
        picked = logits.log_softmax(-1).gather(-1, batch.target_ids[:, None]).squeeze(1)
        counts = [sum(label != IGNORE for label in example["labels"]) for example in examples]
        return list(picked.detach().split(counts))

    examples = random_examples([9, 14, 6, 11])
    before = log_probs(examples)
    for changed in range(len(examples)):
        others = list(examples)
        others[changed] = random_examples([len(examples[changed]["input_ids"])], seed=changed + 9)[0]
        for number, (old, new) in enumerate(zip(before, log_probs(others), strict=True)):
            if number == changed:
                assert old.shape != new.shape or not torch.allclose(old, new, atol=0.01)
            else:
                assert torch.allclose(old, new, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_only_sums_come_out_and_they_are_single_numbers_in_fp32(packing, autocast, fast):
    token_loss = make_token_loss(with_adapter(tiny_model(VOCABULARY)), fast, packing)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        sums = token_loss(collate(random_examples(LENGTHS), packing))
    assert type(sums) is TokenSums
    assert [field.name for field in fields(sums)] == [*NAMES, "by_source"]
    assert sums.by_source is None
    for name in NAMES:
        value = getattr(sums, name)
        assert (value.shape, value.dtype) == ((), torch.float32), name
        assert value.requires_grad == (name == "nll")


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_the_sums_of_each_source_are_those_of_its_examples(packing, autocast, fast):
    model = with_adapter(tiny_model(VOCABULARY))
    token_loss = make_token_loss(model, fast, packing)
    sources = [1, 1, 3, 0, 3, 1, 0, 3, 1]  # none is of source 2
    examples = random_examples(LENGTHS)
    rows = [{**row, "source": of} for row, of in zip(examples, sources, strict=True)]
    (batch,) = iterate_batches([list(range(len(rows)))], rows, packing, CPU, range(4))
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        sums = token_loss(batch)
        alone = token_loss(batch._replace(is_from=None))
    assert sums.by_source.shape == (4, 4)
    assert sums.by_source.dtype == torch.float32
    assert not sums.by_source.requires_grad
    for name in NAMES:
        assert torch.equal(getattr(sums, name), getattr(alone, name))  # the same bits as without sources
    for source, own in enumerate(sums.by_source.tolist()):
        plain = sums_one_by_one(model, [row for row in rows if row["source"] == source])
        tolerance = {"rel": 0.05, "abs": 1.5} if autocast else {"rel": 1e-4}
        assert own == pytest.approx([float(plain[name]) for name in NAMES], **tolerance)
        assert own[3] == plain["count"]
    assert sums.by_source[2].tolist() == [0, 0, 0, 0]
    of_all = [float(getattr(sums, name)) for name in NAMES]
    assert sums.by_source.sum(0).tolist() == pytest.approx(of_all, rel=1e-6)


def test_a_source_s_infinite_loss_stays_its_own():
    stats = torch.tensor([[float("inf"), 1.0, 0.0], [2.0, 3.0, 1.0]])
    own = sums_by_source(stats, torch.tensor([[True, False], [False, True]]))
    assert own.tolist() == [[float("inf"), 1, 0, 1], [2, 3, 1, 1]]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("packing", [True, False])
def test_a_process_without_examples_has_no_sums_of_any_source(packing, fast):
    token_loss = make_token_loss(with_adapter(tiny_model(VOCABULARY)), fast, packing)
    (batch,) = iterate_batches([[]], [], packing, CPU, range(3))
    assert token_loss(batch).by_source.tolist() == [[0, 0, 0, 0]] * 3


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("examples", [[], [{"input_ids": [3, 4, 5], "labels": [IGNORE] * 3}]])
def test_a_batch_without_targets_gives_zero_sums_and_zero_gradients(examples, packing, fast):
    model = with_adapter(tiny_model(VOCABULARY))
    sums = make_token_loss(model, fast, packing)(collate(examples, packing))
    assert [getattr(sums, name).item() for name in NAMES] == [0, 0, 0, 0]
    sums.nll.backward()
    # Not None: DDP waits for the gradient of every parameter.
    assert all(torch.equal(g, torch.zeros_like(g)) for g in adapter_gradients(model).values())


def loss_and_gradients(folder: Path, quantization: str, precision: str, fast: bool = False) -> Any:
    """Mean loss and adapter gradients of a few examples, as the training loop takes them."""
    source = ModelConfig(name_or_path=str(folder), quantization=quantization)
    model = load_model(Config(model=source, lora=LoraConfig(lora_dropout=0.0)), precision, CPU)
    fill_adapter(model)
    batch = collate(random_examples(LENGTHS, vocabulary=800), packing=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        sums = make_token_loss(model, fast, packing=True).train()(batch)
    (sums.nll / sums.count).backward()
    others = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert all(parameter.grad is None for parameter in others)
    return (sums.nll / sums.count).item(), adapter_gradients(model)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("quantization", "least_similarity"), [("int8", 0.9), ("nf4", 0.6)])
def test_a_quantized_base_gives_nearly_the_same_loss_and_gradients_to_the_adapter_alone(
    quantization, least_similarity, fast, tiny_model_dir
):
    exact, exact_gradients = loss_and_gradients(tiny_model_dir, "none", "no")
    loss, gradients = loss_and_gradients(tiny_model_dir, quantization, "bf16", fast)
    assert loss != exact
    assert loss == pytest.approx(exact, rel=0.03)
    flat, exact_flat = (
        torch.cat([gradient.flatten() for gradient in each.values()]) for each in (gradients, exact_gradients)
    )
    assert torch.cosine_similarity(flat, exact_flat, dim=0) > least_similarity


@pytest.mark.parametrize("packing", [True, False])
def test_the_fast_loss_asks_the_model_for_no_logits(packing):
    model = with_adapter(tiny_model(VOCABULARY))
    model.get_base_model().lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the head was called"))
    sums = make_token_loss(model, True, packing)(collate(random_examples(LENGTHS), packing))
    assert sums.nll > 0


def test_attention_in_a_packed_sequence_on_the_fast_path_gets_boundaries_and_no_mask():
    token_loss = make_token_loss(with_adapter(tiny_model(VOCABULARY)), fast=True, packing=True)
    batch = collate(random_examples(LENGTHS), packing=True)
    inputs = token_loss.inputs(batch)
    assert inputs["boundaries"] is batch.limits
    assert inputs["attention_mask"].numel() == 1
