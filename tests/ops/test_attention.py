"""Attention within each example of a packed sequence, against a plain computation in fp64, by example."""

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from finetune.data.collate import Boundaries
from finetune.ops import kernels
from finetune.ops.attention import _sequences, packed_attention

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


def make_boundaries(lengths: list[int], prefix: int = 0) -> Boundaries:
    starts = [prefix + sum(lengths[:number]) for number in range(len(lengths) + 1)]
    return Boundaries(tuple(lengths), torch.tensor(starts, dtype=torch.int32), prefix)


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
    sequences = _sequences((2, 3), 2, torch.device("cpu"))
    assert (sequences.num_queries, sequences.num_keys) == ([2, 2, 3], [2, 4, 5])
    assert sequences.query_starts.tolist() == [0, 2, 4, 7]
    assert sequences.key_starts.tolist() == [0, 2, 6, 11]
    assert sequences.key_indices.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6]
    alone = _sequences((2, 3), 0, torch.device("cpu"))
    assert (alone.num_queries, alone.num_keys, alone.key_indices) == ([2, 3], [2, 3], None)


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


def test_without_boundaries_it_is_transformers_sdpa():
    module = nn.Module()
    module.is_causal, module.num_key_value_groups, module.training = True, 2, False
    inputs = random_inputs(10, 4, 2, 8)
    mask = torch.rand(1, 1, 10, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    for given_mask in (None, mask | torch.eye(10, dtype=torch.bool)):
        expected, _ = sdpa_attention_forward(module, *inputs, given_mask, scaling=0.3)
        output, _ = packed_attention(module, *inputs, given_mask, scaling=0.3)
        assert torch.equal(output, expected)
