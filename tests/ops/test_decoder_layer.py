"""Decoder layers as three functions: the model's own values and gradients; other kinds are left alone."""

from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from tiny import adapter_gradients, built, fill_adapter, random_examples, with_adapter
from torch import Tensor

from finetune.config import Config, LoraConfig, ModelConfig
from finetune.data.collate import collate
from finetune.model.load import add_adapter, load_model
from finetune.model.loss import TokenLoss
from finetune.model.precision import in_fp32
from finetune.ops import decoder_layer, elementwise, lora
from finetune.ops.adapter_weights import add_gradients_in_place
from finetune.ops.attention import PACKED
from finetune.ops.decoder_layer import FusedLayer
from finetune.runtime.accelerator import reseed

CPU = torch.device("cpu")
LENGTHS = [20, 33, 7]
ARCHITECTURES = [("qwen2", {}), ("llama", {}), ("llama", {"mlp_bias": True, "attention_bias": True})]
ARCHITECTURES += [("mistral", {"sliding_window": None})]


@pytest.fixture(autouse=True)
def _with_and_without_kernels(cpu_kernels: None) -> None:
    pass


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[FusedLayer]:
    """The layers that were computed as fused ones, in order."""
    seen: list[FusedLayer] = []
    compute = FusedLayer._compute

    def record(self: FusedLayer, *arguments: Any, **named: Any) -> Tensor:
        seen.append(self)
        return compute(self, *arguments, **named)

    monkeypatch.setattr(FusedLayer, "_compute", record)
    return seen


def loss_of(model: Any) -> TokenLoss:
    return TokenLoss(model).train()


def enable(model: Any) -> tuple[int, int]:
    lora.enable(model)
    elementwise.enable(model)
    return decoder_layer.enable(model)


def update(
    token_loss: TokenLoss,
    packing: bool = True,
    dtype: torch.dtype | None = None,
    seeds: tuple[int, ...] = (0,),
) -> dict[str, Tensor]:
    """The nll and the gradients of one update, with a micro-batch for each seed."""
    token_loss.model.zero_grad()
    token_loss.masks_packed_sequences = token_loss.base.config._attn_implementation != PACKED
    reseed(1, 2, 3)
    nll = torch.tensor(0.0)
    for seed in seeds:
        with torch.autocast("cpu", dtype) if dtype else nullcontext():
            sums = token_loss(collate(random_examples(LENGTHS, seed=seed), packing))
        sums.nll.backward()
        nll += sums.nll.detach()
    gradients = {name: gradient.clone() for name, gradient in adapter_gradients(token_loss.model).items()}
    return {"nll": nll, **gradients}


def distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    pairs = [(got[name].double(), right.double()) for name, right in expected.items()]
    assert all(right.norm() > 0 for _, right in pairs)
    return max(float((actual - right).norm() / right.norm()) for actual, right in pairs)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("architecture", "settings"), ARCHITECTURES)
def test_values_and_gradients_are_the_models_own(architecture, settings, packing, calls):
    token_loss = loss_of(with_adapter(built(architecture, **settings)))
    expected = update(token_loss, packing)
    assert enable(token_loss.model) == (2, 2)
    if packing:
        token_loss.base.set_attn_implementation(PACKED)
    calls.clear()
    assert distance(update(token_loss, packing), expected) < 1e-5
    assert len(calls) == 2


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "down_proj"], ["gate_proj", "o_proj"]])
def test_layers_without_an_adapter_are_their_frozen_weights(targets, calls):
    base = built("qwen2")
    config = LoraConfig(r=4, lora_dropout=0.0, target_modules=targets)
    token_loss = loss_of(fill_adapter(add_adapter(base, config)))
    expected = update(token_loss)
    assert enable(token_loss.model) == (2, 2)
    calls.clear()
    assert distance(update(token_loss), expected) < 1e-5
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_in_16_bits_it_is_as_near_to_fp32_as_the_model_module_by_module(
    quantization, dtype, tiny_model_dir, calls
):
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    source = ModelConfig(name_or_path=str(tiny_model_dir), quantization=quantization)
    config = Config(model=source, lora=LoraConfig(r=4, lora_dropout=0.0))
    token_loss = loss_of(fill_adapter(load_model(config, precision, CPU)))
    with in_fp32(token_loss.model):
        exact = update(token_loss)
    own = distance(update(token_loss, dtype=dtype), exact)
    assert enable(token_loss.model) == (2, 2)
    calls.clear()
    assert distance(update(token_loss, dtype=dtype), exact) < 1.3 * own
    with in_fp32(token_loss.model):
        assert distance(update(token_loss), exact) < 1e-5
    assert len(calls) == 4


