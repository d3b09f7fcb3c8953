"""Each operator of `operators` by a Triton kernel on a CUDA device; the signatures are described there.

Triton comes with torch's Linux wheels. At run time it wants a C compiler and Python's headers. Where it
cannot serve, torch's operations do, and the table at the start of a run says why.
"""

import importlib
import subprocess
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LONGEST_ROW = 16_384  # numbers that one program keeps in registers
ROW_WISE = ("rms_norm", "add_rms_norm", "apply_rms_norm", "rms_norm_backward")
PRODUCTS = ("dropped_product", "dropped_sum", "add_dropped")
FIRST_WITH_PRODUCTS = (8, 0)  # Ampere: for Turing, Triton compiles a product without tensor cores
# A program that sums over rows takes at most as many; more are divided among several, and added up.
ROWS_OF_A_SUM = 2048
# A product and a sum in one instruction. Triton's default, but it announces another.
OPTIONS = {"enable_fp_fusion": True}

_kernels: ModuleType | None = None
_dropout: ModuleType | None = None
_has_products = False


def enable(device: torch.device) -> None:
    """Use the kernels for tensors on a CUDA device. One is compiled and run, to see that it can be.

    Raises:
        OSError: Triton or what it needs is missing; the message says what.
    """
    global _has_products
    disable()
    try:
        _load()
        codes, largest = torch.ones(2, 3, dtype=torch.int8, device=device), torch.ones(2, device=device)
        dequantize_int8(codes, largest, torch.float32)
    except Exception as error:
        disable()
        raise OSError(_explained(error)) from error
    _has_products = torch.cuda.get_device_capability(device) >= FIRST_WITH_PRODUCTS


def _load() -> None:
    global _kernels, _dropout
    _kernels = importlib.import_module("finetune.ops.triton_kernels")
    _dropout = importlib.import_module("finetune.ops.triton_dropout")


