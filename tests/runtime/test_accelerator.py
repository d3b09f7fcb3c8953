"""What the machine can do is told apart from what was asked; a launcher changes no update."""

import json
import os
import subprocess
import sys
from typing import Any

import accelerate
import pytest
import torch
from accelerate import Accelerator
from conftest import HAS_COMPILER, KERNELS_BY, PACKED_BY, ROOT, read_metrics

from finetune.config import ModelConfig
from finetune.config_parsing import parse_config
from finetune.model.load import describe_base, load_base
from finetune.runtime.accelerator import (
    PACKAGES,
    choose_precision,
    compute_same_bits,
    describe_machine,
    matmul_rate,
)
from finetune.runtime.choice import require_as_requested

CPU = torch.device("cpu")
SHORT = {"train__micro_batch_size": 2, "train__gradient_accumulation_steps": 2, "train__max_steps": 3}


@pytest.fixture
def card(monkeypatch):
    """Pretend that this machine has a graphics card; call it with whether the card computes in bf16."""

    def pretend(with_bf16: bool) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr(
            "torch.cuda.is_bf16_supported", lambda including_emulation=True: with_bf16 or including_emulation
        )
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: "GeForce GTX 1080")

    return pretend


@pytest.fixture
def no_card(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_a_card_without_bf16_gets_fp16_and_the_reason_names_the_card(card):
    card(with_bf16=False)  # torch says that it supports bf16, by emulating it
    setting = choose_precision("bf16")
    assert (setting.requested, setting.actual) == ("bf16", "fp16")
    assert "GeForce GTX 1080" in setting.reason
    assert "bf16" in setting.reason


@pytest.mark.parametrize("asked", ["no", "bf16", "fp16"])
def test_a_card_with_bf16_gets_what_was_asked(card, asked):
    card(with_bf16=True)
    setting = choose_precision(asked)
    assert (setting.requested, setting.actual, setting.reason) == (asked, asked, "")


@pytest.mark.parametrize("asked", ["no", "fp16"])
def test_a_card_without_bf16_gets_other_precisions_as_asked(card, asked):
    card(with_bf16=False)
    assert choose_precision(asked).actual == asked


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize(("asked", "got"), [("no", "no"), ("bf16", "bf16"), ("fp16", "bf16")])
def test_without_a_card_fp16_becomes_bf16_with_a_reason(asked, got):
    setting = choose_precision(asked)
    assert (setting.requested, setting.actual) == (asked, got)
    assert bool(setting.reason) == (asked != got)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine computes in fp16")
def test_a_run_that_asks_for_fp16_without_a_card_trains_in_bf16_and_says_so(run_train, tmp_path, capsys):
    asked = run_train(output_dir=tmp_path / "fp16", **SHORT, train__mixed_precision="fp16")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "precision" in line]
    assert [cell.strip() for cell in line.split("│")][1:4] == ["precision", "fp16", "bf16"]
    got = run_train(output_dir=tmp_path / "bf16", **SHORT, train__mixed_precision="bf16")
    assert [e["loss"] for e in read_metrics(asked)] == [e["loss"] for e in read_metrics(got)]


