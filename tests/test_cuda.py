"""What only a GPU can show: its own paths give what the plain ones give, and none of them waits for it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_model
from datasets import Dataset
from torch.nn import functional as F

from finetune.config import Config, FastConfig, LoraConfig
from finetune.data.collate import Boundaries, collate
from finetune.data.tokenize import IGNORE, Examples
from finetune.model.fast_paths import choose_fast_paths
from finetune.model.load import add_adapter
from finetune.model.loss import TokenLoss
from finetune.ops.attention import packed_attention
from finetune.runtime.accelerator import reseed
from finetune.training.metrics import SumWindow

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTHS = [70, 5, 33, 12]


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def examples() -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, 20, length).tolist() for length in LENGTHS]
    return [{"input_ids": ids, "labels": [IGNORE, *ids[1:]]} for ids in rows]


def token_loss(fast: FastConfig, lora_dropout: float = 0.0) -> TokenLoss:
    """A tiny model in bf16 on the GPU, its adapter filled, on the paths that are chosen for it."""
    base = tiny_model(20).to("cuda", torch.bfloat16).requires_grad_(False)
    config = Config(lora=LoraConfig(lora_dropout=lora_dropout), fast=fast)
    model = add_adapter(base, config.lora)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    loss = TokenLoss(model).train()
    train_set = Examples(Dataset.from_list(examples()), truncated=[], dropped={})
    accelerator = Accelerator(mixed_precision="bf16")
    assert all(
        setting.requested == setting.actual
        for setting in choose_fast_paths(config, accelerator, loss, train_set)
    )
    return loss


def loss_and_gradient(loss: TokenLoss) -> tuple[float, torch.Tensor]:
    batch = collate(examples(), packing=True).to(torch.device("cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        sums = loss(batch)
    (sums.nll / len(batch.target_ids)).backward()
    gradients = [p.grad.flatten().float() for p in loss.parameters() if p.grad is not None]
    return float(sums.nll), torch.cat(gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # the kernel for several lengths, and none
@pytest.mark.parametrize("prefix", [0, 13])
def test_packed_attention_is_that_of_each_example_alone(prefix, dtype):
    torch.manual_seed(0)
    starts = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32, device="cuda") + prefix
    query, key, value = (
        torch.randn(1, heads, prefix + sum(LENGTHS), 64, device="cuda", dtype=dtype, requires_grad=True)
        for heads in (4, 2, 2)
    )
    boundaries = Boundaries(tuple(LENGTHS), starts, prefix)
    got, _ = packed_attention(None, query, key, value, None, boundaries=boundaries)
    shared, *own = zip(
        *(tensor.float().split([prefix, *LENGTHS], dim=2) for tensor in (query, key, value)), strict=True
    )
    alone = []
    for parts in own:
        whole = [torch.cat(pair, dim=2) for pair in zip(shared, parts, strict=True)]
        alone.append(F.scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True))
    expected = torch.cat([alone[0][:, :, :prefix], *(one[:, :, prefix:] for one in alone)], dim=2)
    expected = expected.transpose(1, 2)
    assert (got.float() - expected).norm() < 1e-2 * expected.norm()
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((got.float() * weights).sum(), (query, key, value))
    exact = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for gradient, wanted in zip(gradients, exact, strict=True):
        assert (gradient.float() - wanted.float()).norm() < 2e-2 * wanted.float().norm()


def test_the_fast_paths_give_the_loss_and_gradient_of_the_plain_ones():
    off = FastConfig(attention=False, head=False, lora=False, elementwise=False)
    plain, plain_gradient = loss_and_gradient(token_loss(off))
    fast, fast_gradient = loss_and_gradient(token_loss(FastConfig()))
    assert fast == pytest.approx(plain, rel=1e-2)
    assert (fast_gradient - plain_gradient).norm() < 0.1 * plain_gradient.norm()


def test_forward_and_backward_passes_do_not_wait_for_the_device(request):
    loss = token_loss(FastConfig(), lora_dropout=0.1)
    batch = collate(examples(), packing=True).to(torch.device("cuda"))
    window = SumWindow(torch.device("cuda"))
    reseed(0, 0, 0)
    request.getfixturevalue("waiting_is_an_error")
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            sums = loss(batch)
        (sums.nll / len(batch.target_ids)).backward()
        window.add(sums)
