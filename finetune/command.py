"""How a command ends: exit codes, and one line for what a user can mend."""

import sys
import traceback
from collections.abc import Callable, Sequence


def run_command(command: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Run a command and return its exit code.

    A ValueError (what a user can get wrong) and an OSError (a full disk, a folder that cannot be written)
    print one line and give 2; with --debug the traceback comes first.
    """
    try:
        command(argv)
    except (ValueError, OSError) as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {_in_words(error)}", file=sys.stderr)
        return 2
    return 0


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
