"""Attention within each example of a packed sequence, against a plain computation in fp64, by example."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from card import attention_card
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from finetune.data.collate import Boundaries
from finetune.data.segments import Branch
from finetune.ops import kernels
from finetune.ops.attention import describe_kernel, flash_obstacle, packed_attention
from finetune.ops.sequences import separate

BLOCK = 32  # queries that the kernels take at a time
any_sequence = settings(deadline=None, max_examples=25)
fp32_and_bf16 = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
heads = st.sampled_from([2, 4, 6]).flatmap(
    lambda count: st.tuples(
        st.just(count), st.sampled_from([k for k in range(1, count + 1) if count % k == 0])
    )
)
lists_of_lengths = st.lists(st.integers(1, 300) | st.integers(1, 20), min_size=1, max_size=5)


@pytest.fixture(autouse=True)
def _with_and_without_kernels(cpu_kernels: None) -> None:
    pass


def make_boundaries(
    lengths: list[int], prefix: int = 0, branches: Sequence[Sequence[Branch]] = ()
) -> Boundaries:
    starts = [prefix + sum(lengths[:number]) for number in range(len(lengths) + 1)]
    of_examples = tuple(tuple(own) for own in branches)
    return Boundaries(tuple(lengths), torch.tensor(starts, dtype=torch.int32), prefix, of_examples)


def random_inputs(
    num_tokens: int, num_heads: int, num_keys: int, size: int, dtype: Any = torch.float32, seed: int = 0
) -> list[Tensor]:
    """query, key and value as models hand them over: [1, heads, tokens, size], seen through a transpose."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, num_tokens, count, size) for count in (num_heads, num_keys, num_keys)]
    tensors = (2 * torch.randn(shape, generator=generator) for shape in shapes)
    return [tensor.to(dtype).transpose(1, 2).requires_grad_() for tensor in tensors]


def attend(inputs: list[Tensor], lengths: list[int], scale: float | None = None, **others: Any) -> Tensor:
    result, weights = packed_attention(
        None, *inputs, None, boundaries=make_boundaries(lengths), scaling=scale, **others
    )
    assert weights is None
    return result


def reference(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> Tensor:
    """[1, T, H, D] in fp64."""
    group = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in zip(*(tensor[0].split(lengths, dim=1) for tensor in (query, key, value)), strict=True):
        k, v = (tensor.repeat_interleave(group, dim=0) for tensor in (k, v))
        scores = q @ k.transpose(1, 2) * scale
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        outputs.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v)
    return torch.cat(outputs, dim=1).transpose(0, 1)[None]


def assert_near(
    output: Tensor,
    inputs: list[Tensor],
    expected: Tensor,
    exact_inputs: list[Tensor],
    tolerance: float,
    seed: int,
) -> None:
    """The output, and the gradients of its inputs for a random gradient of it, are those expected in fp64."""
    dtype = inputs[0].dtype
    assert (output.dtype, output.shape) == (dtype, expected.shape)
    assert (output.double() - expected).norm() < tolerance * expected.norm()
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    gradients = torch.autograd.grad(output, inputs, grad)
    expected_gradients = torch.autograd.grad(expected, exact_inputs, grad.double())
    least = least_norm(dtype, expected_gradients)
    tolerance *= 1 if kernels.can_compute(*inputs) else 4  # torch's own, where probabilities are near 1
    for got, right in zip(gradients, expected_gradients, strict=True):
        assert (got.dtype, got.shape) == (dtype, right.shape)
        assert (got.double() - right).norm() < tolerance * max(right.norm(), least)


def least_norm(dtype: Any, gradients: Any) -> Tensor:
    """Smaller gradients have their errors measured by this norm: where a token sees hardly more than itself,
    those of q and k are small differences of large numbers. In fp32 the tolerance times this is 8 roundings
    of the largest."""
    share = 1e-1 if dtype == torch.float32 else 1e-2
    return share * max(gradient.norm() for gradient in gradients)


