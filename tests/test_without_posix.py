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

import train
from finetune.__main__ import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="takes away what only Linux has all of")

SHIM = ROOT / "tests" / "without_posix"
QUESTIONS = '{"instruction": "What is a bond?"}\n{"instruction": "Was kostet 1 €? 你好"}\n'
DRIVER = """
import sys, train
from finetune.__main__ import main
from finetune.runtime import system
assert not system.user().isdigit()  # the shim is there: elsewhere it is a number
run, rows, config = sys.argv[1:4]
assert train.main(sys.argv[3:]) == 0
assert main(["audit", *sys.argv[3:], "--page", f"{rows}-audit.html"]) == 0
assert main(["merge", run, "--output", f"{rows}-merged"]) == 0
for suffix in ("csv", "jsonl"):
    output = ["--output", f"{rows}-answers.{suffix}", "--max_new_tokens", "8"]
    assert main(["generate", run, "--input", rows, *output]) == 0
assert main(["report", run]) == 0
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The shim, a console that knows one language, and caches of their own."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SHIM), str(ROOT)]),
        "PYTHONIOENCODING": "cp1252",
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
    }


def start(arguments: list[str], environment: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        command = [sys.executable, *arguments]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def test_the_quickstart_and_what_follows_it_end_as_with_them(tmp_path, tiny_model_dir, environment):
    def settings(name: str) -> list[str]:
        keys: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
        keys["model"]["name_or_path"] = str(tiny_model_dir)
        keys["data"] |= {
            "path": str(ROOT / "data" / "finance_sample.csv"),
            "num_samples": 80,
            "max_length": 128,
        }
        keys |= {"fast": {"int8_matmul": "dequantize"}, "output_dir": str(tmp_path / name)}
        keys["checkpoint"] = {"every_steps": 2, "keep": 2}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(keys))
        return ["--config", str(file)]

    without, rows = tmp_path / "without", tmp_path / "rows.jsonl"
    rows.write_text(QUESTIONS, encoding="utf-8")
    killed = start([str(ROOT / "train.py"), *settings("without")], environment, tmp_path / "killed.txt")
    deadline = time.monotonic() + 240
    while not (without / "checkpoints" / "step_000004").exists() and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    assert killed.wait() != 0, (tmp_path / "killed.txt").read_text(encoding="cp1252")
    arguments = ["-c", DRIVER, str(without), str(rows), *settings("without")]
    resumed = start(arguments, environment, tmp_path / "resumed.txt")
    assert resumed.wait(timeout=240) == 0, (tmp_path / "resumed.txt").read_text(encoding="cp1252")[-3000:]
    assert "Resuming from" in (tmp_path / "resumed.txt").read_text(encoding="cp1252")

    whole = tmp_path / "with"
    assert train.main(settings("with")) == 0
    assert_ended_alike(without, whole)
    assert (without / "report.html").exists()
    assert main(["merge", str(whole), "--output", str(tmp_path / "merged")]) == 0
    assert digests(tmp_path / "rows.jsonl-merged") == digests(tmp_path / "merged")
    for suffix in ("csv", "jsonl"):
        answers = tmp_path / f"answers.{suffix}"
        more = ["--input", str(rows), "--output", str(answers), "--max_new_tokens", "8"]
        assert main(["generate", str(whole), *more]) == 0
        assert (tmp_path / f"rows.jsonl-answers.{suffix}").read_bytes() == answers.read_bytes()
