"""`python -m finetune report RUN`: the report of a run as one page, also of one that is not finished."""

from collections.abc import Sequence
from pathlib import Path

from finetune.report.html import check_page_path
from finetune.report.page import PAGE, write_report
from finetune.runtime.cli import CommandParser, parse_arguments
from finetune.runtime.console import say


def command(argv: Sequence[str]) -> None:
    """Raises ValueError where there is no run, it cannot be read, or the page cannot be written."""
    parser = CommandParser(prog="python -m finetune report", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("--page", metavar="FILE", type=Path, help=f"where it is written (RUN/{PAGE})")
    arguments = parse_arguments(parser, argv)
    if arguments.page is not None:
        check_page_path(arguments.page)
    page: Path = arguments.page or arguments.run / PAGE
    write_report(arguments.run, page)
    say(f"page  {page}")
