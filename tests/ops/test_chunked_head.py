"""The head in chunks, against a plain fp64 computation with all logits at once."""

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from live import LiveBytes
from torch import Tensor
from torch.nn.functional import cross_entropy

from finetune.ops import operators, torch_makers
from finetune.ops.chunked_head import (
    ChunkedTokenSums,
    bytes_per_logit,
    chunked_token_stats,
    tokens_per_chunk,
)
from finetune.ops.torch_makers import ROWS

any_batch = settings(deadline=None, max_examples=60)
fp32_and_bf16 = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)


@pytest.fixture(autouse=True)
def _with_and_without_kernels(cpu_kernels: None) -> None:
    pass


def random_batch(
    num_tokens: int,
    vocabulary: int,
    size: int = 12,
    largest: float = 6.0,
    dtype: Any = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and target_ids, with logits of up to `largest`; every other target is the likeliest."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, size, generator=generator)
    weight = torch.randn(vocabulary, size, generator=generator)
    if num_tokens:
        hidden *= largest / (hidden @ weight.t()).abs().max()
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype)
    target_ids = torch.randint(vocabulary, (num_tokens,), generator=generator)
    target_ids[::2] = (hidden @ weight.t()).argmax(-1)[::2]
    return hidden, weight, target_ids


def reference(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> tuple[list[float], Tensor]:
    """The sums of logits that are rounded as the model rounds them, and the gradient of the nll, in fp64."""
    exact = hidden.detach().double().requires_grad_()
    rounded = (hidden @ weight.t()).detach().double()
    logits = exact @ weight.double().t()
    logits = logits + (rounded - logits).detach()
    nll = cross_entropy(logits, target_ids, reduction="sum")
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum()
    correct = (rounded.argmax(-1) == target_ids).sum()
    (gradient,) = torch.autograd.grad(nll, exact)
    return [float(nll.detach()), float(entropy.detach()), float(correct)], gradient


@fp32_and_bf16
@any_batch
@given(
    num_tokens=st.integers(0, 70),
    vocabulary=st.integers(2, 300),
    chunk=st.sampled_from([1, 5, ROWS, ROWS + 1, 40, 1000]),
    largest=st.sampled_from([1.0, 6.0, 80.0]),
    seed=st.integers(0, 999),
)
@example(num_tokens=0, vocabulary=9, chunk=5, largest=6.0, seed=0)
@example(num_tokens=ROWS, vocabulary=9, chunk=1000, largest=6.0, seed=0)
@example(num_tokens=3 * ROWS + 1, vocabulary=300, chunk=2 * ROWS, largest=80.0, seed=0)
def test_sums_and_gradient_are_those_of_all_logits(
    dtype, tolerance, num_tokens, vocabulary, chunk, largest, seed
):
    hidden, weight, target_ids = random_batch(num_tokens, vocabulary, 12, largest, dtype, seed)
    expected, expected_gradient = reference(hidden, weight, target_ids)
    sums = ChunkedTokenSums.apply(hidden, weight, target_ids, chunk)
    assert (sums.shape, sums.dtype) == ((3,), torch.float32)
    # The sums take the rounded logits as they are, so they are exact in bf16 too.
    assert sums.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5 * max(1, num_tokens))
    (gradient,) = torch.autograd.grad(sums[0] * 0.37, hidden)
    assert (gradient.dtype, gradient.shape) == (dtype, hidden.shape)
    error = (gradient.double() - 0.37 * expected_gradient).norm()
    assert error <= tolerance * 0.37 * expected_gradient.norm() + 1e-6


@fp32_and_bf16
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits_make_no_inf_and_no_nan(dtype, tolerance, sign):
    hidden, weight, target_ids = random_batch(40, 200, largest=80.0 * 1.1, dtype=dtype)
    hidden = (sign * hidden).detach().requires_grad_()
    assert (hidden @ weight.t()).abs().max() > 80
    sums = ChunkedTokenSums.apply(hidden, weight, target_ids, 7)
    (gradient,) = torch.autograd.grad(sums[0], hidden)
    assert sums.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_the_values_that_are_added_up_are_those_of_each_token(chunk):
    hidden, weight, target_ids = random_batch(40, 200, largest=6.0, dtype=torch.float32)
    stats = torch.full((40, 3), float("nan"))
    sums = ChunkedTokenSums.apply(hidden, weight, target_ids, chunk, None, None, stats)
    assert torch.equal(sums, ChunkedTokenSums.apply(hidden, weight, target_ids, chunk))
    assert torch.equal(stats, chunked_token_stats(hidden.detach(), weight, target_ids, chunk))
    assert torch.allclose(stats.sum(0), sums)
    assert torch.autograd.grad(sums[0], hidden)[0].any()


