"""Every maker of every operator against one fp64 reference: torch's operations, C++, and Triton interpreted.

Triton's interpreter runs its kernels on a CPU, in a process of its own: it must be on when Triton is loaded.
Numpy has no bf16: the interpreter truncates to it, and multiplies its bits as integers. For these tests, it
rounds and multiplies as a GPU does.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import ROOT, require_compiler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from finetune.ops import dropout, kernels, operators, torch_makers, triton_makers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU = torch.device("cpu")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(IS_INTERPRETED, reason="this is the process with the interpreter")
def test_triton_interpreted():
    """The tests of this file with Triton's kernels."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n0",
        "-p",
        "no:cacheprovider",
        "-k",
        "Triton and not interpreted",
    ]
    done = subprocess.run(
        [*command, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    if not IS_INTERPRETED:
        pytest.skip("needs Triton's interpreter")
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        _give_it_bf16(interpreter, patch)
        triton_makers._load()
        patch.setattr(triton_makers, "_has_products", True)
        yield
        triton_makers.disable()


def _give_it_bf16(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import triton.language as tl

    convert = interpreter._convert_float
    multiply = interpreter.InterpreterBuilder.create_dot

    def as_fp32(bits: Any) -> Any:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def converted(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return as_fp32(data).view(np.uint32)
        return convert(data, source, target, mode)

    def product(self: Any, a: Any, b: Any, *others: Any) -> Any:
        handles = [
            interpreter.TensorHandle(as_fp32(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        ]
        return multiply(self, *handles, *others)

    patch.setattr(interpreter, "_convert_float", converted)
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", product)


@pytest.fixture(params=["Triton"] if IS_INTERPRETED else ["torch", "C++"])
def maker(request: pytest.FixtureRequest) -> Any:
    if request.param == "torch":
        return torch_makers
    if request.param == "Triton":
        request.getfixturevalue("interpreter")
        return triton_makers
    require_compiler()
    kernels.enable()
    return kernels


@pytest.fixture(params=["Triton"] if IS_INTERPRETED else ["torch"])
def product_maker(request: pytest.FixtureRequest) -> Any:
    """A maker of the products with a dropped-out input: C++ makes none."""
    if request.param == "torch":
        return torch_makers
    request.getfixturevalue("interpreter")
    return triton_makers


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    result: torch.dtype = DTYPES[request.param]
    return result


@pytest.fixture(autouse=True)
def _made_of_what_it_takes(request: pytest.FixtureRequest) -> None:
    if {"maker", "dtype"} <= set(request.fixturenames):
        taken = request.getfixturevalue("maker") is not kernels
        if not taken and request.getfixturevalue("dtype") not in kernels.DTYPES:
            pytest.skip("torch serves fp16 on a CPU")


some = settings(
    deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
seeds = st.integers(0, 10**6)
rows = st.integers(0, 5)
sizes = st.sampled_from([1, 2, 7, 16, 33, 64, 130])
spreads = st.sampled_from([0.01, 1.0, 30.0])


def numbers(seed: int, *shape: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
    return (spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_rounded_once(result: Tensor, exact: Tensor, dtype: torch.dtype, magnitude: float = 0.0) -> None:
    """`result` has the type, and differs from `exact` by the rounding to it, and by what fp32 rounds.

    `magnitude` is that of the terms that cancel in `exact`, if it is greater than those of the result.
    """
    assert result.dtype == dtype
    assert result.shape == exact.shape
    assert exact.dtype == torch.float64
    finest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    largest = max(magnitude, float(exact.abs().max())) if exact.numel() else 0.0
    bound = exact.abs() * torch.finfo(dtype).eps / 2 + finest + 2e-6 * largest
    difference = (result.double() - exact).abs()
    assert bool((difference <= bound).all()), f"{float((difference / bound).max())} times the bound"


def exact_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, weight = x.double(), weight.double()
    scale = (x.square().mean(-1) + eps).rsqrt()
    return x * scale[:, None] * weight, scale


@some
@given(rows=rows, size=sizes, spread=spreads, seed=seeds)
def test_a_norm_and_its_residual_sum(maker, dtype, rows, size, spread, seed):
    x, delta = (numbers(seed + i, rows, size, dtype=dtype, spread=spread) for i in range(2))
    weight = numbers(seed + 2, size, dtype=dtype)
    y, scale = maker.rms_norm(x, weight, 1e-6)
    exact_y, exact_scale = exact_norm(x, weight, 1e-6)
    assert_rounded_once(y, exact_y, dtype)
    assert_rounded_once(scale, exact_scale, torch.float32)
    assert_rounded_once(maker.apply_rms_norm(x, weight, scale), exact_y, dtype)

    total, y, scale = maker.add_rms_norm(x, delta, weight, 1e-6)
    assert torch.equal(total, (x.float() + delta.float()).to(dtype))
    exact_y, exact_scale = exact_norm(total, weight, 1e-6)
    assert_rounded_once(y, exact_y, dtype)
    assert_rounded_once(scale, exact_scale, torch.float32)


@some
@given(rows=rows, size=sizes, spread=spreads, seed=seeds, is_inside=st.booleans())
def test_a_norms_gradient(maker, dtype, rows, size, spread, seed, is_inside):
    x = numbers(seed, rows, size, dtype=dtype, spread=spread)
    dy, dtotal = (numbers(seed + i, rows, size, dtype=dtype) for i in (1, 2))
    weight = numbers(seed + 3, size, dtype=dtype)
    _, scale = exact_norm(x, weight, 1e-6)
    dx = maker.rms_norm_backward(x, weight, scale.float(), dy, dtotal if is_inside else None)
    leaf = x.double().requires_grad_()
    exact_y, _ = exact_norm(leaf, weight, 1e-6)
    (exact,) = torch.autograd.grad(exact_y, leaf, dy.double())
    magnitude = float((scale[:, None] * (dy.double() * weight.double()).abs()).sum(-1).max()) if rows else 0.0
    assert_rounded_once(dx, exact + dtotal.double() if is_inside else exact, dtype, magnitude)


@some
@given(
    tokens=rows,
    heads=st.integers(1, 5),
    half=st.sampled_from([1, 3, 8, 20, 32]),
    beside=st.sampled_from([0, 5]),
    direction=st.sampled_from([1, -1]),
    seed=seeds,
)
def test_rotary_positions(maker, dtype, tokens, heads, half, beside, direction, seed):
    size = 2 * half
    joint = numbers(seed, tokens, heads * size + beside, dtype=dtype)
    x = joint[:, : heads * size].unflatten(1, (heads, size))
    angles = numbers(seed + 1, tokens, half, dtype=torch.float32, spread=3).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    y = maker.rotate(x, cos, sin, direction)
    a, b = x.double().chunk(2, dim=-1)
    c, s = cos.double()[:, None, :half], direction * sin.double()[:, None, :half]
    assert y.is_contiguous()
    assert_rounded_once(y, torch.cat([a * c - b * s, b * c + a * s], dim=-1), dtype, magnitude=4.0)


@some
@given(rows=rows, size=st.sampled_from([1, 7, 64, 1025]), spread=spreads, seed=seeds)
def test_a_gated_silu_and_its_gradient(maker, dtype, rows, size, spread, seed):
    gate_up = numbers(seed, rows, 2 * size, dtype=dtype, spread=spread)
    dy = numbers(seed + 1, rows, size, dtype=dtype)
    leaf = gate_up.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    exact_y = F.silu(gate) * up
    (exact,) = torch.autograd.grad(exact_y, leaf, dy.double())
    assert_rounded_once(maker.gated_silu(gate_up), exact_y.detach(), dtype)
    d_gate_up, y = maker.gated_silu_backward(gate_up, dy)
    assert_rounded_once(y, exact_y.detach(), dtype)
    assert_rounded_once(d_gate_up, exact, dtype)


def exact_stats(logits: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.double().log_softmax(-1)
    p = log_p.exp()
    nll = -log_p.gather(-1, target_ids[:, None])[:, 0]
    is_likeliest = (logits.argmax(-1) == target_ids).double()
    gradient = p.scatter_add(-1, target_ids[:, None], torch.full_like(nll, -1)[:, None])
    return torch.stack([nll, -torch.xlogy(p, p).sum(-1), is_likeliest], dim=1), gradient


@some
@given(
    rows=rows,
    size=st.sampled_from([1, 2, 31, 300, 4097, 9000]),
    spread=st.sampled_from([0.0, 0.3, 5.0, 200.0]),
    seed=seeds,
)
def test_the_stats_of_tokens_and_their_gradient(maker, dtype, rows, size, spread, seed):
    logits = numbers(seed, rows, size, dtype=dtype, spread=spread)
    target_ids = torch.randint(size, (rows,), generator=torch.Generator().manual_seed(seed))
    target_ids[::2] = logits.argmax(-1)[::2]
    exact, exact_gradient = exact_stats(logits, target_ids)
    kept = logits.clone()
    stats = maker.token_stats(logits, target_ids, False)
    assert torch.equal(logits, kept)
    assert stats.dtype == torch.float32
    assert torch.allclose(stats.double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(maker.token_stats(logits, target_ids, True), stats)
    assert_rounded_once(logits, exact_gradient, dtype, magnitude=10.0)  # exp of a difference of up to 1,000


def test_a_large_vocabulary_costs_no_exactness(maker):
    """One fp32 sum over it would lose its small terms, and each nll be too small."""
    logits = numbers(0, 16, 49_152, dtype=torch.float32)
    logits[:, :64] = 17.0
    target_ids = torch.arange(16) * 3000
    stats = maker.token_stats(logits.clone(), target_ids, False).double()
    exact, _ = exact_stats(logits, target_ids)
    assert float((stats - exact)[:, :2].abs().max()) < 5e-6


def test_a_logit_of_minus_infinity_has_no_share(maker):
    logits = torch.full((2, 5000), -torch.inf)
    logits[:, 4500], logits[:, 4999] = 1.0, 2.0
    logits[1, 7] = torch.finfo(torch.float32).min
    targets = torch.tensor([4500, 4999])
    exact, gradient = exact_stats(logits[:, [4500, 4999]], torch.tensor([0, 1]))
    stats = maker.token_stats(logits, targets, True)
    assert torch.allclose(stats.double(), exact, rtol=1e-5)
    assert torch.allclose(logits[:, [4500, 4999]].double(), gradient, rtol=1e-5)
    assert logits.abs().sum() == logits[:, [4500, 4999]].abs().sum()


@some
@given(rows=rows, size=sizes, seed=seeds)
def test_int8_weights(maker, dtype, rows, size, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (rows, size), dtype=torch.int8, generator=generator)
    largest = torch.rand(rows, generator=generator)
    weight = maker.dequantize_int8(codes, largest, dtype)
    assert weight.dtype == dtype
    assert torch.equal(weight, (codes * (largest / 127)[:, None]).to(dtype))


def test_rows_with_large_values(maker, dtype):
    """Sums of squares, and sums over rows, that fp16 cannot hold, nor bf16 tell apart."""
    x = torch.tensor([[60_000.0, -50_000.0] * 40, [1.0, 16.0] * 40]).to(dtype)
    weight, dy = torch.full((80,), 0.5, dtype=dtype), torch.ones(2, 80, dtype=dtype)
    exact, exact_scale = exact_norm(x, weight, 1e-6)
    y, scale = maker.rms_norm(x, weight, 1e-6)
    assert_rounded_once(y, exact, dtype)
    assert_rounded_once(scale, exact_scale, torch.float32)
    assert maker.rms_norm_backward(x, weight, scale, dy, dy).isfinite().all()
    stats = maker.token_stats(x.clone(), torch.tensor([0, 1]), True)
    assert torch.allclose(stats.double(), exact_stats(x, torch.tensor([0, 1]))[0], rtol=1e-5)


@pytest.mark.parametrize("no_number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 40])
def test_what_is_no_number_stays_none(maker, dtype, no_number, place):
    x = numbers(0, 3, 42, dtype=dtype)
    x[1, place] = no_number
    weight, dy = torch.ones(42, dtype=dtype), numbers(1, 3, 42, dtype=dtype)
    is_fine = torch.tensor([True, False, True])
    y, scale = maker.rms_norm(x, weight, 1e-6)
    total, sum_y, _ = maker.add_rms_norm(dy, x, weight, 1e-6)
    dx = maker.rms_norm_backward(x, weight, scale, dy, None)
    through_residual = maker.rms_norm_backward(dy, weight, torch.ones(3), dy, x)
    turned = maker.rotate(x[:, None], weight.expand(3, 42), weight.expand(3, 42), 1)[:, 0]
    d_gate_up, _ = maker.gated_silu_backward(dy, x[:, :21] + x[:, 21:])
    for result in (y, total, sum_y, dx, through_residual, turned, d_gate_up):
        assert torch.equal(result.isfinite().all(-1), is_fine)
    if no_number != -torch.inf:  # there a logit of -infinity is a token that cannot be
        stats = maker.token_stats(x, torch.tensor([5, 5, 5]), True)
        assert torch.equal(stats[:, :2].isfinite().all(-1), is_fine)
        assert torch.equal(x.isnan().all(-1), ~is_fine)


# Dropout


def pool_of(rate: float, dtype: torch.dtype, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return operators.noise_pool(rate, dtype, CPU)


def test_every_maker_draws_the_same_noise(maker):
    pools = []
    for integer in (torch.int16, torch.int32):
        pool, expected = torch.zeros(2, 8192, dtype=integer)
        for key, rate in ((-(2**63), 0.5), (2**63 - 1, 0.1), (7, 0.0)):
            maker.fill_noise(pool, key, dropout.threshold_of(rate))
            torch_makers.fill_noise(expected, key, dropout.threshold_of(rate))
            assert torch.equal(pool, expected)
            assert set(pool.unique().tolist()) <= {0, -1}
            assert abs(float((pool == 0).float().mean()) - rate) < 0.03
            pools.append(pool.clone())
    assert all(torch.equal(*pair) for pair in zip(pools[:3], pools[3:], strict=True))


def test_the_noise_is_that_of_the_seed():
    a = pool_of(0.5, torch.bfloat16, 3).clone()
    assert torch.equal(pool_of(0.5, torch.float32, 3).to(torch.int16), a)
    for other in (4, 3 + 2**40, 2**64 - 1):
        agreement = (pool_of(0.5, torch.bfloat16, other) == a).float().mean()
        assert abs(float(agreement) - 0.5) < 0.002
    shifted = (a[:-1] == a[1:]).float().mean()
    assert abs(float(shifted) - 0.5) < 0.002
    assert abs(float((a == 0).float().mean()) - 0.5) < 0.002


def test_a_start_locates_aligned_slices_that_lie_apart():
    count = 5 * dropout.SLICE + 3
    for start in (0, 1, dropout.NUM_OFFSETS - 1):
        parts = list(dropout.slices(count, start))
        assert [part.stop - part.start for part, _ in parts] == [dropout.SLICE] * 5 + [3]
        offsets = [masks.start for _, masks in parts]
        assert all(offset % dropout.ALIGNMENT == 0 for offset in offsets)
        assert all(masks.stop <= dropout.POOL_SIZE for _, masks in parts)
        assert min(abs(a - b) for a, b in itertools.pairwise(offsets)) > dropout.SLICE // 4
    torch.manual_seed(0)
    starts = [dropout.draw_start() for _ in range(200)]
    assert len(set(starts)) > 190
    assert min(starts) >= 0
    assert max(starts) < dropout.NUM_OFFSETS


@some
@given(
    tokens=st.sampled_from([0, 1, 5, 70]),
    size=st.sampled_from([1, 7, 64, 130]),
    rank=st.sampled_from([1, 8, 24, 130]),
    start=st.integers(0, dropout.NUM_OFFSETS - 1),
    seed=seeds,
)
def test_products_with_what_dropout_keeps(product_maker, dtype, tokens, size, rank, start, seed):
    x, dx = (numbers(seed + i, tokens, size, dtype=dtype) for i in range(2))
    v, a = (
        numbers(seed + 2 + i, n, m, dtype=dtype) for i, (n, m) in enumerate([(tokens, rank), (rank, size)])
    )
    pool = pool_of(0.4, dtype, seed % 3)
    offset = start * dropout.ALIGNMENT
    kept = -pool[offset : offset + x.numel()].view(x.shape).double()
    dropped = x.double() * kept
    assert_near(product_maker.dropped_product(x, a, pool, start), dropped @ a.double().t(), dtype)
    total = product_maker.dropped_sum(v, x, pool, start)
    assert total.dtype == torch.float32
    assert_near(total, v.double().t() @ dropped, dtype)
    exact = dx.double() + kept * (v.double() @ a.double())
    product_maker.add_dropped(dx, v, a, pool, start)
    assert_near(dx, exact, dtype)


def assert_near(result: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Products may be rounded twice, and summed in another order."""
    assert result.shape == exact.shape
    bound = 2 * torch.finfo(dtype).eps * (1 + exact.abs()) + 1e-5 * (1 + float(exact.abs().sum() > 0) * 30)
    assert bool(((result.double() - exact).abs() <= bound).all())


def test_an_input_of_several_slices_and_a_sum_of_several_parts(product_maker):
    tokens, size = 2 * triton_makers.ROWS_OF_A_SUM + 5, 600
    assert tokens * size > dropout.SLICE
    x = torch.zeros(tokens, size)
    some_rows = torch.tensor([0, 1, 3494, 3495, 3496, tokens - 1])  # a slice ends within row 3,495
    x[some_rows] = numbers(0, len(some_rows), size, dtype=torch.float32)
    v, a = numbers(1, tokens, 3, dtype=torch.float32), numbers(2, 3, size, dtype=torch.float32)
    pool, start = pool_of(0.4, torch.float32, 0), 30_000
    masks = torch.cat([pool[masks] for _, masks in dropout.slices(x.numel(), start)]).view(x.shape)
    dropped = x.double() * -masks.double()
    total = product_maker.dropped_sum(v, x, pool, start)
    assert torch.allclose(total.double(), v.double().t() @ dropped, atol=1e-4)
    if product_maker is torch_makers:  # interpreting hundreds of programs takes long
        u = product_maker.dropped_product(x, a, pool, start)
        assert torch.allclose(u.double(), dropped @ a.double().t(), atol=1e-4)


def test_what_dropout_drops_may_be_no_number(product_maker, dtype):
    x = torch.full((2, 8), torch.nan, dtype=dtype)
    pool = torch.zeros(dropout.POOL_SIZE, dtype=dropout.INTEGERS[dtype.itemsize])
    assert product_maker.dropped_product(x, torch.ones(4, 8, dtype=dtype), pool, 3).eq(0).all()
    dx = torch.ones(2, 8, dtype=dtype)
    product_maker.add_dropped(dx, x[:, :4].contiguous(), torch.ones(4, 8, dtype=dtype), pool, 3)
    assert dx.eq(1).all()


# The table


def examples() -> dict[str, tuple[Any, ...]]:
    x, weight, scale = torch.randn(3, 8), torch.rand(8), torch.rand(3)
    codes, pool = torch.ones(3, 8, dtype=torch.int8), torch.zeros(dropout.POOL_SIZE, dtype=torch.int32)
    v, a = torch.randn(3, 2), torch.randn(2, 8)
    joint = torch.randn(3, 40)[:, :32].unflatten(1, (4, 8))
    return {
        "rms_norm": (x, weight, 1e-6),
        "add_rms_norm": (x, x.clone(), weight, 1e-6),
        "apply_rms_norm": (x, weight, scale),
        "rms_norm_backward": (x, weight, scale, x.clone(), None),
        "rotate": (joint, x, x.clone(), -1),
        "gated_silu": (x,),
        "gated_silu_backward": (x, torch.randn(3, 4)),
        "token_stats": (x, torch.tensor([0, 1, 7]), True),
        "dequantize_int8": (codes, scale, torch.bfloat16),
        "fill_noise": (torch.zeros(4096, dtype=torch.int32), 5, 0),
        "dropped_product": (x, a, pool, 3),
        "dropped_sum": (v, x, pool, 3),
        "add_dropped": (x, v, a, pool, 3),
    }


@pytest.mark.parametrize("name", examples())
@pytest.mark.parametrize("compiled", [True, False])
def test_an_operator_is_what_it_declares_and_its_fake_has_its_shapes(name, compiled):
    if compiled:
        require_compiler()
        kernels.enable()
    operator = getattr(torch.ops.finetune, name).default
    torch.library.opcheck(operator, examples()[name])


def test_the_table_says_what_serves_and_why():
    def served() -> dict[str, str]:
        table = operators.makers(CPU)
        assert all(maker.reason for maker in table.values())
        return {name: maker.name for name, maker in table.items()}

    assert served() == dict.fromkeys(examples(), "torch")
    require_compiler()
    operators.enable(CPU)
    assert served() == dict.fromkeys(examples(), "C++") | dict.fromkeys(triton_makers.PRODUCTS, "torch")
    operators.disable()
    assert served() == dict.fromkeys(examples(), "torch")


@pytest.mark.parametrize("name", sorted(set(examples()) - set(triton_makers.PRODUCTS)))
def test_the_table_tells_what_it_does(name, monkeypatch):
    require_compiler()
    operators.enable(CPU)
    called = []
    monkeypatch.setattr(kernels, "_call", lambda kernel, *_: called.append(kernel))
    getattr(torch.ops.finetune, name)(*examples()[name])
    assert called == [{"add_rms_norm": "rms_norm"}.get(name, name)]
    operators.disable()
    getattr(torch.ops.finetune, name)(*examples()[name])
    assert len(called) == 1


CUDA = torch.device("cuda")


def test_on_a_card_the_table_says_what_is_left_to_torch_and_why(monkeypatch):
    assert {maker.name for maker in operators.makers(CUDA).values()} == {"torch"}
    monkeypatch.setattr(triton_makers, "_kernels", triton_makers)
    monkeypatch.setattr(triton_makers, "_has_products", True)
    assert {maker.name for maker in operators.makers(CUDA).values()} == {"Triton"}
    assert operators.makers(CUDA)["rms_norm"].reason == "torch for rows of over 16,384 numbers"
    x = torch.empty(2, 16_385, dtype=torch.bfloat16, device="meta")
    assert not triton_makers.can_compute("rms_norm", x, x[0], 1e-6)
    assert triton_makers.can_compute("gated_silu", x)
    assert triton_makers.can_compute("dropped_product", x, x)
    assert not triton_makers.can_compute("dropped_product", x.float(), x.float())
    assert not triton_makers.can_compute("gated_silu", x.double())
    monkeypatch.setattr(triton_makers, "_has_products", False)
    assert not triton_makers.can_compute("dropped_product", x, x)
    left = {name: maker.reason for name, maker in operators.makers(CUDA).items() if maker.name == "torch"}
    assert set(left) == set(triton_makers.PRODUCTS)
    assert set(left.values()) == {"Triton multiplies without tensor cores before Ampere"}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "there is no triton: it comes with"),
        (subprocess.CalledProcessError(1, ["gcc"]), "install gcc and Python's headers"),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "no C compiler: install gcc"),
        (RuntimeError("PTX\nJIT"), "Triton failed: RuntimeError: PTX$"),
    ],
)
def test_without_what_triton_needs_it_is_off_and_says_what_is_missing(error, message, monkeypatch):
    def fail() -> None:
        raise error

    monkeypatch.setattr(triton_makers, "_load", fail)
    with pytest.raises(OSError, match=message):
        operators.enable(CUDA)
    assert not triton_makers.is_enabled()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_triton_is_off():
    with pytest.raises(OSError, match="CUDA"):
        operators.enable(CUDA)
    assert not triton_makers.is_enabled()
