"""The pages that commands write: HTML files that need nothing but themselves, for screen, phone and paper."""

import os
import re
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

# What shows as nothing or moves other letters about: control characters, and marks of the writing direction.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""The text with what cannot be seen written out, such as \x1b."""
    return _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def check_page_path(path: Path) -> None:
    """Raise ValueError where no page can be written, before the work that would be lost."""
    if path.suffix.lower() not in (".html", ".htm"):  # so that no file of rows is ever written over
        raise ValueError(f"--page {path}: name a file that ends in .html")
    if path.is_dir():
        raise ValueError(f"--page {path} is a folder")
    try:
        _partial(path).touch()
        _partial(path).unlink()
    except OSError as error:
        raise ValueError(f"--page {path} cannot be written: {error.strerror or error}") from error


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page whole or not at all.

    `template` extends "page" and fills its blocks `style` and `content`; `title` must be among the values.
    Every value but Markup is text, whatever it holds: what looks like HTML is escaped, and what cannot be
    seen is written out.
    """
    environment = Environment(
        loader=DictLoader({"page": _SKELETON}),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_seen,
    )
    page = environment.from_string(template).render(values)
    try:
        _partial(path).write_text(page, encoding="utf-8")
        os.replace(_partial(path), path)
    finally:
        _partial(path).unlink(missing_ok=True)


def _seen(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


_SKELETON = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --ink: #1d2329; --dim: #5d6872; --paper: #fff; --line: #d5dae0; --card: #f6f8fa; --bad: #a3260d;
  --good: #18793a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --dim: #98a3ae; --paper: #14181c; --line: #363e47; --card: #1c2127; --bad: #ff9580;
    --good: #6bd390; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; break-after: avoid; }
h3 { font-size: 1rem; margin: 0; }
a { color: inherit; }
p, li { overflow-wrap: anywhere; }
.note { color: var(--dim); margin: .4rem 0; font-size: .92rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.facts td { white-space: normal; overflow-wrap: anywhere; text-align: left; vertical-align: top; }
.facts td:first-child { white-space: nowrap; color: var(--dim); }
pre { overflow-x: auto; font-size: .85rem; line-height: 1.35; }
summary { cursor: pointer; }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem; margin: .8rem 0;
  background: var(--card); break-inside: avoid-page; }
@media (max-width: 40rem) {
  table { font-size: .85rem; }
  th { white-space: normal; }
  th, td { padding: .2rem .3rem; }
}
@media print {
  :root { font-size: 10pt; }
  details::details-content { content-visibility: visible; block-size: auto; opacity: 1; }
}
{% block style %}{% endblock %}
</style>
</head>
<body>
{% block content %}{% endblock %}
</body>
</html>
"""
