"""Processes of a run that are started without a launcher."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from conftest import ROOT


def start(count: int, arguments: Sequence[str], logs: Path) -> list[subprocess.Popen[bytes]]:
    """`python ARGUMENTS` as `count` ranks; what rank R prints to stderr goes to the file R in `logs`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs.mkdir()
    processes = []
    for rank in range(count):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_DATASETS_CACHE": str(logs.parent / "datasets"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        }
        with (logs / str(rank)).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        processes.append(process)
    return processes
