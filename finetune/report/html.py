"""Write the HTML pages of runs and commands. Each is self-contained, for screens, phones and paper.

The templates are in templates/; all of them extend page.html.
"""

import os
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from finetune.runtime import system

TEMPLATES = PackageLoader("finetune.report", "templates")

# Invisible characters and those that reorder others: control characters and direction marks.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""Return the text with invisible characters escaped, such as \x1b."""
    return _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def check_page_path(path: Path) -> None:
    """Raise ValueError if no page can be written to `path`. Commands call it before their work."""
    if path.suffix.lower() not in (".html", ".htm"):  # so that no data file is overwritten
        raise ValueError(f"--page {path}: name a file that ends in .html")
    if path.is_dir():
        raise ValueError(f"--page {path} is a folder")
    try:
        _partial(path).touch()
        _partial(path).unlink()
    except OSError as error:
        raise ValueError(f"--page {path} cannot be written: {error.strerror or error}") from error


def render_page(template: str, **values: Any) -> str:
    """Render a template of templates/.

    The template extends page.html and fills its blocks `style` and `content`; `title` must be among the
    values. Every value but Markup is plain text: HTML in it is escaped, and so are invisible characters.
    """
    environment = Environment(
        loader=TEMPLATES,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_make_visible,
    )
    return environment.get_template(template).render(values)


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page of `render_page`, whole or not at all."""
    page = render_page(template, **values)
    try:
        system.write_text(_partial(path), page)
        system.replace(_partial(path), path)
    finally:
        _partial(path).unlink(missing_ok=True)


def _make_visible(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