@pytest.mark.parametrize("micro_batches", [(0,), (0, 1, 2)])
def test_the_noise_is_that_of_the_layers_module_by_module(micro_batches, calls):
    token_loss = loss_of(with_adapter(built("qwen2"), lora_dropout=0.3))
    lora.enable(token_loss.model)
    elementwise.enable(token_loss.model)
    expected = update(token_loss, seeds=micro_batches)
    assert decoder_layer.enable(token_loss.model) == (2, 2)
    calls.clear()
    assert distance(update(token_loss, seeds=micro_batches), expected) < 1e-5
    assert len(calls) == 2 * len(micro_batches)


def test_gradient_checkpointing_changes_no_gradient_and_keeps_less(calls):
    token_loss = loss_of(with_adapter(built("llama"), lora_dropout=0.5))
    enable(token_loss.model)
    expected, kept = update(token_loss), kept_bytes(token_loss)
    token_loss.base.gradient_checkpointing_enable({"use_reentrant": False})
    calls.clear()
    assert distance(update(token_loss), expected) < 1e-6
    assert len(calls) == 4  # and once more in the backward pass
    assert kept_bytes(token_loss) < 0.5 * kept


def kept_bytes(token_loss: TokenLoss) -> int:
    """Bytes that autograd keeps for the backward pass, without the model's own tensors."""
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in token_loss.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        sums = token_loss(collate(random_examples([200]), packing=True))
    del sums
    return sum(storages.values())


def test_less_is_kept_for_the_backward_pass():
    token_loss = loss_of(with_adapter(built("llama")))
    lora.enable(token_loss.model)
    elementwise.enable(token_loss.model)
    token_loss.base.set_attn_implementation(PACKED)
    token_loss.masks_packed_sequences = False
    before = kept_bytes(token_loss)
    decoder_layer.enable(token_loss.model)
    after = kept_bytes(token_loss)
    assert after < 0.8 * before, (before, after)


def test_parameters_that_ask_for_it_get_the_same_gradients_added_to_their_own():
    token_loss = loss_of(with_adapter(built("qwen2"), lora_dropout=0.3))
    enable(token_loss.model)
    expected = update(token_loss, seeds=(0, 1))
    parameters = [p for p in token_loss.parameters() if p.requires_grad]
    flat = torch.zeros(sum(p.numel() for p in parameters))
    for parameter, part in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
        parameter.data, parameter.grad = parameter.data.clone(), part.view(parameter.shape)
    add_gradients_in_place(parameters)
    reseed(1, 2, 3)
    for seed in (0, 1):
        token_loss(collate(random_examples(LENGTHS, seed=seed), True)).nll.backward()
    got = {name: gradient.clone() for name, gradient in adapter_gradients(token_loss.model).items()}
    assert distance({"nll": expected["nll"], **got}, expected) < 1e-6
    assert torch.equal(torch.cat([p.grad.flatten() for p in parameters]), flat)


# Where the layer's own method runs


INPUTS = {"input_ids": torch.arange(3, 13)[None], "use_cache": False}


def test_with_a_cache_the_layers_own_method_runs(calls):
    model = with_adapter(built("llama")).eval()
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(INPUTS["input_ids"], **settings)
    enable(model)
    calls.clear()
    assert torch.equal(model.generate(INPUTS["input_ids"], **settings), expected)
    assert calls == []


@pytest.fixture
def model(calls: list[FusedLayer]) -> Any:
    """Fused layers whose calls are counted from now on."""
    model = with_adapter(built("qwen2")).eval()
    enable(model)
    calls.clear()
    return model


def test_an_adapter_that_is_off_is_off(model, calls):
    with torch.no_grad(), model.disable_adapter():
        off = model(**INPUTS).logits
        decoder_layer.disable(model)
        lora.disable(model)
        assert torch.allclose(off, model(**INPUTS).logits, atol=1e-4)
    assert calls == []


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_a_merged_adapter_counts_once_and_an_unmerged_one_again(quantization, calls, tiny_model_dir):
    source = ModelConfig(name_or_path=str(tiny_model_dir), quantization=quantization)
    model = fill_adapter(load_model(Config(model=source, lora=LoraConfig(r=4)), "no", CPU)).eval()
    enable(model)
    calls.clear()
    with torch.no_grad():
        before = model(**INPUTS).logits
        model.merge_adapter()
        merged = model(**INPUTS).logits
        assert len(calls) == 2
        model.unmerge_adapter()  # the frozen weights are others now, by rounding
        after = model(**INPUTS).logits
        assert len(calls) == 4
        decoder_layer.disable(model)
        expected = model(**INPUTS).logits
    assert (after - expected).norm() < 1e-4 * expected.norm()
    assert (merged - before).norm() < {"none": 1e-4, "int8": 0.2, "nf4": 0.8}[quantization] * before.norm()