def _explained(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"there is no {error.name}: it comes with torch's Linux wheels"
    if isinstance(error, subprocess.CalledProcessError):
        return "Triton's C compiler failed: install gcc and Python's headers (python3-dev)"
    if "C compiler" in str(error):
        return "Triton finds no C compiler: install gcc"
    lines = str(error).splitlines() or [""]
    return f"Triton failed: {type(error).__name__}: {lines[0]}"


def disable() -> None:
    """Use torch's own operations."""
    global _kernels, _dropout
    _kernels = _dropout = None


def is_enabled() -> bool:
    return _kernels is not None


def reason_against(name: str) -> str:
    """Why torch serves an operator though Triton is enabled; empty if Triton serves it."""
    if name in PRODUCTS and not _has_products:
        return "Triton multiplies without tensor cores before Ampere"
    return ""


def limit_of(name: str) -> str:
    """Which inputs of an operator are left to torch."""
    if name in PRODUCTS:
        return "torch for fp32, for which there are no exact tensor cores"
    return f"torch for rows of over {LONGEST_ROW:,} numbers" if name in ROW_WISE else ""


def can_compute(name: str, *arguments: Any) -> bool:
    """Whether the kernels are enabled and take the arguments of an operator."""
    if _kernels is None:
        return False
    first = arguments[0]
    if name in PRODUCTS:
        return _has_products and first.dtype in (torch.bfloat16, torch.float16)
    if name in ROW_WISE and first.shape[1] > LONGEST_ROW:
        return False
    return name in ("fill_noise", "dequantize_int8") or first.dtype in DTYPES


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    y, scale = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    settings = _row_settings(x.shape[1])
    _launch(_kernels, "rms_norm", (len(x),), x, x, weight, y, y, scale, eps, ADDS=False, **settings)
    return y, scale


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, delta, weight = x.contiguous(), delta.contiguous(), weight.contiguous()
    total, y, scale = torch.empty_like(x), torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    settings = _row_settings(x.shape[1])
    _launch(_kernels, "rms_norm", (len(x),), x, delta, weight, total, y, scale, eps, ADDS=True, **settings)
    return total, y, scale


def apply_rms_norm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    x, weight, scale = x.contiguous(), weight.contiguous(), scale.contiguous()
    y = torch.empty_like(x)
    _launch(_kernels, "apply_rms_norm", (len(x),), x, weight, scale, y, **_row_settings(x.shape[1]))
    return y


def rms_norm_backward(x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor, dtotal: Tensor | None) -> Tensor:
    x, weight, scale, dy = x.contiguous(), weight.contiguous(), scale.contiguous(), dy.contiguous()
    dx, adds = torch.empty_like(x), dtotal is not None
    inputs = (x, weight, scale, dy, dx if dtotal is None else dtotal.contiguous(), dx)
    _launch(_kernels, "rms_norm_backward", (len(x),), *inputs, ADDS=adds, **_row_settings(x.shape[1]))
    return dx


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    tokens, heads, size = x.shape
    if x.stride()[1:] != (size, 1):
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y = x.new_empty(x.shape)
    block = _power_of_two(size // 2)
    per_program = max(1, min(_power_of_two(heads), 2048 // block))
    grid = (tokens, -(-heads // per_program))
    settings = {"DIRECTION": direction, "HALF": size // 2, "BLOCK": block, "HEADS": per_program}
    _launch(_kernels, "rotate", grid, x, cos, sin, y, x.stride(0), heads, **settings)
    return y


def gated_silu(gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    y = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _launch_blocks("gated_silu", y.shape, gate_up, y)
    return y


def gated_silu_backward(gate_up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    gate_up, dy = gate_up.contiguous(), dy.contiguous()
    d_gate_up, y = torch.empty_like(gate_up), torch.empty_like(dy)
    _launch_blocks("gated_silu_backward", y.shape, gate_up, dy, d_gate_up, y)
    return d_gate_up, y


def token_stats(logits: Tensor, target_ids: Tensor, with_gradient: bool) -> Tensor:
    assert logits.is_contiguous()
    stats = logits.new_empty(len(logits), 3, dtype=torch.float32)
    size = logits.shape[1]
    settings = {"SIZE": size, "BLOCK": min(2048, _power_of_two(size)), "WITH_GRADIENT": with_gradient}
    inputs = (logits, target_ids.contiguous(), stats)
    _launch(_kernels, "token_stats", (len(logits),), *inputs, **settings, num_warps=8)
    return stats


def dequantize_int8(codes: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    codes, largest = codes.contiguous(), largest.contiguous()
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    _launch_blocks("dequantize_int8", weight.shape, codes, largest, weight)
    return weight


def fill_noise(pool: Tensor, key: int, threshold: int) -> None:
    block = 1024
    assert len(pool) % block == 0
    _launch(_dropout, "fill_noise", (len(pool) // block,), pool, key, threshold, BLOCK=block)


def dropped_product(x: Tensor, a: Tensor, pool: Tensor, start: int) -> Tensor:
    x, a = x.contiguous(), a.contiguous()
    u = x.new_empty(len(x), len(a))
    settings = _product_settings(x, len(a), rows=16, columns=128)
    grid = (-(-len(x) // 16), -(-len(a) // settings["RANKS"]))
    _launch(_dropout, "dropped_product", grid, x, a, pool, u, start, len(x), **settings)
    return u


def dropped_sum(v: Tensor, x: Tensor, pool: Tensor, start: int) -> Tensor:
    v, x = v.contiguous(), x.contiguous()
    rank, parts = v.shape[1], max(1, -(-len(x) // ROWS_OF_A_SUM))
    sums = x.new_empty(parts, rank, x.shape[1], dtype=torch.float32)
    settings = _product_settings(x, rank, rows=64, columns=32)
    grid = (-(-x.shape[1] // 32), -(-rank // settings["RANKS"]), parts)
    inputs = (v, x, pool, sums, start, len(x), ROWS_OF_A_SUM)
    _launch(_dropout, "dropped_sum", grid, *inputs, **settings)
    return sums[0] if parts == 1 else sums.sum(0)


def add_dropped(dx: Tensor, v: Tensor, a: Tensor, pool: Tensor, start: int) -> None:
    assert dx.is_contiguous()
    v, a = v.contiguous(), a.contiguous()
    settings = _product_settings(dx, len(a), rows=32, columns=128)
    grid = (-(-len(dx) // 32), -(-dx.shape[1] // 128))
    _launch(_dropout, "add_dropped", grid, dx, v, a, pool, start, len(dx), **settings)


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()


def _row_settings(size: int) -> dict[str, int]:
    """For a program that keeps a row in registers: 16 of its numbers in a thread."""
    block = _power_of_two(size)
    return {"SIZE": size, "BLOCK": block, "num_warps": max(1, block // 512)}


def _product_settings(x: Tensor, rank: int, rows: int, columns: int) -> dict[str, int]:
    """For the products with x [T, in]: tiles of rows, columns and ranks. A tensor core takes at least 16."""
    ranks = min(128, max(16, _power_of_two(rank)))
    wide = x.numel() >= 2**31
    tiles = {"ROWS": rows, "COLUMNS": columns, "RANKS": ranks}
    return {"SIZE": x.shape[1], "RANK": rank, "WIDE": wide, **tiles}


def _launch_blocks(name: str, shape: torch.Size, *tensors: Tensor) -> None:
    """A program for each row of `shape` and 1,024 columns."""
    rows, size = shape
    block = min(1024, _power_of_two(size))
    _launch(_kernels, name, (rows, -(-size // block)), *tensors, SIZE=size, BLOCK=block)


def _launch(module: Any, name: str, grid: tuple[int, ...], *arguments: Any, **settings: int) -> None:
    """Launch a kernel, unless there is nothing to compute."""
    if 0 not in grid:
        getattr(module, name)[grid](*arguments, **settings, **OPTIONS)
