"""What is loaded is what was asked for: data types, adapter, seed; and what cannot be loaded, in one line."""

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import gguf
import pytest
import torch
from conftest import QWEN2_TEMPLATE, tiny_model, tiny_tokenizer
from tiny import CPU, LENGTHS, adapter_gradients, fill_adapter, random_examples
from torch import Tensor
from transformers import AutoTokenizer

from finetune.config import Config, LoraConfig, ModelConfig, TrainConfig
from finetune.data.collate import collate
from finetune.data.templates.chat_template import stop_ids
from finetune.model.load import load_base, load_model, load_tokenizer
from finetune.model.loss import TokenLoss
from finetune.model.size import count_parameters
from finetune.training.evaluate import dropout_off

LINEAR_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
NO_DROPOUT = LoraConfig(lora_dropout=0.0)


def config_for(
    folder: Path, quantization: Any = "none", lora: LoraConfig = NO_DROPOUT, **train: Any
) -> Config:
    source = ModelConfig(name_or_path=str(folder), quantization=quantization)
    return Config(model=source, lora=lora, train=TrainConfig(**train))


def adapter_of(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if "lora_" in name}


def base_of(model: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" not in name}


def adapted_layers(model: Any) -> list[str]:
    """The names of the layers that carry an adapter."""
    return sorted({name.partition(".lora_")[0].rpartition("model.")[2] for name in adapter_of(model)})


# Data types and devices


@pytest.mark.parametrize(
    ("quantization", "precision"), [("none", "no"), ("none", "bf16"), ("int8", "bf16"), ("nf4", "bf16")]
)
def test_the_adapter_is_in_fp32_and_alone_trainable(quantization, precision, tiny_model_dir):
    model = load_model(config_for(tiny_model_dir, quantization), precision, CPU)
    assert adapter_of(model)
    assert all(parameter.dtype == torch.float32 for parameter in adapter_of(model).values())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(adapter_of(model))


def test_a_base_without_adapter_is_frozen(tiny_model_dir):
    base = load_base(config_for(tiny_model_dir).model, "no", CPU)
    assert not any(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_an_unquantized_base_is_all_in_the_precision_asked_for(precision, dtype, tiny_model_dir):
    model = load_model(config_for(tiny_model_dir), precision, CPU)
    assert {parameter.dtype for parameter in base_of(model).values()} == {dtype}


@pytest.mark.parametrize(
    ("quantization", "layer", "packed"),
    [("int8", bnb.nn.Linear8bitLt, torch.int8), ("nf4", bnb.nn.Linear4bit, torch.uint8)],
)
def test_a_quantized_base_has_all_its_linear_layers_quantized_and_the_rest_in_bf16(
    quantization, layer, packed, tiny_model_dir
):
    model = load_model(config_for(tiny_model_dir, quantization), "bf16", CPU)
    weights = {name: p for name, p in base_of(model).items() if name.endswith("_proj.base_layer.weight")}
    assert len(weights) == 2 * len(LINEAR_LAYERS)
    assert {parameter.dtype for parameter in weights.values()} == {packed}
    others = {name: p for name, p in base_of(model).items() if name not in weights}
    assert {parameter.dtype for parameter in others.values()} == {torch.bfloat16}
    modules = [
        module for module in model.modules() if isinstance(module, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit)
    ]
    assert len(modules) == len(weights)
    for module in modules:
        assert type(module) is layer
        if quantization == "nf4":
            assert module.weight.quant_type == "nf4"
            assert module.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_the_embeddings_stay_in_bf16_and_the_tied_head_is_no_copy(quantization, tiny_model_dir):
    model = load_model(config_for(tiny_model_dir, quantization), "bf16", CPU)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embeddings.dtype == torch.bfloat16
    assert embeddings.data_ptr() == head.data_ptr()


def test_parameters_are_counted_the_same_however_they_are_kept(tiny_model_dir):
    base = sum(parameter.numel() for parameter in tiny_model(800).parameters())
    rank, layers = 8, 2
    shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    adapter = layers * sum(rank * (inputs + outputs) for inputs, outputs in shapes)
    for quantization in ("none", "int8", "nf4"):
        model = load_model(config_for(tiny_model_dir, quantization), "bf16", CPU)
        assert count_parameters(model) == (adapter, base + adapter)


# The adapter


def test_the_fresh_adapter_depends_on_the_seed_alone(tiny_model_dir):
    def fresh(quantization: str, precision: str, seed: int, drawn_before: int) -> dict[str, Tensor]:
        torch.manual_seed(drawn_before)
        config = config_for(tiny_model_dir, quantization, seed=seed)
        return adapter_of(load_model(config, precision, CPU))

    first = fresh("none", "no", seed=7, drawn_before=0)
    assert all(torch.equal(p, torch.zeros_like(p)) for name, p in first.items() if "lora_B" in name)
    for again in (fresh("none", "no", seed=7, drawn_before=1), fresh("int8", "bf16", seed=7, drawn_before=2)):
        assert all(torch.equal(again[name], first[name]) for name in first)
    other = fresh("none", "no", seed=8, drawn_before=0)
    assert not any(torch.equal(other[name], first[name]) for name in first if "lora_A" in name)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_fresh_adapter_is_the_same_on_a_base_in_bf16(quantization, tiny_model_dir):
    exact = adapter_of(load_model(config_for(tiny_model_dir), "no", CPU))
    other = adapter_of(load_model(config_for(tiny_model_dir, quantization), "bf16", CPU))
    # PEFT makes the adapter in the base's data type first, so some digits may be lost.
    assert all(torch.allclose(other[name], exact[name], rtol=2**-8, atol=0) for name in exact)


def test_a_fresh_adapter_changes_nothing_and_a_filled_one_does(tiny_model_dir):
    config = config_for(tiny_model_dir)
    batch = collate(random_examples(LENGTHS, vocabulary=800), packing=True)
    base = TokenLoss(load_base(config.model, "no", CPU)).target_logits(batch)
    model = load_model(config, "no", CPU)
    assert torch.allclose(TokenLoss(model).target_logits(batch), base, atol=1e-5)
    assert not torch.allclose(TokenLoss(fill_adapter(model)).target_logits(batch), base, atol=0.1)


def folder_with_untied_head(tmp_path: Path) -> Path:
    config = tiny_model(800).config
    config.tie_word_embeddings = False
    type(tiny_model(800))(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_all_linear_means_every_linear_layer_but_the_head(quantization, tmp_path):
    model = load_model(config_for(folder_with_untied_head(tmp_path), quantization), "bf16", CPU)
    layers = adapted_layers(model)
    assert {name.rpartition(".")[2] for name in layers} == LINEAR_LAYERS
    assert len(layers) == 2 * len(LINEAR_LAYERS)


def test_a_list_of_target_modules_means_these_and_no_others(tiny_model_dir):
    lora = replace(NO_DROPOUT, target_modules=["q_proj", "v_proj"])
    model = load_model(config_for(tiny_model_dir, lora=lora), "no", CPU)
    assert adapted_layers(model) == [
        f"layers.{number}.self_attn.{name}" for number in (0, 1) for name in ("q_proj", "v_proj")
    ]


def test_every_lora_setting_reaches_the_adapter(tiny_model_dir):
    lora = LoraConfig(
        r=4,
        lora_alpha=32,
        lora_dropout=0.25,
        target_modules=["o_proj"],
        use_rslora=True,
        use_dora=True,
    )
    model = load_model(config_for(tiny_model_dir, lora=lora), "no", CPU)
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    assert layer.lora_A["default"].weight.shape == (4, 64)
    assert layer.scaling["default"] == 32 / 4**0.5
    assert layer.lora_dropout["default"].p == 0.25
    assert layer.use_dora["default"]
    assert model.peft_config["default"].task_type == "CAUSAL_LM"


@pytest.mark.parametrize("names", [["no_such_layer"], ["q_proj", "no_such_layer"], ["mlp"]])
def test_target_modules_that_the_model_does_not_have_are_refused(names, tiny_model_dir):
    lora = replace(NO_DROPOUT, target_modules=names)
    with pytest.raises(ValueError, match=r"lora\.target_modules") as error:
        load_model(config_for(tiny_model_dir, lora=lora), "no", CPU)
    assert names[-1] in str(error.value).lower()
    assert "\n" not in str(error.value)


# Gradient checkpointing, and quiet


def forward_and_backward(model: Any, autocast: bool = False) -> Any:
    torch.manual_seed(5)  # the dropout noise
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sums = TokenLoss(model).train()(collate(random_examples(LENGTHS, vocabulary=800), packing=True))
    (sums.nll / sums.count).backward()
    return sums


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(quantization, tiny_model_dir):
    def gradients(gradient_checkpointing: bool) -> tuple[dict[str, Tensor], int]:
        config = config_for(
            tiny_model_dir,
            quantization,
            LoraConfig(lora_dropout=0.2),
            gradient_checkpointing=gradient_checkpointing,
        )
        model = fill_adapter(load_model(config, "no", CPU))
        calls = []  # before the layer, since a recomputation stops when it has all it needs
        model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        forward_and_backward(model)
        return adapter_gradients(model), len(calls)

    plain, plain_calls = gradients(False)
    recomputed, calls = gradients(True)
    assert (plain_calls, calls) == (1, 2)
    assert all(torch.allclose(recomputed[name], plain[name], rtol=1e-5, atol=1e-8) for name in plain)


class Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.name}: {record.getMessage()}")


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_loading_training_and_evaluating_say_nothing(quantization, tiny_model_dir, capfd):
    recorder = Recorder()
    loggers = [logging.getLogger(name) for name in ("", "transformers", "peft", "accelerate", "bitsandbytes")]
    for logger in loggers:
        logger.addHandler(recorder)
    try:
        with warnings.catch_warnings(record=True) as caught:
            # What Python shows a user by default.
            warnings.simplefilter("default")
            for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", category)
            config = config_for(tiny_model_dir, quantization, gradient_checkpointing=True)
            load_tokenizer(config)
            model = load_model(config, "bf16", CPU)
            forward_and_backward(model, autocast=True)
            with torch.no_grad(), dropout_off(model), torch.autocast("cpu", torch.bfloat16):
                TokenLoss(model)(collate(random_examples(LENGTHS, vocabulary=800), packing=False))
    finally:
        for logger in loggers:
            logger.removeHandler(recorder)
    assert recorder.messages == []
    assert [str(warning.message) for warning in caught] == []
    assert capfd.readouterr() == ("", "")


# The tokenizer


def test_the_tokenizer_of_a_folder_is_its_own(tiny_model_dir):
    tokenizer = load_tokenizer(Config(model=ModelConfig(name_or_path=str(tiny_model_dir))))
    expected = tiny_tokenizer()
    text = "<|im_start|>user\nWhat is a bond?<|im_end|>\n"
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert tokenizer.chat_template == QWEN2_TEMPLATE


def test_a_tokenizer_without_padding_token_pads_with_its_eos(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    tiny_model(800).save_pretrained(tmp_path)
    loaded = load_tokenizer(Config(model=ModelConfig(name_or_path=str(tmp_path))))
    assert loaded.pad_token == loaded.eos_token == "<|im_end|>"


def test_a_padding_token_of_its_own_is_kept(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    tiny_model(800).save_pretrained(tmp_path)
    assert load_tokenizer(Config(model=ModelConfig(name_or_path=str(tmp_path)))).pad_token == "<|endoftext|>"


def test_starter_is_the_name_of_the_starter_model(starter_dir):
    tokenizer = load_tokenizer(Config(model=ModelConfig(name_or_path="starter")))
    assert tokenizer.chat_template == (starter_dir / "chat_template.jinja").read_text(encoding="utf-8")


# GGUF files


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """The tiny model and its tokenizer as llama.cpp keeps them."""
    model, tokenizer = tiny_model(800), tiny_tokenizer()
    config, path = model.config, tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token.startswith("<|") else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(QWEN2_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), parameter.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_gives_the_model_the_tokenizer_and_a_trainable_adapter(gguf_file):
    config = config_for(gguf_file)
    tokenizer = load_tokenizer(config)
    text = "<|im_start|>user\nWhat is a bond?<|im_end|>\n"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert tokenizer.chat_template == QWEN2_TEMPLATE
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    base = load_base(config.model, "no", CPU)
    expected = tiny_model(800).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in base.state_dict().items())
    model = load_model(config, "bf16", CPU)
    forward_and_backward(model, autocast=True)
    assert all(gradient.isfinite().all() for gradient in adapter_gradients(model).values())
    assert {parameter.dtype for parameter in base_of(model).values()} == {torch.bfloat16}


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_gguf_file_is_not_quantized_again(quantization, gguf_file):
    with pytest.raises(ValueError, match=r"model\.quantization to none"):
        load_base(ModelConfig(name_or_path=str(gguf_file), quantization=quantization), "bf16", CPU)


def with_ends(folder: Path, **ends: Any) -> Path:
    """A folder of a tokenizer whose EOS is <|im_end|>, where these files name tokens at which to stop."""
    tiny_tokenizer().save_pretrained(folder)
    for name, ids in ends.items():
        (folder / f"{name}.json").write_text(json.dumps({"eos_token_id": ids, "model_type": "qwen2"}))
    return folder


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({"generation_config": [0, 2], "config": 5}, {0, 2}),
        ({"generation_config": None, "config": 5}, {2, 5}),
        ({"config": [7, 8]}, {2, 7, 8}),
        ({"generation_config": 0}, {0, 2}),
    ],
)
def test_generation_stops_where_the_generation_config_says_and_at_eos(tmp_path, ends, expected):
    config = Config(model=ModelConfig(name_or_path=str(with_ends(tmp_path, **ends))))
    assert stop_ids(load_tokenizer(config)) == expected


def test_generation_stops_at_the_end_of_the_templates_turn(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(Config(model=ModelConfig(name_or_path=str(tmp_path))))
    assert (stop_ids(loaded), loaded.eos_token) == ({0, 2}, "<|endoftext|>")


def test_a_generation_config_that_cannot_be_read_is_named(tmp_path):
    with_ends(tmp_path)
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"its generation_config\.json cannot be read"):
        load_tokenizer(Config(model=ModelConfig(name_or_path=str(tmp_path))))


# What cannot be loaded


def assert_refused(name: str | Path, *loads: str) -> None:
    """Each of `loads` says in one line which key is wrong, and what it was."""
    config = ModelConfig(name_or_path=str(name), quantization="none")
    for load in loads or ("tokenizer", "base"):
        with pytest.raises(ValueError, match=r"model\.name_or_path") as error:
            load_tokenizer(Config(model=config)) if load == "tokenizer" else load_base(config, "no", CPU)
        message = str(error.value)
        assert str(name) in message
        assert "\n" not in message
        assert len(message) < 1000, message


@pytest.mark.parametrize(
    "name", ["../x", "a/b/c", "/no/such/folder", "./here", "..", "a b", "~/no-such", "a/"]
)
def test_what_is_neither_a_folder_nor_a_hub_name_is_refused(name):
    assert_refused(name)


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "a--b/c", "a/b..c"])
def test_a_hub_name_that_cannot_be_fetched_is_refused(name):
    assert_refused(name)


