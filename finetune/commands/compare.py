"""`python -m finetune compare RUN RUN ...`: compare runs side by side, in the terminal and as a page.

If two runs were evaluated on the same tokens, the difference of their last losses is paired by example.
"""

from collections.abc import Sequence
from pathlib import Path

from finetune.report.comparison import show_comparison, write_comparison
from finetune.report.html import check_page_path
from finetune.runtime.cli import CommandParser, parse_arguments
from finetune.runtime.console import say


def command(argv: Sequence[str]) -> None:
    """Print the comparison and write the page.

    Raises:
        ValueError: invalid arguments, or a folder that holds no run.
    """
    parser = CommandParser(
        prog="python -m finetune compare", usage="%(prog)s RUN RUN ... [--page FILE]", description=__doc__
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run's folder")
    parser.add_argument(
        "--page",
        metavar="FILE",
        type=Path,
        default=Path("compare.html"),
        help="the page to write",
    )
    arguments = parse_arguments(parser, argv)
    if len(arguments.runs) < 2:
        raise ValueError("name two runs or more; `python -m finetune report RUN` shows one")
    check_page_path(arguments.page)
    show_comparison(write_comparison(arguments.runs, arguments.page))
    say(f"page  {arguments.page}")