@fp32_and_bf16
@any_sequence
@given(lengths=lists_of_lengths, heads=heads, size=st.sampled_from([8, 16, 20]), seed=st.integers(0, 999))
@example(lengths=[BLOCK, BLOCK, 1], heads=(4, 2), size=16, seed=0)
@example(lengths=[1, 2 * BLOCK + 1, BLOCK - 1], heads=(6, 1), size=8, seed=0)
@example(lengths=[1], heads=(2, 2), size=8, seed=0)
@example(lengths=[5], heads=(2, 2), size=16, seed=303)  # probabilities near 1
@example(lengths=[1, 2], heads=(4, 4), size=8, seed=1)
def test_output_and_gradients_are_those_of_each_example_alone(dtype, tolerance, lengths, heads, size, seed):
    scale = 0.3
    inputs = random_inputs(sum(lengths), *heads, size, dtype, seed)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = reference(*exact, lengths, scale)
    output = attend(inputs, lengths, scale)
    assert_near(output, inputs, expected, exact, tolerance, seed)


def expand(tensor: Tensor, lengths: list[int], prefix: int) -> Tensor:
    """[1, heads, tokens, size] in which each example has its own copy of the shared prefix."""
    shared, *own = tensor.split([prefix, *lengths], dim=2)
    return torch.cat([part for one in own for part in (shared, one)], dim=2)


@fp32_and_bf16
@any_sequence
@given(lengths=lists_of_lengths, prefix=st.integers(1, 150), heads=heads, seed=st.integers(0, 999))
@example(lengths=[BLOCK, BLOCK, 1], prefix=BLOCK, heads=(4, 2), seed=0)
@example(lengths=[1, 1], prefix=1, heads=(2, 2), seed=0)
@example(lengths=[3, 200, 200], prefix=17, heads=(6, 2), seed=0)
def test_a_shared_prefix_counts_as_if_each_example_had_its_own(
    dtype, tolerance, lengths, prefix, heads, seed
):
    scale, size = 0.3, 8
    inputs = random_inputs(prefix + sum(lengths), *heads, size, dtype, seed)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    whole = [length + prefix for length in lengths]
    expanded = reference(*(expand(tensor, lengths, prefix) for tensor in exact), whole, scale)
    rows = [part[:, prefix:] for part in expanded.split(whole, dim=1)]
    expected = torch.cat([expanded[:, :prefix], *rows], dim=1)
    output, _ = packed_attention(
        None, *inputs, None, boundaries=make_boundaries(lengths, prefix), scaling=scale
    )
    assert_near(output, inputs, expected, exact, tolerance, seed)


def test_the_sequences_are_what_a_variable_length_kernel_takes():
    sequences = separate(make_boundaries([2, 3], 2))
    assert (sequences.num_queries, sequences.num_keys) == ([2, 2, 3], [2, 4, 5])
    assert sequences.query_starts.tolist() == [0, 2, 4, 7]
    assert sequences.key_starts.tolist() == [0, 2, 6, 11]
    assert sequences.shared.key_indices.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6]
    assert sequences.shared.copies.tolist() == [0, 1, 2, 3, 6, 7]
    assert sequences.shared.groups == ((3, 2),)
    assert sequences.shared.own.tolist() == [4, 5, 8, 9, 10]
    assert sequences.shared.order is None
    boundaries = make_boundaries([2, 3])
    alone = separate(boundaries)
    assert (alone.num_queries, alone.num_keys, alone.shared) == ([2, 3], [2, 3], None)
    assert alone.query_starts is alone.key_starts is boundaries.starts


