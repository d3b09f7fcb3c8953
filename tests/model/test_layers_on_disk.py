"""A base whose layers are read one at a time has the weights of one that is loaded whole, to the bit."""

import json
import logging
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny import CPU, random_examples
from torch.distributed.fsdp import FSDPModule

from finetune.config import Config, LoraConfig, ModelConfig
from finetune.data.preparing.examples import Examples
from finetune.model.fast_paths import choose_fast_paths, require_same_results
from finetune.model.flat_adapter import FlatAdapter
from finetune.model.layers_on_disk import describe_reading, find_layers
from finetune.model.load import load_architecture, load_model
from finetune.model.loss import TokenLoss
from finetune.ops.decoder_layer import stacks
from finetune.ops.plain_weights import use_plain_weights
from finetune.runtime.accelerator import create_accelerator

QUANTIZATIONS = ("none", "int8", "nf4")


def loaded(folder, quantization="none", plain_weights=True, **lora):
    config = ModelConfig(name_or_path=str(folder), quantization=quantization)
    return load_model(Config(model=config, lora=LoraConfig(**lora)), "bf16", CPU, plain_weights=plain_weights)


def layers_of(model):
    ((_, layers),) = stacks(model)
    return layers


def frozen(layer):
    return {name: parameter for name, parameter in layer.named_parameters() if not parameter.requires_grad}


def found(folder):
    architecture = load_architecture(ModelConfig(name_or_path=str(folder)))
    return find_layers(architecture, torch.bfloat16, str(folder), {})


@pytest.fixture
def copied(tiny_model_dir, tmp_path):
    """A copy of the model, and what its one file has."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    return folder, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_layers_have_the_memory_of_the_first_one_until_they_are_read(tiny_model_dir, quantization, caplog):
    with caplog.at_level(logging.WARNING):
        model = loaded(tiny_model_dir, quantization)
    assert not caplog.records
    first, *others = layers_of(model)
    for layer in others:
        for name, weight in frozen(layer).items():
            assert weight.data_ptr() == frozen(first)[name].data_ptr(), name


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_layers_that_were_read_are_those_of_a_base_that_was_loaded_whole(tiny_model_dir, quantization):
    model = loaded(tiny_model_dir, quantization)
    whole = loaded(tiny_model_dir, quantization, plain_weights=False)
    use_plain_weights(whole)
    for index, (layer, other) in enumerate(zip(layers_of(model), layers_of(whole), strict=True)):
        model.get_base_model().layers_on_disk.read(layer, index)
        assert layer.self_attn.layer_idx == index
        expected = frozen(other)
        assert frozen(layer).keys() == expected.keys()
        for name, weight in frozen(layer).items():
            assert weight.dtype == expected[name].dtype
            assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"init_lora_weights": "olora"}])
def test_an_adapter_that_is_made_from_the_weights_has_the_base_loaded_whole(tiny_model_dir, lora):
    assert not hasattr(loaded(tiny_model_dir, **lora).get_base_model(), "layers_on_disk")


def test_a_sharded_base_that_was_read_whole_is_said_to_be(tiny_model_dir):
    for lora, rows in (({}, 0), ({"use_dora": True}, 1)):
        model = loaded(tiny_model_dir, **lora)
        assert describe_reading(model) == []
        for layer in layers_of(model):  # as `fully_shard` leaves it
            layer.__class__ = type("Sharded", (FSDPModule, type(layer)), {})
        differ = describe_reading(model)
        assert len(differ) == rows
        assert all(choice.requested != choice.actual for choice in differ)


def test_the_adapter_starts_with_the_same_weights(tiny_model_dir):
    made, other = (loaded(tiny_model_dir, plain_weights=by_layer) for by_layer in (True, False))
    for (name, weight), expected in zip(made.named_parameters(), other.parameters(), strict=True):
        if weight.requires_grad:
            assert torch.equal(weight, expected), name


def test_a_model_in_several_files_is_read_by_their_index(copied):
    folder, tensors = copied
    names = sorted(tensors)
    files = {name: f"model-{number % 2 + 1:05d}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file(
            {name: tensors[name] for name in names if files[name] == file}, folder / file, {"format": "pt"}
        )
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    layers = found(folder)
    assert {name: path.name for name, path in layers.files.items()} == files


def test_a_model_is_loaded_whole_where_its_files_do_not_name_its_tensors(copied):
    folder, tensors = copied
    assert found(folder) is not None
    name = "model.layers.1.mlp.up_proj.weight"
    for changed in (
        {key: tensor for key, tensor in tensors.items() if key != name},
        {**tensors, "model.layers.1.mlp.gate.weight": tensors[name].clone()},
        {**tensors, "model.other.weight": tensors[name].clone()},
    ):
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        assert found(folder) is None


def test_fast_paths_that_compute_something_else_with_the_own_weights_are_refused(tiny_model_dir):
    accelerator = create_accelerator(Config(), "bf16")
    model = loaded(tiny_model_dir)
    FlatAdapter(model)
    token_loss = TokenLoss(model).train()
    rows = random_examples([40, 17, 30], vocabulary=500)
    train_set = Examples(Dataset.from_list(rows), truncated=[], dropped={})
    paths = choose_fast_paths(Config(), accelerator, token_loss, train_set, "dequantize", is_sharded=True)
    assert paths.packed
    for index, layer in enumerate(layers_of(model)):
        model.get_base_model().layers_on_disk.read(layer, index)
    require_same_results(accelerator, token_loss, train_set, packing=True)
    layer = layers_of(model)[1]
    forward = layer.forward
    layer.forward = lambda hidden, **named: -5 * forward(hidden, **named).roll(3, 1)
    with pytest.raises(ValueError, match=r"do not compute the longest example \(different results\)"):
        require_same_results(accelerator, token_loss, train_set, packing=True)
    assert layer.forward is not forward  # the fast paths stay chosen
