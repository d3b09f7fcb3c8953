"""The plan, for any lengths, budgets, process counts and seeds; the tensors against plain loops."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config import Config, DataConfig, TrainConfig
from finetune.data.collate import (
    MIN_SHARED,
    Boundaries,
    MicroBatch,
    collate,
    iterate_updates,
    pack,
    pad,
    shared_prefix,
)
from finetune.data.order import epoch_order
from finetune.data.plan import (
    Layout,
    Plan,
    balance,
    lay_out,
    make_plan,
    plan_evaluation,
)
from finetune.data.preparing.examples import Examples
from finetune.data.templates.tokenize import IGNORE

CPU = torch.device("cpu")
LONGEST = 10

# No test here may fail for being slow, on a machine that others use too.
any_plan = settings(deadline=None, max_examples=100)
any_examples = settings(deadline=None, max_examples=40)

seeds = st.integers(0, 2**32 - 1)
lengths_of_examples = st.lists(st.integers(1, LONGEST), min_size=1, max_size=30)
layouts = st.builds(
    Layout,
    packing=st.booleans(),
    micro_batch_size=st.integers(1, 6),
    max_tokens=st.integers(LONGEST, 4 * LONGEST),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    lengths = draw(lengths_of_examples)
    target_counts = [draw(st.integers(1, length)) for length in lengths]
    return Plan(
        lengths=np.array(lengths),
        target_counts=np.array(target_counts),
        layout=draw(layouts),
        global_batch_size=draw(st.integers(1, 12)),
        num_epochs=draw(st.integers(1, 3)),
        seed=draw(seeds),
        num_processes=draw(st.integers(1, 5)),
    )


def processes(plan: Plan) -> list[Plan]:
    """The same plan as each of its processes holds it."""
    return [replace(plan, rank=rank) for rank in range(plan.num_processes)]


def examples_of(plan: Plan, step: int) -> list[int]:
    """The examples of an update over all processes, in ascending order."""
    batches = [batch for one in processes(plan) for batch in one.update(step).micro_batches]
    return sorted(example for batch in batches for example in batch)


def keeps_to(layout: Layout, batch: list[int], lengths: Any) -> bool:
    if layout.packing:
        return sum(lengths[i] for i in batch) <= layout.max_tokens
    width = max(lengths[i] for i in batch)
    return len(batch) <= layout.micro_batch_size and len(batch) * width <= layout.max_tokens


@any_plan
@given(plans())
def test_every_example_comes_whole_and_exactly_once_per_epoch(plan):
    for epoch in range(plan.num_epochs):
        first = epoch * plan.steps_per_epoch
        steps = range(first, first + plan.steps_per_epoch)
        seen = [example for step in steps for example in examples_of(plan, step)]
        assert sorted(seen) == list(range(len(plan.lengths)))
        assert all(plan.update(step).epoch == epoch for step in steps)


@any_plan
@given(plans())
def test_micro_batches_keep_to_the_token_budget_and_the_micro_batch_size(plan):
    for one in processes(plan):
        for step in range(plan.num_steps):
            for batch in one.update(step).micro_batches:
                assert batch == [] or keeps_to(plan.layout, batch, plan.lengths)


@any_plan
@given(plans())
def test_every_process_takes_part_in_every_update(plan):
    for one in processes(plan):
        for step in range(plan.num_steps):
            batches = one.update(step).micro_batches
            assert len(batches) >= 1
            # An empty micro-batch only stands in for nothing at all.
            assert batches == [[]] or all(batches)


@any_plan
@given(plans())
def test_a_collective_plan_only_fills_up_to_the_largest_number_of_micro_batches(plan):
    for step in range(plan.num_steps):
        own = [one.update(step).micro_batches for one in processes(plan)]
        filled_up = [one.update(step).micro_batches for one in processes(replace(plan, collective=True))]
        assert {len(batches) for batches in filled_up} == {max(map(len, own))}
        for batches, more in zip(own, filled_up, strict=True):
            assert more[: len(batches)] == batches
            assert not any(more[len(batches) :])


@any_plan
@given(st.lists(st.integers(1, LONGEST), max_size=30), plans(), st.integers(0, 30))
def test_a_collective_plan_fills_up_an_evaluation_too(lengths, plan, most):
    eval_set = eval_set_of(lengths)
    own = [plan_evaluation(one, eval_set, most) for one in processes(plan)]
    together = processes(replace(plan, collective=True))
    filled_up = [plan_evaluation(one, eval_set, most) for one in together]
    assert {len(batches) for batches in filled_up} == {max(map(len, own))}
    assert [[batch for batch in batches if batch] for batches in filled_up] == own


def test_a_large_evaluation_is_laid_out_piece_by_piece(monkeypatch):
    monkeypatch.setattr("finetune.data.plan.LAID_OUT_AT_ONCE", 4)
    lengths = [LONGEST - n % 7 for n in range(30)]
    layout = Layout(packing=True, micro_batch_size=1, max_tokens=4 * LONGEST)
    sizes = np.array(lengths)
    plan = Plan(sizes, sizes, layout, 8, num_epochs=1, seed=0, num_processes=3)
    shares = [plan_evaluation(one, eval_set_of(lengths)) for one in processes(plan)]
    for first in range(0, 30, 12):  # four of each process
        piece = set(range(first, min(first + 12, 30)))
        batches = [batch for share in shares for batch in share if piece & set(batch)]
        assert sorted(example for batch in batches for example in batch) == sorted(piece)


@any_plan
@given(plans())
def test_an_order_that_is_computed_serves_as_one_in_memory(plan):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.data.order.MAX_PERMUTED", 0)
        for epoch in range(plan.num_epochs):
            first = epoch * plan.steps_per_epoch
            steps = range(first, first + plan.steps_per_epoch)
            seen = [example for step in steps for example in examples_of(plan, step)]
            assert sorted(seen) == list(range(len(plan.lengths)))


@any_plan
@given(plans(), layouts, st.integers(1, 5))
def test_an_update_is_the_same_for_every_rank_process_count_and_layout(plan, other_layout, other_count):
    other = replace(plan, layout=other_layout, num_processes=other_count)
    assert other.num_steps == plan.num_steps
    for step in range(plan.num_steps):
        examples = examples_of(plan, step)
        assert examples_of(other, step) == examples
        for one in (*processes(plan), *processes(other)):
            update = one.update(step)
            assert update.num_target_tokens == sum(plan.target_counts[i] for i in examples)
            assert update.num_tokens == sum(plan.lengths[i] for i in examples)


@any_plan
@given(plans())
def test_only_the_last_update_of_an_epoch_is_short(plan):
    sizes = [len(examples_of(plan, step)) for step in range(plan.steps_per_epoch)]
    assert set(sizes[:-1]) <= {plan.global_batch_size}
    assert 1 <= sizes[-1] <= plan.global_batch_size
    assert plan.num_steps == plan.num_epochs * len(sizes)


@any_plan
@given(plans())
def test_updates_take_the_epoch_order_piece_by_piece(plan):
    for step in range(plan.num_steps):
        epoch, position = divmod(step, plan.steps_per_epoch)
        order = epoch_order(plan.seed, epoch, len(plan.lengths)).tolist()
        size = plan.global_batch_size
        assert examples_of(plan, step) == sorted(order[position * size : (position + 1) * size])


@any_plan
@given(plans(), st.integers(1, 20))
def test_max_steps_only_stops_earlier(plan, max_steps):
    short = replace(plan, max_steps=max_steps)
    assert short.num_steps == min(max_steps, plan.num_steps)
    assert short.steps_per_epoch == plan.steps_per_epoch
    for step in range(short.num_steps):
        assert short.update(step) == plan.update(step)


@any_plan
@given(plans())
def test_a_plan_built_again_gives_the_same_updates_in_any_order_of_asking(plan):
    forward = [plan.update(step) for step in range(plan.num_steps)]
    again = replace(plan, lengths=plan.lengths.copy(), target_counts=plan.target_counts.copy())
    assert [again.update(step) for step in reversed(range(plan.num_steps))] == forward[::-1]


@any_plan
@given(seeds, st.integers(0, 100), st.integers(1, 200))
def test_an_epoch_order_is_a_permutation_and_always_the_same(seed, epoch, num_examples):
    order = epoch_order(seed, epoch, num_examples).tolist()
    epoch_order.cache_clear()
    assert epoch_order(seed, epoch, num_examples).tolist() == order
    assert sorted(order) == list(range(num_examples))


def test_other_epochs_and_other_seeds_give_other_orders():
    orders = [tuple(epoch_order(seed, epoch, 50)) for seed in range(10) for epoch in range(10)]
    assert len(set(orders)) == 100


def test_the_epoch_order_is_the_one_that_runs_on_disk_were_trained_in():
    # A change here would have every interrupted run go on with other examples than it left out.
    assert epoch_order(42, 0, 12).tolist() == [0, 7, 6, 9, 11, 3, 5, 2, 4, 10, 1, 8]
    assert epoch_order(42, 1, 12).tolist() == [0, 7, 4, 9, 8, 3, 1, 2, 10, 6, 5, 11]


@any_plan
@given(lengths_of_examples, st.integers(1, 6))
def test_processes_get_about_as_many_tokens(lengths, num_processes):
    shares = balance(range(len(lengths)), np.array(lengths), num_processes)
    assert sorted(example for share in shares for example in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)


def fewest_groups(sizes: list[int], budget: int) -> int:
    """The smallest number of groups of at most `budget`, by trying them all."""

    def fits(rest: list[int], loads: list[int]) -> bool:
        return not rest or any(
            load + rest[0] <= budget and fits(rest[1:], [*loads[:n], load + rest[0], *loads[n + 1 :]])
            for n, load in enumerate(loads)
        )

    return next(count for count in range(1, len(sizes) + 1) if fits(sizes, [0] * count))


@any_plan
@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(0, 10), st.integers(0, 25))
def test_packed_micro_batches_are_as_few_and_then_as_even_as_they_can_be(own, prefix, spare):
    lengths, budget = np.array(own) + prefix, max(own) + prefix + spare
    layout = Layout(packing=True, micro_batch_size=1, max_tokens=budget)
    groups = lay_out(list(range(len(own))), lengths, layout, prefix)
    loads = [sum(own[i] for i in group) for group in groups]
    assert sorted(i for group in groups for i in group) == list(range(len(own)))
    assert max(loads) + prefix <= budget
    assert len(groups) <= fewest_groups(own, budget - prefix) * 11 / 9 + 1
    balanced = balance(range(len(own)), np.array(own), len(groups))
    most_even = max(sum(own[i] for i in group) for group in balanced)
    assert max(loads) == most_even or most_even + prefix > budget


@pytest.mark.parametrize(
    ("own", "prefix", "budget", "expected"),
    [
        ([826, 69], 0, 1024, [895]),  # one pass over all weights, not two
        ([100] * 8, 40, 840, [800]),  # the prefix is there once: 840 tokens, not 1,120
        ([100] * 8, 40, 839, [400, 400]),  # not 700 and 100
        ([4, 4, 3, 3, 2, 2], 0, 9, [9, 9]),  # first-fit decreasing needs three
        ([], 0, 10, []),
    ],
)
def test_an_update_is_cut_into_even_micro_batches(own, prefix, budget, expected):
    layout = Layout(packing=True, micro_batch_size=1, max_tokens=budget)
    groups = lay_out(list(range(len(own))), np.array(own, dtype=np.int64) + prefix, layout, prefix)
    assert [sum(own[i] for i in group) for group in groups] == expected


@any_plan
@given(st.lists(st.integers(1, LONGEST), max_size=30), plans())
def test_evaluation_covers_every_example_exactly_once_within_the_limits(lengths, plan):
    eval_set = eval_set_of(lengths)
    batches = [batch for one in processes(plan) for batch in plan_evaluation(one, eval_set)]
    assert all(batch and keeps_to(plan.layout, batch, lengths) for batch in batches)
    assert sorted(example for batch in batches for example in batch) == list(range(len(lengths)))


def eval_set_of(lengths: list[int]) -> Examples:
    """Examples of these lengths, of the rows 100, 101, ..."""
    ids = [[0] * length for length in lengths]
    numbers = list(range(100, 100 + len(ids)))
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids, "row_number": numbers})
    return Examples(dataset, truncated=[], dropped={})


def test_the_plan_of_a_config_uses_its_sizes_and_defaults_to_the_memory_sized_for():
    dataset = Dataset.from_dict(
        {"input_ids": [[5, 6, 7], [8, 9]], "labels": [[IGNORE, 6, 7], [IGNORE, IGNORE]]}
    )
    train_set = Examples(dataset, truncated=[], dropped={})
    train = TrainConfig(micro_batch_size=3, gradient_accumulation_steps=4, num_epochs=5, max_steps=6, seed=7)
    plan = make_plan(Config(train=train, data=DataConfig(max_length=10)), train_set, False, 1, 2)
    assert plan.lengths.tolist() == [3, 2]
    assert plan.target_counts.tolist() == [2, 0]
    assert plan.layout == Layout(packing=False, micro_batch_size=3, max_tokens=30)
    assert plan.global_batch_size == 3 * 4 * 2
    assert (plan.num_epochs, plan.max_steps, plan.seed) == (5, 6, 7)
    assert (plan.rank, plan.num_processes) == (1, 2)
    left_to_the_run = replace(train, max_tokens_per_micro_batch="auto")
    config = Config(train=left_to_the_run, data=DataConfig(max_length=10))
    assert make_plan(config, train_set, True, 0, 1).layout.max_tokens == 30
    assert make_plan(config, train_set, True, 0, 1, max_tokens=12).layout.max_tokens == 12
    asked = replace(train, max_tokens_per_micro_batch=17)
    plan = make_plan(Config(train=asked, data=DataConfig(max_length=10)), train_set, True, 0, 1)
    assert plan.layout == Layout(packing=True, micro_batch_size=3, max_tokens=17)
    assert plan.global_batch_size == 3 * 4


# Tensors


def make_example(input_ids: list[int], is_target: list[bool]) -> dict[str, list[int]]:
    """The first token is never a target: nothing predicts it."""
    targets = [False, *is_target[1:]]
    return {
        "input_ids": input_ids,
        "labels": [t if y else IGNORE for t, y in zip(input_ids, targets, strict=True)],
    }


examples_with_tokens = st.integers(1, 8).flatmap(
    lambda length: st.builds(
        make_example,
        st.lists(st.integers(0, 50), min_size=length, max_size=length),
        st.lists(st.booleans(), min_size=length, max_size=length),
    )
)


def behind(beginning: list[int], examples: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """The examples with tokens before them that are no targets."""
    return [
        {
            "input_ids": beginning + example["input_ids"],
            "labels": [IGNORE] * len(beginning) + example["labels"],
        }
        for example in examples
    ]


lists_of_examples = st.builds(
    behind,
    st.just([]) | st.lists(st.integers(0, 50), max_size=20),
    st.lists(examples_with_tokens, min_size=1, max_size=6),
)


def targets_one_by_one(examples: list[dict[str, list[int]]], starts: list[int]) -> list[tuple[int, int]]:
    """(place that predicts, token to predict), by a plain loop."""
    targets = []
    for example, start in zip(examples, starts, strict=True):
        for t in range(1, len(example["input_ids"])):
            if example["labels"][t] != IGNORE:
                targets.append((start + t - 1, example["input_ids"][t]))
    return targets


def targets_in(batch) -> list[tuple[int, int]]:
    return list(zip(batch.target_positions.tolist(), batch.target_ids.tolist(), strict=True))


@any_examples
@given(lists_of_examples)
def test_a_packed_row_gives_the_examples_back(examples):
    batch = pack(examples)
    prefix, starts = batch.limits.prefix, batch.limits.starts.tolist()
    num_tokens = sum(len(e["input_ids"]) - prefix for e in examples) + prefix
    assert batch.input_ids.shape == batch.position_ids.shape == (1, num_tokens)
    assert batch.num_tokens == num_tokens
    shared, *pieces = (piece.tolist() for piece in batch.input_ids[0].tensor_split(starts[:-1]))
    assert [shared + piece for piece in pieces] == [example["input_ids"] for example in examples]
    shared, *pieces = (piece.tolist() for piece in batch.position_ids[0].tensor_split(starts[:-1]))
    assert [shared + piece for piece in pieces] == [list(range(len(e["input_ids"]))) for e in examples]
    assert targets_in(batch) == targets_one_by_one(examples, [start - prefix for start in starts[:-1]])
    assert all(tensor.dtype == torch.long for tensor in batch[:4])


@any_examples
@given(lists_of_examples)
def test_what_is_shared_predicts_no_target_and_leaves_each_example_a_token(examples):
    prefix = shared_prefix(examples)
    assert prefix == 0 or (prefix >= MIN_SHARED and len(examples) > 1)
    for example in examples:
        assert example["input_ids"][:prefix] == examples[0]["input_ids"][:prefix]
        assert example["labels"][: prefix + 1] == [IGNORE] * min(prefix + 1, len(example["labels"]))
        assert len(example["input_ids"]) > prefix


def test_all_that_is_alike_before_the_targets_is_shared():
    common = list(range(20))
    examples = [{"input_ids": [*common, own, 3, 4], "labels": [IGNORE] * 21 + [3, 4]} for own in (30, 31, 32)]
    assert shared_prefix(examples) == 20
    assert shared_prefix(examples[:1]) == 0
    assert shared_prefix([*examples, {"input_ids": common[:5], "labels": [IGNORE] * 5}]) == 0
    earlier = {"input_ids": common, "labels": [IGNORE] * 12 + common[12:]}
    assert shared_prefix([*examples, earlier]) == 11  # the twelfth predicts a target
    every_token = {"input_ids": common, "labels": [IGNORE, *common[1:]]}
    assert shared_prefix([every_token, every_token]) == 0


@any_examples
@given(lists_of_examples)
def test_a_packed_token_sees_its_own_example_up_to_itself_and_nothing_else(examples):
    limits = pack(examples).limits
    owner = [None] * limits.prefix
    owner += [
        number for number, example in enumerate(examples) for _ in example["input_ids"][limits.prefix :]
    ]
    sees = [
        [owner[column] in (None, owner[row]) and column <= row for column in range(len(owner))]
        for row in range(len(owner))
    ]
    mask = limits.mask()
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[sees]]


@any_examples
@given(lists_of_examples)
def test_the_boundaries_of_a_packed_row_are_where_its_examples_lie(examples):
    limits = pack(examples).limits
    assert limits.lengths == tuple(len(example["input_ids"]) - limits.prefix for example in examples)
    assert limits.starts.dtype == torch.int32
    before = [sum(limits.lengths[:number]) for number in range(len(examples) + 1)]
    assert limits.starts.tolist() == [limits.prefix + number for number in before]


@any_examples
@given(lists_of_examples)
def test_padded_rows_give_the_examples_back(examples):
    batch = pad(examples)
    width = max(len(example["input_ids"]) for example in examples)
    assert batch.input_ids.shape == (len(examples), width)
    assert batch.limits.dtype == torch.bool
    lengths = [len(example["input_ids"]) for example in examples]
    assert batch.limits.tolist() == [[t < length for t in range(width)] for length in lengths]
    rows = [ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.limits, strict=True)]
    assert rows == [example["input_ids"] for example in examples]
    assert batch.position_ids.tolist() == [list(range(width))] * len(examples)
    starts = [row * width for row in range(len(examples))]
    assert targets_in(batch) == targets_one_by_one(examples, starts)
    assert batch.num_tokens == sum(lengths)
    assert all(tensor.dtype == torch.long for tensor in batch[:4])


@any_examples
@given(lists_of_examples, st.booleans())
def test_each_target_knows_its_example(examples, packing):
    batch = collate(examples, packing)
    counts = [sum(label != IGNORE for label in example["labels"]) for example in examples]
    expected = [number for number, count in enumerate(counts) for _ in range(count)]
    assert batch.example_of_target().tolist() == expected


def assert_equal(got: MicroBatch, expected: MicroBatch) -> None:
    for one, other in zip(got[:4], expected[:4], strict=True):
        assert torch.equal(one, other)
    assert got.num_tokens == expected.num_tokens
    assert type(got.limits) is type(expected.limits)
    if isinstance(expected.limits, Boundaries):
        assert (got.limits.lengths, got.limits.prefix) == (expected.limits.lengths, expected.limits.prefix)
        assert torch.equal(got.limits.starts, expected.limits.starts)
    else:
        assert torch.equal(got.limits, expected.limits)


@any_examples
@given(lists_of_examples)
def test_collate_packs_or_pads_as_asked(examples):
    for packing, plain in ((True, pack), (False, pad)):
        assert_equal(collate(examples, packing), plain(examples))


@pytest.mark.parametrize("packing", [True, False])
def test_no_examples_make_a_batch_of_one_token_without_a_target(packing):
    batch = collate([], packing)
    assert batch.input_ids.shape == (1, 1)
    assert (batch.limits.mask() if packing else batch.limits).all()
    assert targets_in(batch) == []
    assert batch.target_positions.dtype == batch.target_ids.dtype == torch.long


@pytest.mark.parametrize("packing", [True, False])
def test_updates_from_the_middle_of_a_run_are_those_of_the_whole_run(packing):
    generator = np.random.default_rng(0)
    dataset = [
        make_example(generator.integers(0, 50, length).tolist(), [True] * length)
        for length in generator.integers(2, 9, size=13)
    ]
    plan = Plan(
        lengths=np.array([len(example["input_ids"]) for example in dataset]),
        target_counts=np.array([len(example["input_ids"]) - 1 for example in dataset]),
        layout=Layout(packing, micro_batch_size=2, max_tokens=16),
        global_batch_size=5,
        num_epochs=2,
        seed=1,
    )
    whole = list(iterate_updates(plan, dataset, 0, CPU))
    later = list(iterate_updates(plan, dataset, 4, CPU))
    assert len(whole) == plan.num_steps == 6
    assert [update for update, _ in later] == [update for update, _ in whole[4:]]
    for update, batches in whole:
        assert sum(len(batch.target_ids) for batch in batches) == update.num_target_tokens
        for indices, batch in zip(update.micro_batches, batches, strict=True):
            assert_equal(batch, collate([dataset[i] for i in indices], packing))
    for (_, batches), (_, expected) in zip(later, whole[4:], strict=True):
        assert [b.input_ids.tolist() for b in batches] == [b.input_ids.tolist() for b in expected]


with_a_target = examples_with_tokens.filter(lambda example: any(x != IGNORE for x in example["labels"]))


@any_examples
@given(st.data())
def test_the_shared_prefix_of_a_data_set_is_that_of_any_two_of_its_examples_or_shorter(data):
    beginning = data.draw(st.lists(st.integers(0, 50), max_size=20))
    examples = behind(beginning, data.draw(st.lists(with_a_target, min_size=2, max_size=6)))
    dataset = Dataset.from_list([{**example, "row_number": 1} for example in examples])
    found = Examples(dataset, truncated=[], dropped={}).shared_prefix
    assert found == shared_prefix(examples)
    assert all(found <= shared_prefix([one, other]) for one in examples for other in examples)
