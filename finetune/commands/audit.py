"""`python -m finetune audit --config FILE`: show what would be trained on, in the terminal and as a page.

Of the model only the tokenizer is loaded. Only the page is written.
"""

from collections.abc import Sequence
from pathlib import Path

from finetune.config_parsing import parse_config
from finetune.data.audit import measure
from finetune.report.audit import make_view, print_view, write_view
from finetune.report.html import check_page_path
from finetune.runtime.cli import config_parser, split_arguments
from finetune.runtime.console import console


def command(argv: Sequence[str]) -> None:
    """Audit the rows of a configuration: print the findings and write the page.

    Raises:
        ValueError: invalid arguments, rows or a tokenizer that train.py cannot use either, or a page that
            cannot be written.
    """
    parser = config_parser(
        "audit",
        "[--page FILE]",
        "Show what would be trained on: tokens by role, cut and dropped rows, duplicates and leaks. "
        "Of the model only the tokenizer is loaded.",
    )
    parser.add_argument("--page", metavar="FILE", default="audit.html", help="the page to write (audit.html)")
    arguments, settings = split_arguments(parser, argv)
    config = parse_config(settings)
    page = Path(arguments.page)
    check_page_path(page)

    from finetune.model.load import load_tokenizer  # brings seconds of libraries that --help does not need

    with console.status("reading the rows"):
        tokenizer = load_tokenizer(config)
        audit = measure(config, tokenizer)
    view = make_view(audit, tokenizer)
    write_view(page, view)
    print_view(view)
    console.print(f"page  {page}", soft_wrap=True, markup=False)
