"""How a command ends: exit codes, and one line for what a user can mend."""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Any, NoReturn

from finetune.config_parsing import unused_preset_settings
from finetune.runtime.system import let_streams_take_any_text

LOST_PEER = (
    "stopped: another process of this run has ended or does not answer; if it did not say why, it was "
    "killed, perhaps for want of memory. Rerun the same command to resume"
)


class CommandParser(argparse.ArgumentParser):
    """Raises ValueError for an argument that is wrong; an option's name is never guessed from its start."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; `{self.prog} --help` tells more")


def run_command(command: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run a command and return its exit code: what it returns, or 0.

    A ValueError (what a user can get wrong) and an OSError (a full disk, a folder that cannot be written)
    print one line and give 2; a FloatingPointError (a run that diverged) and the loss of another process of
    the run print one line and give 1. With --debug the traceback comes first.
    """
    let_streams_take_any_text()
    try:
        return command(argv) or 0
    except (ValueError, OSError) as error:
        return _end(argv, f"error: {_in_words(error)}", 2)
    except FloatingPointError as error:
        return _end(argv, f"stopped: {error}", 1)
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        return _end(argv, LOST_PEER, 1)
    except KeyboardInterrupt:
        return _end(argv, "stopped", 130)
    finally:
        _discard_unread_errors()


def check_settings(argv: Sequence[str]) -> int:
    """2 and one printed line if the configuration is wrong, else 0; print which preset settings do not apply.

    Called before the slow imports. The ranks of a run get the same arguments, so that only the first checks
    them: when it fails, its launcher ends the others.
    """
    return run_command(_print_unused_settings, argv) if os.environ.get("RANK", "0") == "0" else 0


def _print_unused_settings(argv: Sequence[str]) -> None:
    for remark in unused_preset_settings(argv):
        print(remark, file=sys.stderr, flush=True)


def settings_among(argv: Sequence[str]) -> list[str]:
    """`--config` and the keys with a dot: what a command surely leaves to the configuration."""
    settings: list[str] = []
    for argument, following in zip_longest(argv, argv[1:]):
        if re.match(r"--(config|\w+\.[\w.+]*)(=|$)", argument):
            settings.append(argument)
            if "=" not in argument and following is not None:
                settings.append(following)
    return settings


def config_parser(command: str, options: str, description: str) -> CommandParser:
    """The parser of a command that takes the configuration of train.py; `options` stand in its usage line."""
    return CommandParser(
        prog=f"python -m finetune {command}",
        usage=f"%(prog)s [--config FILE] {options} [--section.key VALUE ...]",
        description=description,
        epilog="--config and the keys of the configuration are what train.py takes, such as --data.path FILE "
        "or --data.max_length 1024; `python train.py --help` lists them. Without --config: the quickstart.",
    )


def split_arguments(parser: CommandParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """A command's own arguments, and the rest: those of the configuration.

    Raises:
        ValueError: an argument of the command that is wrong.
    """
    return parser.parse_known_args(argv)


def parse_arguments(parser: CommandParser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command that takes no key of the configuration.

    Raises:
        ValueError: an argument that is wrong.
    """
    arguments, others = split_arguments(parser, argv)
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return arguments


def _is_lost_peer(error: RuntimeError) -> bool:
    from finetune.runtime.processes import is_lost_peer  # here, as it imports torch, which takes seconds

    return is_lost_peer(error)


def _end(argv: Sequence[str], line: str, code: int) -> int:
    if "--debug" in argv:
        traceback.print_exc()
    with suppress(OSError):  # of `2>&1 | tee log` the reader may be gone
        print(line, file=sys.stderr, flush=True)
    return code


def _discard_unread_errors() -> None:
    """Drop what was written to stderr after its reader had gone (`2>&1 | tee log` gets a Ctrl-C too).

    Python flushes stderr once more as it exits; from Python 3.13 on, a failure there makes the exit code 120.
    """
    if sys.stderr is None:  # `2>&-`
        return
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
