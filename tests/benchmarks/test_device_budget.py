"""What an update asks of a card stays within its budget, counted on fake tensors without one."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT, require_compiler

sys.path.insert(0, str(ROOT / "benchmarks"))
from counting import BLOCK, Counting

BASES = ("int8", "nf4", "bf16")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What device_budget.py writes for Qwen2-0.5B with dropout, by base; all bases are counted at once."""
    require_compiler()
    folder, script = tmp_path_factory.mktemp("budget"), str(ROOT / "benchmarks" / "device_budget.py")
    started = {}
    for base in BASES:
        arguments = ["--program", "finetune", "--model", "Qwen2-0.5B", "--base", base, "--dropout", "0.1"]
        command = [sys.executable, script, *arguments, "--out", str(folder / base)]
        started[base] = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    for process in started.values():
        errors = process.communicate()[1]
        assert process.returncode == 0, errors[-4000:]
    return {base: json.loads((folder / base).read_text(encoding="utf-8")) for base in BASES}


@pytest.fixture
def cases(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {base: result["cases"][0] for base, result in results.items()}


def test_every_fast_path_is_taken(results):
    for base, result in results.items():
        (paths,) = result["paths"].values()
        assert paths["GPU kernels"] == "Triton"
        assert paths["decoder layers"] == "fused"
        assert paths["attention"] == "packed, FlashAttention"
        assert paths["int8 weights"] == ("dequantize" if base == "int8" else "none")


def test_an_update_on_an_int8_base_stays_within_its_budget(cases):
    case = cases["int8"]
    assert case["operations"] <= 2200
    assert case["traffic_gb"] <= 10
    assert case["peak_gb"] <= 1.45
    assert case["waits"] == 1


def test_the_trial_of_the_fast_paths_needs_less_memory_than_an_update(cases):
    for case in cases.values():
        assert case["trial"]["peak_gb"] < case["peak_gb"]


def test_other_bases_ask_for_no_more_than_an_int8_base(cases):
    for base in ("nf4", "bf16"):
        assert cases[base]["operations"] <= cases["int8"]["operations"]
        assert cases[base]["traffic_gb"] <= cases["int8"]["traffic_gb"]


def test_every_part_of_an_update_is_counted(cases):
    for case in cases.values():
        for name in ("forward", "head", "backward", "clip", "optimizer"):
            assert case["parts"][name]["operations"] > 0
        assert sum(part["operations"] for part in case["parts"].values()) == case["operations"]


def counted(function: Any, *inputs: torch.Tensor) -> Any:
    counting = Counting("cpu")
    with counting, counting.part("it"):
        result = function(*inputs)
    del result
    return counting.parts["it"]


def test_views_are_no_operations_and_products_are_no_traffic():
    x = torch.ones(8, 16)
    assert counted(lambda x: x.t()[:4].view(2, 2, 8), x).operations == 0
    product = counted(lambda x: x @ x.t(), x)
    assert (product.operations, product.traffic) == (1, 0)


def test_an_operation_reads_its_inputs_and_writes_its_results():
    x, y = torch.ones(100), torch.ones(100)
    assert counted(lambda x, y: x + y, x, y).traffic == 3 * 400
    assert counted(lambda x, y: x.add_(y), x, y).traffic == 3 * 400
    assert counted(lambda x, y: x.copy_(y), x, y).traffic == 2 * 400
    assert counted(lambda x: x * x, x).traffic == 2 * 400  # read once
    assert counted(lambda x: x.expand(50, 100) + 1, x).traffic == 51 * 400


def test_an_index_reads_no_more_than_it_names():
    table, rows = torch.ones(1000, 8), torch.tensor([3, 5])
    assert counted(lambda table, rows: table[rows], table, rows).traffic == 2 * 64 + 16


def test_the_peak_is_the_most_that_was_alive_at_once():
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.ones(BLOCK)

    def together() -> list[torch.Tensor]:
        return [torch.ones(BLOCK) for _ in range(3)]

    assert counted(one_after_the_other).peak == 4 * BLOCK
    assert counted(together).peak == 3 * 4 * BLOCK
    assert counted(lambda: torch.ones(1)).peak == BLOCK


def test_a_number_for_the_host_is_a_wait():
    x = torch.ones(4)
    assert counted(lambda x: x.sum(), x).waits == 0
    assert counted(lambda x: float(x.sum()), x).waits == 1
    assert counted(lambda x: x.nonzero(), x).waits == 1


def test_saved_tensors_count_until_the_backward_pass():
    def train(x: torch.Tensor) -> None:
        (x * 2).sigmoid().sum().backward()

    x = torch.ones(BLOCK, requires_grad=True)
    assert counted(train, x).peak >= 2 * 4 * BLOCK
