"""Variants of the adapter and its training: they resume to the bit, and plain PEFT computes their logits."""

import signal
from typing import Any

import pytest
import torch
from kills import assert_ended_alike, wait_for_the_next_second
from peft import PeftModel
from transformers import AutoModelForCausalLM

import train
from finetune.run.checkpoint import Checkpointer
from finetune.run.tracker import Tracker

TOKENS = torch.arange(3, 60)[None]
VARIANTS: dict[str, dict[str, Any]] = {
    "PiSSA": {"lora__init_lora_weights": "pissa"},
    "OLoRA": {"lora__init_lora_weights": "olora", "lora__use_rslora": True},
    "EVA": {"lora__init_lora_weights": "eva"},
    "LoRA+": {"optim__lora_b_lr_ratio": 16, "optim__name": "paged_adamw_8bit"},
    "modules to save": {"lora__modules_to_save": "[lm_head, embed_tokens, norm, gate_proj]"},
    "some layers": {"lora__layers_to_transform": "[1]", "lora__exclude_modules": "[up_proj]"},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_variant_resumes_to_the_bit_and_plain_peft_computes_its_logits(
    run_on_same_rows, tiny_model_dir, tmp_path, monkeypatch, settings
):
    trained_logits = []
    finish, advance = train.finish, Tracker.advance

    def finish_and_keep_logits(checkpointer: Checkpointer, *others: Any) -> None:
        model = checkpointer.trained.model.eval()
        with torch.no_grad():
            trained_logits.append(model(input_ids=TOKENS).logits)
        finish(checkpointer, *others)

    def stopping_advance(self: Tracker, step: int) -> None:
        advance(self, step)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    settings = {"data__eval_fraction": 0, "lora__r": 4, "optim__learning_rate": 1e-3, **settings}
    monkeypatch.setattr(train, "finish", finish_and_keep_logits)
    whole = run_on_same_rows(output_dir=tmp_path / "whole", **settings)
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "advance", stopping_advance)
        run_on_same_rows(output_dir=stopped, expect=128 + signal.SIGTERM, **settings)
    wait_for_the_next_second(stopped)
    run_on_same_rows(output_dir=stopped, **settings)
    assert_ended_alike(stopped, whole)

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        of_base = base(input_ids=TOKENS).logits
        logits = PeftModel.from_pretrained(base, whole / "adapter").eval()(input_ids=TOKENS).logits
    assert (logits - of_base).abs().max() > 0.01
    print("MAX", of_base.abs().max(), [(logits - r).abs().max() for r in trained_logits])
    for of_run in trained_logits:
        assert (logits - of_run).abs().max() < 1e-5