def test_the_record_of_a_run_says_what_it_ran_on_and_with(run_train, tmp_path, rows_file):
    record = json.loads((run_train(output_dir=tmp_path / "run", **SHORT) / "environment.json").read_text())
    assert record.keys() == {
        "python",
        "packages",
        "device",
        "processor",
        "memory_gib",
        "cuda",
        "num_processes",
        "num_nodes",
        "adapter_step",
        "base",
        "int8",
        "model_adapter",
        "token_rows",
        "token_budget",
        "described",
        "settings",
        "global_batch_size",
        "started_from",
        "data",
        "rows",
    }
    assert record["packages"].keys() == set(PACKAGES)
    assert record["packages"]["accelerate"] == accelerate.__version__
    assert record["num_processes"] == 1
    assert record["int8"] == "none"
    assert record["memory_gib"] > 0
    assert record["device"]
    assert record["processor"]
    assert (record["data"]["train_examples"], record["data"]["eval_examples"]) == (16, 4)

    rows_file.write_text(rows_file.read_text().replace("What is 7", "What be 7"))
    other = json.loads((run_train(output_dir=tmp_path / "other", **SHORT) / "environment.json").read_text())
    assert other["data"]["fingerprint"] != record["data"]["fingerprint"]
    differing = {"data": None, "described": None}  # the device's speed is measured each time
    assert {**other, **differing} == {**record, **differing}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),  # `accelerate launch` sets both
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
    ],
)
def test_the_launchers_environment_changes_no_update(run_train, tmp_path, monkeypatch, name, value):
    plain = run_train(output_dir=tmp_path / "plain", **SHORT)
    monkeypatch.setenv(name, value)
    launched = run_train(output_dir=tmp_path / "launched", **SHORT)
    for key in ("loss", "grad_norm", "num_target_tokens"):
        values = [[e[key] for e in read_metrics(run) if key in e] for run in (plain, launched)]
        assert values[0] == values[1]
    adapters = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (plain, launched)]
    assert adapters[0] == adapters[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a processor's threads train nothing here")
def test_a_number_of_threads_that_the_user_set_is_kept(run_train, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)  # what torch does with it when it is imported
    try:
        run_dir = run_train(output_dir=tmp_path / "run", **SHORT)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert "3 threads" in json.loads((run_dir / "environment.json").read_text())["device"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a processor's threads train nothing here")
def test_all_cores_work_where_a_launcher_left_one_thread(run_train, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    torch.set_num_threads(1)
    try:
        run_train(output_dir=tmp_path / "run", **SHORT)
        assert torch.get_num_threads() == 2
        assert os.environ["OMP_NUM_THREADS"] == "1"
    finally:
        torch.set_num_threads(threads)


# Requested and actual


def table_of(text: str) -> dict[str, tuple[str, str, str]]:
    """The rows of "Requested and actual" as name -> asked, got, why."""
    lines = text.partition("Requested and actual")[2].partition("└")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    return {name: (asked, got, why) for name, asked, got, why in rows}


@pytest.fixture
def wide_screen(monkeypatch):
    monkeypatch.setattr("finetune.runtime.console.console._width", 250)


@pytest.fixture
def built_for_this_machine(monkeypatch):
    """A torch built for a card is a difference on a machine without one, which these tests are not about."""
    if not torch.cuda.is_available():
        monkeypatch.setattr("torch.version.cuda", None)


@pytest.mark.usefixtures("wide_screen", "built_for_this_machine")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a card computes attention otherwise")
def test_every_part_is_in_the_table_of_requested_and_actual(run_train, capsys):
    run_train(**SHORT, model__quantization="int8", train__mixed_precision="bf16", optim__name="adamw")
    table = table_of(capsys.readouterr().out)
    assert {name: asked for name, (asked, _, _) in table.items()} == {
        "device": "cpu",
        "processes": "1",
        "data workers": "0",
        "trackers": "tensorboard",
        "precision": "bf16",
        "sharding": "none",
        "quantization": "int8",
        "optimizer": "adamw",
        "layout": "packed",
        "attention": f"packed, {PACKED_BY}",
        "loss": "target tokens in chunks of 64 MiB",
        "LoRA layers": "one function for each input",
        "norms, rotary, SiLU": "keep their inputs",
        "decoder layers": "fused",
        "int8 weights": table["int8 weights"][0],
        "CPU kernels": "compiled",
    }
    _, int8, measured = table.pop("int8 weights")
    assert int8 in ("int8", "dequantize")
    assert "in int8" in measured
    _, kernels, missing = table.pop("CPU kernels")
    assert kernels == KERNELS_BY
    assert missing == ("" if HAS_COMPILER else "there is no C++ compiler: install g++")
    assert all(asked == got and why == "" for asked, got, why in table.values())


@pytest.mark.usefixtures("wide_screen", "built_for_this_machine")
def test_paths_that_are_switched_off_are_in_the_table_as_asked(run_train, capsys):
    off = {f"fast__{path}": False for path in ("attention", "head", "lora", "elementwise", "kernels")}
    run_train(**SHORT, **off, optim__name="adamw")
    table = table_of(capsys.readouterr().out)
    parts = ("attention", "loss", "LoRA layers", "norms, rotary, SiLU", "decoder layers")
    parts += ("int8 weights", "CPU kernels")
    plain = ["sdpa", "all logits of target tokens", "PEFT's", "the model's", "module by module"]
    plain += ["none", "torch's operations"]
    assert [table[part][0] for part in parts] == plain
    assert all(asked == got and why == "" for asked, got, why in table.values())


@pytest.mark.usefixtures("built_for_this_machine")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine pages")
def test_strict_refuses_what_differs_and_runs_what_does_not(run_train, tmp_path, capfd):
    run_train(expect=2, output_dir=tmp_path / "refused", **SHORT, strict=True, optim__name="paged_adamw")
    error = capfd.readouterr().err
    assert error.startswith("error: strict is on")
    assert "optimizer: requested paged_adamw, actual adamw (paging" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "refused").exists()
    possible = {"optim__name": "adamw", "fast__kernels": HAS_COMPILER}
    run_train(output_dir=tmp_path / "run", **SHORT, strict=True, **possible)


def test_strict_alone_on_the_command_line_means_true():
    assert parse_config(["--strict"]).strict is True
    assert parse_config([]).strict is False
    assert parse_config(["--strict", "false"]).strict is False


@pytest.mark.usefixtures("wide_screen")
def test_a_torch_built_for_a_card_that_is_not_there_is_a_difference(run_train, monkeypatch, capsys):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run_train(**SHORT)
    asked, got, why = table_of(capsys.readouterr().out)["device"]
    assert (asked, got) == ("cuda", "cpu")
    assert "finds no GPU" in why


class Driver:
    """libcuda as ctypes loads it, of a driver that supports a version of CUDA (12040: 12.4)."""

    def __init__(self, version: int) -> None:
        self._version = version

    def cuDriverGetVersion(self, pointer: Any) -> int:  # noqa: N802
        pointer._obj.value = self._version
        return 0


@pytest.mark.parametrize(
    ("driver", "torch_cuda", "reason"),
    [
        (11040, "12.8", "supports CUDA 11.4, and this torch needs 12.8"),
        (12040, "13.0", "supports CUDA 12.4, and this torch needs 13.0"),
        (12040, "12.8", "finds no GPU that it can use"),  # any driver of the same major version will do
        (13000, "12.8", "finds no GPU that it can use"),
        (None, "12.8", "finds no GPU that it can use"),
    ],
)
def test_a_driver_that_is_too_old_for_torch_is_named_in_one_line(monkeypatch, driver, torch_cuda, reason):
    def load(name: str) -> Driver:
        assert name == "libcuda.so.1"
        if driver is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return Driver(driver)

    monkeypatch.setattr("ctypes.CDLL", load)
    monkeypatch.setattr("torch.version.cuda", torch_cuda)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    device, *others = describe_machine(Accelerator(cpu=True), [])
    assert (device.requested, device.actual) == ("cuda", "cpu")
    assert reason in device.reason
    with pytest.raises(ValueError, match=f"device: requested cuda, actual cpu .*{reason}") as error:
        require_as_requested([device, *others])
    assert "\n" not in str(error.value)


def test_the_matmul_rate_is_measured_on_random_numbers(monkeypatch):
    multiplied = []
    real = torch.mm
    monkeypatch.setattr("torch.mm", lambda a, b: multiplied.extend((a, b)) or real(a, b))
    assert matmul_rate(CPU, "bf16") > 0
    for x in multiplied:
        assert x.dtype == torch.bfloat16
        assert x.float().std() == pytest.approx(1, abs=0.05)


def test_several_processes_asked_of_accelerate_launch_on_a_cpu_are_a_difference(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "train.py"]
    ended = subprocess.run(
        [*launch, "--strict", "--output_dir", str(tmp_path / "run"), "--optim.name", "adamw"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode != 0
    assert "processes: requested several, actual 1 (on a CPU accelerate launch starts one" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_quantization_that_did_not_happen_is_a_difference(tiny_model_dir):
    model = load_base(ModelConfig(name_or_path=str(tiny_model_dir), quantization="none"), "no", CPU)
    quantization = describe_base(ModelConfig(quantization="int8"), model)
    assert (quantization.requested, quantization.actual) == ("int8", "none")
    assert quantization.reason


def test_a_gpu_is_told_to_compute_the_same_bits_each_time():
    """Nothing fills new memory for it: that would cost a launch and a pass for every tensor."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    try:
        compute_same_bits()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
