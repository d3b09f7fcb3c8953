"""Killed at random moments, also while it writes a checkpoint, a run always goes on to the same end."""

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
