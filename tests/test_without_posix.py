"""Without the names of POSIX, and where files are refused as on Windows, everything ends as with them."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from kills import assert_ended_alike, digests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="takes away what only Linux has all of")

SHIM = ROOT / "tests" / "without_posix"
QUESTIONS = '{"instruction": "What is a bond?"}\n{"instruction": "Was kostet 1 €? 你好"}\n'
DRIVER = """
import sys, train
from finetune.__main__ import main
from finetune.runtime import system
which, run, rows, *settings = sys.argv[1:]
assert system.user().isdigit() == (which == "with")  # the shim is there: elsewhere it is a number
assert train.main(settings) == 0
assert main(["audit", *settings, "--page", f"{rows}-audit.html"]) == 0
assert main(["merge", run, "--output", f"{rows}-merged"]) == 0
for suffix in ("csv", "jsonl"):
    output = ["--output", f"{rows}-answers.{suffix}", "--max_new_tokens", "8"]
    assert main(["generate", run, "--input", rows, *output]) == 0
assert main(["report", run]) == 0
"""


def environment(tmp_path: Path, name: str) -> dict[str, str]:
    """A cache of its own, and the order of sets (PEFT writes one down) that the other has."""
    return os.environ | {"PYTHONHASHSEED": "0", "HF_DATASETS_CACHE": str(tmp_path / f"{name}-datasets")}


def start(arguments: list[str], environment: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        command = [sys.executable, *arguments]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def test_the_quickstart_and_what_follows_it_end_as_with_them(tmp_path, tiny_model_dir):
    keys: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    keys["model"]["name_or_path"] = str(tiny_model_dir)
    keys["data"] |= {"path": str(ROOT / "data" / "finance_sample.csv"), "num_samples": 80}
    keys["data"]["max_length"] = 128
    keys |= {"fast": {"int8_matmul": "dequantize"}, "checkpoint": {"every_steps": 2, "keep": 2}}

    def arguments(name: str) -> list[str]:
        (tmp_path / f"{name}.jsonl").write_text(QUESTIONS, encoding="utf-8")
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(keys | {"output_dir": str(tmp_path / name)}))
        return [str(tmp_path / name), str(tmp_path / f"{name}.jsonl"), "--config", str(file)]

    shim = {"PYTHONPATH": os.pathsep.join([str(SHIM), str(ROOT)]), "PYTHONIOENCODING": "cp1252"}
    without = environment(tmp_path, "without") | shim
    reference = environment(tmp_path, "with") | {"PYTHONPATH": str(ROOT)}
    whole = start(["-c", DRIVER, "with", *arguments("with")], reference, tmp_path / "with.txt")
    try:
        settings = arguments("without")
        killed = start([str(ROOT / "train.py"), *settings[2:]], without, tmp_path / "killed.txt")
        deadline = time.monotonic() + 600
        while not (tmp_path / "without" / "checkpoints" / "step_000004").exists() and killed.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        killed.kill()
        assert killed.wait() != 0, (tmp_path / "killed.txt").read_text(encoding="cp1252")
        resumed = start(["-c", DRIVER, "without", *settings], without, tmp_path / "without.txt")
        said = tmp_path / "without.txt"
        assert resumed.wait(timeout=600) == 0, said.read_text(encoding="cp1252")[-3000:]
        assert "Resuming from" in said.read_text(encoding="cp1252")
        assert whole.wait(timeout=600) == 0, (tmp_path / "with.txt").read_text(encoding="utf-8")[-3000:]
    finally:
        for process in (whole, killed):
            process.kill()

    assert_ended_alike(tmp_path / "without", tmp_path / "with")
    assert digests(tmp_path / "without.jsonl-merged") == digests(tmp_path / "with.jsonl-merged")
    for suffix in ("csv", "jsonl"):
        answers, expected = (tmp_path / f"{name}.jsonl-answers.{suffix}" for name in ("without", "with"))
        assert answers.read_bytes() == expected.read_bytes()
    for name in ("without", "with"):
        assert (tmp_path / name / "report.html").exists()
        assert (tmp_path / f"{name}.jsonl-audit.html").exists()
