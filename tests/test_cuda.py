"""What only a GPU can show: its own paths give what the plain ones give, and none of them waits for it."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT, read_metrics, tiny_model
from datasets import Dataset
from ops.test_operators import examples as operator_examples
from safetensors.torch import load_file
from tiny import conversation, fill_adapter, with_adapter
from torch.nn import functional as F

from finetune.config import Config, FastConfig, LoraConfig, ModelConfig, OptimConfig
from finetune.data.collate import Boundaries, collate, iterate_batches
from finetune.data.preparing.examples import Examples
from finetune.data.templates.tokenize import IGNORE
from finetune.model.fast_paths import choose_fast_paths
from finetune.model.flat_adapter import FlatAdapter
from finetune.model.generate import generate_answers
from finetune.model.load import add_adapter, load_base, load_tokenizer
from finetune.model.loss import TokenLoss
from finetune.ops import elementwise, torch_makers, triton_makers
from finetune.ops.attention import packed_attention
from finetune.ops.quantized import dequantized
from finetune.run.tracker import Tracker
from finetune.runtime.accelerator import DTYPES, reseed
from finetune.training import loss_scale
from finetune.training.metrics import SumWindow
from finetune.training.optim import create_optimizer

sys.path.insert(0, str(ROOT / "benchmarks"))
from update import make_update, set_up

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


def branching() -> list[dict[str, Any]]:
    """The examples, the first with branches; three targets are predicted by its token 29."""
    first, *others = examples()
    branches = [(70, 30), (80, 30), (85, 12)]
    ids = first["input_ids"] + others[1]["input_ids"][:30]
    return [{"input_ids": ids, "labels": [IGNORE, *ids[1:]], "branches": branches}, *others]


def test_branches_give_the_loss_and_gradient_of_the_plain_layout_and_the_same_bits_again():
    def outcome(loss: TokenLoss, packing: bool) -> tuple[float, torch.Tensor]:
        loss.zero_grad()
        batch = collate(branching(), packing).to(torch.device("cuda"))
        with torch.autocast("cuda", torch.bfloat16):
            sums = loss(batch)
        (sums.nll / len(batch.target_ids)).backward()
        return float(sums.nll), torch.cat([p.grad.flatten() for p in loss.parameters() if p.grad is not None])

    off = FastConfig(attention=False, head=False, lora=False, elementwise=False)
    plain, plain_gradient = outcome(token_loss(off), packing=False)
    loss = token_loss(FastConfig())
    nll, gradient = outcome(loss, packing=True)
    assert nll == pytest.approx(plain, rel=1e-2)
    assert (gradient - plain_gradient).norm() < 0.1 * plain_gradient.norm()
    again = outcome(loss, packing=True)
    assert again[0] == nll
    assert torch.equal(again[1], gradient)


@pytest.mark.parametrize("make_examples", [examples, branching])
@pytest.mark.parametrize("sources", [[], [0, 1, 2]])
def test_forward_and_backward_passes_do_not_wait_for_the_device(request, make_examples, sources):
    loss = token_loss(FastConfig(), lora_dropout=0.1)
    device = torch.device("cuda")
    rows = [{**row, "source": n % 3} for n, row in enumerate(make_examples())]
    (batch,) = iterate_batches([[0, 1, 2, 3]], rows, True, device, sources)
    window = SumWindow(device, ["a", "b", "c"][: len(sources)])
    reseed(0, 0, 0)
    request.getfixturevalue("waiting_is_an_error")
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            sums = loss(batch)
        (sums.nll / len(batch.target_ids)).backward()
        window.add(sums)


@pytest.mark.parametrize(("base", "precision"), [("int8", "bf16"), ("nf4", "bf16"), ("int8", "fp16")])
def test_quantized_bases_take_every_fast_path_and_give_the_plain_gradient(base, precision, tiny_model_dir):
    def outcome(fast: FastConfig) -> tuple[float, torch.Tensor]:
        AcceleratorState._reset_state(reset_partial_state=True)
        config = Config(
            model=ModelConfig(name_or_path=str(tiny_model_dir), quantization=base),
            lora=LoraConfig(lora_dropout=0),
            fast=fast,
        )
        loaded = load_base(config.model, precision, torch.device("cuda"))
        torch.manual_seed(0)  # of A
        model = fill_adapter(add_adapter(loaded, config.lora))
        adapter, loss = FlatAdapter(model), TokenLoss(model).train()
        accelerator = Accelerator(mixed_precision=precision)
        train_set = Examples(Dataset.from_list(examples()), truncated=[], dropped={})
        for choice in choose_fast_paths(config, accelerator, loss, train_set):
            assert choice.requested == choice.actual
        batch = collate(examples(), packing=True).to(torch.device("cuda"))
        # On a GPU, bitsandbytes rounds activations to int8, so it is no reference for paths that do not.
        with nullcontext() if fast.lora else dequantized(model):
            with torch.autocast("cuda", DTYPES[precision]):
                sums = loss(batch)
            (sums.nll / len(batch.target_ids)).backward()
        return float(sums.nll.detach()), adapter.gradient.clone()

    plain, plain_gradient = outcome(
        FastConfig(attention=False, head=False, lora=False, elementwise=False, kernels=False)
    )
    fast, gradient = outcome(FastConfig())
    assert fast == pytest.approx(plain, rel=1e-2)
    assert (gradient - plain_gradient).norm() < 0.1 * plain_gradient.norm()


def test_fp16_repeats_an_update_that_overflows(run_train, tmp_path, monkeypatch):
    settings = {"train__mixed_precision": "fp16", "train__max_steps": 3, "lora__lora_dropout": 0.1}
    calm = run_train(output_dir=tmp_path / "calm", **settings)
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**40)
    forced = run_train(output_dir=tmp_path / "forced", **settings)
    repeats = [line["overflow_repeats"] for line in read_metrics(forced) if line["split"] == "train"]
    assert len(repeats) == 3  # no update is left out
    assert repeats[0] > 0
    assert_near(adapter_of(forced), adapter_of(calm), 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_no_sum_of_squares(dtype):
    x = 40 * torch.randn(7, 896, device="cuda", dtype=dtype)  # the squares of a row sum to 1.4 million
    weight = torch.ones(896, device="cuda", dtype=dtype)
    with torch.autocast("cuda", dtype):
        y = elementwise._RmsNorm.apply(x, weight, 1e-6)
    exact = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    assert y.isfinite().all()
    assert (y.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


def test_the_flat_optimizer_is_bitsandbytes_own_tensor_by_tensor():
    def model() -> Any:
        return with_adapter(tiny_model(20).to("cuda"))

    flat, own = model(), model()
    adapter, config = FlatAdapter(flat), OptimConfig(name="paged_adamw_8bit", learning_rate=1e-2)
    ours = create_optimizer(config.name, adapter, config)
    trainable = [p for p in own.parameters() if p.requires_grad]
    theirs = bnb.optim.PagedAdamW8bit(
        trainable, lr=1e-2, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    for _ in range(3):
        adapter.zero_gradients()
        for ours_p, theirs_p in zip(
            (p for p in flat.parameters() if p.requires_grad), trainable, strict=True
        ):
            theirs_p.grad = torch.randn_like(theirs_p)
            ours_p.grad.copy_(theirs_p.grad)
        ours.step()
        theirs.step()
    torch.cuda.synchronize()
    for ours_p, theirs_p in zip((p for p in flat.parameters() if p.requires_grad), trainable, strict=True):
        assert torch.equal(ours_p, theirs_p)


class StoppedError(Exception):
    pass


def test_a_resumed_run_ends_as_if_never_stopped(run_train, tmp_path, monkeypatch):
    settings = {"lora__r": 64, "train__mixed_precision": "bf16"}
    settings |= {"model__quantization": "int8", "lora__lora_dropout": 0.1}
    whole = run_train(output_dir=tmp_path / "whole", **settings)
    advance = Tracker.advance

    def stopping(self: Tracker, step: int) -> None:
        if step == 3:  # a checkpoint comes after every second update
            raise StoppedError
        advance(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "advance", stopping)
        with pytest.raises(StoppedError):
            run_train(output_dir=tmp_path / "resumed", **settings)
    resumed = run_train(output_dir=tmp_path / "resumed", **settings)
    # Attention's gradient is a sum in no fixed order on a GPU.
    assert_near(adapter_of(resumed), adapter_of(whole), 1e-2)


def adapter_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


def assert_near(
    weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert weights.keys() == expected.keys()
    difference = sum((weights[name] - expected[name]).norm() ** 2 for name in expected) ** 0.5
    assert difference <= tolerance * sum(expected[name].norm() ** 2 for name in expected) ** 0.5


def test_answers_are_those_of_a_cpu(tiny_model_dir):
    config = ModelConfig(name_or_path=str(tiny_model_dir), quantization="none")
    tokenizer, answers = load_tokenizer(Config(model=config)), {}
    for device in ("cuda", "cpu"):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(mixed_precision="no", cpu=device == "cpu")
        model = load_base(config, "no", accelerator.device)
        questions = [conversation("What is two plus two?"), conversation("Why?")]
        answers[device] = generate_answers(accelerator, model, tokenizer, questions, max_new_tokens=16)
    assert answers["cuda"] == answers["cpu"]


def test_an_update_waits_for_the_device_once(tiny_model_dir):
    config = Config(
        model=ModelConfig(name_or_path=str(tiny_model_dir), quantization="int8"),
        optim=OptimConfig(name="paged_adamw_8bit"),
    )
    accelerator = Accelerator(mixed_precision="bf16")
    model = add_adapter(load_base(config.model, "bf16", torch.device("cuda")), config.lora)
    adapter, loss = FlatAdapter(model), TokenLoss(model).train()
    program = set_up(config, accelerator, "bf16", adapter, loss)
    train_set = Examples(Dataset.from_list(examples()), truncated=[], dropped={})
    choose_fast_paths(config, accelerator, loss, train_set)
    batch = collate(examples(), packing=True).to(torch.device("cuda"))
    make_update(program, batch, 0, lambda _: nullcontext())  # makes the optimizer's state
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_update(program, batch, 1, lambda _: nullcontext())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchronizing" in str(warning.message)]
    assert len(waits) == 1, waits


@pytest.mark.parametrize("name", operator_examples())
def test_tritons_kernels_give_what_torchs_operations_give(name):
    pytest.importorskip("triton")

    def on_the_gpu(dtype: torch.dtype) -> list[Any]:
        torch.manual_seed(0)
        return [
            x.cuda().to(dtype if x.is_floating_point() and x.dim() > 1 else x.dtype)
            if isinstance(x, torch.Tensor)
            else x
            for x in operator_examples()[name]
        ]

    triton_makers.enable(torch.device("cuda"))
    if reason := triton_makers.reason_against(name):
        pytest.skip(reason)
    given = [on_the_gpu(torch.float32) for _ in range(2)]
    results = [
        getattr(makers, name)(*arguments)
        for makers, arguments in zip((triton_makers, torch_makers), given, strict=True)
    ]
    # What an operator returns, and what it writes.
    for of_triton, of_torch in zip(
        [*given[0], *as_tuple(results[0])], [*given[1], *as_tuple(results[1])], strict=True
    ):
        if isinstance(of_torch, torch.Tensor):
            torch.testing.assert_close(of_triton, of_torch, rtol=1e-2, atol=1e-2)


def as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)
