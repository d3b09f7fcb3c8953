"""Killed at random moments, also while it writes a checkpoint, a run always goes on to the same end."""

import json
import re
import subprocess
import sys

from conftest import ROOT


def test_twenty_kills_at_random_moments_change_nothing():
    soak = [sys.executable, str(ROOT / "tests" / "soak.py"), "--kills", "20"]
    ended = subprocess.run(soak, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-3000:]
    in_writes = re.search(r"20 kills, (\d+) in a checkpoint's write; \d+ runs ended", ended.stdout)
    assert in_writes is not None, ended.stdout
    assert int(in_writes[1]) > 0


def test_runs_of_several_processes_go_on_after_a_kill_with_as_many_and_by_themselves(tmp_path):
    """By hand: 30 kills, of which other numbers of processes go on too (docs/robustness.md)."""
    found = tmp_path / "found.json"
    soak = [sys.executable, str(ROOT / "tests" / "soak.py"), "--processes", "--kills", "2"]
    ended = subprocess.run([*soak, "--output", str(found)], capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-6000:]
    changes = {"none x2 -> none x2": 1, "base x2 -> started again by its launcher": 1}
    assert json.loads(found.read_text())["changes"] == changes
