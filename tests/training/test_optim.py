"""The learning rate follows transformers' schedules; the optimizer is the requested one, or says why not."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from conftest import tiny_model
from optimizers import ALL, SETTINGS, SHAPES, separate_optimizer
from peft.optimizers import create_loraplus_optimizer
from tiny import (
    CPU,
    VOCABULARY,
    fill_adapter,
    flat_adapter,
    parameters_of,
    random_examples,
    with_adapter,
)
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_scheduler, get_wsd_schedule

from finetune.config import Config, LoraConfig, ModelConfig, OptimConfig
from finetune.data.collate import collate
from finetune.model.flat_adapter import FlatAdapter
from finetune.model.load import add_adapter, load_model
from finetune.model.loss import TokenLoss
from finetune.runtime.choice import Choice
from finetune.training.optim import (
    choose_optimizer,
    create_optimizer,
    learning_rate_at,
    set_learning_rate,
)

CUDA = torch.device("cuda")


def transformers_rates(name: str, warmup_steps: int, num_steps: int, learning_rate: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    scheduler = get_scheduler(name, optimizer, warmup_steps, num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("num_steps", [1, 2, 7, 40])
@pytest.mark.parametrize(
    ("warmup_ratio", "warmup_steps"),
    [
        (0.0, {1: 0, 2: 0, 7: 0, 40: 0}),
        (0.03, {1: 1, 2: 1, 7: 1, 40: 2}),
        (0.25, {1: 1, 2: 1, 7: 2, 40: 10}),
        (1.0, {1: 1, 2: 2, 7: 7, 40: 40}),
    ],
)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_every_learning_rate_is_that_of_transformers(schedule, warmup_ratio, warmup_steps, num_steps):
    config = OptimConfig(schedule=schedule, warmup_ratio=warmup_ratio, learning_rate=3e-4)
    name = "constant_with_warmup" if schedule == "constant" and warmup_ratio > 0 else schedule
    rates = [learning_rate_at(step, num_steps, config) for step in range(num_steps)]
    expected = transformers_rates(name, warmup_steps[num_steps], num_steps, 3e-4)
    assert rates == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_steps", [3, 7, 40])
@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_a_floor_and_a_number_of_warm_up_steps_give_the_rates_of_transformers(num_steps, warmup_steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    to_floor = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, warmup_steps, num_steps, min_lr_rate=0.1
    ).lr_lambdas[0]
    config = OptimConfig(
        learning_rate=3e-4, schedule="cosine", min_lr_ratio=0.1, warmup_steps=warmup_steps or None
    )
    for step in range(num_steps):
        assert learning_rate_at(step, num_steps, config) == pytest.approx(3e-4 * to_floor(step), rel=1e-12)


@pytest.mark.parametrize("floor", [None, 0.2])
def test_a_warm_up_stable_decay_schedule_is_that_of_transformers_after_the_warm_up(floor):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    num_steps, warmup_steps, decay_steps = 40, 5, 12
    expected = get_wsd_schedule(
        optimizer,
        num_warmup_steps=warmup_steps,
        num_decay_steps=decay_steps,
        num_training_steps=num_steps,
        decay_type="linear",
        min_lr_ratio=floor or 0,
    ).lr_lambdas[0]
    config = OptimConfig(
        learning_rate=3e-4,
        schedule="warmup_stable_decay",
        decay_ratio=0.3,
        min_lr_ratio=floor,
        warmup_steps=warmup_steps,
    )
    rates = [learning_rate_at(step, num_steps, config) for step in range(num_steps)]
    # The rise begins at 0 with a floor too.
    assert rates[:warmup_steps] == pytest.approx([3e-4 * step / warmup_steps for step in range(warmup_steps)])
    rest = range(warmup_steps, num_steps)
    assert rates[warmup_steps:] == pytest.approx([3e-4 * expected(step) for step in rest], rel=1e-12)
    assert rates.count(3e-4) == num_steps - warmup_steps - decay_steps + 1


def test_a_linear_schedule_with_a_floor_ends_at_it():
    config = OptimConfig(learning_rate=1.0, schedule="linear", min_lr_ratio=0.25)
    rates = [learning_rate_at(step, 4, config) for step in range(5)]
    assert rates == pytest.approx([1, 1 - 0.1875, 1 - 0.375, 1 - 0.5625, 0.25])


def test_without_warm_up_the_first_update_has_the_full_rate_and_the_last_is_above_zero():
    for schedule in ("linear", "cosine"):
        config = OptimConfig(schedule=schedule, warmup_ratio=0.0, learning_rate=1.0)
        rates = [learning_rate_at(step, 5, config) for step in range(5)]
        assert rates[0] == 1.0
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] > 0
        assert learning_rate_at(5, 5, config) == pytest.approx(0, abs=1e-15)


def test_a_new_learning_rate_reaches_every_group():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p], "lr": 0.5} for p in parameters])
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("requested", "actual"), [("paged_adamw_8bit", "adamw_8bit"), ("paged_adamw", "adamw")]
)
def test_a_paged_optimizer_becomes_the_same_one_without_paging_on_a_cpu_and_says_why(requested, actual):
    setting = choose_optimizer(requested, CPU)
    assert (setting.name, setting.requested, setting.actual) == ("optimizer", requested, actual)
    assert "GPU memory" in setting.reason


@pytest.mark.parametrize("requested", ALL)
def test_every_other_optimizer_is_the_requested_one(requested):
    assert choose_optimizer(requested, CUDA) == Choice("optimizer", requested, requested, reason="")
    if not requested.startswith("paged"):
        assert choose_optimizer(requested, CPU) == Choice("optimizer", requested, requested, reason="")


@pytest.mark.parametrize(
    ("name", "kind", "bits", "paged"),
    [
        ("adamw", torch.optim.AdamW, None, None),
        ("adamw_8bit", bnb.optim.AdamW, 8, False),
        ("paged_adamw", bnb.optim.AdamW, 32, True),
        ("paged_adamw_8bit", bnb.optim.AdamW, 8, True),
        ("sgd", torch.optim.SGD, None, None),
    ],
)
def test_each_name_makes_its_optimizer_with_the_settings_of_the_config(name, kind, bits, paged):
    config = OptimConfig(learning_rate=0.01, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.1)
    optimizer = create_optimizer(name, flat_adapter(torch.zeros(3)), config)
    assert isinstance(optimizer, kind)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.1)
    if name != "sgd":
        assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.9), 1e-5)
    if bits is not None:
        assert optimizer.args.optim_bits == bits
        assert optimizer.is_paged == paged


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_an_update_of_adamw_is_the_one_of_the_formula(name):
    torch.manual_seed(0)
    # Large enough for bitsandbytes to keep its state in 8 bits.
    adapter = flat_adapter(torch.randn(64, 128))
    (weight,), (region,) = parameters_of(adapter), adapter.regions
    before = weight.detach().clone()
    config = OptimConfig(learning_rate=0.01, weight_decay=0.1)
    optimizer = create_optimizer(name, adapter, config)
    weight.grad.normal_()
    optimizer.step()
    # In the first update both averages are the gradient's own, so the step is its sign.
    expected = before - 0.01 * (0.1 * before + weight.grad.sign())
    assert torch.allclose(weight, expected, atol=1e-4)
    if name == "adamw_8bit":
        assert optimizer.state[region.parameter]["state1"].dtype == torch.uint8


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ALL)
def test_the_flat_adapter_gets_the_updates_of_the_separate_tensors_to_the_bit(name):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    adapter = flat_adapter(*tensors)
    flat = create_optimizer(name, adapter, SETTINGS)
    weights = [torch.nn.Parameter(tensor) for tensor in tensors]
    separate = separate_optimizer(name, weights)
    for step in range(5):
        adapter.zero_gradients()
        for parameter, weight in zip(parameters_of(adapter), weights, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator)
            if step == 0 and weight.dim() == 2:  # as in the first update of all A: whole blocks of zeros
                weight.grad[: len(weight) // 2] = 0
            parameter.grad.copy_(weight.grad)
        for optimizer in (flat, separate):
            set_learning_rate(optimizer, 0.01 / (1 + step))
            optimizer.step()
        for parameter, weight in zip(parameters_of(adapter), weights, strict=True):
            assert torch.equal(parameter, weight), (step, weight.shape)


LORA_PLUS_OF_PEFT = {
    "adamw": torch.optim.AdamW,
    "adamw_8bit": bnb.optim.AdamW8bit,
    "paged_adamw": bnb.optim.PagedAdamW32bit,
    "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    "sgd": torch.optim.SGD,
}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_lora_plus_makes_the_updates_of_peft_to_the_bit(name, use_dora):
    settings = LoraConfig(r=64, use_dora=use_dora)  # tensors above and below 4,096 numbers
    models = [
        fill_adapter(add_adapter(tiny_model(VOCABULARY).requires_grad_(False), settings)) for _ in range(2)
    ]
    config = OptimConfig(learning_rate=0.01, weight_decay=0.1, lora_b_lr_ratio=16)
    adapter = FlatAdapter(models[0], separates_b=True)
    ours = create_optimizer(name, adapter, config)
    theirs = create_loraplus_optimizer(
        models[1], LORA_PLUS_OF_PEFT[name], lr=0.01, loraplus_lr_ratio=16, weight_decay=0.1
    )
    for group in theirs.param_groups:  # otherwise B and all vectors have a decay of their own, 0
        group["weight_decay"] = 0.1
    at_start = [group["lr"] for group in theirs.param_groups]
    own, others = parameters_of(adapter), [p for p in models[1].parameters() if p.requires_grad]
    assert any(p.numel() < 4096 for p in own)
    generator = torch.Generator().manual_seed(0)
    for share in (1.0, 0.5, 0.25):
        set_learning_rate(ours, 0.01 * share)
        for group, peak in zip(theirs.param_groups, at_start, strict=True):
            group["lr"] = peak * share
        for parameter, other in zip(own, others, strict=True):
            other.grad = torch.randn(other.shape, generator=generator)
            parameter.grad.copy_(other.grad)
        ours.step()
        theirs.step()
        assert all(torch.equal(parameter, other) for parameter, other in zip(own, others, strict=True))


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_all_tensors_take_one_call_for_each_precision_of_the_state(monkeypatch, name):
    sizes = []

    def counting(real: Any) -> Any:
        return lambda kind, gradient, *others, **more: (
            sizes.append(gradient.numel()),
            real(kind, gradient, *others, **more),
        )

    for function in ("optimizer_update_8bit_blockwise", "optimizer_update_32bit"):
        monkeypatch.setattr(bnb.functional, function, counting(getattr(bnb.functional, function)))
    optimizer = create_optimizer(name, flat_adapter(*(torch.randn(shape) for shape in SHAPES)), SETTINGS)
    optimizer.step()
    assert sizes == [8 * 576 + 64 * 64 + 5120 + 400 * 256 + 16 * 512, 256 + 512]


@pytest.mark.parametrize("name", ALL)
def test_the_rounded_copy_follows_every_update(name):
    adapter = flat_adapter(*(torch.randn(shape) for shape in SHAPES))
    optimizer = create_optimizer(name, adapter, SETTINGS)
    own = parameters_of(adapter)
    before = [copy.clone() for copy in adapter.rounded(own, torch.bfloat16)]
    adapter.gradient.normal_()
    optimizer.step()
    for parameter, old, copy in zip(own, before, adapter.rounded(own, torch.bfloat16), strict=True):
        assert torch.equal(copy, parameter.detach().bfloat16())
        assert not torch.equal(copy, old)


def test_sgd_is_the_plain_rule():
    adapter = flat_adapter(torch.tensor([1.0, -2.0]))
    (weight,) = parameters_of(adapter)
    optimizer = create_optimizer("sgd", adapter, OptimConfig(learning_rate=0.5, weight_decay=0.1))
    weight.grad.copy_(torch.tensor([1.0, 3.0]))
    optimizer.step()
    assert torch.allclose(weight, torch.tensor([1 - 0.5 * (1 + 0.1), -2 - 0.5 * (3 - 0.2)]))


@pytest.mark.parametrize(
    ("quantization", "name"), [("none", "adamw"), ("int8", "adamw_8bit"), ("none", "sgd")]
)
def test_training_changes_every_tensor_of_the_adapter_and_nothing_else(quantization, name, tiny_model_dir):
    source = ModelConfig(name_or_path=str(tiny_model_dir), quantization=quantization)
    model = load_model(Config(model=source, lora=LoraConfig(r=64)), "no", CPU)
    adapter = FlatAdapter(model)
    optimizer = create_optimizer(name, adapter, OptimConfig(learning_rate=0.01))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    token_loss = TokenLoss(model).train()
    for _ in range(2):  # in the first update B is zero, so A has no gradient
        adapter.zero_gradients()
        token_loss(collate(random_examples([9, 14], vocabulary=800), packing=True)).nll.backward()
        optimizer.step()
    changed = {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert changed == {name for name in before if "lora_" in name}


def test_training_with_8_bit_states_lowers_the_loss():
    model = with_adapter(tiny_model(VOCABULARY))
    token_loss = TokenLoss(model).train()
    adapter = FlatAdapter(model)
    optimizer = create_optimizer("adamw_8bit", adapter, OptimConfig(learning_rate=0.01))
    batch = collate(random_examples([9, 14]), packing=True)
    losses = []
    for _ in range(20):
        adapter.zero_gradients()
        sums = token_loss(batch)
        sums.nll.backward()
        optimizer.step()
        losses.append((sums.nll / sums.count).item())
    assert losses[-1] < 0.5 * losses[0]
