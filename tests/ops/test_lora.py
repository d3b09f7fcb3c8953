"""LoRA layers as one function each, against PEFT's own forward; the dropout noise against its definition."""

from contextlib import nullcontext
from itertools import product
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from conftest import tiny_model
from peft.tuners.lora import LoraLayer
from tiny import VOCABULARY, adapter_gradients, fill_adapter, random_examples, with_adapter
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from finetune.config import Config, LoraConfig, ModelConfig, TrainConfig
from finetune.data.collate import collate
from finetune.model.load import load_model
from finetune.model.loss import TokenLoss
from finetune.ops import dropout, lora, operators
from finetune.runtime.accelerator import reseed

CPU = torch.device("cpu")
IN, OUT, RANK = 48, 40, 4
KINDS = ["fp32", "fp32 under autocast", "bf16", "int8", "nf4"]


@pytest.fixture(autouse=True)
def _fresh_pool():
    operators._pool.cache_clear()
    yield
    operators._pool.cache_clear()


def shrink_pool(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a pool of `size` masks, so that an input takes several slices of it."""
    monkeypatch.setattr(dropout, "POOL_SIZE", size)
    monkeypatch.setattr(dropout, "SLICE", size // 2)
    monkeypatch.setattr(dropout, "NUM_OFFSETS", size // 2 // dropout.ALIGNMENT)


def keep_some(x: Tensor, rate: float) -> Tensor:
    """x with zeros where it is dropped, with noise as a layer draws it."""
    return dropout.zero_dropped(x, operators.noise_pool(rate, x.dtype, x.device), dropout.draw_start())


def lora_layer(
    kind: str = "fp32", bias: bool = True, dropout: float = 0.0, sizes: tuple[int, int, int] = (IN, OUT, RANK)
) -> Any:
    """A LoRA layer of PEFT's with random A and B, as it is in a model of this kind."""
    num_in, num_out, rank = sizes
    torch.manual_seed(0)
    plain = nn.Linear(num_in, num_out, bias)
    model = nn.Module()
    model.linear = plain.to(torch.bfloat16 if kind == "bf16" else torch.float32)
    if kind in ("int8", "nf4"):
        if kind == "int8":
            model.linear = bnb.nn.Linear8bitLt(num_in, num_out, bias, has_fp16_weights=False)
        else:
            model.linear = bnb.nn.Linear4bit(
                num_in, num_out, bias, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
        model.linear.load_state_dict(plain.state_dict())
        model.linear.to("cpu")
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "int8", kind == "nf4"
    config = peft.LoraConfig(r=rank, lora_alpha=3 * rank, lora_dropout=dropout, target_modules=["linear"])
    model = peft.get_peft_model(model.requires_grad_(False), config)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.3)
    return model.base_model.model.linear.train()


def random_input(kind: str = "fp32", shape: tuple[int, ...] = (2, 7, IN)) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return x.to(torch.float32 if kind.startswith("fp32") else torch.bfloat16).requires_grad_()


def results(layer: Any, x: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """The output and the gradients of x, A and B for a random gradient of the output."""
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    gradients = torch.autograd.grad(y, [x, *weights], dy)
    return {"y": y.detach(), **dict(zip(("x", "A", "B"), gradients, strict=True))}


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, right in expected.items():
        assert (got[name].dtype, got[name].shape) == (right.dtype, right.shape), name
        assert right.norm() > 0, name
        assert (got[name].float() - right.float()).norm() <= tolerance * right.float().norm(), name


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], right) for name, right in expected.items())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_pefts_own_forward(kind, bias):
    layer, x, autocast = lora_layer(kind, bias), random_input(kind), kind != "fp32"
    expected = results(layer, x, autocast)
    assert lora.enable(layer) == (1, 1)
    assert_near(results(layer, x, autocast), expected, 1e-2 if autocast else 1e-5)