def test_of_equally_likely_tokens_the_first_one_counts_as_in_argmax():
    weight = torch.tensor([[0.0], [1.0], [1.0], [0.5]])
    hidden = torch.ones(4, 1)
    target_ids = torch.tensor([1, 2, 1, 3])
    assert ChunkedTokenSums.apply(hidden, weight, target_ids, 3)[2] == 2
    assert ((hidden @ weight.t()).argmax(-1) == target_ids).sum() == 2


def test_only_the_nll_has_a_gradient_and_the_head_has_none():
    hidden, weight, target_ids = random_batch(9, 30)
    sums = ChunkedTokenSums.apply(hidden, weight.requires_grad_(), target_ids, 4)
    (sums * torch.tensor([1.0, 5.0, 7.0])).sum().backward()
    assert weight.grad is None
    _, expected = reference(hidden, weight.detach(), target_ids)
    assert torch.allclose(hidden.grad.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_target_tokens", [100, 257, 1000])
def test_in_bf16_the_gradient_is_scaled_to_within_half_a_step(num_target_tokens):
    # 257: products with numbers just below a power of two are all rounded the same way.
    hidden, weight, target_ids = random_batch(64, 300, dtype=torch.bfloat16)
    _, exact = reference(hidden, weight, target_ids)
    exact /= num_target_tokens
    nll = ChunkedTokenSums.apply(hidden, weight, target_ids, 16)[0]
    (gradient,) = torch.autograd.grad(nll / num_target_tokens, hidden)
    scale = (gradient.double() * exact).sum() / exact.square().sum()
    assert abs(scale - 1) < (2**-9 if num_target_tokens == 257 else 5e-4)


def test_a_gradient_of_zero_gives_zeros():
    hidden, weight, target_ids = random_batch(9, 30)
    (0 * ChunkedTokenSums.apply(hidden, weight, target_ids, 4)[0]).backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_the_gradient_of_the_hidden_states_is_all_that_is_kept(chunk):
    hidden, weight, target_ids = random_batch(50, 300)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        ChunkedTokenSums.apply(hidden, weight, target_ids, chunk)
    assert [tuple(tensor.shape) for tensor in kept] == [(50, 12)]


def test_no_more_than_a_chunk_of_logits_is_there_at_a_time():
    hidden, weight, target_ids = random_batch(500, 300)
    with LiveBytes() as live:
        ChunkedTokenSums.apply(hidden, weight, target_ids, 40)
    values = 40 * 3 * 4
    assert live.most <= (40 * 300 + 500 * 12) * 4 + 2 * values + 1024


def test_without_gradients_it_gives_the_same_sums_and_keeps_nothing():
    hidden, weight, target_ids = random_batch(50, 300)
    expected = ChunkedTokenSums.apply(hidden, weight, target_ids, 7)
    kept = []
    with (
        torch.no_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t),
    ):
        sums = ChunkedTokenSums.apply(hidden, weight, target_ids, 7)
    assert torch.equal(sums, expected)
    assert not sums.requires_grad
    assert kept == []


def test_the_inputs_stay_as_they_are():
    hidden, weight, target_ids = random_batch(20, 30)
    before = [tensor.clone() for tensor in (hidden, weight, target_ids)]
    ChunkedTokenSums.apply(hidden, weight, target_ids, 6)[0].backward()
    assert all(torch.equal(old, new) for old, new in zip(before, (hidden, weight, target_ids), strict=True))


@given(
    budget=st.integers(1, 4096),
    vocabulary=st.integers(2, 2**21),
    size=st.sampled_from([2, 4, 10]),
)
def test_a_chunk_keeps_to_its_budget_uses_it_and_has_a_token_at_least(budget, vocabulary, size):
    chunk = tokens_per_chunk(budget, vocabulary, size)
    assert chunk >= 1
    assert chunk == 1 or chunk * vocabulary * size <= budget * 1024 * 1024
    assert (chunk + 1) * vocabulary * size > budget * 1024 * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_budget_counts_what_torchs_operations_hold_of_a_chunk_on_a_gpu(monkeypatch, dtype):
    """There they take a whole chunk at a time, as here with ROWS as large."""
    monkeypatch.setattr(torch_makers, "ROWS", 64)
    tokens, vocabulary = 64, 5000
    with LiveBytes() as live:
        logits = torch.randn(tokens, vocabulary).to(dtype)
        live.restart()
        torch_makers.token_stats(logits, torch.arange(tokens), True)
    counted = bytes_per_logit(dtype, torch.device("cuda"))
    assert live.most / (tokens * vocabulary) == pytest.approx(counted, rel=0.02)


def test_the_budget_counts_the_logits_alone_where_a_kernel_replaces_them(monkeypatch):
    monkeypatch.setattr(operators, "makers", lambda _: {"token_stats": operators.Maker("Triton")})
    assert bytes_per_logit(torch.float16, torch.device("cuda")) == 2
    assert bytes_per_logit(torch.float32, torch.device("cpu")) == 4
