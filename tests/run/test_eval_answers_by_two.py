"""Answers to eval rows by two processes that share the base: those of one process, also after kills."""

from pathlib import Path

from conftest import ROOT, read_metrics
from kills import checkpoint_names
from planted import BEST, ENDS_AT, FOLLOWS_CHRF, PLANTED, plant
from runtime.test_processes import (
    assert_same_metrics,
    launch,  # noqa: F401  a fixture
)

SETTINGS = {
    **FOLLOWS_CHRF,
    "lora__lora_dropout": 0.0,
    "optim__learning_rate": 0.01,  # so that the loss falls until the end
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
    starts = len(list((run_dir / "tensorboard").iterdir()))
    assert starts == 1 + len(KILLED)
    assert "base, on 2 processes" in result.stdout
    assert_same_metrics(run_dir, alone)
    assert answer_files(run_dir) == answer_files(alone)
    assert len(answer_files(run_dir)) == ENDS_AT + 1

    lines = {line["step"]: line for line in read_metrics(run_dir) if line["split"] == "eval"}
    assert min(lines, key=lambda step: lines[step]["loss"]) == ENDS_AT
    assert {step: line["chrf"] for step, line in lines.items()} == PLANTED
    assert checkpoint_names(run_dir) == [f"step_{step:06d}" for step in (BEST, ENDS_AT)]
    weights = [
        folder / "adapter_model.safetensors"
        for folder in (run_dir / "adapter", run_dir / "checkpoints" / f"step_{BEST:06d}")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
