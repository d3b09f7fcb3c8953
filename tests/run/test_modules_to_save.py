"""Layers that are trained whole beside LoRA: in a run, in all commands that read it, and what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from conftest import read_metrics, tiny_model
from peft import PeftModel
from runtime.test_processes import assert_same_metrics, launch  # noqa: F401  a fixture
from safetensors.torch import load_file
from tiny import VOCABULARY
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finetune.__main__ import main
from finetune.config import Config, LoraConfig, ModelConfig
from finetune.model.load import add_adapter, load_base, load_model
from finetune.model.precision import in_fp32
from finetune.model.target_modules import check_modules_to_save
from finetune.run.adapter import find_trained, load_trained

NAMES = ("lm_head", "embed_tokens", "norm")
PREFIX = "base_model.model."
TOKENS = torch.arange(3, 60)[None]
# As the seeds train, at a learning rate that shows.
WHOLE = {
    "lora__modules_to_save": f"[{', '.join(NAMES)}]",
    "model__quantization": "int8",
    "fast__int8_matmul": "dequantize",
    "train__mixed_precision": "bf16",
    "optim__name": "paged_adamw_8bit",
    "optim__learning_rate": 1e-3,
    "lora__lora_dropout": 0.0,
    "data__eval_fraction": 0.4,
    "checkpoint__keep_best": True,
}


@torch.no_grad()
def fp32_logits(model: Any) -> torch.Tensor:
    model.eval()
    with in_fp32(model):
        logits: torch.Tensor = model(input_ids=TOKENS).logits.float()
    return logits


@pytest.fixture
def command(whole, capsys) -> Callable[..., str]:
    """What a command prints of the run."""

    def run(name: str, *more: Any) -> str:
        capsys.readouterr()
        assert main([name, str(whole), *map(str, more)]) == 0
        return " ".join(capsys.readouterr().out.split())

    return run


def test_the_run_trains_saves_and_names_them(whole, tiny_model_dir):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    saved = load_file(whole / "adapter" / "adapter_model.safetensors")
    copies = {name.removeprefix(PREFIX): tensor for name, tensor in saved.items() if ".lora_" not in name}
    assert set(copies) == {name for name, _ in base.named_parameters(remove_duplicate=False) if _ends(name)}
    assert len(copies) == 7
    original = base.state_dict()
    for name, tensor in copies.items():
        assert tensor.dtype == torch.float32
        change = (tensor - original[name]).abs()
        assert 1e-4 < change.max() < 0.05, name
    # The head and the embedding were one weight.
    assert not torch.equal(copies["lm_head.weight"], copies["model.embed_tokens.weight"])

    settings = {
        choice["name"]: choice for choice in json.loads((whole / "environment.json").read_text())["settings"]
    }
    names = ", ".join(NAMES)
    assert settings["modules to save"]["actual"] == settings["modules to save"]["requested"] == names
    numbers = sum(tensor.numel() for tensor in copies.values())
    assert f"7 trained and saved whole, {numbers:,} numbers" in settings["modules to save"]["reason"]
    assert "are two from now on" in settings["modules to save"]["reason"]
    assert settings["loss"]["actual"] == settings["loss"]["requested"]
    assert settings["norms, rotary, SiLU"]["actual"].endswith(", except 5")
    assert settings["norms, rotary, SiLU"]["reason"] == "norms that are trained"
    losses = [line["loss"] for line in read_metrics(whole) if line["split"] == "eval"]
    assert losses[-1] < losses[0]


def _ends(name: str) -> bool:
    return name.removesuffix(".weight").endswith(NAMES)


def test_plain_peft_computes_the_same_logits(whole, tiny_model_dir):
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, dtype=torch.float32, quantization_config=quantization
    )
    trained = find_trained(whole, ["--train.mixed_precision", "no"])
    expected = fp32_logits(load_trained(trained).model)
    logits = fp32_logits(PeftModel.from_pretrained(base, whole / "adapter"))
    assert (logits - expected).abs().max() < 1e-5


def test_a_loaded_run_has_the_weights_that_were_trained_and_its_base(whole, tiny_model_dir):
    model = load_trained(find_trained(whole)).model
    saved = load_file(whole / "adapter" / "adapter_model.safetensors")
    for wrapper_name in ("lm_head", "model.norm", "model.embed_tokens"):
        wrapper = model.get_base_model().get_submodule(wrapper_name)
        assert torch.equal(wrapper.modules_to_save["default"].weight, saved[f"{PREFIX}{wrapper_name}.weight"])
    config = ModelConfig(name_or_path=str(tiny_model_dir))
    base = load_base(config, "bf16", torch.device("cpu"))
    with model.disable_adapter():
        assert torch.equal(fp32_logits(model), fp32_logits(base))


def test_evaluate_finds_the_losses_of_the_run_and_of_its_base(whole, command, tmp_path):
    command("evaluate", "--generate", 0, "--output", tmp_path / "figures.json")
    found = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["all"]["loss"]
    losses = [line["loss"] for line in read_metrics(whole) if line["split"] == "eval"]
    assert found["base"]["value"] == pytest.approx(losses[0], rel=1e-4)
    assert found["tuned"]["value"] == pytest.approx(min(losses), rel=1e-4)


def test_merge_unties_the_head_and_keeps_what_was_trained(whole, command, tmp_path):
    in_fp32 = ["--train.mixed_precision", "no"]
    printed = command("merge", "--output", tmp_path / "merged", "--dtype", "fp32", *in_fp32)
    assert "Not compared" not in printed
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not merged.config.tie_word_embeddings
    expected = fp32_logits(load_trained(find_trained(whole, in_fp32)).model)
    assert (fp32_logits(merged) - expected).abs().max() < 1e-4


def test_generate_reads_it(whole, command, made_once, tmp_path):
    answers = tmp_path / "answers.jsonl"
    command("generate", "--input", made_once["rows"], "--output", answers, "--max_new_tokens", 2)
    assert len(answers.read_text(encoding="utf-8").splitlines()) == 20


def test_export_writes_a_head_of_its_own_and_vllm_gets_the_merged_model(whole, command, tmp_path):
    printed = command("export", "--output", tmp_path / "gguf", "--format", "f16")
    assert "vllm serve MERGED" in printed
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    saved = load_file(whole / "adapter" / "adapter_model.safetensors")
    for name, own_name in (("output.weight", "lm_head"), ("token_embd.weight", "model.embed_tokens")):
        expected = saved[f"{PREFIX}{own_name}.weight"]
        torch.testing.assert_close(torch.tensor(tensors[name]).float(), expected, rtol=2**-10, atol=1e-6)
    card = (whole / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "vllm serve" not in card
    assert "Layers whose names end with `lm_head, embed_tokens, norm` were trained whole" in " ".join(
        card.split()
    )


def test_another_run_goes_on_from_it(whole, run_on_same_rows, tmp_path):
    settings = {key: value for key, value in WHOLE.items() if key != "lora__modules_to_save"}
    more = {"model__adapter": whole, "train__num_epochs": 1, "output_dir": tmp_path / "next"}
    run_dir = run_on_same_rows(**{**settings, **more})
    before, after = (
        [line["loss"] for line in read_metrics(folder) if line["split"] == "eval"]
        for folder in (whole, run_dir)
    )
    assert after[0] == pytest.approx(min(before), rel=1e-6)
    assert "modules_to_save: [embed_tokens, lm_head, norm]" in re.sub(
        r"modules_to_save:\s+- (\w+)\s+- (\w+)\s+- (\w+)",
        r"modules_to_save: [\1, \2, \3]",
        (run_dir / "config.yaml").read_text(encoding="utf-8"),
    )


def test_processes_that_share_the_base_make_the_updates_of_one(run_train, launch, rows_file, tmp_path):  # noqa: F811
    settings = {
        **WHOLE,
        "train__mixed_precision": "no",
        "optim__name": "adamw",
        "data__path": rows_file,
        "data__num_samples": 17,
        "train__max_tokens_per_micro_batch": 128,
        "train__gradient_accumulation_steps": 1,
        "train__max_steps": 2,
        "eval__at_start": False,
    }
    alone = run_train(output_dir=tmp_path / "alone", **settings, train__micro_batch_size=8)
    two = {"train__micro_batch_size": 4, "train__sharding": "base", "output_dir": tmp_path / "two"}
    result = launch(**settings, **two)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "two" / "environment.json").read_text())
    assert "base, on 2 processes" in [choice["actual"] for choice in record["settings"]]
    assert_same_metrics(tmp_path / "two", alone)
    weights = [
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (alone, tmp_path / "two")
    ]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)


def quantized_model(folder: Path, quantization: str) -> Any:
    config = ModelConfig(name_or_path=str(folder), quantization=quantization)
    return load_base(config, "bf16", torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lm_haed", "the model has no lm_haed; it has lm_head"),
        ("nothing.like.it", "the model has no nothing.like.it"),
        ("mlp", "model.layers.0.mlp is a Qwen2MLP of several layers: name its layers"),
        ("act_fn", "model.layers.0.mlp.act_fn has no weights to train"),
        ("up_proj", "model.layers.0.mlp.up_proj is quantized"),
        ("head", "head is only the end of lm_head: write the whole name"),
    ],
)
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_what_cannot_be_trained_whole_is_refused_by_name(tiny_model_dir, quantization, name, words):
    with pytest.raises(ValueError, match=f"^lora.modules_to_save: {re.escape(words)}"):
        check_modules_to_save(quantized_model(tiny_model_dir, quantization), [name], trains_rows=False)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_rows_of_added_tokens_and_the_whole_layer_are_refused_together(name):
    base, config = tiny_model(VOCABULARY), LoraConfig(modules_to_save=[name])
    with pytest.raises(ValueError, match=f"{name} is to be trained whole, and rows of it"):
        add_adapter(base, config, added_token_ids=[1])
    assert add_adapter(tiny_model(VOCABULARY), LoraConfig(modules_to_save=["norm"]), added_token_ids=[1])


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_layer_that_is_trained_whole_gets_no_lora(tiny_model_dir, use_dora):
    config = Config(
        model=ModelConfig(name_or_path=str(tiny_model_dir), quantization="none"),
        lora=LoraConfig(modules_to_save=["down_proj", "norm"], use_dora=use_dora),
    )
    model = load_model(config, "bf16", torch.device("cpu"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = [name for name in trained if ".lora_" not in name]
    assert len(whole) == 2 + 5
    assert not [name for name in trained if "down_proj" in name and ".lora_" in name]
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=TOKENS).logits
    assert logits.dtype == torch.bfloat16
