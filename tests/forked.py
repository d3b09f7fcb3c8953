"""`python train.py ARGUMENTS` without its imports, which take longer than an error: a process that has them
done forks one for each command line. `python tests/forked.py` is that process: it reads command lines from
its standard input, as JSON, and writes the exit code of each to its standard output.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 120  # seconds


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Forks:
    """Command lines in processes forked from one with this environment."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process, self._folder = process, folder

    def run(self, argv: list[str], folder: Path) -> Ended:
        """Run `python train.py ARGV` in a folder, to its end."""
        printed = [self._folder / "stdout", self._folder / "stderr"]
        call = {"argv": argv, "folder": str(folder), "printed": [str(path) for path in printed]}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(call), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        return Ended(code, *(path.read_text(encoding="utf-8") for path in printed))


@contextmanager
def forks(environment: dict[str, str], folder: Path) -> Iterator[Forks]:
    """Start that process; it ends with the context. What it is forked to print passes through `folder`."""
    with subprocess.Popen(
        [sys.executable, str(Path(__file__))],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Forks(process, folder)
        assert process.stdin is not None
        process.stdin.close()


def _run(argv: list[str], folder: str, printed: list[str]) -> int:
    """Become `python train.py ARGV`, and return its exit code."""
    signal.alarm(PATIENCE)
    os.chdir(folder)
    for number, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        return train.check_settings(argv) or train.main(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _fork(call: dict[str, Any]) -> int:
    if process := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 70
    try:
        code = _run(**call)
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import train

    for line in sys.stdin:
        print(_fork(json.loads(line)), flush=True)
