"""bitsandbytes' operators as what its CUDA code asks of a card: its kernels, and operations of torch.

Read in bitsandbytes 0.50.0, backends/cuda/ops.py and backends/default/ops.py. Operators that are a single
kernel there are not listed: they count as they are. A kernel that has no operator of its own is one
conversion here, which reads and writes as much.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

OUTLIERS = 100  # one column in so many has an activation above the threshold


def _int8_vectorwise_quant(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    columns = None
    if threshold > 0:
        outliers = x.abs() >= threshold
        if bool(outliers.any()):
            of_column = outliers.any(dim=0)
            columns = torch.arange(max(1, x.shape[-1] // OUTLIERS), device=x.device)
            bool(of_column[0])  # argwhere waits for the number of its results
    codes = x.to(torch.int8)
    if columns is not None:
        codes[:, columns] = 0
    return codes, torch.empty(x.numel() // x.shape[-1], device=x.device), columns


def _int8_mixed_scaled_mm(
    x: Tensor,
    codes: Tensor,
    weight: Tensor,
    row_scales: Tensor,
    scales: Tensor,
    columns: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    product = _int8_scaled_mm(codes, weight, row_scales, scales, bias, x.dtype)
    if columns is None:
        return product, x.new_empty(0)
    of_x = x[:, columns].contiguous()
    of_weight = weight[:, columns].contiguous() * scales.view(-1, 1) * (1 / 127)
    return product.addmm(of_x, of_weight.to(x.dtype).t()), of_x


def _int8_scaled_mm(
    codes: Tensor,
    weight: Tensor,
    row_scales: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    product = torch.ops.bitsandbytes.int8_linear_matmul.default(codes, weight)
    return _int8_mm_dequant(product, row_scales, scales, dtype, bias)


def _int8_mm_dequant(
    product: Tensor,
    row_scales: Tensor,
    scales: Tensor,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    out = product.to(torch.float16)
    if bias is not None and bias.dtype != torch.float16:
        out.add_(bias)
    return out.to(dtype or torch.float16)


def _gemm_4bit(
    x: Tensor,
    codes: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    block: int,
    kind: str,
    bias: Tensor | None = None,
) -> Tensor:
    """As for many tokens: the weight is dequantized, and cuBLAS multiplies."""
    weight = torch.ops.bitsandbytes.dequantize_4bit.default(codes, absmax, block, kind, shape, x.dtype)
    return F.linear(x, weight, bias)


DECOMPOSITIONS: dict[str, Callable[..., Any]] = {
    "bitsandbytes::int8_vectorwise_quant": _int8_vectorwise_quant,
    "bitsandbytes::int8_mixed_scaled_mm": _int8_mixed_scaled_mm,
    "bitsandbytes::int8_scaled_mm": _int8_scaled_mm,
    "bitsandbytes::int8_mm_dequant": _int8_mm_dequant,
    "bitsandbytes::gemm_4bit": _gemm_4bit,
}
