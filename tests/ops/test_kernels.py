"""The compiled kernels: each against a plain fp64 computation, whatever the threads; and how they come to be.

Attention, the head, norms, rotary positions and gated activations have tests of their own, with and without.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import require_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.data.collate import Boundaries
from finetune.data.segments import Branch, Segment, segments_of
from finetune.ops import compiler, kernels
from finetune.ops.attention import packed_attention
from finetune.ops.quantized import frozen_weight

fp32_and_bf16 = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def _with_kernels() -> None:
    require_compiler()
    kernels.enable()


@pytest.fixture
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def one_after_another(*lengths: int) -> tuple[Segment, ...]:
    return segments_of(lengths, 0, ())


def values_of(logits: Tensor, target_ids: Tensor) -> Tensor:
    exact = logits.double().log_softmax(-1)
    nll = -exact.gather(-1, target_ids[:, None])[:, 0]
    entropy = -(exact.exp() * exact).sum(-1)
    return torch.stack([nll, entropy, (logits.argmax(-1) == target_ids).double()], dim=1)


@fp32_and_bf16
@settings(deadline=None)
@given(
    rows=st.integers(1, 9),
    size=st.integers(1, 300),
    spread=st.sampled_from([0.0, 0.3, 5.0, 80.0]),
    seed=st.integers(0, 999),
)
def test_a_tokens_values_and_gradient_are_those_of_its_logits(dtype, rows, size, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, size, generator=generator)).to(dtype)
    target_ids = torch.randint(size, (rows,), generator=generator)
    target_ids[::2] = logits.argmax(-1)[::2]
    expected, kept = values_of(logits, target_ids), logits.clone()
    values = kernels.token_stats(logits, target_ids, with_gradient=False)
    assert torch.equal(logits, kept)
    assert torch.allclose(values.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(kernels.token_stats(logits, target_ids, with_gradient=True), values)
    gradient = kept.double().softmax(-1)
    gradient[torch.arange(rows), target_ids] -= 1
    assert torch.allclose(
        logits.double(), gradient, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )


@fp32_and_bf16
@pytest.mark.parametrize("no_number", [torch.nan, torch.inf, -torch.nan])
@pytest.mark.parametrize("place", [0, 3, 40])
def test_what_is_no_number_stays_none(dtype, no_number, place):
    logits = torch.randn(2, 41).to(dtype)
    logits[1, place] = no_number
    values = kernels.token_stats(logits, torch.tensor([5, 5]), with_gradient=True)
    assert values[0].isfinite().all()
    assert logits[0].isfinite().all()
    assert values[1, :2].isnan().all()
    assert logits[1].isnan().all()

    x = torch.randn(41, 1, 16).to(dtype)
    x[place, 0, 3] = no_number
    output = kernels.attention_forward(x, x, x, one_after_another(41), 1.0)
    assert output[place:].isfinite().all(-1).logical_not().all()


def test_bf16_is_rounded_to_the_nearest_and_ties_to_even():
    # The low half of an fp32 decides: below, at and above the middle, behind an even and an odd last bit.
    bits = torch.tensor(
        [0x3F80_7FFF, 0x3F80_8000, 0x3F80_8001, 0x3F81_7FFF, 0x3F81_8000, 0x3F81_8001, 0x7F7F_FFFF]
    )
    x = bits.to(torch.int32).view(torch.float32)
    codes = torch.full((len(x), 1), 127, dtype=torch.int8)
    exact = (x / 127 * 127).bfloat16()
    assert torch.equal(kernels.dequantize_int8(codes, x, torch.bfloat16)[:, 0], exact)


@fp32_and_bf16
def test_int8_weights_are_bitsandbytes_own(dtype):
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(70, 50, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(50, 70), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    layer(torch.randn(2, 70).bfloat16())
    fast = frozen_weight(layer, dtype)
    kernels.disable()
    assert torch.equal(fast, frozen_weight(layer, dtype))


def attention_inputs(num_tokens: int, heads: int, key_heads: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_tokens, count, size) for count in (heads, key_heads, key_heads, heads)]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


@pytest.mark.usefixtures("_three_threads")
def test_the_number_of_threads_changes_no_bit():
    branches = [[], [], [Branch(71, 40), Branch(99, 71)], []]
    segments = segments_of((70, 3, 120, 33), 19, branches)
    query, key, value, grad = attention_inputs(245, 6, 2, 64)
    logits, target_ids = torch.randn(50, 999).bfloat16(), torch.randint(999, (50,))
    weight = torch.rand(64).bfloat16()

    def computed() -> list[Tensor]:
        settings: tuple[Any, ...] = (segments, 0.125)
        attended = kernels.attention_forward(query, key, value, *settings)
        grads = kernels.attention_backward(query, key, value, grad, *settings)
        own = logits.clone()
        values = kernels.token_stats(own, target_ids, with_gradient=True)
        rows, dy = query.reshape(-1, 64), grad.reshape(-1, 64)
        y, scale = kernels.rms_norm(rows, weight, 1e-6)
        dx = kernels.rms_norm_backward(rows, weight, scale, dy, y)
        silu = [kernels.gated_silu(rows), *kernels.gated_silu_backward(rows, dy[:, :32])]
        return [attended, *grads, own, values, y, scale, dx, *silu]

    torch.set_num_threads(1)
    alone = computed()
    for threads in (2, 3, 2):
        torch.set_num_threads(threads)
        assert all(torch.equal(new, old) for new, old in zip(computed(), alone, strict=True))


def test_heads_may_lie_apart_and_be_of_any_size():
    segments = one_after_another(9, 40)
    for size in (1, 7, 16, 33):
        query, key, value, grad = attention_inputs(49, 4, 2, size)
        expected = kernels.attention_forward(query, key, value, segments, 0.2)
        expected_grads = kernels.attention_backward(query, key, value, grad, segments, 0.2)
        fused = torch.cat([query, key, value], dim=1)  # one projection for all three
        views = fused.split([4, 2, 2], dim=1)
        assert torch.equal(kernels.attention_forward(*views, segments, 0.2), expected)
        got = kernels.attention_backward(*views, grad, segments, 0.2)
        assert all(torch.equal(new, old) for new, old in zip(got, expected_grads, strict=True))
        turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (query, key, value)]
        assert torch.equal(kernels.attention_forward(*turned, segments, 0.2), expected)


@pytest.mark.parametrize("size", [16, 40])
def test_values_may_be_of_another_size_than_queries(size):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 9, 4, 24), (1, 9, 2, 24), (1, 9, 2, size)]
    inputs = [torch.randn(shape, generator=generator).transpose(1, 2).requires_grad_() for shape in shapes]
    boundaries = Boundaries((3, 4), torch.tensor([2, 5, 9], dtype=torch.int32), 2)
    grad = torch.randn(1, 9, 4, size, generator=generator)

    def computed() -> list[Tensor]:
        output, _ = packed_attention(None, *inputs, None, boundaries=boundaries, scaling=1)
        return [output, *torch.autograd.grad(output, inputs, grad)]

    got = computed()
    kernels.disable()
    for new, expected in zip(got, computed(), strict=True):
        assert torch.allclose(new, expected, rtol=1e-4, atol=1e-5)


def test_an_integer_scale_is_the_number_that_it_is():
    query, key, value, grad = attention_inputs(9, 4, 2, 8)
    for scale in (1, 2):
        expected = kernels.attention_forward(query, key, value, one_after_another(4, 5), float(scale))
        assert torch.equal(
            kernels.attention_forward(query, key, value, one_after_another(4, 5), scale), expected
        )
        exact = kernels.attention_backward(query, key, value, grad, one_after_another(4, 5), float(scale))
        got = kernels.attention_backward(query, key, value, grad, one_after_another(4, 5), scale)
        assert all(torch.equal(new, old) for new, old in zip(got, exact, strict=True))


def test_targets_may_lie_apart():
    logits, targets = torch.randn(6, 40), torch.randint(40, (6, 2))
    values = kernels.token_stats(logits, targets[:, 1], with_gradient=False)
    assert torch.allclose(values.double(), values_of(logits, targets[:, 1]), rtol=1e-5, atol=1e-5)


def test_a_token_that_cannot_be_adds_nothing_to_the_entropy():
    logits = torch.tensor([[0.0, -torch.inf, 1.0, torch.finfo(torch.float32).min]])
    values = kernels.token_stats(logits, torch.tensor([0]), with_gradient=False)
    expected = values_of(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    assert torch.allclose(values.double(), expected, rtol=1e-5)


def test_nothing_gives_nothing():
    empty = torch.empty(0, 4, 8)
    assert kernels.attention_forward(empty, empty, empty, (), 1.0).shape == (0, 4, 8)
    assert [len(x) for x in kernels.attention_backward(empty, empty, empty, empty, (), 1.0)] == [0, 0, 0]
    assert kernels.token_stats(torch.empty(0, 9), torch.empty(0).long(), True).shape == (0, 3)


def test_what_they_do_not_take_is_left_to_torch():
    x = torch.ones(3)
    assert kernels.can_compute(x, x)
    assert not kernels.can_compute(x, x.bfloat16())
    assert not kernels.can_compute(x.half())
    assert not kernels.can_compute(x.double(), x.double())
    assert not kernels.can_compute(x.to("meta"))
    kernels.disable()
    assert not kernels.can_compute(x)


# How they come to be


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.disable()
    return tmp_path / "finetune"


def fake_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    compiler = folder / "a-compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))


def test_they_are_compiled_once_and_nothing_else_is_left(empty_cache, monkeypatch):
    kernels.enable()
    (library,) = empty_cache.iterdir()
    written = library.stat().st_mtime_ns
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("it was compiled again"))
    kernels.enable()
    assert kernels.can_compute(torch.ones(1))
    assert library.stat().st_mtime_ns == written


def test_another_source_or_compiler_is_another_library(empty_cache, tmp_path, monkeypatch):
    kernels.enable()
    changed = tmp_path / "kernels.cpp"
    changed.write_text(kernels.SOURCE.read_text() + "\n// changed\n")
    monkeypatch.setattr(kernels, "SOURCE", changed)
    kernels.enable()
    fake_compiler(tmp_path, monkeypatch, 'if [ "$1" = --version ]; then echo 99; else exec g++ "$@"; fi')
    kernels.enable()
    assert len(list(empty_cache.iterdir())) == 3


def test_the_library_takes_torchs_threads(empty_cache):
    kernels.enable()
    (library,) = empty_cache.iterdir()
    assert b"libgomp" not in library.read_bytes()


def test_without_a_compiler_it_says_what_to_install(empty_cache, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"no C\+\+ compiler: install g\+\+"):
        kernels.enable()
    assert not kernels.can_compute(torch.ones(1))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            '[ "$1" = --version ] || { echo "x.cpp:3: error: no such thing" >&2; exit 1; }',
            "a-compiler failed: x.cpp:3",
        ),
        ('[ "$1" = --version ] || exit 7', "a-compiler failed: exit 7"),
        ("sleep 9", "a-compiler took over"),
        (r"printf 'error: \351\n' >&2; exit 1", "a-compiler failed: error"),
        (
            '[ "$1" = --version ] && exit 0; for last; do :; done; echo rubbish > "$last"',
            "file too short",
        ),
    ],
)
def test_a_compiler_that_fails_is_named_and_leaves_nothing(
    script, message, empty_cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(compiler, "COMPILE_TIMEOUT", 2)
    fake_compiler(tmp_path, monkeypatch, script)
    with pytest.raises(OSError, match=message):
        kernels.enable()
    assert not kernels.can_compute(torch.ones(1))
    assert not empty_cache.exists() or os.listdir(empty_cache) == []
