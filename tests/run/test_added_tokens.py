"""A base without ChatML's tokens, trained with ChatML: their rows, from the first update to the hand-over."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import peft
import pytest
import torch
from conftest import ROOT, read_metrics, tiny_model
from kills import StoppedError, assert_ended_alike
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2ForCausalLM

from finetune.__main__ import main
from finetune.ops.quantized import dequantized
from finetune.run.adapter import find_trained, load_trained
from finetune.run.tracker import Tracker

SETTINGS = {
    "data__chat_template": "chatml",
    "lora__lora_dropout": 0.0,
    "train__num_epochs": 4,
    "optim__learning_rate": 1e-2,
    "optim__name": "adamw",
}
WEIGHTS = "adapter_model.safetensors"
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied head", "head of its own"])


@pytest.fixture
def base(tmp_path, tied) -> Path:
    """A model folder whose tokenizer ends texts with <|endoftext|> and has no chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([(ROOT / "data" / "finance_sample.csv").read_text(encoding="utf-8")], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path / "base")
    model = tiny_model(len(tokenizer))
    model.config.update({"tie_word_embeddings": tied, "eos_token_id": 0, "pad_token_id": 0})
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    torch.manual_seed(0)
    Qwen2ForCausalLM(model.config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def run_chatml(run_train, base) -> Callable[..., Path]:
    def run(**settings: Any) -> Path:
        return run_train(**{"model__name_or_path": base, **SETTINGS, **settings})

    return run


def plain_peft(base: Path, adapter: Path) -> peft.PeftModel:
    """As anybody loads it: PEFT and transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(adapter)))
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens.to(model.device)).logits.float().cpu()


@TIED
def test_the_rows_are_trained_saved_loaded_and_merged(run_chatml, base, tied, tmp_path, capfd):
    run = run_chatml()
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert ids == [500, 501]
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    names = {"model.embed_tokens": ids, "lm_head": ids}
    assert settings["trainable_token_indices"] == (ids if tied else names)
    described = dict(json.loads((run / "environment.json").read_text())["described"])
    assert described["trained rows"] == "2 tokens of the embedding and the head"

    # They are trained: away from the mean of the others, and from one another.
    original = Qwen2ForCausalLM.from_pretrained(base)
    weights = load_file(run / "adapter" / WEIGHTS)
    rows = {name: tensor for name, tensor in weights.items() if "trainable_tokens" in name}
    assert len(rows) == (1 if tied else 2)
    for name, tensor in rows.items():
        layer = original.lm_head if "lm_head" in name else original.model.embed_tokens
        apart = (tensor - layer.weight.mean(0)).abs().amax(1)
        assert apart.min() > 1e-3, name
        assert not torch.equal(tensor[0], tensor[1])
    losses = [line["loss"] for line in read_metrics(run) if line["split"] == "eval"]
    assert losses[-1] < 0.8 * losses[0]

    # Plain PEFT, our own loading and the merged model compute the same.
    tokens = torch.tensor([[ids[0], 5, 6, 200, ids[1], ids[0], 7, 300, 8, ids[1]]])
    expected = logits(plain_peft(base, run / "adapter"), tokens)
    assert expected.shape[-1] == 502
    trained = find_trained(run)
    torch.testing.assert_close(
        logits(load_trained(trained).model.eval(), tokens), expected, rtol=0, atol=1e-5
    )
    (checkpoint,) = (run / "checkpoints").glob(f"step_{read_metrics(run)[-1]['step']:06d}")
    of_checkpoint = load_trained(find_trained(checkpoint))  # it has no tokenizer beside it
    torch.testing.assert_close(logits(of_checkpoint.model.eval(), tokens), expected, rtol=0, atol=1e-5)
    assert of_checkpoint.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == ids
    assert main(["merge", str(run), "--output", str(tmp_path / "merged"), "--dtype", "fp32"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 502
    assert merged.config.tie_word_embeddings == tied
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=0, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 502

    # The other commands take the run as any other.
    assert main(["evaluate", str(run), "--generate", "1", "--max_new_tokens", "4"]) == 0
    assert main(["export", str(run), "--output", str(tmp_path / "gguf"), "--quantize", "f16"]) == 0
    assert "--enable-lora" not in capfd.readouterr().out  # vLLM takes no adapter with rows
    (path,) = (tmp_path / "gguf").glob("*.gguf")
    file = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in file.fields.items() if name.startswith("tokenizer")}
    assert fields["tokenizer.ggml.tokens"][500:] == ["<|im_start|>", "<|im_end|>"]
    assert fields["tokenizer.ggml.token_type"][500:] == [gguf.TokenType.CONTROL] * 2
    tensors = {tensor.name: torch.tensor(tensor.data).float() for tensor in file.tensors}
    torch.testing.assert_close(
        tensors["token_embd.weight"], merged.model.embed_tokens.weight.detach(), rtol=1e-3, atol=1e-3
    )
    assert ("output.weight" in tensors) == (not tied)


@TIED
def test_the_code_on_the_card_loads_the_rows(run_chatml, tied, monkeypatch):
    run = run_chatml(train__max_steps=2)
    card = (run / "adapter" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    assert "vllm serve" not in card
    model_line = next(line for line in code.splitlines() if line.startswith("base = "))
    folder = find_trained(run).config.model.name_or_path
    code = code.replace(model_line, f"base = AutoModelForCausalLM.from_pretrained({folder!r})")
    monkeypatch.chdir(run / "adapter")
    variables: dict[str, Any] = {}
    exec(code.replace("max_new_tokens=200", "max_new_tokens=2"), variables)
    tokens = torch.tensor([[500, 5, 6, 501]])
    expected = logits(load_trained(find_trained(run)).model.eval(), tokens)
    torch.testing.assert_close(logits(variables["model"].eval(), tokens), expected, rtol=0, atol=1e-5)


@TIED
def test_the_dequantized_base_is_merged_with_the_rows(run_chatml, tied, tmp_path):
    run = run_chatml(model__quantization="int8", train__num_epochs=2)
    output = tmp_path / "merged"
    arguments = ["--output", str(output), "--which", "dequantized", "--dtype", "fp32"]
    assert main(["merge", str(run), *arguments]) == 0
    tokens = torch.tensor([[500, 5, 6, 200, 501, 500, 7]])
    trained = load_trained(find_trained(run)).model.eval()
    with dequantized(trained):
        expected = logits(trained, tokens)
    merged = AutoModelForCausalLM.from_pretrained(output)
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=0, atol=1e-3)


@TIED
@pytest.mark.parametrize(
    "varied",
    [
        {"model__quantization": "none"},
        {"model__quantization": "int8"},
        {"model__quantization": "nf4", "train__gradient_checkpointing": True},
        {"model__quantization": "none", "lora__use_dora": True, "fast__head": False},
    ],
    ids=lambda varied: ", ".join(map(str, varied.values())),
)
def test_a_stopped_run_ends_as_if_it_had_not_stopped(run_chatml, tied, varied, tmp_path, monkeypatch):
    settings = {
        **varied,
        "train__mixed_precision": "bf16",
        "optim__name": "adamw_8bit",
        "lora__lora_dropout": 0.1,
        "lora__r": 64,
        "train__num_epochs": 2,
        "checkpoint__every_steps": 1,
    }
    whole = run_chatml(output_dir=tmp_path / "whole", **settings)
    advance = Tracker.advance

    def stop(self: Tracker, step: int) -> None:
        if step == 3:
            raise StoppedError
        advance(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "advance", stop)
        with pytest.raises(StoppedError):
            run_chatml(output_dir=tmp_path / "stopped", **settings)
    run_chatml(output_dir=tmp_path / "stopped", **settings)
    assert_ended_alike(whole, tmp_path / "stopped")


@TIED
def test_a_second_run_trains_the_rows_further_and_a_new_adapter_gets_new_ones(
    run_chatml, run_train, base, tied, tmp_path
):
    first = run_chatml(output_dir=tmp_path / "first")
    second = run_chatml(output_dir=tmp_path / "second", model__adapter=first, train__max_steps=2)
    losses = {run: [m["loss"] for m in read_metrics(run) if m["split"] == "eval"] for run in (first, second)}
    assert losses[second][0] == pytest.approx(losses[first][-1], rel=1e-6)
    before, after = (load_file(run / "adapter" / WEIGHTS) for run in (first, second))
    for name in before:
        if "trainable_tokens" in name:
            assert not torch.equal(before[name], after[name])
    # An adapter on the same base that knows nothing of these tokens
    model = peft.get_peft_model(
        Qwen2ForCausalLM.from_pretrained(base), peft.LoraConfig(r=3, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "plain")
    third = run_chatml(output_dir=tmp_path / "third", model__adapter=tmp_path / "plain", train__max_steps=2)
    weights = load_file(third / "adapter" / WEIGHTS)
    assert sum("trainable_tokens" in name for name in weights) == (1 if tied else 2)
    assert sum("lora_A" in name for name in weights) == 2


@pytest.mark.parametrize("tied", [True])
def test_rows_of_other_tokens_than_the_template_adds_are_refused(run_chatml, base, tied, tmp_path, capfd):
    settings = peft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    model = peft.get_peft_model(Qwen2ForCausalLM.from_pretrained(base), settings)
    model.save_pretrained(tmp_path / "other")
    run_chatml(expect=2, output_dir=tmp_path / "run", model__adapter=tmp_path / "other")
    assert "trains the rows of the tokens [1, 2], and data.chat_template adds others: [500, 501]" in (
        capfd.readouterr().err
    )
    assert not (tmp_path / "run").exists()


@TIED
def test_verify_agrees_on_rows(run_chatml, base, tied, rows_file, capfd):
    arguments = [
        *("--model.name_or_path", str(base), "--model.quantization", "none"),
        *("--data.path", str(rows_file), "--data.max_length", "128", "--data.chat_template", "chatml"),
        *("--train.mixed_precision", "bf16", "--updates", "1"),
    ]
    assert main(["verify", *arguments]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "target tokens in chunks" in said


@pytest.mark.parametrize("tied", [True])
def test_a_base_with_room_for_the_tokens_keeps_its_size(run_chatml, base, tied, tmp_path):
    roomy = shutil.copytree(base, tmp_path / "roomy")
    model = Qwen2ForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(512)
    model.save_pretrained(roomy)
    run = run_chatml(model__name_or_path=roomy, train__max_steps=2)
    rows = [t for n, t in load_file(run / "adapter" / WEIGHTS).items() if "trainable_tokens" in n]
    assert [tensor.shape for tensor in rows] == [(2, 64)]
    assert load_trained(find_trained(run)).model.config.vocab_size == 512