def test_another_adapter_is_the_one_that_counts(model, calls):
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter("second", settings)
    model.base_model.set_adapter("second")
    actual = model(**INPUTS).logits
    assert calls == []
    decoder_layer.disable(model)
    lora.disable(model)
    assert torch.allclose(actual, model(**INPUTS).logits, atol=1e-4)


@pytest.mark.parametrize("part", ["self_attn", "mlp", "mlp.up_proj"])
def test_hooks_run(part, model, calls):
    seen = []
    with torch.no_grad():
        before = model(**INPUTS).logits
        calls.clear()
        layer = model.get_base_model().model.layers[0]
        layer.get_submodule(part).register_forward_hook(lambda *_: seen.append(part))
        assert torch.allclose(model(**INPUTS).logits, before, atol=1e-4)
    assert seen == [part]
    assert [fused.module for fused in calls] == [model.get_base_model().model.layers[1]]


def test_the_hidden_states_are_there_when_asked_for(model):
    states = model(**INPUTS, output_hidden_states=True).hidden_states
    decoder_layer.disable(model)
    expected = model(**INPUTS, output_hidden_states=True).hidden_states
    assert len(states) == len(expected) == 3
    assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(states, expected, strict=True))


def test_a_model_in_fp32_under_autocast_keeps_its_residual_stream_in_fp32(model, calls):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**INPUTS)
    assert calls == []


# What is not fused


@pytest.mark.parametrize(
    ("architecture", "settings", "fused"),
    [
        ("qwen3", {}, 0),  # it norms queries and keys
        ("gemma2", {}, 0),  # its norms multiply by 1 + weight, and there are more of them
        ("phi3", {}, 0),  # its projections are joint ones
        ("olmo2", {}, 0),  # its norms come after attention and MLP
        ("granite", {"residual_multiplier": 0.5}, 0),  # it scales what it adds to the residual stream
        ("llama", {"hidden_act": "gelu"}, 0),
        ("mistral", {"sliding_window": 4}, 0),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, 1),
    ],
)
def test_what_computes_something_else_is_left_alone(architecture, settings, fused):
    model = with_adapter(built(architecture, **settings)).eval()
    with torch.no_grad():
        before = model(**INPUTS).logits
        assert enable(model) == (fused, 2)
        assert torch.allclose(model(**INPUTS).logits, before, rtol=1e-4, atol=1e-4)


def test_layers_with_parts_that_are_not_fast_are_left_alone():
    base = built("qwen2")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, use_dora=True, target_modules=["v_proj"]))
    assert enable(model) == (0, 2)
    model = with_adapter(built("qwen2"))
    lora.enable(model, int8_matmul=True)
    elementwise.enable(model)
    assert decoder_layer.enable(model) == (0, 2)
    model = with_adapter(built("qwen2"))
    lora.enable(model)
    assert decoder_layer.enable(model) == (0, 2)


def test_a_layer_with_other_trained_weights_is_left_alone():
    model = with_adapter(built("qwen2", attention_bias=True))
    model.get_base_model().model.layers[1].self_attn.q_proj.base_layer.bias.requires_grad_(True)
    assert enable(model) == (1, 2)


def test_disabling_gives_the_layers_their_own_methods_and_weights_back(model):
    def storages() -> set[int]:
        return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    before = model(**INPUTS).logits
    assert len(storages()) < len(list(model.parameters()))
    decoder_layer.disable(model)
    lora.disable(model)
    elementwise.disable(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not model.get_base_model().model._forward_pre_hooks
    assert len(storages()) == len(list(model.parameters()))
    assert torch.allclose(model(**INPUTS).logits, before, atol=1e-4)


def test_the_names_and_values_of_the_state_are_as_before():
    plain, fused = (with_adapter(built("qwen2")) for _ in range(2))
    enable(fused)
    expected, state = plain.state_dict(), fused.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
