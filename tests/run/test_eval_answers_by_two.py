"""Answers to eval rows by two processes that share the base: those of one process, also after kills."""

from pathlib import Path

from conftest import ROOT, read_metrics
from kills import checkpoint_names
from planted import BEST, ENDS_AT, LOWEST_LOSS, PLANTED, plant
from runtime.test_processes import (
    assert_same_metrics,
    launch,  # noqa: F401  a fixture
)

SETTINGS = {
    "lora__lora_dropout": 0.0,
    "optim__name": "adamw",
    "optim__learning_rate": 0.07,
    "optim__schedule": "constant",
    "train__seed": 41,
    "train__num_epochs": 4,
    "train__early_stopping_patience": ENDS_AT - BEST,
    "eval__every": 1,
    "eval__answers": 4,
    "checkpoint__every_steps": 4,
    "checkpoint__keep": 1,
    "checkpoint__keep_best": True,
    "checkpoint__best_by": "chrf",
}
ONE = {"train__micro_batch_size": 8, "train__gradient_accumulation_steps": 1}
SHARED_BY_TWO = {
    "train__micro_batch_size": 4,
    "train__gradient_accumulation_steps": 1,
    "train__sharding": "base",
}
KILLED = ["between two batches", "after the file of answers", "while writing the result"]


def answer_files(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "evaluations").glob("answers_*")}


def test_two_that_share_a_base_answer_as_one_and_keep_the_best_by_it_after_kills(
    run_train,
    launch,  # noqa: F811
    monkeypatch,
    tmp_path,
):
    with monkeypatch.context() as patch:
        for planted in plant():
            patch.setattr(*planted)
        alone = run_train(output_dir=tmp_path / "alone", **SETTINGS, **ONE)
    for name, value in {
        "MOMENTS": ",".join(KILLED),
        "PET_MAX_RESTARTS": str(len(KILLED)),  # torchrun's --max-restarts
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else the restarted processes do not find each other
    }.items():
        monkeypatch.setenv(name, value)
    run_dir = tmp_path / "both"
    result = launch(ROOT / "tests" / "planted.py", output_dir=run_dir, **SETTINGS, **SHARED_BY_TWO)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("exitcode: 9") or result.stdout.count("exitcode: 9"), result.stderr
    assert "base, on 2 processes" in result.stdout
    assert_same_metrics(run_dir, alone)
    assert answer_files(run_dir) == answer_files(alone)
    assert len(answer_files(run_dir)) == ENDS_AT + 1

    lines = {line["step"]: line for line in read_metrics(run_dir) if line["split"] == "eval"}
    assert min(lines, key=lambda step: lines[step]["loss"]) == LOWEST_LOSS
    assert {step: line["chrf"] for step, line in lines.items()} == PLANTED
    assert checkpoint_names(run_dir) == [f"step_{step:06d}" for step in (BEST, ENDS_AT)]
    weights = [
        folder / "adapter_model.safetensors"
        for folder in (run_dir / "adapter", run_dir / "checkpoints" / f"step_{BEST:06d}")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
