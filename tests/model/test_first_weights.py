"""PiSSA and OLoRA: PEFT's updates of the same function, on a base that stays as it is."""

from typing import Any

import peft
import pytest
import torch
from conftest import tiny_model
from peft.tuners.lora import LoraLayer
from tiny import CPU, VOCABULARY, random_examples
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from finetune.config import Config, LoraConfig, ModelConfig
from finetune.data.templates.tokenize import IGNORE
from finetune.model.first_weights import FROM_BASE, start_from_data
from finetune.model.flat_adapter import FlatAdapter
from finetune.model.load import add_adapter, load_model
from finetune.model.precision import in_fp32
from finetune.model.safetensors_files import weight_reader
from finetune.ops.quantized import frozen_weight


class OneProcess:
    num_processes = 1


def update_all(model: Any, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    """One update towards the tokens themselves."""
    logits = model(input_ids=tokens).logits[0, :-1]
    F.cross_entropy(logits, tokens[0, 1:]).backward()


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("method", FROM_BASE)
def test_updates_move_the_model_as_those_of_peft_which_changes_the_base(method, use_rslora):
    tokens = torch.randint(VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0, use_rslora=use_rslora, init_lora_weights=method)
    base = tiny_model(VOCABULARY).requires_grad_(False)
    before = base(input_ids=tokens).logits
    ours = add_adapter(base, config)
    theirs = peft.get_peft_model(
        tiny_model(VOCABULARY),
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules="all-linear",
            use_rslora=use_rslora,
            init_lora_weights=method,
            task_type="CAUSAL_LM",
        ),
    )
    assert torch.allclose(ours(input_ids=tokens).logits, before, atol=1e-4)
    adapter = FlatAdapter(ours)
    optimizers = [
        torch.optim.SGD(parameters, lr=0.001)
        for parameters in (
            [region.parameter for region in adapter.regions],
            [p for p in theirs.parameters() if p.requires_grad],
        )
    ]
    fixed = {name: p.detach().clone() for name, p in ours.named_parameters() if p.requires_grad}
    for _ in range(4):
        adapter.zero_gradients()
        optimizers[1].zero_grad()
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            update_all(model, optimizer, tokens)
        adapter.reduce_gradients(OneProcess())
        for optimizer in optimizers:
            optimizer.step()
    logits = [model(input_ids=tokens).logits for model in (ours, theirs)]
    assert torch.allclose(*logits, atol=1e-4)
    assert (logits[0] - before).abs().max() > 0.01
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            dimension = 0 if "lora_A" in name else 1
            trained, start = (x.chunk(2, dimension) for x in (parameter, fixed[name]))
            assert torch.equal(trained[1], start[1])
            assert not torch.equal(trained[0], start[0])


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantized_base_stays_as_it_is_and_the_adapter_begins_at_nothing(tiny_model_dir, quantization):
    config = Config(
        model=ModelConfig(name_or_path=str(tiny_model_dir), quantization=quantization),
        lora=LoraConfig(r=4, init_lora_weights="pissa"),
    )
    model = load_model(config, "bf16", CPU).eval()
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad(), model.disable_adapter():
        of_base = model(input_ids=tokens).logits
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    assert (logits - of_base).abs().max() < 0.05 * of_base.std()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert all(
        weight.abs().max() > 0 for weight in (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    )


@pytest.mark.parametrize("use_rslora", [False, True])
def test_loftq_brings_each_weight_in_4_bits_nearer_to_the_one_it_was(tiny_model_dir, use_rslora):
    full = AutoModelForCausalLM.from_pretrained(tiny_model_dir).state_dict()
    lora = LoraConfig(r=8, lora_alpha=24, use_rslora=use_rslora, init_lora_weights="loftq")
    config = Config(model=ModelConfig(name_or_path=str(tiny_model_dir), quantization="nf4"), lora=lora)
    models = [load_model(config, "bf16", CPU) for _ in range(2)]
    layers = [dict(model.get_base_model().named_modules()) for model in models]
    names = [name for name, layer in layers[0].items() if isinstance(layer, LoraLayer)]
    assert len(names) == 14
    for name in names:
        layer, same = (of_model[name] for of_model in layers)
        quantized = frozen_weight(layer.base_layer, torch.float32)
        error = full[f"{name}.weight"] - quantized
        left = float((error - layer.get_delta_weight("default").detach()).norm() / error.norm())
        # Of an error without any structure, the 8 largest of 32 to 64 singular values hold a good part.
        assert 0.3 < left < 0.9, name
        expected = torch.linalg.svdvals(error)[8:].norm() / error.norm()
        assert left == pytest.approx(float(expected), rel=1e-3)
        for half in ("lora_A", "lora_B"):
            assert torch.equal(getattr(layer, half)["default"].weight, getattr(same, half)["default"].weight)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad(), in_fp32(models[0]):
        corrected = models[0](input_ids=tokens).logits
        with models[0].disable_adapter():
            quantized = models[0](input_ids=tokens).logits
        exact = AutoModelForCausalLM.from_pretrained(tiny_model_dir)(input_ids=tokens).logits
    assert (corrected - exact).norm() < 0.95 * (quantized - exact).norm()
    assert models[0].peft_config["default"].init_lora_weights is True  # it is saved as plain LoRA


def test_weights_are_read_from_one_file_or_several(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    model.model.save_pretrained(tmp_path / "decoder")  # names its weights without `model.`
    name = "model.layers.1.mlp.up_proj.weight"
    for folder in (tiny_model_dir, tmp_path / "parts", tmp_path / "decoder"):
        read = weight_reader(str(folder), {})
        assert torch.equal(read(name), model.state_dict()[name])
        with pytest.raises(ValueError, match=r"no safetensors file with the weight model\.layers\.9"):
            read("model.layers.9.mlp.up_proj.weight")
    with pytest.raises(ValueError, match="no safetensors file"):
        weight_reader(str(tmp_path), {})(name)


def test_layers_and_modules_are_chosen_and_those_that_are_not_there_are_named():
    def names(**settings: Any) -> set[str]:
        model = add_adapter(tiny_model(VOCABULARY).requires_grad_(False), LoraConfig(**settings))
        return set(model.targeted_module_names)

    everything = names()
    assert names(layers_to_transform=[1]) == {name for name in everything if ".layers.1." in name}
    without = names(exclude_modules=["up_proj", "model.layers.0.mlp.down_proj"])
    assert everything - without == {
        *(f"model.layers.{number}.mlp.up_proj" for number in (0, 1)),
        "model.layers.0.mlp.down_proj",
    }
    with pytest.raises(
        ValueError, match=r"lora.layers_to_transform: the model has no layer 2; its last is 1"
    ):
        names(layers_to_transform=[0, 2])
    with pytest.raises(ValueError, match=r"lora.exclude_modules: the model has no up_projj"):
        names(exclude_modules=["up_projj"])


def test_eva_takes_the_main_directions_of_the_inputs_at_the_targets():
    examples = random_examples([30] * 8)
    model = add_adapter(tiny_model(VOCABULARY).requires_grad_(False), LoraConfig(r=4))
    inputs: list[Tensor] = []
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    handle = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        for example in examples:
            model(input_ids=torch.tensor([example["input_ids"]]))
    handle.remove()
    chosen = torch.cat(
        [x[0][torch.tensor(example["labels"]) != IGNORE] for x, example in zip(inputs, examples, strict=True)]
    )
    start_from_data(model, examples)
    a = layer.lora_A["default"].weight
    # They span about as much of the variance as the principal components do.
    centred = chosen - chosen.mean(0)
    basis = torch.linalg.qr(a.detach().T).Q
    most = torch.linalg.svdvals(centred)[:4].square().sum()
    assert (centred @ basis).square().sum() > 0.95 * most
    assert layer.lora_B["default"].weight.abs().max() == 0
    assert model.peft_config["default"].init_lora_weights is True
    with pytest.raises(ValueError, match="wants 8 target tokens"):
        start_from_data(
            add_adapter(tiny_model(VOCABULARY).requires_grad_(False), LoraConfig(r=8)),
            random_examples([2] * 4),
        )
