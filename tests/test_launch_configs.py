"""configs/launch/: each file can be read, and the keys and files that its command names exist."""

import re
import shlex
import subprocess

import pytest
import yaml
from conftest import ROOT

from finetune.config_parsing import parse_config

FOLDER = ROOT / "configs" / "launch"
FIRST_LINES = {
    "slurm.sh": "# sbatch configs/launch/slurm.sh",
    "skypilot.yaml": "# sky launch -c finetune configs/launch/skypilot.yaml",
    "kubernetes.yaml": "# kubectl create -f configs/launch/kubernetes.yaml",
}


def command_of(name: str) -> list[str]:
    """The words of the torchrun command."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    if name == "kubernetes.yaml":
        words: list[str] = yaml.safe_load(text)["spec"]["trainer"]["command"]
        return words
    shell = yaml.safe_load(text)["run"] if name == "skypilot.yaml" else text
    return shlex.split(shell[shell.index("torchrun --") :].replace("\\\n", ""))


def test_each_file_is_known_here():
    assert {path.name for path in FOLDER.iterdir()} == FIRST_LINES.keys()


@pytest.mark.parametrize("name", FIRST_LINES)
def test_a_launch_file_names_its_command_first_and_keys_and_files_that_exist(name, monkeypatch):
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    assert next(line for line in lines if not line.startswith("#!")) == FIRST_LINES[name]
    command = command_of(name)
    place = command.index("train.py")
    monkeypatch.chdir(ROOT)
    train = parse_config(command[place + 1 :]).train  # refuses an unknown key, or a file that is not there
    assert (train.global_batch_size, train.gradient_accumulation_steps) == (64, None)
    options = {option.partition("=")[0] for option in command[1:place]}
    assert {"--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--max-restarts"} <= options
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in "".join(lines)


def test_torchrun_knows_the_options():
    from torch.distributed.run import get_args_parser

    for name in FIRST_LINES:
        command = [re.sub(r"\$\(?\{?\w+\}?\)?", "1", word) for word in command_of(name)]
        arguments = get_args_parser().parse_args(command[1:])
        assert arguments.training_script == "train.py"
        assert arguments.max_restarts == 3


def test_the_shell_reads_the_commands():
    scripts = [
        (FOLDER / "slurm.sh").read_text(),
        yaml.safe_load((FOLDER / "skypilot.yaml").read_text())["run"],
    ]
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