def test_a_gguf_file_that_is_missing_or_none_is_refused(tmp_path):
    assert_refused(tmp_path / "no-such.gguf")
    (tmp_path / "text.gguf").write_text("hello " * 100)
    assert_refused(tmp_path / "text.gguf")
    (tmp_path / "folder.gguf").mkdir()
    assert_refused(tmp_path / "folder.gguf")


def test_an_empty_folder_is_refused(tmp_path):
    assert_refused(tmp_path)


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def half_of_the_weights(folder: Path) -> None:
    """As a copy that was broken off leaves it."""
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def config_with(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "layer_types": None, **values}))

    return change


BROKEN = {
    "without weights": without_weights,
    "half of the weights": half_of_the_weights,
    "config that is no JSON": config_that_is_no_json,
    "no causal model": config_with(model_type="t5", architectures=["T5Model"]),
    "unknown kind of model": config_with(model_type="no-such-kind"),
    "value of the wrong type": config_with(hidden_size="wide"),
    "weights of other sizes": config_with(hidden_size=32),
    # A layer with random weights is not the model that was asked for.
    "weights of too few layers": config_with(num_hidden_layers=3),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_a_folder_that_is_no_whole_causal_model_is_refused(change, tiny_model_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    change(folder)
    assert_refused(folder, "base")


def test_a_folder_that_holds_only_an_adapter_is_refused(tiny_model_dir, tmp_path):
    # transformers would load the base below it, and the fresh adapter would take the place of this one.
    load_model(config_for(tiny_model_dir), "no", CPU).save_pretrained(tmp_path)
    assert_refused(tmp_path, "base")


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused(
    run_train, tiny_model_dir, tmp_path, capfd
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    run_train(expect=2, model__name_or_path=folder)
    error = capfd.readouterr().err
    assert f"the tokenizer has {before + 1} tokens, but the model has embeddings for {before}" in error
    assert error.count("\n") == 1


def test_4bit_layers_give_the_same_gradients_after_an_evaluation(tiny_model_dir):
    # On some CPUs bitsandbytes packs their weights in evaluation, and has no gradient for what is packed.
    model = load_model(config_for(tiny_model_dir, "nf4"), "bf16", CPU)
    ids = torch.arange(3, 23)[None]

    def gradients() -> list[Tensor]:
        model.train().zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids).logits.float().square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.eval()(input_ids=ids)
    assert all(torch.equal(*pair) for pair in zip(gradients(), before, strict=True))
