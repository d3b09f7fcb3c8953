"""Where all processes compute each micro-batch together, those with fewer are filled up; else they hang."""

import json
from pathlib import Path

import numpy as np
import pytest
from by_hand import start
from conftest import ROOT


# Micro-batches of an update of eight examples, one of one example, and the evaluations of all examples and of
# one: of each process, and filled up.
@pytest.mark.parametrize(
    ("uneven", "even"),
    [
        ([[1, 1, 2, 1], [7, 1, 7, 0]], [7, 1, 7, 1]),
        ([[1, 1, 1, 1], [3, 1, 4, 0], [4, 1, 4, 0]], [4, 1, 4, 1]),
    ],
    ids=["two", "three"],
)
def test_processes_with_fewer_micro_batches_are_filled_up_and_without_that_they_hang(
    tmp_path: Path, uneven: list[list[int]], even: list[int]
):
    script = ROOT / "tests" / "uneven_shares.py"
    processes = start(len(uneven), [str(script), str(tmp_path)], tmp_path / "logs")
    for rank, process in enumerate(processes):
        assert process.wait(timeout=300) == 0, (tmp_path / "logs" / str(rank)).read_text()
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(len(uneven))]

    assert [found["uneven"] for found in results] == uneven
    for found in results:
        assert found["even"] == even
        for together, alone in zip(found["filled_up"], found["alone"], strict=True):
            assert np.abs(alone).max() > 0.1
            assert together == pytest.approx(alone, rel=1e-5, abs=1e-6)
        assert found["evaluated"] == found["evaluated_unsharded"]
        assert np.count_nonzero(np.array(found["evaluated"][0])[:, 3]) == 9
        # The signal to the second process came within the second batch.
        assert found["stopped"] == {"sums": None, "batches": 2, "exit_code": 143}
        assert found["hung"], found["error"]
    # The first to give up closes its connections to the others.
    assert any("Timed out" in found["error"] for found in results)
