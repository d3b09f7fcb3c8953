"""`python -m finetune report RUN`: write the report of a run, finished or not, as one page."""

from collections.abc import Sequence
from pathlib import Path

from finetune.report.html import check_page_path
from finetune.report.page import PAGE, write_report
from finetune.runtime.cli import CommandParser, parse_arguments
from finetune.runtime.console import say


def command(argv: Sequence[str]) -> None:
    """Write the report.

    Raises:
        ValueError: invalid arguments, a folder that holds no run, or a page that cannot be written.
    """
    parser = CommandParser(prog="python -m finetune report", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("--page", metavar="FILE", type=Path, help=f"the page to write (default RUN/{PAGE})")
    arguments = parse_arguments(parser, argv)
    if arguments.page is not None:
        check_page_path(arguments.page)
    page: Path = arguments.page or arguments.run / PAGE
    write_report(arguments.run, page)
    say(f"page  {page}")