def test_a_branch_is_a_sequence_with_the_keys_of_what_it_continues():
    sequences = separate(make_boundaries([6, 1], 1, [[Branch(4, 3), Branch(6, 2)], []]))
    assert (sequences.num_queries, sequences.num_keys) == ([1, 3, 2, 1, 1], [1, 4, 5, 3, 2])
    shared = sequences.shared
    assert shared.key_indices.tolist() == [0, 0, 1, 2, 3, 0, 1, 2, 4, 5, 0, 1, 6, 0, 7]
    assert shared.groups == ((5, 1), (3, 1), (2, 1))  # the tokens 0; 1; 2
    assert shared.copies.tolist() == [0, 1, 5, 10, 13, 2, 6, 11, 3, 7]
    assert shared.own.tolist() == [4, 8, 9, 12, 14]
    assert shared.order is None
    apart = separate(make_boundaries([3, 2], 0, [[Branch(2, 1)], []])).shared
    assert apart.groups == ((2, 1),)
    assert apart.order is None
    alone = separate(make_boundaries([3, 2], 0, [[Branch(2, 0)], []]))
    assert (alone.num_queries, alone.shared) == ([2, 1, 2], None)
    assert alone.query_starts.tolist() == alone.key_starts.tolist() == [0, 2, 3, 5]
    later = separate(make_boundaries([2, 3], 0, [[], [Branch(2, 1)]])).shared
    assert later.copies.tolist() == [2, 4]
    assert later.own.tolist() == [0, 1, 3, 5]
    assert later.order.tolist() == [1, 2, 0, 3, 4]


class Comb(NamedTuple):
    """The branches of some examples; `lengths` include what they share."""

    lengths: list[int]
    branches: list[list[Branch]]
    prefix: int = 0

    @property
    def boundaries(self) -> Boundaries:
        return make_boundaries([length - self.prefix for length in self.lengths], self.prefix, self.branches)

    @property
    def num_tokens(self) -> int:
        return self.prefix + sum(length - self.prefix for length in self.lengths)


@st.composite
def combs(draw: st.DrawFn) -> Comb:
    prefix = draw(st.just(0) | st.integers(1, 90))
    lengths, branches = [], []
    for _ in range(draw(st.integers(1, 3))):
        length = trunk = prefix + draw(st.integers(1, 100))
        own = []
        for _ in range(draw(st.integers(0, 3))):
            lowest = 0 if prefix == 0 else prefix + 1
            own.append(Branch(length, draw(st.integers(lowest, trunk))))
            length += draw(st.integers(1, 10) | st.integers(1, 100))
        lengths.append(length)
        branches.append(own)
    return Comb(lengths, branches, prefix)


def comb_reference(query: Tensor, key: Tensor, value: Tensor, comb: Comb, scale: float) -> Tensor:
    """[1, T, H, D] in fp64, with a mask drawn token by token."""
    prefix, sees, end = comb.prefix, torch.eye(comb.num_tokens, dtype=torch.bool), comb.prefix
    for query_place in range(prefix):
        sees[query_place, : query_place + 1] = True
    for length, branches in zip(comb.lengths, comb.branches, strict=True):
        first = end
        for own in range(length - prefix):
            place, start, seen = first + own, first, own + 1
            for branch in branches:
                if own >= branch.start - prefix:
                    start, seen = first + branch.start - prefix, own + 1 - (branch.start - prefix)
                    sees[place] = False
                    sees[place, first : first + branch.attach - prefix] = True
            sees[place, :prefix] = True
            sees[place, start : start + seen] = True
        end += length - prefix
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~sees, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


TWO_COMBS = Comb([75, 60, 20], [[Branch(40, 33), Branch(44, 40)], [], [Branch(12, 7), Branch(19, 7)]], 5)


