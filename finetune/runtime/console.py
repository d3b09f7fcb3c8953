"""The terminal: one console for output, and one on standard error for progress that is no output."""

import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from finetune.runtime.choice import Choice


class _Console(Console):
    """Continues when nobody reads any more (`| tee` gets a Ctrl-C too): the run still has to be saved."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _Console(highlight=False)
stderr_console = Console(stderr=True)


def say(message: str) -> None:
    """Print one line, never folded."""
    console.print(message, soft_wrap=True, markup=False)


def show_choices(choices: Sequence[Choice]) -> None:
    """Print what was requested beside what runs."""
    table = Table("", "requested", "actual", "why", title="Requested and actual", title_justify="left")
    for choice in choices:
        style = "yellow" if choice.requested != choice.actual else ""
        table.add_row(choice.name, choice.requested, choice.actual, choice.reason, style=style)
    console.print(table)
