"""Parts of a GPU imitated on a CPU.

Torch's attention kernels: what they get is checked, and computed in fp64. Their definitions in its own
sources are the contract: offsets of sequences in int32, causal masks aligned at the end of each sequence,
head sizes in multiples of 8. And quantized layers whose weights are fake tensors on a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from finetune.ops import attention, quantized


@contextmanager
def attention_card(monkeypatch: Any, capability: tuple[int, int]) -> Iterator[list[str]]:
    """Attention takes this machine's CPU for a GPU of a capability; the kernels that it calls are listed."""
    called: list[str] = []
    library = torch.library.Library("aten", "IMPL")
    for function in (flash_forward, flash_backward, efficient_forward, efficient_backward):

        def counted(*arguments: Any, own: Any = function, **others: Any) -> Any:
            called.append(own.__name__)
            return own(*arguments, **others)

        kind, direction = function.__name__.split("_")
        library.impl(f"_{kind}_attention_{direction}", counted, "CPU")
    with monkeypatch.context() as patch:
        patch.setattr(attention, "gpu_capability", lambda _: capability)
        patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        try:
            yield called
        finally:
            library._destroy()


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    max_queries: int,
    max_keys: int,
    dropout: float,
    causal: bool,
    debug: bool,
    *,
    scale: float,
) -> tuple[Tensor, ...]:
    check_offsets(query, key, query_starts, key_starts, max_queries, max_keys)
    assert (dropout, causal, debug) == (0.0, True, False)
    assert query.dtype in (torch.bfloat16, torch.float16)
    assert query.shape[1] % key.shape[1] == 0
    assert query.shape[2] <= 256
    expanded = [x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value)]
    output, logsumexp = forward(query, *expanded, query_starts, key_starts, scale)
    state = torch.zeros(2, dtype=torch.uint64)
    return output.to(query.dtype), logsumexp.float(), state, state[0].clone(), query.new_empty(0)


def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    max_queries: int,
    max_keys: int,
    dropout: float,
    causal: bool,
    state: Tensor,
    unused: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, ...]:
    check_offsets(query, key, query_starts, key_starts, max_queries, max_keys)
    assert (dropout, causal, state.shape, unused.shape) == (0.0, True, (2,), ())
    assert grad.dtype == query.dtype
    group = query.shape[1] // key.shape[1]
    expanded = [x.repeat_interleave(group, dim=1) for x in (key, value)]
    dq, dk, dv = backward(grad, query, *expanded, output, logsumexp, query_starts, key_starts, scale)
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return tuple(x.to(query.dtype) for x in (dq, dk, dv))


