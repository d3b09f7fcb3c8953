"""The command for the first hour on a card runs to its end on a CPU, with a tiny model."""

import json
import os
import subprocess
import sys

from conftest import ROOT


def test_every_step_runs_on_a_cpu_or_says_what_it_needs(tmp_path):
    out = tmp_path / "on_a_gpu.json"
    command = [sys.executable, "benchmarks/on_a_gpu.py", "--device", "cpu", "--tiny", "--out", str(out)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = {row["step"]: row for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    status = {name: row["status"] for name, row in rows.items()}
    for name in ("tests/test_cuda.py", "verify, as on Turing", "speed, Unsloth, nf4, no dropout"):
        assert status.pop(name) == "not measured"
        assert rows[name]["reason"] == "needs a card"
    for name in [name for name in status if "TRL" in name]:  # it is not among the tests' packages
        assert status.pop(name) in ("ok", "not measured")
    assert status
    assert set(status.values()) == {"ok"}
    assert rows["verify, int8, bf16"]["numbers"]["paths"]["layout"][1] == "packed"
    assert set(rows["peak of each part"]["numbers"]["parts"]) >= {"forward", "backward", "optimizer"}
    assert rows["speed, int8"]["numbers"]["useful_tokens_per_second"] > 0


def test_a_step_that_fails_or_takes_too_long_costs_its_own_row(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import on_a_gpu

    job = {"model": str(tmp_path / "none"), "rows": "none.csv", "folder": str(tmp_path), "is_tiny": True}
    step = on_a_gpu.Step("speed", "measure_speed", {"changes": {}}, limit=600)
    row = on_a_gpu.run(step, job)
    assert row["status"] == "failed"
    assert "neither an existing folder" in row["reason"]
    row = on_a_gpu.run(step._replace(limit=0), job)
    assert row["reason"] == "took over 0 s"