@pytest.mark.parametrize(
    ("quantization", "precision", "tolerance"),
    [("none", "no", 1e-5), ("none", "bf16", 1e-2), ("int8", "bf16", 1e-2), ("nf4", "bf16", 1e-2)],
)
def test_every_layer_of_a_model_computes_what_pefts_own_does(
    quantization, precision, tolerance, tiny_model_dir
):
    source = ModelConfig(name_or_path=str(tiny_model_dir), quantization=quantization)
    model = load_model(Config(model=source, lora=LoraConfig(lora_dropout=0.0)), precision, CPU)
    fill_adapter(model).train()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 2 * 7
    kind = "fp32" if precision == "no" else "bf16"
    inputs = [random_input(kind, (2, 9, layer.in_features)) for layer in layers]
    expected = [results(*pair, precision == "bf16") for pair in zip(layers, inputs, strict=True)]
    assert lora.enable(model) == (14, 14)
    for layer, x, right in zip(layers, inputs, expected, strict=True):
        assert_near(results(layer, x, precision == "bf16"), right, tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_computes_what_pefts_own_forward_does(kind):
    layer, x, autocast = lora_layer(kind, dropout=0.5), random_input(kind), kind != "fp32"
    layer.eval()
    layer.base_layer.train()  # as `dropout_off` has it
    expected = results(layer, x, autocast)
    lora.enable(layer)
    assert_near(results(layer, x, autocast), expected, 1e-2 if autocast else 1e-5)


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_a_layer_is_right_after_its_base_computed_alone_in_evaluation(kind):
    # bitsandbytes may lay its weights out anew then.
    layer, autocast = lora_layer(kind, sizes=(64, 64, RANK)), kind != "fp32"
    x = random_input(kind, (5, 64))
    expected = results(layer, x, autocast)
    lora.enable(layer)
    layer.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer.base_layer(x.detach())
    assert_near(results(layer.train(), x, autocast), expected, 1e-2 if autocast else 1e-5)


def test_an_input_without_a_gradient_gives_gradients_to_a_and_b_alone():
    layer, x = lora_layer(), random_input()
    expected = results(layer, x)
    lora.enable(layer)
    y = layer(x.detach())
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    got = {"A": layer.lora_A["default"].weight.grad, "B": layer.lora_B["default"].weight.grad}
    assert_near(got, {name: expected[name] for name in ("A", "B")}, 1e-5)
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == [
        "lora_A.default.weight",
        "lora_B.default.weight",
    ]


# What is left to PEFT


@pytest.fixture
def model() -> Any:
    return with_adapter(tiny_model(VOCABULARY))


IDS = torch.tensor([[3, 7, 2, 9, 11]])


def logits_of(model: Any, fast: bool) -> Tensor:
    if fast:
        lora.enable(model)
    else:
        lora.disable(model)
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_an_adapter_that_is_off_is_off(model):
    with model.disable_adapter():
        assert torch.equal(logits_of(model, fast=True), logits_of(model, fast=False))
        off = logits_of(model, fast=True)
    assert not torch.allclose(logits_of(model, fast=True), off, atol=0.01)


def test_a_merged_adapter_counts_once(model):
    before = logits_of(model, fast=True)
    model.merge_adapter()
    assert torch.equal(logits_of(model, fast=True), logits_of(model, fast=False))
    assert torch.allclose(logits_of(model, fast=True), before, atol=1e-4)
    model.unmerge_adapter()
    assert torch.allclose(logits_of(model, fast=True), before, atol=1e-4)


def add_second_adapter(model: Any, target_modules: Any) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=7, target_modules=target_modules, init_lora_weights=False)
    model.add_adapter("second", config)


@pytest.mark.parametrize("active", [["default", "second"], ["second"], ["default"]])
def test_the_adapters_that_are_active_count(model, active):
    add_second_adapter(model, "all-linear")
    model.base_model.set_adapter(active)
    expected = logits_of(model, fast=False)
    assert torch.allclose(logits_of(model, fast=True), expected, atol=1e-4)
    model.base_model.set_adapter(["default", "second"] if len(active) == 1 else ["default"])
    assert not torch.allclose(logits_of(model, fast=True), expected, atol=0.01)


def test_a_layer_that_lacks_the_active_adapter_is_its_base(model):
    add_second_adapter(model, ["q_proj"])
    model.base_model.set_adapter(["second"])
    assert torch.allclose(logits_of(model, fast=True), logits_of(model, fast=False), atol=1e-4)


