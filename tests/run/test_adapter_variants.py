"""Variants of the adapter and its training: they resume to the bit, and plain PEFT computes their logits."""

import signal
from typing import Any

import pytest
import torch
from kills import assert_ended_alike, wait_for_the_next_second
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import train
from finetune.model.fast_paths import use_reference_paths
from finetune.model.loss import TokenLoss
from finetune.model.precision import in_fp32
from finetune.run.checkpoint import Checkpointer
from finetune.run.tracker import Tracker

TOKENS = torch.arange(3, 60)[None]


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """In fp32, also of a base in 4 bits."""
    with in_fp32(model):
        logits: torch.Tensor = model(input_ids=TOKENS).logits
    return logits


VARIANTS: dict[str, dict[str, Any]] = {
    "PiSSA": {"lora__init_lora_weights": "pissa"},
    "OLoRA": {"lora__init_lora_weights": "olora", "lora__use_rslora": True},
    "EVA": {"lora__init_lora_weights": "eva"},
    "LoRA+": {"optim__lora_b_lr_ratio": 16, "optim__name": "paged_adamw_8bit"},
    "modules to save": {"lora__modules_to_save": "[lm_head, embed_tokens, norm, gate_proj]"},
    "LoftQ": {
        "lora__init_lora_weights": "loftq",
        "model__quantization": "nf4",
        "train__mixed_precision": "bf16",
    },
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
        by_fast_paths = logits_of(model)
        use_reference_paths(TokenLoss(model))
        trained_logits.append((by_fast_paths, logits_of(model)))
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

    given: dict[str, Any] = {}
    if settings.get("model__quantization") == "nf4":  # as the run has it: all else in bf16
        given["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        given["dtype"] = torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, **given)
    of_base = logits_of(base)
    logits = logits_of(PeftModel.from_pretrained(base, whole / "adapter").eval())
    assert (logits - of_base).abs().max() > 0.01
    for by_fast_paths, by_reference in trained_logits:
        assert (logits - by_reference).abs().max() < 1e-5
        # Fused kernels add up in another order: some units in the last place of the largest logit.
        assert (logits - by_fast_paths).abs().max() < 1e-5 * of_base.abs().max()
