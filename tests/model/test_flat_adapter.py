"""The flat adapter computes what the separate tensors would, and the model does not notice it."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_model
from peft import PeftModel, set_peft_model_state_dict
from tiny import VOCABULARY, fill_adapter, parameters_of, random_examples, with_adapter
from torch import nn

from finetune.config import LoraConfig
from finetune.data.collate import collate
from finetune.model.flat_adapter import BLOCK, SMALLEST_8BIT, FlatAdapter
from finetune.model.given_adapter import adapter_weights
from finetune.model.load import add_adapter
from finetune.model.loss import TokenLoss
from finetune.ops import lora
from finetune.ops.adapter_weights import in_dtype


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_model(r: int = 4, **options: bool) -> PeftModel:
    config = LoraConfig(r=r, lora_dropout=0, **options)
    return fill_adapter(add_adapter(tiny_model(VOCABULARY).requires_grad_(False), config))


def backward(token_loss: TokenLoss) -> None:
    batch = collate(random_examples([9, 14]), packing=True)
    sums = token_loss(batch)
    (sums.nll / sums.count).backward()


# r 4: all tensors are small, and a block holds several rows; r 3: most are no whole blocks; r 64: some are
# large; DoRA: magnitudes besides A and B
MODELS = [
    lambda: with_adapter(tiny_model(VOCABULARY)),
    lambda: make_model(r=3),
    lambda: make_model(r=64),
    lambda: make_model(use_dora=True),
]


@pytest.mark.parametrize("make", MODELS)
def test_a_model_keeps_its_names_values_losses_and_gradients(make: Callable[[], PeftModel]):
    plain, model = make(), make()
    adapter = FlatAdapter(model)
    before, after = trainable(plain), trainable(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    for _ in range(2):  # gradients add up
        backward(TokenLoss(plain))
        backward(TokenLoss(model))
    for name, parameter in after.items():
        assert torch.equal(parameter.grad, before[name].grad), name
        assert parameter.grad.untyped_storage().data_ptr() == adapter.gradient.data_ptr()
        assert parameter.untyped_storage().data_ptr() == adapter.weights.data_ptr()
    assert adapter.gradient.abs().sum() == pytest.approx(sum(p.grad.abs().sum() for p in before.values()))


@pytest.mark.parametrize("make", MODELS)
def test_every_tensor_is_whole_blocks_of_its_own_in_the_region_of_its_size(make: Callable[[], PeftModel]):
    model = make()
    adapter = FlatAdapter(model)
    named = list(trainable(model).items())
    blocks: set[int] = set()
    for region in adapter.regions:
        for member in region.members:
            _, parameter = named[member.index]
            assert member.start % BLOCK == 0
            assert parameter.data_ptr() == region.parameter[member.start :].data_ptr()
            assert region.is_large == (parameter.numel() >= SMALLEST_8BIT)
            own = set(range(parameter.storage_offset() // BLOCK, -(-member_end(parameter) // BLOCK)))
            assert not own & blocks
            blocks |= own
    assert len(blocks) * BLOCK == len(adapter.weights)
    assert sorted(m.index for region in adapter.regions for m in region.members) == list(range(len(named)))


def member_end(parameter: nn.Parameter) -> int:
    return parameter.storage_offset() + parameter.numel()


def test_the_a_of_layers_that_share_an_input_lie_side_by_side():
    model = make_model()
    FlatAdapter(model)
    for layer in model.get_base_model().model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for group in (
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [mlp.gate_proj, mlp.up_proj],
        ):
            weights = [projection.lora_A["default"].weight for projection in group]
            for one, next_one in pairwise(weights):
                assert member_end(one) == next_one.storage_offset()


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1e6])
def test_clipping_gives_the_norm_and_gradients_of_torchs_function(max_norm, scale):
    generator = torch.Generator().manual_seed(0)
    model = make_model(r=64)
    adapter = FlatAdapter(model)
    own = list(trainable(model).values())
    gradients = [torch.randn(p.shape, generator=generator) * 0.01 for p in own]
    for parameter, gradient in zip(own, gradients, strict=True):
        parameter.grad.copy_(gradient * scale)
    separate = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(separate, gradients, strict=True):
        parameter.grad = gradient
    expected = nn.utils.clip_grad_norm_(separate, max_norm or float("inf"))
    norm = adapter.clip_gradients(max_norm, scale)
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    for parameter, other in zip(own, separate, strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=0)


def test_the_norm_of_millions_of_numbers_is_exact_to_fp32():
    model = nn.Linear(2500, 2000, bias=False)
    adapter = FlatAdapter(model)
    adapter.gradient.normal_(std=1e-3, generator=torch.Generator().manual_seed(0))
    expected = float(adapter.gradient.double().norm())
    assert float(adapter.clip_gradients(1.0)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_number_that_is_not_finite_shows_in_the_norm(bad):
    model = make_model()
    adapter = FlatAdapter(model)
    list(trainable(model).values())[5].grad[0, 0] = bad
    assert not adapter.clip_gradients(1.0).isfinite()


def test_zeroing_keeps_the_views_and_mends_them_where_zero_grad_replaced_them():
    model = with_adapter(tiny_model(VOCABULARY))
    adapter, token_loss = FlatAdapter(model), TokenLoss(model)
    accelerator = Accelerator(cpu=True)
    backward(token_loss)
    expected = adapter.gradient.clone()
    adapter.zero_gradients()
    assert not adapter.gradient.any()
    model.zero_grad(set_to_none=False)
    backward(token_loss)
    adapter.reduce_gradients(accelerator)
    assert torch.equal(adapter.gradient, expected)
    model.zero_grad()
    backward(token_loss)
    with pytest.raises(RuntimeError, match="zero_gradients"):  # these gradients would be lost
        adapter.reduce_gradients(accelerator)
    adapter.zero_gradients()
    backward(token_loss)
    adapter.reduce_gradients(accelerator)
    assert torch.equal(adapter.gradient, expected)
    torch.optim.SGD([region.parameter for region in adapter.regions]).zero_grad()
    with pytest.raises(RuntimeError, match="zero_gradients"):  # the optimizer would pass over them
        adapter.reduce_gradients(accelerator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounded_copy_is_made_anew_after_a_change_and_only_then(dtype):
    model = with_adapter(tiny_model(VOCABULARY))
    adapter = FlatAdapter(model)
    own = list(trainable(model).values())
    copies = adapter.rounded(own, dtype)

    def assert_fresh() -> None:
        for parameter, copy, again in zip(own, copies, adapter.rounded(own, dtype), strict=True):
            assert again is copy
            assert torch.equal(copy, parameter.detach().to(dtype))

    assert_fresh()
    copies[0][0, 0] = 7.0  # what is not written anew keeps it
    assert adapter.rounded(own[:1], dtype)[0][0, 0] == 7.0
    weights = {name: torch.randn_like(tensor) for name, tensor in adapter_weights(model).items()}
    set_peft_model_state_dict(model, weights)
    assert_fresh()
    with torch.no_grad():
        own[3].mul_(2)
    assert_fresh()


def test_the_fast_layers_take_the_rounded_copy_and_keep_none_of_their_own(monkeypatch):
    model = with_adapter(tiny_model(VOCABULARY))
    adapter, token_loss = FlatAdapter(model), TokenLoss(model)
    assert lora.enable(model) == (14, 14)
    copied: list[torch.dtype] = []
    real = adapter.rounded
    monkeypatch.setattr(adapter, "rounded", lambda own, dtype: copied.append(dtype) or real(own, dtype))
    with torch.autocast("cpu", torch.bfloat16):
        backward(token_loss)
    assert copied
    assert set(copied) == {torch.bfloat16}
    views = {view.untyped_storage().data_ptr() for view in in_dtype(parameters_of(adapter), torch.bfloat16)}
    assert len(views) == 1


def test_the_files_are_those_of_the_separate_tensors(tmp_path):
    for name in ("plain", "flat"):
        model = with_adapter(tiny_model(VOCABULARY))
        if name == "flat":
            FlatAdapter(model)
        model.save_pretrained(tmp_path / name)
    file = "adapter_model.safetensors"
    assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "flat" / file).read_bytes()