def test_dora_and_biases_and_layers_of_other_kinds_are_left_alone():
    base = tiny_model(VOCABULARY).requires_grad_(False)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "embed_tokens"])
    mixed = peft.get_peft_model(base, config)
    assert lora.enable(mixed) == (4, 5)
    (embedding,) = [m for m in mixed.modules() if isinstance(m, peft.tuners.lora.Embedding)]
    assert "forward" not in vars(embedding)

    for settings in ({"use_dora": True}, {"lora_bias": True}):
        base = tiny_model(VOCABULARY).requires_grad_(False)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings)
        other = fill_adapter(peft.get_peft_model(base, config))
        expected = logits_of(other, fast=False)
        assert lora.enable(other) == (0, 4)
        assert torch.equal(logits_of(other, fast=True), expected)

    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    gpt2 = peft.get_peft_model(GPT2LMHeadModel(config), peft.LoraConfig(r=4, fan_in_fan_out=True))
    assert lora.enable(gpt2) == (0, 2)


def test_slowing_down_gives_pefts_forward_back():
    layer, x = lora_layer(dropout=0.5), random_input()
    reseed(1, 2, 3)
    expected = results(layer, x)
    lora.enable(layer)
    reseed(1, 2, 3)
    assert not torch.equal(results(layer, x)["y"], expected["y"])
    lora.disable(layer)
    assert "forward" not in vars(layer)
    reseed(1, 2, 3)
    assert_equal(results(layer, x), expected)
    lora.disable(layer)  # again: nothing happens


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_what_is_saved_is_the_same_to_the_byte(quantization, tiny_model_dir, tmp_path):
    source = ModelConfig(name_or_path=str(tiny_model_dir), quantization=quantization)
    precision = "no" if quantization == "none" else "bf16"

    def saved(fast: bool) -> tuple[dict[str, Tensor], dict[str, bytes]]:
        model = fill_adapter(load_model(Config(model=source), precision, CPU)).train()
        folder = tmp_path / f"{fast}"
        if fast:
            lora.enable(model)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model(input_ids=IDS)
        model.save_pretrained(folder)
        return model.state_dict(), {path.name: path.read_bytes() for path in folder.iterdir()}

    state, files = saved(fast=False)
    fast_state, fast_files = saved(fast=True)
    assert fast_state.keys() == state.keys()
    assert all(torch.equal(fast_state[key], value) for key, value in state.items())
    assert fast_files == files
    assert "adapter_model.safetensors" in files


# Dropout


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("kind", "rate"), [("fp32", 0.05), ("fp32", 0.6), ("bf16", 0.3)])
def test_the_mean_and_the_variance_of_the_noise_are_those_of_dropout(kind, rate, fast, monkeypatch):
    shrink_pool(2**16, monkeypatch)  # larger than the input all the same
    # With a single output and rank 1, tokens are independent: y = base + scaling b (a . x m) / (1 - p).
    # That it holds of PEFT's own layer too says that it is the right comparison.
    layer = lora_layer(kind, bias=False, dropout=rate, sizes=(IN, 1, 1))
    if fast:
        lora.enable(layer)
    x = random_input(kind, (64, IN)).detach()
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    if kind == "bf16":  # the adapter too, so that what is compared is the noise alone
        a, b = a.bfloat16(), b.bfloat16()
    terms = layer.scaling["default"] * b.double() * a.double() * x.double()  # [tokens, IN]
    mean = (x.double() @ layer.base_layer.weight.double().t()).squeeze(1) + terms.sum(1)
    spread = (rate / (1 - rate) * terms.square().sum(1)).sqrt()
    draws = []
    for step in range(200):
        reseed(5, step, 0)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            draws.append(layer(x).squeeze(1).double())
    z = (torch.stack(draws) - mean) / spread
    num_draws = z.numel()
    # Five standard errors, and what rounding may add.
    rounding = 0.02 if kind == "bf16" else 1e-4
    assert abs(z.mean()) < 5 / num_draws**0.5 + rounding
    error_of_variance = ((z.pow(4).mean() - z.var() ** 2) / num_draws).sqrt()
    assert abs(z.square().mean() - 1) < 5 * error_of_variance + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", [1e-4, 0.05, 0.5, 0.9])
def test_the_asked_share_of_numbers_is_dropped(rate, dtype):
    x = torch.ones(1000, 1000, dtype=dtype)
    reseed(1, 2, 3)
    kept = keep_some(x, rate)
    assert (kept.shape, kept.dtype) == (x.shape, dtype)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    error = (rate * (1 - rate) / x.numel()) ** 0.5
    share = dropout.dropped_share(rate)
    assert abs(share - rate) <= 0.5 / 2**16
    assert abs((kept == 0).double().mean() - share) < 5 * error
    # Neighbours are dropped independently, along rows and columns.
    dropped = (kept == 0).double()
    for one, other in ((dropped[1:], dropped[:-1]), (dropped[:, 1:], dropped[:, :-1])):
        both = rate**2
        assert abs((one * other).mean() - both) < 5 * (both / x.numel()) ** 0.5 + 2 * rate * error * 5


