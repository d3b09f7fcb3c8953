"""A wheel built from the tree holds all that the program needs: it runs the quickstart in an empty folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the installed wheel, beside the libraries of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: a build leaves folders in the tree that it builds from.
    ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "*.egg-info", "shared")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    wheels = ["--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip, "wheel", *offline, *wheels, str(tree)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", str(folder / "site"), str(wheel)], check=True)
    return folder


def run(installed: Path, empty: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed / "site"), "COLUMNS": "200"}
    done = subprocess.run(
        command, cwd=empty, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_the_program(installed):
    (wheel,) = installed.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in (ROOT / "finetune").rglob("*.*") if path.suffix != ".pyc"]
    missing = {str(path.relative_to(ROOT)) for path in files} - names
    assert not missing
    for name in ("train.py", "finetune/configs/quickstart.yaml", "finetune/sample_data/finance_sample.csv"):
        assert name in names


def test_the_quickstart_runs_in_an_empty_folder(installed, starter_dir, tmp_path):
    short = ["--train.max_steps", "1", "--data.num_samples", "20", "--data.max_length", "64"]
    shown = run(installed, tmp_path, sys.executable, "-m", "train", *short, "--eval.at_start", "false")
    assert "-m train" not in shown  # it was not stopped
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert (run_dir / "adapter" / "adapter_model.safetensors").is_file()
    script = str(installed / "site" / "bin" / "finetune")
    assert "usage: python -m finetune" in run(installed, tmp_path, script, "--help")
    assert "report" in run(installed, tmp_path, script, "report", str(run_dir))
    stopped = "from finetune.run.summary import launch_command as f, Path; print(f(Path('r'), 1, False))"
    command = run(installed, tmp_path, sys.executable, "-c", stopped)
    assert command == "python -m train --config r/config.yaml\n"