@fp32_and_bf16
@any_sequence
@given(comb=combs(), heads=heads, seed=st.integers(0, 999))
@example(comb=Comb([20], [[Branch(5, 0), Branch(9, 0)]]), heads=(2, 2), seed=0)
@example(comb=TWO_COMBS, heads=(4, 2), seed=0)
@example(comb=Comb([2 * BLOCK], [[Branch(BLOCK, BLOCK)]]), heads=(6, 1), seed=0)
def test_a_branch_attends_to_itself_and_to_what_it_continues(dtype, tolerance, comb, heads, seed):
    inputs = random_inputs(comb.num_tokens, *heads, 8, dtype, seed)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = comb_reference(*exact, comb, 0.3)
    output, _ = packed_attention(None, *inputs, None, boundaries=comb.boundaries, scaling=0.3)
    assert_near(output, inputs, expected, exact, tolerance, seed)


def test_the_default_scale_is_one_over_the_root_of_the_head_size():
    inputs = random_inputs(9, 2, 1, 16)
    assert torch.equal(attend(inputs, [4, 5]), attend(inputs, [4, 5], 0.25))


@fp32_and_bf16
def test_no_example_sees_another(dtype, tolerance):
    lengths = [5, BLOCK + 7, 1, 40]
    inputs = random_inputs(sum(lengths), 4, 2, 8, dtype)
    before = attend(inputs, lengths).split(lengths, dim=1)
    for changed in range(len(lengths)):
        others = random_inputs(sum(lengths), 4, 2, 8, dtype, seed=1)
        mixed = []
        for old, new in zip(inputs, others, strict=True):
            parts = list(old.split(lengths, dim=2))
            parts[changed] = new.split(lengths, dim=2)[changed]
            mixed.append(torch.cat(parts, dim=2))
        after = attend(mixed, lengths).split(lengths, dim=1)
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            assert torch.allclose(old, new, rtol=0, atol=1e-6) == (number != changed)


def test_no_gradient_flows_between_examples():
    lengths = [5, BLOCK + 7, 40]
    inputs = random_inputs(sum(lengths), 4, 2, 8)
    for chosen, output in enumerate(attend(inputs, lengths).split(lengths, dim=1)):
        for gradient in torch.autograd.grad(output.square().sum(), inputs, retain_graph=True):
            norms = [float(part.norm()) for part in gradient.split(lengths, dim=2)]
            assert [norm > 0 for norm in norms] == [number == chosen for number in range(len(lengths))]


def test_no_token_sees_a_later_one():
    lengths = [BLOCK + 20]
    inputs = random_inputs(*lengths, 2, 1, 8)
    before = attend(inputs, lengths)
    with torch.no_grad():
        for tensor in inputs:
            tensor[:, :, 50:] += 1
    after = attend(inputs, lengths)
    assert torch.allclose(before[:, :50], after[:, :50], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 50:], after[:, 50:], atol=0.01)


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"sliding_window": 6}, "sliding window"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "is_causal"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
    ],
)
def test_an_argument_it_does_not_support_is_refused_by_name(others, named):
    with pytest.raises(NotImplementedError, match=named):
        attend(random_inputs(10, 2, 1, 8), [3, 7], **others)


@pytest.mark.parametrize(
    "others",
    [
        {"softcap": None, "s_aux": None, "sliding_window": None, "dropout": 0.0},
        {"sliding_window": 7},
        {"is_causal": True},
        {"is_causal": None},
        {"position_ids": torch.arange(10)[None], "use_cache": False, "output_attentions": True},
    ],
)
def test_arguments_that_change_nothing_are_accepted(others):
    inputs = random_inputs(10, 2, 1, 8)
    assert torch.equal(attend(inputs, [3, 7], **others), attend(inputs, [3, 7]))


def test_a_sliding_window_must_hold_a_branch_and_what_it_continues():
    inputs, boundaries = random_inputs(9, 2, 1, 8), make_boundaries([9], 0, [[Branch(5, 4)]])
    expected, _ = packed_attention(None, *inputs, None, boundaries=boundaries)
    output, _ = packed_attention(None, *inputs, None, boundaries=boundaries, sliding_window=8)
    assert torch.equal(output, expected)
    with pytest.raises(NotImplementedError, match="sliding window"):
        packed_attention(None, *inputs, None, boundaries=boundaries, sliding_window=7)