def test_what_is_kept_stays_as_it_is_to_the_bit():
    x = torch.tensor([-0.0, 1e-40, -3.5, torch.inf, 65504.0, 2**-24] * 50)
    reseed(4, 0, 0)
    pool = operators.noise_pool(0.5, x.dtype, x.device)
    (_, part), *others = dropout.slices(x.numel(), 17)
    assert others == []
    mask, kept = pool[part], dropout.zero_dropped(x, pool, 17)
    assert set(mask.tolist()) == {0, -1}
    assert torch.equal(kept.view(torch.int32), x.view(torch.int32) & mask)


def test_the_noise_depends_on_seed_step_and_rank_alone():
    layer, x = lora_layer(dropout=0.5), random_input().detach()
    lora.enable(layer)

    def noise(*state: int) -> Tensor:
        reseed(*state)
        return layer(x).detach()

    states = list(product((1, 2), (0, 1), (0, 1)))
    outputs = {state: noise(*state) for state in states}
    for state in reversed(states):
        assert torch.equal(noise(*state), outputs[state])
        assert not any(torch.allclose(outputs[state], outputs[other]) for other in states if other != state)


def test_layers_and_passes_of_an_update_draw_noise_of_their_own():
    layers, x = [lora_layer(dropout=0.5) for _ in range(3)], random_input().detach()
    for layer in layers:
        lora.enable(layer)
    reseed(1, 2, 3)
    outputs = [layer(x) for layer in layers * 2]
    for number, one in enumerate(outputs):
        assert not any(torch.allclose(one, other) for other in outputs[number + 1 :])


def masked(layer: Any, x: Tensor, keeps: Tensor, share: float) -> Tensor:
    """The layer with the numbers that are kept, as a plain function."""
    base, a, b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    kept = x * keeps / (1 - share)
    return linear(x, base.weight, base.bias) + layer.scaling["default"] * kept @ a.t() @ b.t()


@pytest.mark.parametrize("pool_size", [None, 256])
def test_the_backward_pass_drops_what_the_forward_pass_dropped(pool_size, monkeypatch):
    # A pool of 256 masks is too small for an input, which then takes several slices of it.
    if pool_size:
        shrink_pool(pool_size, monkeypatch)
    layer, x = lora_layer(dropout=0.4), random_input()
    share = dropout.dropped_share(0.4)
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    reseed(7, 1, 0)
    expected = masked(layer, x, keep_some(torch.ones_like(x), 0.4), share)
    lora.enable(layer)
    reseed(7, 1, 0)
    y = layer(x)
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5)
    # By the time of the backward pass, others have drawn, and from another seed.
    layer(x)
    reseed(7, 2, 0)
    layer(x)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, *weights], dy)
    right = torch.autograd.grad(expected, [x, *weights], dy)
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in zip(got, right, strict=True))


def test_an_input_of_many_slices_is_dropped_with_the_right_share(monkeypatch):
    shrink_pool(2**12, monkeypatch)
    x, shares = torch.ones(37, 1000), []
    for step in range(50):
        reseed(1, step, 0)
        shares.append(float((keep_some(x, 0.25) == 0).double().mean()))
    # Of each step's numbers no more than the pool's 2^12 are independent.
    error = (0.25 * 0.75 / (50 * 2**12)) ** 0.5
    assert abs(sum(shares) / 50 - 0.25) < 5 * error


def test_checkpointed_layers_repeat_their_noise():
    layers, x = (
        nn.Sequential(*(lora_layer(dropout=0.5, sizes=(IN, IN, RANK)) for _ in range(3))),
        random_input(),
    )
    assert lora.enable(layers) == (3, 3)

    def gradients(compute: Any) -> list[Tensor]:
        reseed(1, 2, 3)
        y = compute()
        reseed(4, 5, 6)  # the backward pass has to find its noise again all the same
        weights = [p for p in layers.parameters() if p.requires_grad]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *weights])]

    plain = gradients(lambda: layers(x))
    kept = gradients(lambda: checkpoint(layers, x, use_reentrant=False))
    assert all(torch.equal(*pair) for pair in zip(kept, plain, strict=True))


