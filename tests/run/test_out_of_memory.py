"""A run that runs out of memory says in one line what to lower, and the command that it prints works."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import read_metrics

import train
from finetune.data.collate import MicroBatch
from finetune.model.loss import TokenLoss, TokenSums
from finetune.run.checkpoint import fault_of
from finetune.runtime import accelerator as machine

SETTINGS = {
    "lora__lora_dropout": 0.0,
    "optim__name": "adamw",
    "optim__eps": 1e-5,
    "checkpoint__every_steps": 2,
    "data__max_length": 64,
    "train__micro_batch_size": 4,
    "train__gradient_accumulation_steps": 2,
}


def as_cuda_says() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...\nSee ...")


def as_the_driver_says() -> None:
    raise RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`")


def as_python_says() -> None:
    raise MemoryError


def ask_torch_for_too_much() -> None:
    torch.empty(2**55)


@pytest.fixture
def memory(monkeypatch) -> Callable[..., None]:
    """Pretend that from update `step` + 1 on, an update has no memory for more tokens than `tokens`."""
    forward, reseed = TokenLoss.forward, machine.reseed
    now = {"step": 0}

    def noting_reseed(seed: int, step: int, rank: int) -> None:
        now["step"] = step
        reseed(seed, step, rank)

    def pretend(step: int, tokens: int, fail: Callable[[], None] = as_cuda_says) -> None:
        def failing(self: TokenLoss, batch: MicroBatch) -> TokenSums:
            if now["step"] >= step and batch.num_tokens > tokens and torch.is_grad_enabled():
                fail()
            return forward(self, batch)

        monkeypatch.setattr(TokenLoss, "forward", failing)

    monkeypatch.setattr(machine, "reseed", noting_reseed)
    return pretend


def launch(command: str) -> int:
    """Run a command that the program printed, in this process."""
    launcher, program, *argv = shlex.split(command)
    assert (launcher, program) == ("python", "train.py")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return train.main(argv)


def printed_command(error: str) -> str:
    assert error.startswith("error: out of memory after update ")
    assert error.count("\n") == 1
    return error.partition("To resume with less memory: ")[2].strip()


def assert_same_updates(run_dir: Path, other: Path) -> None:
    for entry, expected in zip(read_metrics(run_dir), read_metrics(other), strict=True):
        assert (entry["step"], entry["split"]) == (expected["step"], expected["split"])
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("fail", [as_cuda_says, as_the_driver_says, as_python_says, ask_torch_for_too_much])
def test_it_names_a_smaller_budget_with_which_the_run_resumes(run_train, memory, tmp_path, capfd, fail):
    whole = run_train(output_dir=tmp_path / "whole", **SETTINGS)
    capfd.readouterr()
    memory(step=2, tokens=100, fail=fail)
    run_dir = run_train(expect=2, output_dir=tmp_path / "a run", **SETTINGS)
    error = capfd.readouterr().err
    checkpoint = run_dir / "checkpoints" / "step_000002"
    assert error.startswith(f"error: out of memory after update 2; the last checkpoint is {checkpoint}. ")
    assert list((run_dir / "checkpoints").iterdir()) == [checkpoint]
    assert fault_of(checkpoint) is None
    assert not (run_dir / "adapter").exists()
    command = printed_command(error)
    assert command.endswith(" --train.max_tokens_per_micro_batch 64")
    assert launch(command) == 0
    assert "64 at most" in capfd.readouterr().out
    assert_same_updates(run_dir, whole)


def test_a_budget_that_would_change_nothing_is_not_named(run_train, memory, tmp_path, capfd):
    """The budget has room for far more than the micro-batch that did not fit."""
    memory(step=1, tokens=100)
    run_train(expect=2, output_dir=tmp_path / "run", **SETTINGS, train__max_tokens_per_micro_batch=100_000)
    command = printed_command(capfd.readouterr().err)
    assert command.endswith(" --train.max_tokens_per_micro_batch 64")
    assert launch(command) == 0


def test_where_no_smaller_budget_holds_an_example_it_names_checkpointing_then_the_length(
    run_train, memory, tmp_path, capfd
):
    memory(step=2, tokens=64)
    settings = {**SETTINGS, "data__max_length": 128, "train__max_tokens_per_micro_batch": 128}
    run_dir = run_train(expect=2, output_dir=tmp_path / "run", **settings)
    command = printed_command(capfd.readouterr().err)
    assert command.endswith(" --train.gradient_checkpointing true")
    assert launch(command) == 2  # it still does not fit: this memory knows of tokens alone
    command = printed_command(capfd.readouterr().err)
    checkpoint = run_dir / "checkpoints" / "step_000002"
    assert (
        f" --data.max_length 64 --train.max_tokens_per_micro_batch 64 --output_dir {run_dir}-64 " in command
    )
    assert command.endswith(f" --resume {checkpoint}")
    assert launch(command) == 0
    assert [e["step"] for e in read_metrics(Path(f"{run_dir}-64")) if e["split"] == "train"] == [3, 4]


def test_before_the_first_checkpoint_it_says_that_there_is_none(run_train, memory, tmp_path, capfd):
    memory(step=0, tokens=100)
    run_dir = run_train(expect=2, output_dir=tmp_path / "run", **SETTINGS)
    error = capfd.readouterr().err
    assert error.startswith("error: out of memory after update 0; there was no checkpoint yet. ")
    assert launch(printed_command(error)) == 0
    assert [e["step"] for e in read_metrics(run_dir) if e["split"] == "train"] == [1, 2, 3, 4]


def test_an_evaluation_that_does_not_fit_names_the_budget_too(run_train, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(TokenLoss, "token_stats", lambda *arguments: as_cuda_says())
    run_train(expect=2, output_dir=tmp_path / "run", **SETTINGS)
    assert "--train.max_tokens_per_micro_batch 64" in printed_command(capfd.readouterr().err)


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ("none", "set model.quantization to int8 or nf4"),
        ("int8", "set model.quantization to nf4"),
        ("nf4", ""),
    ],
)
def test_a_model_that_does_not_fit_is_one_line_too(
    run_train, monkeypatch, tmp_path, capfd, quantization, said
):
    monkeypatch.setattr(train, "load_model", lambda *arguments: as_cuda_says())
    settings = {"model__quantization": quantization, "train__mixed_precision": "bf16"}
    run_dir = run_train(expect=2, output_dir=tmp_path / "run", **settings)
    error = capfd.readouterr().err
    assert error.startswith("error: out of memory: choose a smaller model.name_or_path")
    assert error.count("\n") == 1
    assert said in error
    assert ("model.quantization" in error) == bool(said)
    assert "data.max_length (now 128)" in error
    assert not run_dir.exists()


def test_another_error_is_left_as_it_is(run_train, memory, tmp_path):
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    memory(step=1, tokens=10, fail=fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_train(output_dir=tmp_path / "run", **SETTINGS)
