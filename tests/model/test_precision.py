"""A model computes in fp32 for a while, on every path, and is afterwards what it was before."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from tiny import CPU, fill_adapter, random_examples
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from finetune.config import Config, FastConfig, LoraConfig, ModelConfig, TrainConfig
from finetune.data.collate import MicroBatch, collate
from finetune.data.preparing.examples import Examples
from finetune.model.fast_paths import choose_fast_paths
from finetune.model.load import add_adapter, load_model
from finetune.model.loss import TokenLoss
from finetune.model.precision import in_fp32

EXAMPLES = random_examples([20, 60, 33], vocabulary=700)
PLAIN = FastConfig(attention=False, head=False, lora=False, elementwise=False, kernels=False)
PATHS = {
    "reference paths": PLAIN,
    "fast paths": replace(FastConfig(), kernels=False),
    "fast paths with kernels": FastConfig(),
    "int8 activations": FastConfig(int8_matmul="int8"),
}
KINDS = [(base, paths) for base in ("none", "int8", "nf4") for paths in PATHS if paths != "int8 activations"]
KINDS.append(("int8", "int8 activations"))
LORA = LoraConfig(r=4, lora_dropout=0.0)


@pytest.fixture
def token_loss(tiny_model_dir: Path) -> Callable[..., TokenLoss]:
    """The tiny model in bf16 with a filled adapter, on a base of this kind and these paths."""

    def build(quantization: str, fast: FastConfig) -> TokenLoss:
        settings = ModelConfig(name_or_path=str(tiny_model_dir), quantization=quantization)
        config = Config(model=settings, lora=LORA, train=TrainConfig(), fast=fast)
        made = TokenLoss(fill_adapter(load_model(config, "bf16", CPU))).eval()
        examples = Examples(Dataset.from_list(EXAMPLES), truncated=[], dropped={})
        choose_fast_paths(config, Accelerator(cpu=True, mixed_precision="bf16"), made, examples)
        return made

    return build


def with_same_weights(token_loss: TokenLoss, tiny_model_dir: Path) -> TokenLoss:
    """transformers' and PEFT's model in fp32 on the reference paths, never quantized, with those weights."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir).requires_grad_(False)
    model = add_adapter(plain, LORA)
    layers = dict(token_loss.model.named_modules())
    weights = {}
    for name, parameter in token_loss.model.named_parameters():
        layer = layers[name.rpartition(".")[0]]
        is_quantized = isinstance(parameter, bnb.nn.Int8Params | bnb.nn.Params4bit)
        weights[name] = dequantize(layer) if is_quantized else parameter.detach().float()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert all("lm_head" in name for name in missing)  # tied to the embeddings
    return TokenLoss(model).eval()


def dequantize(layer: Any) -> Tensor:
    """By the definition: int8 codes by the largest of each row / 127, nf4 codes by a table and each block's
    largest, rounded to the base's 16 bits."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        codes, largest = (
            (layer.state.CB, layer.state.SCB)
            if layer.weight.CB is None
            else (layer.weight.CB, layer.weight.SCB)
        )
        return (codes.double() * largest.double()[:, None] / 127).float()
    state = layer.weight.quant_state
    packed = layer.weight.data.flatten().int()
    values = state.code[torch.stack([packed >> 4, packed & 15], dim=1).flatten()].view(-1, state.blocksize)
    return (values * state.absmax[:, None]).view(state.shape).to(state.dtype).float()


@torch.no_grad()
def losses(token_loss: TokenLoss, batch: MicroBatch) -> Tensor:
    """[N, 2] nll and entropy: by `token_stats`, as an evaluation takes them."""
    return token_loss.token_stats(batch)[:, :2].double()


@pytest.mark.parametrize(("quantization", "paths"), KINDS)
def test_the_losses_are_those_of_a_model_in_fp32_with_the_same_weights(
    token_loss, tiny_model_dir, quantization, paths
):
    made = token_loss(quantization, PATHS[paths])
    exact = with_same_weights(made, tiny_model_dir)
    for packing in (True, False):
        batch = collate(EXAMPLES, packing)
        with in_fp32(made):
            actual, sums = losses(made, batch), made(batch)
        expected = losses(exact, batch)
        torch.testing.assert_close(actual.sum(0), expected.sum(0), rtol=1e-6, atol=0)
        assert sums.nll.item() == pytest.approx(expected[:, 0].sum().item(), rel=1e-6)


@pytest.mark.parametrize(("quantization", "paths"), KINDS)
def test_the_model_is_afterwards_what_it_was(token_loss, quantization, paths):
    made, batch = token_loss(quantization, PATHS[paths]), collate(EXAMPLES, packing=True)
    with torch.autocast("cpu", torch.bfloat16):
        before = losses(made, batch)
    weights = {name: parameter.detach().clone() for name, parameter in made.named_parameters()}
    attributes = {name: dict(module.__dict__) for name, module in made.named_modules()}
    with in_fp32(made):
        inside = losses(made, batch)
    assert {name: p.dtype for name, p in made.named_parameters()} == {n: w.dtype for n, w in weights.items()}
    assert all(torch.equal(parameter, weights[name]) for name, parameter in made.named_parameters())
    assert {name: module.__dict__.keys() for name, module in made.named_modules()} == {
        name: kept.keys() for name, kept in attributes.items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses(made, batch), before)
    assert not torch.equal(inside, before)


def test_an_error_inside_leaves_the_model_as_it_was(token_loss):
    made = token_loss("int8", PATHS["int8 activations"])
    dtypes = [parameter.dtype for parameter in made.parameters()]
    with pytest.raises(KeyboardInterrupt), in_fp32(made):
        raise KeyboardInterrupt
    assert [parameter.dtype for parameter in made.parameters()] == dtypes
    layers = [module for module in made.modules() if hasattr(module, "int8_matmul")]
    assert layers
    assert all(layer.int8_matmul for layer in layers)


def test_parameters_in_fp32_keep_their_memory(token_loss):
    """An optimizer and a collective communication may hold on to the adapter's."""
    made = token_loss("none", PLAIN)
    places = {name: p.data_ptr() for name, p in made.named_parameters() if p.dtype == torch.float32}
    assert places
    with in_fp32(made):
        inside = {name: p.data_ptr() for name, p in made.named_parameters() if name in places}
    assert inside == places == {n: p.data_ptr() for n, p in made.named_parameters() if n in places}


@pytest.mark.parametrize("around", [nullcontext(), torch.autocast("cpu", torch.bfloat16)])
def test_autocast_is_off_inside_and_afterwards_as_before(around: AbstractContextManager[Any]):
    layer = nn.Linear(4, 4, dtype=torch.bfloat16)
    with around:
        enabled = torch.is_autocast_enabled("cpu")
        with in_fp32(layer):
            assert layer(torch.ones(1, 4)).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu") == enabled