def test_without_boundaries_it_is_transformers_sdpa():
    module = nn.Module()
    module.is_causal, module.num_key_value_groups, module.training = True, 2, False
    inputs = random_inputs(10, 4, 2, 8)
    mask = torch.rand(1, 1, 10, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    for given_mask in (None, mask | torch.eye(10, dtype=torch.bool)):
        expected, _ = sdpa_attention_forward(module, *inputs, given_mask, scaling=0.3)
        output, _ = packed_attention(module, *inputs, given_mask, scaling=0.3)
        assert torch.equal(output, expected)


# On a GPU


@pytest.fixture(params=[(8, 6), (7, 5)], ids=["ampere", "turing"])
def card(request, monkeypatch) -> Iterator[tuple[tuple[int, int], list[str]]]:
    """The capability of a GPU that is imitated, and the names of the kernels that are called on it."""
    kernels.disable()
    with attention_card(monkeypatch, request.param) as called:
        yield request.param, called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize(("count", "size"), [((4, 2), 16), ((3, 1), 20), ((2, 2), 8)])
def test_on_a_gpu_one_kernel_computes_all_examples(card, dtype, prefix, count, size):
    (capability, called), lengths = card, [5, 40, 1, 3]
    inputs = random_inputs(prefix + sum(lengths), *count, size, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    whole = [length + prefix for length in lengths]
    expanded = reference(*(expand(tensor, lengths, prefix) for tensor in exact), whole, 0.3)
    rows = [part[:, prefix:] for part in expanded.split(whole, dim=1)]
    expected = torch.cat([expanded[:, :prefix], *rows], dim=1)
    output, _ = packed_attention(
        None, *inputs, None, boundaries=make_boundaries(lengths, prefix), scaling=0.3
    )
    assert_near(output, inputs, expected, exact, 1e-5 if dtype == torch.float32 else 2e-2, seed=0)
    kind = "flash" if capability >= (8, 0) and dtype != torch.float32 else "efficient"
    assert called == [f"{kind}_forward", f"{kind}_backward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("comb", [TWO_COMBS, Comb([30], [[Branch(20, 20)]]), Comb([9], [[Branch(4, 0)]])])
def test_on_a_gpu_one_kernel_computes_all_branches(card, dtype, comb):
    _, called = card
    inputs = random_inputs(comb.num_tokens, 4, 2, 16, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = comb_reference(*exact, comb, 0.3)
    output, _ = packed_attention(None, *inputs, None, boundaries=comb.boundaries, scaling=0.3)
    assert_near(output, inputs, expected, exact, 1e-5 if dtype == torch.float32 else 2e-2, seed=0)
    assert len(called) == 2


def test_on_a_gpu_no_copy_of_what_branches_continue_is_kept(card):
    comb = Comb([90], [[Branch(50 + 10 * number, 50) for number in range(4)]])
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        inputs = random_inputs(comb.num_tokens, 4, 2, 16, torch.bfloat16)
        packed_attention(None, *inputs, None, boundaries=comb.boundaries)
    assert separate(comb.boundaries).num_keys == [50, 60, 60, 60, 60]
    assert sum(x.numel() for x in saved) < 2 * sum(x.numel() for x in inputs)


def test_on_a_gpu_the_model_decides_the_scale_and_the_size_of_the_values(card):
    query, key, value = random_inputs(9, 2, 2, 16, torch.bfloat16)
    wide, _ = packed_attention(None, query, key, value, None, boundaries=make_boundaries([4, 5]))
    narrow, _ = packed_attention(None, query, key, value[..., :5], None, boundaries=make_boundaries([4, 5]))
    assert torch.equal(narrow, wide[..., :5])


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "reason"),
    [
        ((8, 0), torch.bfloat16, 256, None),
        ((8, 6), torch.float16, 64, None),
        ((8, 6), torch.float16, 256, None),
        ((9, 0), torch.bfloat16, 200, None),
        ((12, 0), torch.bfloat16, 128, None),
        ((7, 5), torch.float16, 64, "compute capability 8.0, and this GPU has 7.5"),
        ((8, 9), torch.float32, 64, "16 bits only"),
        ((9, 0), torch.bfloat16, 264, "at most 256 numbers, and these have 264"),
        ((8, 6), torch.bfloat16, 200, "cannot train heads of 200 numbers"),
        ((8, 9), torch.bfloat16, 224, "cannot train heads of 224 numbers"),
        ((12, 0), torch.bfloat16, 200, "cannot train heads of 200 numbers"),
    ],
)
def test_flash_attention_is_not_used_where_it_would_fail(monkeypatch, capability, dtype, head_size, reason):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    obstacle = flash_obstacle(capability, dtype, head_size)
    assert obstacle is None if reason is None else reason in (obstacle or "")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert flash_obstacle(capability, dtype, head_size) is not None


def test_the_name_of_the_kernel_says_why_it_is_not_flash_attention(card):
    capability, _ = card
    name, reason = describe_kernel(torch.device("cpu"), torch.float16, 64)
    if capability == (7, 5):
        assert name == "memory-efficient kernel"
        assert "8.0" in reason
    else:
        assert (name, reason) == ("FlashAttention", "")
    name, reason = describe_kernel(torch.device("cpu"), torch.float32, 64)
    assert name == "memory-efficient kernel"
    assert reason


class Operations(TorchDispatchMode):
    """The names of the operations, and the largest of their results that are tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        self.names.append(function._schema.name.removeprefix("aten::"))
        for result in results if isinstance(results, list | tuple) else [results]:
            if isinstance(result, Tensor):
                self.largest = max(self.largest, result.numel())
        return results


@pytest.mark.parametrize(
    "boundaries",
    [make_boundaries([70, 5, 33]), make_boundaries([70, 5, 33], 13), TWO_COMBS.boundaries],
    ids=["no prefix", "prefix", "branches"],
)
def test_no_gradient_is_filled_with_zeros_or_scattered(card, boundaries):
    inputs = random_inputs(int(boundaries.starts[-1]), 4, 2, 16, torch.float16)
    with Operations() as operations:
        output, _ = packed_attention(None, *inputs, None, boundaries=boundaries)
        torch.autograd.grad(output, inputs, output.detach())
    scattering = {"index_put", "_index_put_impl_", "index_add", "select_backward", "slice_backward"}
    assert not {*operations.names} & {*scattering, "zeros", "zero_", "new_zeros", "fill_"}


def test_no_score_is_held_for_every_pair_of_tokens(card):
    tokens = 512
    inputs = random_inputs(tokens, 2, 1, 8, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True), Operations() as operations:
        packed_attention(None, *inputs, None, boundaries=make_boundaries([tokens]))
    assert operations.largest < tokens * tokens


@pytest.mark.parametrize("prefix", [0, 6])
def test_autocast_rounds_nothing_that_is_computed_in_fp32(prefix):
    lengths = [30, 11]
    inputs = random_inputs(prefix + sum(lengths), 4, 2, 16, torch.bfloat16)
    boundaries = make_boundaries(lengths, prefix)
    expected, _ = packed_attention(None, *inputs, None, boundaries=boundaries)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = packed_attention(None, *inputs, None, boundaries=boundaries)
    assert torch.equal(output, expected)


def test_what_is_kept_of_one_sequence_is_not_used_for_another_with_its_lengths():
    kernels.disable()
    inputs = random_inputs(9, 2, 1, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        packed_attention(None, *inputs, None, boundaries=make_boundaries([2, 4], 3))
    output, _ = packed_attention(None, *inputs, None, boundaries=make_boundaries([2, 4], 3))
    assert output.isfinite().all()
