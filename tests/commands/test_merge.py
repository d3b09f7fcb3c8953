"""A merged folder predicts what the trained model does, loads with transformers alone, and is whole."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.__main__ import main
from finetune.ops.quantized import dropout_off
from finetune.run.adapter import find_trained, load_trained

SETTINGS = {"optim__learning_rate": 0.02, "data__eval_fraction": 0.4}
FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
IDS = torch.arange(20, 60)[None]


def run_merge(run_dir: Path, output: Path, *more: str) -> None:
    assert main(["merge", str(run_dir), "--output", str(output), *more]) == 0


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        logits: torch.Tensor = model.float()(IDS).logits[0]
    return logits


@torch.no_grad()
def trained_logits(run_dir: Path) -> torch.Tensor:
    opened = load_trained(find_trained(run_dir))
    with dropout_off(opened.model), opened.accelerator.autocast():
        logits: torch.Tensor = opened.model(IDS).logits[0].float()
    return logits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model__quantization": "int8"},
        {"lora__use_dora": True, "model__quantization": "int8"},
        {"lora__use_rslora": True, "lora__target_modules": "[q_proj,down_proj]"},
    ],
    ids=["plain", "int8", "dora-int8", "rslora"],
)
def test_in_fp32_the_merged_model_computes_what_the_trained_one_does(run_train, tmp_path, settings):
    run_dir = run_train(**SETTINGS, **settings)
    run_merge(run_dir, tmp_path / "merged", "--dtype", "fp32")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == FILES
    expected = trained_logits(run_dir)
    error = (logits_of(tmp_path / "merged") - expected).square().mean() / expected.var()
    assert error.sqrt() < 1e-4


def test_an_int8_run_is_nearer_to_its_dequantized_base_than_to_the_original(run_train, tmp_path, capsys):
    run_dir = run_train(**SETTINGS, model__quantization="int8")
    for which in ("full_precision", "dequantized"):
        run_merge(run_dir, tmp_path / which, "--which", which, "--dtype", "fp32")
    expected = trained_logits(run_dir)
    far, near = (
        (logits_of(tmp_path / which) - expected).norm() for which in ("full_precision", "dequantized")
    )
    assert near < far / 20
    run_merge(run_dir, tmp_path / "best")
    assert "Written: dequantized, " in capsys.readouterr().out


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_bf16_run_keeps_its_predictions(run_train, tmp_path, capsys, quantization):
    run_dir = run_train(**SETTINGS, model__quantization=quantization, train__mixed_precision="bf16")
    run_merge(run_dir, tmp_path / "merged", "--which", "dequantized", "--dtype", "fp32")
    printed = capsys.readouterr().out
    assert "it keeps at least 99%" in printed
    expected = trained_logits(run_dir)  # in bf16
    error = (logits_of(tmp_path / "merged") - expected).square().mean() / expected.var()
    assert error.sqrt() < 0.03


def test_the_folder_loads_without_peft_and_bitsandbytes(run_train, tmp_path):
    run_dir = run_train(**SETTINGS, model__quantization="int8", train__mixed_precision="bf16")
    folder = tmp_path / "merged"
    run_merge(run_dir, folder, "--dtype", "bf16")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    program = (
        "import sys; sys.modules['peft'] = sys.modules['bitsandbytes'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})\n"
        "text = tokenizer.apply_chat_template([{'role': 'user', 'content': 'Hi'}], tokenize=False)\n"
        "assert '<|im_start|>user' in text\n"
        "assert model.lm_head.weight is model.model.embed_tokens.weight\n"
        "model.generate(**tokenizer(text, return_tensors='pt'), max_new_tokens=2)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_a_write_that_fails_leaves_nothing(run_train, tmp_path, monkeypatch, capsys):
    run_dir = run_train(**SETTINGS)
    output = tmp_path / "there" / "merged"

    def fail(path: Path) -> None:
        assert list(path.parent.parent.glob(".merged.partial/model.safetensors"))
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("finetune.runtime.files.flush_to_disk", fail)
    capsys.readouterr()
    assert main(["merge", str(run_dir), "--output", str(output)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "{run}"], "exists already"),
        (["--output", "new", "--rows", "0"], "--rows must be at least 1"),
        (["--output", "new", "--which", "dequantized"], "was not quantized"),
        ([], "--output"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(run_train, capsys, monkeypatch, arguments, message):
    run_dir = run_train(**SETTINGS)

    def refuse(_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("finetune.commands.merge.load_trained", refuse)
    capsys.readouterr()
    assert main(["merge", str(run_dir), *(text.format(run=run_dir) for text in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_without_eval_rows_the_training_rows_are_compared_on(run_train, tmp_path, capsys):
    run_dir = run_train(data__eval_fraction=0)
    run_merge(run_dir, tmp_path / "merged", "--rows", "5")
    printed = capsys.readouterr().out
    assert "comparing on its train rows" in printed
    assert "of 5 rows" in printed


def test_an_adapter_on_a_tied_head_is_refused(tiny_model_dir, tmp_path, rows_file, capsys):
    import peft

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    code = main(
        [
            "merge",
            str(tmp_path / "adapter"),
            "--output",
            str(tmp_path / "merged"),
            "--data.path",
            str(rows_file),
        ]
    )
    assert code == 2
    assert "shares one weight" in capsys.readouterr().err
