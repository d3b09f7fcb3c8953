"""What tests of commands share: the arguments of a configuration, and how a command ends."""

from pathlib import Path
from typing import Any

import pytest

from finetune.__main__ import main


def config_arguments(folder: Path, keys: dict[str, Any]) -> list[str]:
    """Arguments that set these keys on top of the defaults, by an empty file in `folder`."""
    (folder / "empty.yaml").write_text("{}\n", encoding="utf-8")
    return ["--config", str(folder / "empty.yaml"), *(f"--{key}={value}" for key, value in keys.items())]


def six_updates(model_dir: Path, rows_file: Path) -> dict[str, Any]:
    """Keys for six updates of a tiny model in fp32 on 16 of 20 rows."""
    return {
        "model.name_or_path": model_dir,
        "model.quantization": "none",
        "data.path": rows_file,
        "data.max_length": 128,
        "train.num_epochs": 2,
        "train.micro_batch_size": 2,
        "train.gradient_accumulation_steps": 3,
        "train.mixed_precision": "no",
        "optim.name": "adamw",
    }


def enter_empty_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `folder` and change into it."""
    folder.mkdir()
    monkeypatch.chdir(folder)


def assert_one_line_error(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    """The command prints only one line, with `message`, ends with 2 and leaves no file here."""
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert list(Path.cwd().iterdir()) == []


def help_of(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """What the command prints for --help, in one line."""
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())
