"""What a Mac is given, told on a machine that is none: only its choices are tested here, not its GPU."""

from pathlib import Path

import pytest
import torch
from conftest import read_metrics
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.model.generate import Sampler
from finetune.model.load import choose_quantization
from finetune.runtime.accelerator import choose_precision, sum_dtype
from finetune.training.optim import choose_optimizer

MPS = torch.device("mps")


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.backends.mps.is_macos_or_newer", lambda major, minor: major <= 14)


def test_it_computes_in_the_precision_that_its_system_has(mac, monkeypatch):
    assert choose_precision("bf16").actual == "bf16"
    assert choose_precision("fp16").actual == "fp16"
    monkeypatch.setattr("torch.backends.mps.is_macos_or_newer", lambda major, minor: False)
    old = choose_precision("bf16")
    assert (old.requested, old.actual) == ("bf16", "fp16")
    assert "macOS has bf16 from version 14 on" in old.reason
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert choose_precision("fp16").actual == "bf16"


@pytest.mark.parametrize("requested", ["int8", "nf4"])
def test_its_base_is_not_quantized_and_the_table_says_so(requested):
    choice = choose_quantization(requested, MPS)
    assert (choice.requested, choice.actual) == (requested, "none")
    assert "Apple" in choice.reason
    assert choose_quantization("none", MPS).reason == ""


@pytest.mark.parametrize("requested", ["paged_adamw_8bit", "adamw_8bit", "paged_adamw"])
def test_torchs_optimizer_takes_the_place_of_bitsandbytes(requested):
    choice = choose_optimizer(requested, MPS)
    assert (choice.requested, choice.actual) == (requested, "adamw")
    assert "Apple" in choice.reason
    assert choose_optimizer("sgd", MPS).actual == "sgd"


class NoFp64(TorchDispatchMode):
    """Collects the operations that make fp64 tensors, which Apple's GPUs lack."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, kinds, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        tensors = result if isinstance(result, tuple | list) else [result]
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tensors):
            self.found.append(str(function))
        return result


def test_a_run_needs_no_fp64_on_its_device(run_train, tmp_path, monkeypatch):
    """What is computed on the host, after an evaluation, may be fp64."""
    settings = {"train__max_steps": 4, "optim__name": "adamw", "log__every_steps": 2}
    whole = run_train(output_dir=tmp_path / "fp64", **settings)
    assert sum_dtype(MPS) == torch.float32
    for user in ("finetune.training.metrics", "finetune.training.evaluate"):
        monkeypatch.setattr(f"{user}.sum_dtype", lambda device: torch.float32)
    monkeypatch.setattr("torch.Tensor.double", lambda x: x)
    with NoFp64() as used:
        run_dir: Path = run_train(output_dir=tmp_path / "fp32", **settings)
    assert used.found == []
    for entry, expected in zip(read_metrics(run_dir), read_metrics(whole), strict=True):
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_an_answers_noise_is_drawn_on_the_host():
    sampler = Sampler(1.0, [1, 2], MPS)
    assert [generator.device.type for generator in sampler._generators] == ["cpu", "cpu"]
