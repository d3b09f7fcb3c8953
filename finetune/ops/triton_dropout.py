"""Triton's kernels for dropout: its noise, and the adapters' thin products with inputs that it thins out.

`triton_makers` launches them. An input [T, SIZE] is never written with its zeros: they are put in where a
product loads it. `dropout` describes the noise.
"""

import triton
import triton.language as tl

from finetune.ops import dropout

SLICE = tl.constexpr(dropout.SLICE)
ALIGNMENT = tl.constexpr(dropout.ALIGNMENT)
NUM_OFFSETS = tl.constexpr(dropout.NUM_OFFSETS)
STRIDE = tl.constexpr(dropout.STRIDE)
GAMMA = tl.constexpr(dropout.GAMMA)
FACTOR_1 = tl.constexpr(dropout.FACTORS[0])
FACTOR_2 = tl.constexpr(dropout.FACTORS[1])
SHIFT_1 = tl.constexpr(dropout.SHIFTS[0])
SHIFT_2 = tl.constexpr(dropout.SHIFTS[1])
SHIFT_3 = tl.constexpr(dropout.SHIFTS[2])


@triton.jit(do_not_specialize=["key", "threshold"])
def fill_noise(pool_ptr, key, threshold, BLOCK: tl.constexpr):
    """A program for BLOCK masks, four from each 64-bit word. BLOCK divides the pool."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = key.to(tl.uint64) + (place // 4 + 1).to(tl.uint64) * GAMMA
    z = (z ^ (z >> SHIFT_1)) * FACTOR_1
    z = (z ^ (z >> SHIFT_2)) * FACTOR_2
    z = z ^ (z >> SHIFT_3)
    number = (z >> ((place % 4) * 16).to(tl.uint64)).to(tl.int16)
    mask = tl.where(number.to(tl.int32) >= threshold, -1, 0)
    tl.store(pool_ptr + place, mask.to(pool_ptr.dtype.element_ty))


@triton.jit
def _kept(pool_ptr, start, place, inside):
    """Whether the numbers at `place` of an input, which are `inside` it, are kept."""
    offset = (start + place // SLICE * STRIDE) % NUM_OFFSETS * ALIGNMENT
    return tl.load(pool_ptr + offset + place % SLICE, mask=inside, other=0) != 0


@triton.jit
def _place(row, column, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Where rows and columns lie in an input: unsigned, so that division by a power of two is a shift."""
    if WIDE:
        return row.to(tl.uint64)[:, None] * SIZE + column.to(tl.uint64)[None, :]
    return row.to(tl.uint32)[:, None] * SIZE + column.to(tl.uint32)[None, :]


@triton.jit(do_not_specialize=["start", "rows"])
def dropped_product(
    x_ptr, a_ptr, pool_ptr, u_ptr, start, rows,
    SIZE: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """A program for ROWS rows and RANKS columns of u [rows, RANK] = dropout(x) a^T."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    sums = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for first in range(0, SIZE, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < SIZE)[None, :]
        place = _place(row, column, SIZE, WIDE)
        x = tl.load(x_ptr + place, mask=inside, other=0.0)
        x = tl.where(_kept(pool_ptr, start, place, inside), x, 0.0).to(x_ptr.dtype.element_ty)
        exists = (column < SIZE)[:, None] & (rank < RANK)[None, :]
        a = tl.load(a_ptr + rank[None, :] * SIZE + column[:, None], mask=exists, other=0.0)
        sums = tl.dot(x, a, sums, input_precision="ieee")
    to = u_ptr + row.to(tl.int64)[:, None] * RANK + rank[None, :]
    mask = (row < rows)[:, None] & (rank < RANK)[None, :]
    tl.store(to, sums.to(u_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["start", "rows", "rows_each"])
def dropped_sum(
    v_ptr, x_ptr, pool_ptr, sums_ptr, start, rows, rows_each,
    SIZE: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """A program for COLUMNS columns, RANKS rows and a part of `rows_each` rows of v and x.

    sums [parts, RANK, SIZE] fp32 are v^T dropout(x) of each part; `rows_each` is a multiple of ROWS.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    part = tl.program_id(2)
    sums = tl.zeros((RANKS, COLUMNS), dtype=tl.float32)
    for first in range(part * rows_each, tl.minimum(rows, (part + 1) * rows_each), ROWS):
        row = first + tl.arange(0, ROWS)
        exists = (rank < RANK)[:, None] & (row < rows)[None, :]
        v = tl.load(v_ptr + row.to(tl.int64)[None, :] * RANK + rank[:, None], mask=exists, other=0.0)
        inside = (row < rows)[:, None] & (column < SIZE)[None, :]
        place = _place(row, column, SIZE, WIDE)
        x = tl.load(x_ptr + place, mask=inside, other=0.0)
        x = tl.where(_kept(pool_ptr, start, place, inside), x, 0.0).to(x_ptr.dtype.element_ty)
        sums = tl.dot(v, x, sums, input_precision="ieee")
    to = sums_ptr + part.to(tl.int64) * RANK * SIZE + rank[:, None] * SIZE + column[None, :]
    tl.store(to, sums, mask=(rank < RANK)[:, None] & (column < SIZE)[None, :])


@triton.jit(do_not_specialize=["start", "rows"])
def add_dropped(
    dx_ptr, v_ptr, a_ptr, pool_ptr, start, rows,
    SIZE: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """A program for ROWS rows and COLUMNS columns of dx [rows, SIZE] += dropout(v a)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, RANK, RANKS):
        rank = first + tl.arange(0, RANKS)
        exists = (row < rows)[:, None] & (rank < RANK)[None, :]
        v = tl.load(v_ptr + row.to(tl.int64)[:, None] * RANK + rank[None, :], mask=exists, other=0.0)
        exists = (rank < RANK)[:, None] & (column < SIZE)[None, :]
        a = tl.load(a_ptr + rank[:, None] * SIZE + column[None, :], mask=exists, other=0.0)
        sums = tl.dot(v, a, sums, input_precision="ieee")
    inside = (row < rows)[:, None] & (column < SIZE)[None, :]
    place = _place(row, column, SIZE, WIDE)
    sums = tl.where(_kept(pool_ptr, start, place, inside), sums, 0.0)
    sums += tl.load(dx_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + place, sums.to(dx_ptr.dtype.element_ty), mask=inside)
