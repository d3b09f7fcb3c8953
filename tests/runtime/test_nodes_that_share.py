"""Two nodes of two processes share a base, on each node or over both, and make the update of one process."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from conftest import ROOT, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """What each process found with a value of train.shard_over. Both are made by one launch."""
    folder = tmp_path_factory.mktemp("nodes")
    tiny_model(len(tiny_tokenizer())).save_pretrained(folder / "tied")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2"]
    torchrun += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [
                *torchrun,
                *(f"--rdzv_conf=is_host={1 - node}", "--local_addr=127.0.0.1"),
                *(str(ROOT / "tests" / "sharded_on_nodes.py"), str(folder)),
            ],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    said = [node.communicate()[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    return lambda name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("shard_over", "choice", "sharing", "part"),
    [
        ("node", "base, on 2 processes, 2 times", [[0, 1], [0, 1], [2, 3], [2, 3]], 1 / 2),
        ("all", "base, on 4 processes", 4 * [[0, 1, 2, 3]], 1 / 4),
    ],
)
def test_they_share_a_base_as_told_and_make_the_update_of_one(found, shard_over, choice, sharing, part):
    processes = found(shard_over)
    assert [own["node"] for own in processes] == ["0", "0", "1", "1"]
    assert [own["shares with"] for own in processes] == sharing
    for own in processes:
        assert own["choice"] == choice
        assert own["held"] == pytest.approx(part, rel=0.01)
        assert own["is the same to the bit"]
        assert own["against one process"] < 1e-5


@pytest.mark.parametrize("shard_over", ["node", "all"])
def test_a_process_waits_no_longer_for_a_silent_one_that_shares_its_base(found, shard_over):
    assert all(own["has the timeout"] for own in found(shard_over))
