"""Triton's kernels compile for the cards that people own, without one at hand, and fit into them."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# The bytes of shared memory that a program may take, by NVIDIA's compute capability or AMD's architecture.
SHARED_MEMORY = {
    "sm_75": 65_536,
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_120": 101_376,
    "gfx90a": 65_536,
    "gfx942": 65_536,
    "gfx1100": 65_536,
}
KERNELS = {
    "rms_norm",
    "apply_rms_norm",
    "rms_norm_backward",
    "rotate",
    "gated_silu",
    "gated_silu_backward",
    "token_stats",
    "dequantize_int8",
    "fill_noise",
}
PRODUCTS = {"dropped_product", "dropped_sum", "add_dropped"}
RECORD = ROOT / "benchmarks" / "results" / "kernels.json"


def assert_they_fit(cases: list[dict[str, object]]) -> None:
    for card, shared_memory in SHARED_MEMORY.items():
        own = [case for case in cases if case["card"] == card]
        expected = KERNELS if card == "sm_75" else KERNELS | PRODUCTS
        assert {case["kernel"] for case in own} == expected
        spilling = {case["kernel"] for case in own if case["spilled_bytes"] != 0}
        # With the widest adapters a Radeon runs out of registers, which is slower, not wrong.
        assert spilling <= (PRODUCTS if card == "gfx1100" else set())
        assert [case for case in own if case["shared_memory"] > shared_memory] == []


def test_each_kernel_compiles_for_each_card_and_spills_nothing(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "kernels.json"
    command = [sys.executable, "benchmarks/compile_kernels.py", "--out", str(out)]
    # A process of its own: another test's may interpret Triton.
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [*command, "--models", "Qwen2-0.5B", "--dtypes", "float16"],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert_they_fit(json.loads(out.read_text())["cases"])


def test_the_record_is_of_every_kernel_and_model() -> None:
    """Made by `python benchmarks/compile_kernels.py --out benchmarks/results/kernels.json`."""
    record = json.loads(RECORD.read_text())
    files = [ROOT / "finetune" / "ops" / f"triton_{name}.py" for name in ("kernels", "dropout", "makers")]
    assert record["source"] == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    cases = record["cases"]
    assert_they_fit(cases)
    assert len(record["models"]) == 3
    assert {case["dtype"] for case in cases} == {"float16", "bfloat16", "float32"}