def test_gradient_checkpointing_changes_no_gradient_of_a_model_with_dropout(tiny_model_dir):
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        config = Config(
            model=ModelConfig(name_or_path=str(tiny_model_dir), quantization="none"),
            lora=LoraConfig(lora_dropout=0.5),
            train=TrainConfig(gradient_checkpointing=checkpointing),
        )
        model = fill_adapter(load_model(config, "no", CPU))
        lora.enable(model)
        token_loss = TokenLoss(model).train()
        reseed(1, 2, 3)
        for seed in range(2):  # two micro-batches of one update
            token_loss(collate(random_examples([9, 14, 6], seed=seed), packing=True)).nll.backward()
        return adapter_gradients(model)

    assert_near(gradients(True), gradients(False), 1e-5)


# int8


def test_activations_in_int8_give_nearly_the_same_output_and_the_very_same_gradients():
    layer, x = lora_layer("int8"), random_input("int8", (64, IN))
    lora.enable(layer)
    dequantized = results(layer, x, autocast=True)
    lora.enable(layer, int8_matmul=True)
    in_int8 = results(layer, x, autocast=True)
    assert not torch.equal(in_int8["y"], dequantized["y"])
    error = (in_int8.pop("y").float() - dequantized["y"].float()).norm()
    assert 0 < error < 5e-2 * dequantized.pop("y").float().norm()
    assert_equal(in_int8, dequantized)


# Several layers of one input


def three_layers(kind: str, dropout: float) -> list[Any]:
    """Of different widths, scales and weights."""
    layers = [lora_layer(kind, dropout=dropout, sizes=(IN, size, RANK)) for size in (OUT, 16, 24)]
    for number, layer in enumerate(layers, 1):
        layer.scaling["default"] *= number
        with torch.no_grad():
            layer.lora_A["default"].weight.mul_(1 + number / 10)
        lora.enable(layer)
    return layers


def parts(layers: list[Any], y: Tensor) -> list[Tensor]:
    """The outputs of each layer, of those side by side."""
    return list(torch.split(y, [layer.out_features for layer in layers], dim=-1))


def results_of(layers: list[Any], x: Tensor, ys: list[Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    dys = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in ys]
    weights = [half["default"].weight for layer in layers for half in (layer.lora_A, layer.lora_B)]
    gradients = torch.autograd.grad(ys, [x, *weights], dys)
    named = {f"y{number}": y.detach() for number, y in enumerate(ys)}
    return {**named, **{f"gradient {number}": gradient for number, gradient in enumerate(gradients)}}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_one_input_compute_together_what_each_computes(kind):
    layers, x = three_layers(kind, 0.0), random_input(kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind != "fp32"):
        alone = [layer(x) for layer in layers]
        together = parts(layers, lora.project(layers, x))
    tolerance = 1e-5 if kind == "fp32" else 1e-2
    assert_near(results_of(layers, x, together), results_of(layers, x, alone), tolerance)


def test_layers_of_one_input_drop_the_same_numbers_of_it():
    layers, x = three_layers("fp32", 0.5), random_input()
    reseed(0, 0, 0)
    alone = []
    for layer in layers:
        lora.disable(layer)
        with torch.no_grad():
            base = layer.base_layer(x)
            reseed(0, 0, 0)
            kept = keep_some(x, 0.5) / 0.5
            update = kept @ layer.lora_A["default"].weight.t() @ layer.lora_B["default"].weight.t()
            alone.append(base + layer.scaling["default"] * update)
        lora.enable(layer)
    reseed(0, 0, 0)
    for got, expected in zip(parts(layers, lora.project(layers, x)), alone, strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spoil", ["plain", "off", "another dropout", "a hook"])
def test_layers_that_cannot_compute_together_compute_alone(spoil, monkeypatch):
    layers, x = three_layers("fp32", 0.0), random_input()
    seen: list[str] = []
    if spoil == "plain":
        lora.disable(layers[1])
    elif spoil == "off":
        layers[1].enable_adapters(False)
    elif spoil == "another dropout":
        layers[1].lora_dropout["default"] = nn.Dropout(0.9)
    else:
        layers[1].register_forward_hook(lambda *_: seen.append("hook"))
    reseed(0, 0, 0)
    expected = [layer(x) for layer in layers]
    reseed(0, 0, 0)
    got = parts(layers, lora.project(layers, x))
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    assert seen == (["hook"] * 2 if spoil == "a hook" else [])
