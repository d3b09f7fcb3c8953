"""Triton's kernels for norms, rotary positions, gated activations, the vocabulary and int8 weights.

`triton_makers` launches them. Each program computes in fp32, and rounds what it stores. Offsets that could
pass 2^31 are 64 bits wide. SIZE and HALF are a model's own sizes, so few variants are compiled; numbers that
differ from batch to batch are no reason to compile again.
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    x_ptr, delta_ptr, weight_ptr, total_ptr, y_ptr, scale_ptr, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """A program for each row. If ADDS, x + delta takes the place of x, and is stored in `total`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    place = row * SIZE + column
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(delta_ptr + place, mask=inside, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + place, total, mask=inside)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt_rn(tl.sum(x * x, 0) / SIZE + eps)
    tl.store(scale_ptr + row, scale)
    tl.store(y_ptr + place, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def apply_rms_norm(x_ptr, weight_ptr, scale_ptr, y_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A program for each row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    place = row * SIZE + column
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.load(scale_ptr + row) * weight
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward(
    x_ptr, weight_ptr, scale_ptr, dy_ptr, dtotal_ptr, dx_ptr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """A program for each row: the gradient minus its component along x, scaled; if ADDS, plus `dtotal`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    place = row * SIZE + column
    scale = tl.load(scale_ptr + row)
    normed = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) * scale
    dnormed = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
    dnormed *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dx = (dnormed - normed * (tl.sum(dnormed * normed, 0) / SIZE)) * scale
    if ADDS:
        dx += tl.load(dtotal_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotate(
    x_ptr, cos_ptr, sin_ptr, y_ptr, stride, heads,
    DIRECTION: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A program for each token and HEADS heads. The tokens of x are `stride` apart."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    exists = column < HALF
    cos = tl.load(cos_ptr + token * 2 * HALF + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * 2 * HALF + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    inside = (head < heads)[:, None] & exists[None, :]
    place = head[:, None] * 2 * HALF + column[None, :]
    a = tl.load(x_ptr + token * stride + place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + token * stride + place + HALF, mask=inside, other=0.0).to(tl.float32)
    to = y_ptr + token * heads * 2 * HALF + place
    tl.store(to, (a * cos - DIRECTION * b * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(to + HALF, (b * cos + DIRECTION * a * sin).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated_silu(gate_up_ptr, y_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A program for each row of y [T, SIZE] and BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    gate = tl.load(gate_up_ptr + row * 2 * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * SIZE + SIZE + column, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * SIZE + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated_silu_backward(
    gate_up_ptr, dy_ptr, d_gate_up_ptr, y_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program for each row of y [T, SIZE] and BLOCK columns: the gradients of gate and up, and y."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    of_gate = row * 2 * SIZE + column
    gate = tl.load(gate_up_ptr + of_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + of_gate + SIZE, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    dtype = y_ptr.dtype.element_ty
    d_gate = dy * up * share * (1 + gate * (1 - share))
    tl.store(d_gate_up_ptr + of_gate, d_gate.to(dtype), mask=inside)
    tl.store(d_gate_up_ptr + of_gate + SIZE, (dy * silu).to(dtype), mask=inside)
    tl.store(y_ptr + row * SIZE + column, (silu * up).to(dtype), mask=inside)


@triton.jit
def token_stats(
    logits_ptr, target_ptr, stats_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, WITH_GRADIENT: tl.constexpr
):
    """A program for each row of logits [n, SIZE], in one pass, or two if WITH_GRADIENT.

    With m the largest logit so far: total = sum of exp(x - m), and weighted = sum of exp(x - m) (x - m).
    The entropy is log(total) - weighted / total.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * SIZE
    target = tl.load(target_ptr + row)
    own = tl.load(row_ptr + target).to(tl.float32)
    most = -float("inf")
    likeliest = tl.zeros((), dtype=tl.int32)
    total = 0.0
    weighted = 0.0
    for first in range(0, SIZE, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + column, mask=column < SIZE, other=-float("inf")).to(tl.float32)
        largest = tl.max(x, 0)
        place = tl.min(tl.where(x == largest, column, SIZE), 0)
        likeliest = tl.where(largest > most, place, likeliest)
        new = tl.maximum(most, largest)
        moved = tl.where(most == new, 0.0, most - new)  # 0 also where both are -infinity
        shrink = tl.exp(moved)
        # A logit of -infinity has no share, and adds 0, not 0 times infinity.
        absent = x == -float("inf")
        e = tl.where(absent, 0.0, tl.exp(x - new))
        shrunk = tl.where(total == 0.0, 0.0, shrink * (weighted + total * moved))
        weighted = shrunk + tl.sum(tl.where(absent, 0.0, e * (x - new)), 0)
        total = total * shrink + tl.sum(e, 0)
        most = new
    log_total = tl.log(total)
    tl.store(stats_ptr + row * 3, log_total - (own - most))
    tl.store(stats_ptr + row * 3 + 1, log_total - weighted / total)
    tl.store(stats_ptr + row * 3 + 2, (likeliest == target).to(tl.float32))
    if WITH_GRADIENT:
        share = 1 / total
        for first in range(0, SIZE, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < SIZE
            x = tl.load(row_ptr + column, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.exp(x - most) * share - tl.where(column == target, 1.0, 0.0)
            tl.store(row_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_int8(codes_ptr, largest_ptr, weight_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A program for each row of the weight [out, SIZE] and BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    scale = tl.div_rn(tl.load(largest_ptr + row), 127.0)
    codes = tl.load(codes_ptr + row * SIZE + column, mask=inside, other=0).to(tl.float32)
    weight = (codes * scale).to(weight_ptr.dtype.element_ty)
    tl.store(weight_ptr + row * SIZE + column, weight, mask=inside)
