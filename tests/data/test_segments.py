"""Examples with branches: where their tokens lie, what each sees and what predicts it, by plain loops."""

import torch
from branching import Comb, by_hand, lists_of_combs, paths
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config import Config, TrainConfig
from finetune.data.collate import pack, pad, shared_prefix, unfold
from finetune.data.plan import Layout, Plan, count_tokens, lay_out, make_plan, plan_evaluation
from finetune.data.preparing.examples import Examples
from finetune.data.segments import Branch, Segment, segments_of
from finetune.data.templates.tokenize import IGNORE

any_examples = settings(deadline=None, max_examples=60)


def examples_of(combs: list[Comb]) -> Examples:
    rows = [{**comb, "row_number": number} for number, comb in enumerate(combs, 1)]
    return Examples(Dataset.from_list(rows), truncated=[], dropped={})


def places_of(examples: list[Comb]) -> list[list[int]]:
    """For each token of each example, its place in the packed sequence."""
    prefix = shared_prefix(examples)
    places, end = [], prefix
    for example in examples:
        own = len(example["input_ids"]) - prefix
        places.append([*range(prefix), *range(end, end + own)])
        end += own
    return places


def targets_by_hand(example: Comb) -> list[tuple[int, int]]:
    """(place that predicts, place of the target) in the example, in the order of the targets."""
    contexts = [0, *(attach for _, attach in example["branches"])]
    return [
        (before, place)
        for path, context in zip(paths(example), contexts, strict=True)
        for before, place in zip(path[max(0, context - 1) :], path[max(1, context) :], strict=False)
        if example["labels"][place] != IGNORE
    ]


def test_a_branch_continues_a_part_of_its_trunk():
    segments = segments_of((7, 4), 3, [(Branch(6, 5), Branch(8, 6)), ()])
    assert segments == (
        Segment(0, 3),
        Segment(3, 3, parent=0, context=3),
        Segment(6, 2, parent=1, context=5),
        Segment(8, 2, parent=1, context=6),
        Segment(10, 4, parent=0, context=3),
    )
    assert segments_of((2, 3), 0, ()) == (Segment(0, 2), Segment(2, 3))


@any_examples
@given(lists_of_combs())
def test_a_packed_token_sees_what_is_before_it_in_its_own_sequence(examples):
    batch, places = pack(examples), places_of(examples)
    num_tokens = batch.input_ids.numel()
    sees = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    positions = torch.zeros(num_tokens, dtype=torch.long)
    for example, own in zip(examples, places, strict=True):
        assert batch.input_ids[0, own].tolist() == example["input_ids"]
        for path in paths(example):
            for position, place in enumerate(path):
                sees[own[place], [own[before] for before in path[: position + 1]]] = True
                positions[own[place]] = position
    assert torch.equal(batch.limits.mask()[0, 0], sees)
    assert torch.equal(batch.position_ids[0], positions)
    assert batch.num_tokens == num_tokens == 1 + max(place for own in places for place in own)


@any_examples
@given(lists_of_combs())
def test_a_target_is_predicted_by_the_token_before_it_in_its_own_sequence(examples):
    packed, padded = pack(examples), pad(examples)
    expected = [
        (own[before], example["input_ids"][place], number)
        for number, (example, own) in enumerate(zip(examples, places_of(examples), strict=True))
        for before, place in targets_by_hand(example)
    ]
    got = (packed.target_positions, packed.target_ids, packed.example_of_target())
    assert list(zip(*(x.tolist() for x in got), strict=True)) == expected
    assert torch.equal(padded.target_ids, packed.target_ids)
    assert torch.equal(padded.example_of_target(), packed.example_of_target())


@any_examples
@given(lists_of_combs())
def test_padded_each_branch_is_a_sequence_behind_what_it_continues(examples):
    assert [unfold(example) for example in examples] == [by_hand(example) for example in examples]
    alone = [sequence for example in examples for sequence in by_hand(example)]
    got, expected = pad(examples), pad(alone)
    names = ("input_ids", "position_ids", "target_positions", "target_ids", "limits")
    assert all(torch.equal(getattr(got, name), getattr(expected, name)) for name in names)
    assert got.num_tokens == expected.num_tokens


@any_examples
@given(lists_of_combs())
def test_what_is_shared_ends_before_the_first_target_and_the_first_branch(examples):
    prefix = shared_prefix(examples)
    for example in examples:
        assert prefix == 0 or all(attach > prefix for _, attach in example["branches"])
        assert all(label == IGNORE for label in example["labels"][: prefix + 1])
    if prefix > 0:
        assert examples_of(examples).shared_prefix <= prefix


def test_a_branch_within_the_common_beginning_shortens_what_is_shared():
    ids = list(range(30))
    plain = {"input_ids": ids, "labels": [IGNORE] * 25 + ids[25:], "branches": []}
    branch = {"input_ids": [*ids, 7, 8], "labels": [*plain["labels"], 7, 8], "branches": [[30, 13]]}
    assert shared_prefix([plain, plain]) == 24
    assert shared_prefix([plain, branch]) == examples_of([plain, branch]).shared_prefix == 12


@any_examples
@given(lists_of_combs(), st.integers(1, 9), st.integers(0, 200))
def test_padded_micro_batches_count_the_sequences_of_each_example(examples, micro_batch_size, spare):
    data = examples_of(examples)
    layout = Layout(False, micro_batch_size, int(data.lengths.max()) + spare)
    groups = lay_out(list(range(len(examples))), data.lengths, layout, 0, data.sequence_sizes)
    assert sorted(number for group in groups for number in group) == list(range(len(examples)))
    for group in groups:
        shape = pad([examples[number] for number in group]).input_ids.shape
        assert count_tokens(group, data.lengths, layout, 0, data.sequence_sizes) == shape.numel()
        fits = shape[0] <= micro_batch_size and shape.numel() <= layout.max_tokens
        assert fits or len(group) == 1


def test_the_plan_counts_each_token_that_is_laid_once():
    ids = list(range(9))
    examples = [
        {"input_ids": ids[:4], "labels": [IGNORE, *ids[1:4]], "branches": []},
        {"input_ids": ids, "labels": [IGNORE, *ids[1:]], "branches": [[5, 2], [6, 5]]},
    ]
    data = examples_of(examples)
    sizes = data.sequence_sizes
    assert (data.lengths.tolist(), sizes.counts.tolist(), sizes.widths.tolist()) == ([4, 9], [1, 3], [4, 8])
    for packing, largest in ((True, 13), (False, 24)):
        plan = plan_of(data, packing)
        update = plan.update(0)
        assert (update.num_tokens, update.num_target_tokens) == (13, 11)
        assert plan.largest_batch(update) == largest
        assert plan_evaluation(plan, data) == update.micro_batches
    assert examples_of(examples[:1]).sequence_sizes is None


def plan_of(data: Examples, packing: bool) -> Plan:
    train = TrainConfig(micro_batch_size=3, max_tokens_per_micro_batch=40)
    return make_plan(Config(train=train), data, packing, 0, 1)
