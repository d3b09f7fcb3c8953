"""Two nodes, each with its own launcher and caches, make the updates of one process."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, read_metrics

import train

# 16 examples are trained on: updates of 6, 6 and 4 examples.
SETTINGS = {
    "train__global_batch_size": 6,
    "train__micro_batch_size": 1,
    "lora__lora_dropout": 0.0,
    "optim__name": "adamw",
    "optim__learning_rate": 1e-2,
}
SAME = ("split", "step", "epoch", "num_target_tokens")
CLOSE = ("loss", "entropy", "mean_token_accuracy", "grad_norm", "learning_rate")

# train.py, but the process of the second node is killed before update 4 of the first attempt.
KILLED_ONCE = """
import os, signal, sys, train
from finetune.runtime import accelerator
reseed = accelerator.reseed
def reseed_or_die(seed, step, rank):
    if (step, os.environ["GROUP_RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (3, "1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    reseed(seed, step, rank)
accelerator.reseed = reseed_or_die
sys.exit(train.main(sys.argv[1:]))
"""

Node = tuple[int, str, str]
"""Exit code, stdout and stderr of a node's launcher"""


@pytest.fixture
def on_two_nodes(run_train, monkeypatch, tmp_path) -> Callable[..., list[Node]]:
    """Launch with torchrun, once for each node, with run_train's settings; `{node}` in them is its number."""

    def run(
        script: Path = ROOT / "train.py",
        options: tuple[str, ...] = (),
        namespaces: tuple[str, ...] = (),
        **settings: Any,
    ) -> list[Node]:
        started: list[list[str]] = []
        with monkeypatch.context() as patch:
            patch.setattr(train, "main", lambda argv: started.append(argv) or 0)
            run_train(**settings)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        nodes = []
        for node in (0, 1):
            first, own = ("10.77.0.1", f"10.77.0.{node + 1}") if namespaces else ("127.0.0.1", "127.0.0.1")
            rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint={first}:{port}", "--rdzv_id=test"]
            rendezvous += [f"--rdzv_conf=is_host={1 - node}", f"--local_addr={own}"]
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
            command = [*torchrun, *rendezvous, *options, str(script)]
            command += [argument.replace("{node}", str(node)) for argument in started[0]]
            environment = {
                "CUDA_VISIBLE_DEVICES": "",
                "HF_DATASETS_CACHE": str(tmp_path / f"datasets-{node}"),
                "TMPDIR": str(tmp_path / f"tmp-{node}"),
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "PASSIVE",
                "PYTHONPATH": str(ROOT),
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            }
            if namespaces:
                command = ["ip", "netns", "exec", namespaces[node], *command]
                environment["GLOO_SOCKET_IFNAME"] = f"finetune{node}"
            (tmp_path / f"tmp-{node}").mkdir(exist_ok=True)
            nodes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **environment},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        said = [node.communicate() for node in nodes]
        return [(node.returncode, *texts) for node, texts in zip(nodes, said, strict=True)]

    return run


@pytest.fixture
def alone(run_on_same_rows, tmp_path, made_once) -> Path:
    """The run of one process; made once, and only read."""
    if "alone" not in made_once:
        made_once["alone"] = run_on_same_rows(output_dir=tmp_path / "alone", **SETTINGS)
    return made_once["alone"]


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between 10.77.0.1 (finetune0) and 10.77.0.2 (finetune1)."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and the command ip")
    first, second = names = (f"finetune-{os.getpid()}-0", f"finetune-{os.getpid()}-1")

    def is_done(*commands: str) -> bool:
        ended = [subprocess.run(["ip", *command.split()], capture_output=True) for command in commands]
        return all(process.returncode == 0 for process in ended)

    try:
        if not is_done(
            f"netns add {first}",
            f"netns add {second}",
            f"link add finetune0 netns {first} type veth peer finetune1 netns {second}",
            f"-n {first} addr add 10.77.0.1/24 dev finetune0",
            f"-n {second} addr add 10.77.0.2/24 dev finetune1",
            *(f"-n {name} link set lo up" for name in names),
            *(f"-n {name} link set finetune{node} up" for node, name in enumerate(names)),
        ):
            pytest.skip("no network namespaces can be made here")
        yield names
    finally:
        is_done(*(f"netns del {name}" for name in names))


def assert_same_metrics(run_dir: Path, other_dir: Path) -> None:
    ours, theirs = read_metrics(run_dir), read_metrics(other_dir)
    assert len(ours) == len(theirs)
    for entry, other in zip(ours, theirs, strict=True):
        assert [entry[key] for key in SAME] == [other[key] for key in SAME]
        for key in (key for key in CLOSE if key in entry):
            assert entry[key] == pytest.approx(other[key], rel=1e-5), (entry, other)


def test_two_nodes_of_which_one_is_killed_and_started_again_make_the_updates_of_one_process(
    on_two_nodes, alone, made_once, tmp_path
):
    script, run_dir = tmp_path / "killed_once.py", tmp_path / "run"
    script.write_text(KILLED_ONCE)
    settings = {"output_dir": run_dir, "data__path": made_once["rows"], **SETTINGS}
    nodes = on_two_nodes(script, ("--max-restarts=1",), **settings)
    assert [code for code, _, _ in nodes] == [0, 0], nodes
    said = nodes[0][1] + nodes[1][1]
    assert "6, shared by 2 process" in said
    assert "after update 2." in said
    assert_same_metrics(run_dir, alone)
    assert {path.name for path in run_dir.iterdir()} == {path.name for path in alone.iterdir()}
    for node in (0, 1):
        assert list((tmp_path / f"datasets-{node}").rglob("*.arrow")) != []


def test_a_folder_that_the_nodes_do_not_share_is_refused_before_anything_is_written(on_two_nodes, tmp_path):
    nodes = on_two_nodes(output_dir=tmp_path / "runs-{node}" / "mine", **SETTINGS)
    for code, out, err in nodes:
        assert code != 0
        assert "Run " not in out
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "is not one folder: process 1 on" in line
    assert list(tmp_path.glob("runs-*")) == []


def test_two_nodes_in_networks_of_their_own_make_the_updates_of_one_process(
    on_two_nodes, alone, made_once, namespaces, tmp_path
):
    settings = {"output_dir": tmp_path / "run", "data__path": made_once["rows"], **SETTINGS}
    nodes = on_two_nodes(namespaces=namespaces, **settings)
    assert [code for code, _, _ in nodes] == [0, 0], nodes
    assert_same_metrics(tmp_path / "run", alone)
