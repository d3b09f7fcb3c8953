"""fp16's loss scale: an update whose gradient overflows is made again at half the scale."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_metrics
from kills import StoppedError, digests
from torch import Tensor

import finetune.training.loss_scale as loss_scale_module
from finetune.config import Config
from finetune.model.loss import TokenLoss, TokenSums
from finetune.run.tracker import Tracker
from finetune.runtime.accelerator import create_accelerator
from finetune.training.loss_scale import LossScale
from finetune.training.metrics import Numbers

GOOD, OVERFLOWED, BAD = Numbers.FINITE, Numbers.GRADIENT_NOT_FINITE, Numbers.LOSS_NOT_FINITE


def test_an_overflow_halves_the_scale_and_gives_the_same_update_again():
    loss_scale = LossScale("fp16")
    given, outcomes = [], iter([GOOD, OVERFLOWED, OVERFLOWED, GOOD, GOOD])
    for update in loss_scale.repeating("abc"):
        given.append((update, loss_scale.value))
        loss_scale.adapt_to(next(outcomes))
    assert given == [("a", 4096), ("b", 4096), ("b", 2048), ("b", 1024), ("c", 1024)]
    assert loss_scale.metrics() == {"loss_scale": 1024, "overflow_repeats": 2}
    assert "2 times" in loss_scale.remarks()[0]


def test_a_bad_loss_and_an_overflow_at_scale_1_are_not_repeated():
    loss_scale = LossScale("fp16")
    assert not loss_scale.adapt_to(BAD)
    assert loss_scale.value == 4096
    for _ in range(12):
        assert loss_scale.adapt_to(OVERFLOWED)
        assert list(loss_scale.repeating([])) == []
        loss_scale._must_repeat = False
    assert loss_scale.value == 1
    assert not loss_scale.adapt_to(OVERFLOWED)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_other_precisions_are_not_scaled(precision):
    loss_scale = LossScale(precision)
    loss = torch.tensor(3.0)
    assert loss_scale.apply(loss) is loss
    assert loss_scale.value == 1
    assert not loss_scale.adapt_to(OVERFLOWED)
    assert loss_scale.metrics() == loss_scale.state_dict() == {}
    assert loss_scale.remarks() == []
    loss_scale.load_state_dict({"scale": 8.0, "good_updates": 1, "repeats": 0})  # of a run that began in fp16
    assert loss_scale.value == 1


def test_it_grows_and_falls_as_torchs_scaler_does(monkeypatch):
    monkeypatch.setattr(loss_scale_module, "GROWTH_INTERVAL", 3)
    loss_scale = LossScale("fp16")
    theirs = torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=3)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        overflows = torch.rand(1, generator=generator).item() < 0.2
        theirs.scale(weight.sum()).backward()
        if overflows:
            weight.grad.fill_(float("inf"))
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        loss_scale.adapt_to(OVERFLOWED if overflows else GOOD)
        assert loss_scale.value == theirs.get_scale()


def test_it_goes_on_from_its_own_checkpoint_and_from_one_of_torchs_scaler(monkeypatch):
    monkeypatch.setattr(loss_scale_module, "GROWTH_INTERVAL", 3)
    first = LossScale("fp16")
    for numbers in (OVERFLOWED, GOOD, GOOD):
        first.adapt_to(numbers)
    again = LossScale("fp16")
    again.load_state_dict(first.state_dict())
    older = LossScale("fp16")
    older.load_state_dict(
        {"scale": 2048.0, "growth_factor": 2.0, "growth_interval": 2000, "_growth_tracker": 2}
    )
    for loss_scale in (first, again, older):
        loss_scale.adapt_to(GOOD)
        assert loss_scale.value == 4096
    assert again.num_repeats == 1
    from_bf16 = LossScale("fp16")
    from_bf16.load_state_dict({})
    assert from_bf16.value == 4096


def test_accelerates_own_scaler_is_off(tmp_path):
    accelerator = create_accelerator(Config(output_dir=str(tmp_path)), "no")
    scaler = torch.amp.GradScaler("cpu", **accelerator.scaler_handler.to_kwargs())
    assert scaler.scale(torch.tensor(3.0)) == 3


# In the loop. A CPU has no fp16 run, so an overflow is imitated: where the gradient of a micro-batch's loss
# is above LIMIT, it becomes infinite. In fp32, a power of two as a scale changes no bit, so that the run must
# end as one without a scale does.

LIMIT = 15.0  # that gradient is the scale divided by the 60 to 200 target tokens of an update
SETTINGS = {
    "train__max_steps": 6,
    "lora__lora_dropout": 0.2,
    "lora__r": 64,
    "optim__name": "adamw_8bit",
    "train__micro_batch_size": 2,
    "train__gradient_accumulation_steps": 3,
    "train__max_tokens_per_micro_batch": 128,
    "train__packing": False,
    "log__every_steps": 1,
}


class Overflowing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, nll: Tensor) -> Tensor:
        return nll.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.where(gradient > LIMIT, float("inf"), gradient)


@pytest.fixture
def as_in_fp16(monkeypatch) -> pytest.MonkeyPatch:
    """The loop scales as in fp16, and gradients overflow."""
    forward = TokenLoss.forward

    def overflowing(self: TokenLoss, batch: Any) -> TokenSums:
        sums = forward(self, batch)
        return replace(sums, nll=Overflowing.apply(sums.nll))

    monkeypatch.setattr(TokenLoss, "forward", overflowing)
    monkeypatch.setattr("train.LossScale", lambda _: LossScale("fp16"))
    return monkeypatch


def train_lines(run_dir: Path) -> list[dict[str, Any]]:
    """Without what the speed and the scale say."""
    left_out = {"useful_tokens_per_second", "mfu", "peak_memory_gib", "loss_scale", "overflow_repeats"}
    return [
        {key: value for key, value in entry.items() if key not in left_out}
        for entry in read_metrics(run_dir)
        if entry["split"] == "train"
    ]


def test_a_run_that_overflows_makes_every_update_of_one_that_does_not(run_train, tmp_path, request, capfd):
    plain = run_train(output_dir=tmp_path / "plain", **SETTINGS)
    monkeypatch = request.getfixturevalue("as_in_fp16")
    # The scale grows back, so that updates overflow in the middle of the run too.
    monkeypatch.setattr(loss_scale_module, "GROWTH_INTERVAL", 2)
    capfd.readouterr()
    scaled = run_train(output_dir=tmp_path / "scaled", **SETTINGS)
    assert train_lines(scaled) == train_lines(plain)
    assert digests(scaled / "adapter") == digests(plain / "adapter")
    logged = [entry for entry in read_metrics(scaled) if entry["split"] == "train"]
    repeats = [entry["overflow_repeats"] for entry in logged]
    assert repeats[0] > 0
    assert repeats[-1] > repeats[1]
    assert all(1 < entry["loss_scale"] <= 4096 for entry in logged)
    said = capfd.readouterr().out
    assert f"made again at half the loss scale {repeats[-1]} times" in said


def test_a_run_that_overflows_and_is_stopped_goes_on_at_its_scale(run_train, tmp_path, as_in_fp16):
    as_in_fp16.setattr(loss_scale_module, "GROWTH_INTERVAL", 2)
    settings = {**SETTINGS, "checkpoint__every_steps": 1}
    whole = run_train(output_dir=tmp_path / "whole", **settings)
    advance = Tracker.advance

    def stopping_advance(self: Tracker, step: int) -> None:
        if step == 4:
            raise StoppedError
        advance(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "advance", stopping_advance)
        with pytest.raises(StoppedError):
            run_train(output_dir=tmp_path / "run", **settings)
    run_dir = run_train(output_dir=tmp_path / "run", **settings)
    scales = [
        [(e["loss_scale"], e["overflow_repeats"]) for e in read_metrics(folder) if e["split"] == "train"]
        for folder in (run_dir, whole)
    ]
    assert scales[0] == scales[1]
    assert train_lines(run_dir) == train_lines(whole)
    assert digests(run_dir / "adapter") == digests(whole / "adapter")


def test_a_gradient_that_overflows_at_every_scale_is_a_bad_update(run_train, tmp_path, as_in_fp16, capfd):
    as_in_fp16.setattr(sys.modules[__name__], "LIMIT", 0.0)
    run_dir = run_train(expect=1, output_dir=tmp_path / "run", **SETTINGS)
    assert "a number of update 1 is not finite" in capfd.readouterr().err
    assert (run_dir / "bad_update.json").exists()
    assert not (run_dir / "checkpoints").exists()
