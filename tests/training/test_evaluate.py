"""Evaluation gives the plain numbers however the examples are laid out, and answers do not mix."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_model
from datasets import Dataset
from tiny import (
    CPU,
    LAYOUTS,
    LENGTHS,
    VOCABULARY,
    conversation,
    fill_adapter,
    random_examples,
    sums_one_by_one,
    with_adapter,
)

from finetune.config import Config, LoraConfig, ModelConfig
from finetune.data.conversations import Conversation
from finetune.data.plan import Plan, plan_evaluation
from finetune.data.preparing.examples import Examples
from finetune.model.load import load_model
from finetune.model.loss import TokenLoss
from finetune.training.best import best_of, is_out_of_patience
from finetune.training.evaluate import (
    evaluate,
    evaluation_metrics,
    loss_error,
    pick_conversations,
)

NAMES = ("loss", "entropy", "mean_token_accuracy")


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def eval_set_of(examples: list[dict[str, list[int]]]) -> Examples:
    numbered = [{**example, "row_number": number} for number, example in enumerate(examples, 1)]
    return Examples(Dataset.from_list(numbered), truncated=[], dropped={})


def plan_for(layout: Any, num_processes: int = 1) -> Plan:
    """A plan of which evaluation uses the layout and the processes."""
    nothing = np.array([], dtype=np.int64)
    return Plan(nothing, nothing, layout, 1, num_epochs=1, seed=0, num_processes=num_processes)


def evaluate_on(accelerator: Any, model: Any, examples: Examples, plan: Plan) -> dict[str, float]:
    return evaluation_metrics(sums_of(accelerator, model, examples, plan), examples, set())


def sums_of(accelerator: Any, model: Any, examples: Examples, plan: Plan) -> torch.Tensor:
    token_loss = TokenLoss(model).train(model.training)
    batches = plan_evaluation(plan, examples)
    return evaluate(accelerator, token_loss, batches, examples.dataset, plan.layout.packing)


def test_evaluation_gives_the_plain_numbers_for_every_layout(accelerator):
    model = with_adapter(tiny_model(VOCABULARY))
    examples = random_examples(LENGTHS)
    metrics = [evaluate_on(accelerator, model, eval_set_of(examples), plan_for(x)) for x in LAYOUTS]
    for other in metrics[1:]:
        assert other == pytest.approx(metrics[0], rel=1e-6)
    plain = {name: value.item() for name, value in sums_one_by_one(model, examples).items()}
    assert metrics[0] == pytest.approx(
        {
            "loss": plain["nll"] / plain["count"],
            "entropy": plain["entropy"] / plain["count"],
            "mean_token_accuracy": plain["correct"] / plain["count"],
            "num_target_tokens": plain["count"],
        },
        rel=1e-4,
    )
    assert 0 < metrics[0]["mean_token_accuracy"] < 1


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[4]], ids=["packed", "padded"])
def test_the_shares_of_all_processes_add_up_to_the_whole(accelerator, layout):
    model = with_adapter(tiny_model(VOCABULARY))
    eval_set = eval_set_of(random_examples(LENGTHS))
    whole = evaluate_on(accelerator, model, eval_set, plan_for(layout))
    plan = plan_for(layout, num_processes=4)
    shares = [evaluate_on(accelerator, model, eval_set, replace(plan, rank=rank)) for rank in range(4)]
    counts = [share["num_target_tokens"] for share in shares]
    assert sum(counts) == whole["num_target_tokens"]
    for name in NAMES:
        total = sum(share[name] * count for share, count in zip(shares, counts, strict=True))
        assert total / sum(counts) == pytest.approx(whole[name], rel=1e-6)


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[4]], ids=["packed", "padded"])
def test_examples_that_are_trained_on_too_count_and_the_loss_without_them_is_given(accelerator, layout):
    model = with_adapter(tiny_model(VOCABULARY))
    examples = random_examples(LENGTHS)
    numbers = {2, 5}  # from 1
    plan, eval_set = plan_for(layout), eval_set_of(examples)
    with_leaks = evaluation_metrics(sums_of(accelerator, model, eval_set, plan), eval_set, numbers)
    everything = evaluate_on(accelerator, model, eval_set, plan)
    others = [example for number, example in enumerate(examples, 1) if number not in numbers]
    clean = evaluate_on(accelerator, model, eval_set_of(others), plan)
    assert {name: with_leaks[name] for name in everything} == pytest.approx(everything, rel=1e-6)
    assert with_leaks["loss_without_leaks"] == pytest.approx(clean["loss"], rel=1e-6)
    assert clean["loss"] != pytest.approx(everything["loss"], rel=1e-3)


def test_where_all_examples_are_trained_on_too_there_is_no_loss_without_them(accelerator):
    model, eval_set = with_adapter(tiny_model(VOCABULARY)), eval_set_of(random_examples([5, 9]))
    plan = plan_for(LAYOUTS[1])
    sums = sums_of(accelerator, model, eval_set, plan)
    assert evaluation_metrics(sums, eval_set, {1, 2}) == evaluation_metrics(sums, eval_set, set())


# By source and eval set: five examples of 1, 2, 4, 8 and 16 nats.

NATS = torch.tensor([[1.0, 0, 0, 1], [2, 0, 0, 1], [4, 0, 1, 1], [8, 0, 0, 2], [16, 0, 0, 4]]).double()


def eval_set_from(sources: list[int], names: list[str]) -> Examples:
    columns = {"row_number": [1, 2, 3, 4, 5], "source": sources}
    return Examples(Dataset.from_dict(columns), truncated=[], dropped={}, source_names=names)


def test_the_loss_is_that_of_the_main_rows_and_each_set_has_its_own():
    eval_set = eval_set_from([0, 0, 1, 1, 2], ["rows", "math", "code"])
    metrics = evaluation_metrics(NATS, eval_set, {}, {"math": "math.jsonl", "code": "code.jsonl"})
    assert (metrics["loss"], metrics["num_target_tokens"]) == (1.5, 2)
    assert [metrics[f"loss/{name}"] for name in eval_set.source_names] == [1.5, 4, 4]
    assert [metrics[f"num_target_tokens/{name}"] for name in eval_set.source_names] == [2, 3, 4]
    assert metrics["mean_token_accuracy/math"] == pytest.approx(1 / 3)


def test_without_main_rows_the_loss_is_that_of_all_sets_together():
    eval_set = eval_set_from([1, 1, 2, 2, 2], ["trained on", "math", "code"])
    metrics = evaluation_metrics(NATS, eval_set, {}, ["math", "code"])
    assert (metrics["loss"], metrics["num_target_tokens"]) == (31 / 9, 9)
    assert metrics["loss/math"] == 1.5
    assert "loss/trained on" not in metrics


def test_sources_that_are_no_sets_count_together():
    metrics = evaluation_metrics(NATS, eval_set_from([0, 0, 1, 1, 1], ["a", "b"]), {})
    assert (metrics["loss"], metrics["loss/a"], metrics["loss/b"]) == (31 / 9, 1.5, 4)


@pytest.mark.parametrize("names", [["rows"], ["trained on alone", "rows"]])
def test_of_one_source_alone_no_figures_are_given_apart(names):
    metrics = evaluation_metrics(NATS, eval_set_from([len(names) - 1] * 5, names), {})
    assert set(metrics) == {*NAMES, "num_target_tokens"}


@pytest.mark.parametrize(("leaks", "without"), [({1}, 2), ({1, 5}, 2), ({4, 5}, None), ({1, 2}, None)])
def test_the_loss_without_leaks_is_that_of_the_main_rows(leaks, without):
    eval_set = eval_set_from([0, 0, 1, 1, 1], ["rows", "math"])
    metrics = evaluation_metrics(NATS, eval_set, leaks, ["math"])
    assert metrics["loss"] == 1.5
    assert metrics.get("loss_without_leaks") == without


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_mib", [None, 1])
def test_each_example_has_its_own_sums(accelerator, layout, head_mib):
    model = with_adapter(tiny_model(VOCABULARY))
    examples = random_examples(LENGTHS)
    eval_set, plan = eval_set_of(examples), plan_for(layout)
    token_loss = TokenLoss(model)
    token_loss.head_mib = head_mib
    batches = plan_evaluation(plan, eval_set)
    sums = evaluate(accelerator, token_loss, batches, eval_set.dataset, layout.packing)
    for own, example in zip(sums, examples, strict=True):
        alone = sums_one_by_one(model, [example])
        plain = [float(alone[name]) for name in ("nll", "entropy", "correct", "count")]
        assert own.tolist() == pytest.approx(plain, rel=1e-4)


def test_a_process_without_examples_adds_nothing(accelerator, monkeypatch):
    model = with_adapter(tiny_model(VOCABULARY))
    others = torch.tensor([[6.0, 4.0, 1.0, 2.0]], dtype=torch.float64)
    monkeypatch.setattr(accelerator, "reduce", lambda sums, reduction: sums + others)
    eval_set = eval_set_of(random_examples([5]))
    plan = replace(plan_for(LAYOUTS[0], num_processes=2), rank=1)
    assert plan_evaluation(plan, eval_set) == []
    assert evaluate_on(accelerator, model, eval_set, plan) == {
        "loss": 3.0,
        "entropy": 2.0,
        "mean_token_accuracy": 0.5,
        "num_target_tokens": 2,
    }


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_during_evaluation_and_the_mode_is_as_before_afterwards(accelerator, training):
    model = with_adapter(tiny_model(VOCABULARY), lora_dropout=0.5).train(training)
    examples = random_examples(LENGTHS)
    random_state = torch.random.get_rng_state()
    metrics = evaluate_on(accelerator, model, eval_set_of(examples), plan_for(LAYOUTS[2]))
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    plain = sums_one_by_one(model.eval(), examples)
    assert metrics["loss"] == pytest.approx((plain["nll"] / plain["count"]).item(), rel=1e-4)


def int8_model(folder: Any) -> Any:
    source = ModelConfig(name_or_path=str(folder), quantization="int8")
    config = Config(model=source, lora=LoraConfig(lora_dropout=0.5))
    return fill_adapter(load_model(config, "no", CPU))


def test_evaluation_of_an_int8_base_gives_the_same_numbers_for_every_layout(accelerator, tiny_model_dir):
    model = int8_model(tiny_model_dir)
    eval_set = eval_set_of(random_examples(LENGTHS, vocabulary=800))
    metrics = [evaluate_on(accelerator, model, eval_set, plan_for(layout)) for layout in LAYOUTS]
    for other in metrics[1:]:
        assert other == pytest.approx(metrics[0], rel=1e-5)


def test_evaluation_of_an_int8_base_computes_what_training_computes(accelerator, tiny_model_dir):
    model = int8_model(tiny_model_dir).train()
    examples = random_examples(LENGTHS, vocabulary=800)
    metrics = evaluate_on(accelerator, model, eval_set_of(examples), plan_for(LAYOUTS[0]))
    assert all(module.training for module in model.modules())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    plain = sums_one_by_one(model, examples)
    assert metrics["loss"] == pytest.approx((plain["nll"] / plain["count"]).item(), rel=1e-4)


def test_a_failing_evaluation_leaves_the_mode_as_it_was(accelerator):
    model = with_adapter(tiny_model(VOCABULARY)).train()
    eval_set = eval_set_of(random_examples([5]))
    with pytest.raises(IndexError):
        evaluate(accelerator, TokenLoss(model), [[0], [1]], eval_set.dataset, packing=True)
    assert all(module.training for module in model.modules())


# Conversations


def asked_of(*arguments: Any, **settings: Any) -> list[list[dict[str, Any]]]:
    return [asked.messages for asked in pick_conversations(*arguments, **settings)]


def test_the_first_rows_are_asked_without_their_answer():
    rows = Dataset.from_list(
        [
            {"instruction": "Add.", "input": "1 and 2", "output": "3"},
            {"instruction": "Say hi.", "input": None, "output": "Hi."},
            {"instruction": "Not asked.", "input": None, "output": "No."},
        ]
    )
    assert asked_of(rows, "Be brief.", count=2) == [
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Add.\n Context:1 and 2"},
        ],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hi."}],
    ]
    assert asked_of(rows, None, count=1) == [[{"role": "user", "content": "Add.\n Context:1 and 2"}]]


def test_a_longer_conversation_is_asked_up_to_its_last_answer():
    turns = conversation("One?", "1", "Two?", "2", "Thanks.")
    rows = Dataset.from_list([{"messages": turns}])
    assert asked_of(rows, None) == [turns[:3]]


def test_a_row_that_opens_with_its_only_answer_is_nothing_to_be_asked():
    opening = [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Hello."}]
    asked = conversation("One?", "1")
    rows = Dataset.from_list([{"messages": turns} for turns in (opening, opening[1:], asked, opening)])
    assert asked_of(rows, "Be kind.", count=1) == [[{"role": "system", "content": "Be kind."}, asked[0]]]


def test_a_row_with_tools_is_asked_with_them_up_to_the_last_turn_that_is_trained_on():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    turns = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is 2."},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "Not at all.", "train": False},
    ]
    row = {
        "messages": turns,
        "tools": [{"type": "function"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    (asked,) = pick_conversations([row], "Be brief.")
    assert asked == Conversation(
        [{"role": "system", "content": "Be brief."}, *turns[:3]], row["tools"], row["chat_template_kwargs"]
    )
    assert pick_conversations([{"text": "Once upon a time"}], None) == []


def test_few_rows_or_none_give_as_many_conversations():
    rows = Dataset.from_list([{"instruction": "Hi.", "input": None, "output": "Hi."}] * 2)
    assert len(pick_conversations(rows, None, count=3)) == 2
    assert pick_conversations(rows.select([]), None) == []


def bf16_int8_loss(tiny_model_dir: Path) -> tuple[TokenLoss, Accelerator]:
    base = ModelConfig(name_or_path=str(tiny_model_dir), quantization="int8")
    config = Config(model=base, lora=LoraConfig(r=4, lora_dropout=0.0))
    return TokenLoss(fill_adapter(load_model(config, "bf16", CPU))), Accelerator(mixed_precision="bf16")


def test_in_fp32_the_loss_is_the_same_in_every_layout_and_in_bf16_it_is_not(tiny_model_dir):
    token_loss, accelerator = bf16_int8_loss(tiny_model_dir)
    eval_set = eval_set_of(random_examples(LENGTHS, vocabulary=700))

    def loss(layout: Any, precision: str) -> float:
        plan = plan_for(layout)
        batches = plan_evaluation(plan, eval_set)
        dataset, packing = eval_set.dataset, layout.packing
        sums = evaluate(accelerator, token_loss, batches, dataset, packing, precision=precision)
        return float(sums[:, 0].sum() / sums[:, 3].sum())

    exact = [loss(layout, "fp32") for layout in LAYOUTS]
    assert exact == pytest.approx([exact[0]] * len(LAYOUTS), rel=1e-6)
    rounded = [loss(layout, "run") for layout in LAYOUTS]
    assert max(abs(a - b) for a, b in zip(rounded, exact, strict=True)) > 1e-4
    with pytest.raises(AssertionError):
        assert rounded == pytest.approx([rounded[0]] * len(LAYOUTS), rel=1e-6)


def test_the_error_of_a_loss_is_its_mean_difference_and_twice_what_that_may_vary_by():
    exact = torch.tensor([[10.0, 0, 0, 5], [8.0, 0, 0, 5]], dtype=torch.float64)
    shifted = exact + torch.tensor([[0.5, 0, 0, 0], [0.5, 0, 0, 0]])
    assert loss_error(shifted, exact) == pytest.approx(0.1)  # 1 nat over 10 tokens, the same in both
    apart = exact + torch.tensor([[0.5, 0, 0, 0], [-0.5, 0, 0, 0]])
    assert loss_error(apart, exact) == pytest.approx(2 * 0.5**0.5 / 10)
    assert loss_error(exact, exact) == 0


def line(loss: float, error: float | None = None) -> dict[str, float]:
    return {"loss": loss} if error is None else {"loss": loss, "loss_error": error}


@pytest.mark.parametrize(
    ("lines", "best"),
    [
        ([line(3.0), line(2.99), line(2.98)], 2),  # exact: every difference counts
        ([line(3.0), line(3.0)], 0),
        ([line(3.0, 0.01), line(2.99, 0.01)], 0),  # within the error of both
        ([line(3.0, 0.01), line(2.99, 0.01), line(2.98, 0.01)], 2),  # 0.02 is more than 0.014
        ([line(3.0, 0.01), line(2.98, 0.01), line(2.97, 0.01)], 1),
    ],
)
def test_the_best_evaluation_is_lower_by_more_than_the_error(lines, best):
    assert best_of(lines, "loss") is lines[best]
    assert is_out_of_patience(lines, len(lines) - best, "loss") is False
    assert best == len(lines) - 1 or is_out_of_patience(lines, len(lines) - 1 - best, "loss")