def efficient_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: None,
    query_starts: Tensor,
    key_starts: Tensor,
    max_queries: int,
    max_keys: int,
    dropout: float,
    mask: int,
    compute_logsumexp: bool,
    *,
    scale: float,
) -> tuple[Any, ...]:
    check_offsets(query[0], key[0], query_starts, key_starts, max_queries, max_keys)
    assert query.shape[0] == key.shape[0] == value.shape[0] == 1
    assert query.shape[2] == key.shape[2] == value.shape[2]
    assert (bias, dropout, mask, compute_logsumexp) == (None, 0.0, 2, True)
    output, logsumexp = forward(query[0], key[0], value[0], query_starts, key_starts, scale)
    padded = torch.full((len(query_starts) - 1, query.shape[2], -(-max_queries // 32) * 32), torch.nan)
    for number, (start, end) in enumerate(pairwise(query_starts.tolist())):
        padded[number, :, : end - start] = logsumexp[:, start:end]
    seed = torch.zeros((), dtype=torch.int64)
    return output.to(query.dtype)[None], padded, seed, seed.clone(), max_queries, max_keys


def efficient_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: None,
    output: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    max_queries: int,
    max_keys: int,
    logsumexp: Tensor,
    dropout: float,
    seed: Tensor,
    offset: Tensor,
    mask: int,
    bias_requires_grad: bool,
    *,
    scale: float,
) -> tuple[Tensor, ...]:
    check_offsets(query[0], key[0], query_starts, key_starts, max_queries, max_keys)
    assert (bias, dropout, mask, bias_requires_grad) == (None, 0.0, 2, False)
    assert query.shape[2] == key.shape[2] == value.shape[2]
    counts = query_starts.diff().tolist()
    rows = torch.cat([logsumexp[number, :, :count] for number, count in enumerate(counts)], dim=1)
    tensors = (x[0] for x in (grad, query, key, value, output))
    grads = backward(*tensors, rows, query_starts, key_starts, scale)
    return *(x.to(query.dtype)[None] for x in grads), torch.empty(0)


def check_offsets(
    query: Tensor, key: Tensor, query_starts: Tensor, key_starts: Tensor, max_queries: int, max_keys: int
) -> None:
    assert query.shape[2] % 8 == 0
    for rows, starts, most in ((query, query_starts, max_queries), (key, key_starts, max_keys)):
        assert starts.dtype == torch.int32
        assert starts[0] == 0
        assert starts[-1] == len(rows)
        assert starts.diff().min() > 0
        assert starts.diff().max() == most


def forward(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] and the logarithm [H, T] of each query's sum of exponentials, in fp64."""
    outputs, sums = [], []
    for (q,), (k, v) in zip(parts(query_starts, query), parts(key_starts, key, value), strict=True):
        scores = masked_scores(q, k, scale)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(sums, dim=1)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    scale: float,
) -> list[Tensor]:
    """The gradients of query, key and value in fp64, from the output and the sums that were saved."""
    grads: list[list[Tensor]] = [[], [], []]
    of_queries = parts(query_starts, query, grad, output, logsumexp.t().unsqueeze(2))
    for (q, dy, y, total), (k, v) in zip(of_queries, parts(key_starts, key, value), strict=True):
        p = (masked_scores(q, k, scale) - total).exp()
        ds = p * (dy @ v.transpose(1, 2) - (dy * y).sum(-1, keepdim=True)) * scale
        for own, gradient in zip(
            grads, (ds @ k, ds.transpose(1, 2) @ q, p.transpose(1, 2) @ dy), strict=True
        ):
            own.append(gradient.transpose(0, 1))
    return [torch.cat(own) for own in grads]


def parts(starts: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each sequence's part [H, t, D] of the tensors [T, H, D], in fp64."""
    for start, end in pairwise(starts.tolist()):
        yield tuple(x[start:end].transpose(0, 1).double() for x in tensors)


def masked_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    scores = query @ key.transpose(1, 2) * scale
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + scores.shape[2] - scores.shape[1])
    return scores.masked_fill(later, -torch.inf)


def quantized_layer(kind: str, bias: bool = True) -> Any:
    """An int8 or nf4 layer of 64 inputs and 128 outputs, with the settings that transformers gives it."""
    torch.manual_seed(0)
    plain = nn.Linear(64, 128, bias=bias)
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(64, 128, bias=bias, quant_type="nf4", compute_dtype=torch.bfloat16)
    else:
        layer = bnb.nn.Linear8bitLt(64, 128, bias=bias, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict(plain.to(torch.bfloat16).state_dict())
    layer = layer.to("cpu").requires_grad_(False)
    if kind == "nf4":
        layer.weight.quant_state.packing_format_for_cpu = False
    return layer


def put_on_gpu(layer: Any) -> None:
    """Give a layer weights that are fake tensors on a GPU, within FakeTensorMode."""
    if isinstance(layer, bnb.nn.Linear4bit):
        state = layer.weight.quant_state
        state.absmax, state.code = (torch.empty_like(x, device="cuda") for x in (state.absmax, state.code))
    else:
        codes, largest = quantized.int8_state(layer)
        layer.state.CB, layer.state.SCB = (torch.empty_like(x, device="cuda") for x in (codes, largest))
    weight = nn.Parameter(torch.empty_like(layer.weight.data, device="cuda"), requires_grad=False)
    own = {name: getattr(layer.weight, name, None) for name in ("CB", "quant_state")}
    for name, value in own.items():
        setattr(weight, name, value)
    layer.weight = weight
    layer.bias = nn.Parameter(torch.empty_like(layer.bias.data, device="cuda"), requires_grad=False)
