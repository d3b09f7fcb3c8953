"""The page of an audit: one HTML file that needs nothing but itself, on a screen, a phone or paper."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment

LONG = 12  # a list of more entries is folded

# What shows as nothing or moves other letters about: control characters, and marks of the writing direction.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


class Table(NamedTuple):
    """Its first column names what the others give figures for."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


class Entry(NamedTuple):
    """One row, or rows that belong together, by their numbers."""

    numbers: Sequence[int]
    note: str = ""


class Listing(NamedTuple):
    """Rows that share a finding. `joint` stands between the numbers of one entry."""

    title: str
    entries: Sequence[Entry]
    joint: str = ", "


class Segment(NamedTuple):
    """Neighbouring tokens of one kind. `role` is one of chat.ROLES; what max_length cuts is not `kept`."""

    text: str
    role: str
    trained: bool
    kept: bool


class ShownRow(NamedTuple):
    """A row as it is trained on, with all that is wrong with it. `split` is train, eval or dropped."""

    number: int
    split: str
    problems: Sequence[str]
    segments: Sequence[Segment]


class Report(NamedTuple):
    """All that is shown of an audit. `rows` are the worst first, `note` says how many of all they are;
    `names` says of each row number how it is written."""

    title: str
    tables: Sequence[Table]
    histogram: str
    listings: Sequence[Listing]
    rows: Sequence[ShownRow]
    note: str
    names: Mapping[int, str]


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


def write_page(path: Path, report: Report) -> None:
    """Write the page whole or not at all."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = visible
    shown = {row.number for row in report.rows}
    page = environment.from_string(_TEMPLATE).render(**report._asdict(), shown=shown, long=LONG)
    try:
        _partial(path).write_text(page, encoding="utf-8")
        os.replace(_partial(path), path)
    finally:
        _partial(path).unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --ink: #1d2329; --dim: #5d6872; --paper: #fff; --line: #d5dae0; --card: #f6f8fa;
  --trained: #cdeed6; --under: #18793a; --bad: #a3260d; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --dim: #98a3ae; --paper: #14181c; --line: #363e47; --card: #1c2127;
    --trained: #17472a; --under: #6bd390; --bad: #ff9580; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0; }
a { color: inherit; }
p, li { overflow-wrap: anywhere; }
.note { color: var(--dim); margin: .4rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.facts td { white-space: normal; overflow-wrap: anywhere; text-align: left; vertical-align: top; }
.facts td:first-child { white-space: nowrap; color: var(--dim); }
pre { overflow-x: auto; font-size: .85rem; line-height: 1.35; }
details, .list { border-top: 1px solid var(--line); padding: .5rem 0; }
summary { cursor: pointer; }
.list ul { margin: .3rem 0; padding-left: 1.2rem; }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem; margin: .8rem 0;
  background: var(--card); break-inside: avoid-page; scroll-margin-top: 3rem; }
.problems { margin: .2rem 0 .5rem; padding-left: 1.2rem; color: var(--bad); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .92rem; color: var(--dim); }
.system, .user, .other { color: var(--ink); }
mark { background: var(--trained); color: var(--ink); text-decoration: underline 2px var(--under);
  text-underline-offset: .2em; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
del { color: var(--dim); text-decoration: line-through; }
.keys { position: sticky; top: 0; background: var(--paper); padding: .4rem 0; }
@media (max-width: 40rem) {
  table { font-size: .85rem; }
  th { white-space: normal; }
  th, td { padding: .2rem .3rem; }
  pre { font-size: .62rem; }
}
@media print {
  .keys { position: static; }
  details::details-content { content-visibility: visible; block-size: auto; opacity: 1; }
}
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for table in tables %}
<h2>{{ table.title }}</h2>
<div class="scroll"><table{% if not table.columns %} class="facts"{% endif %}>
{% if table.columns %}
<tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% endif %}
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell | visible }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% if table.note %}<p class="note">{{ table.note }}</p>{% endif %}

{% endfor %}
<h2>Examples by length in tokens</h2>
<pre>{{ histogram }}</pre>
{% macro name(number) -%}
{% if number in shown %}<a href="#row-{{ number }}">{{ names[number] }}</a>
{%- else %}{{ names[number] }}{% endif %}
{%- endmacro %}
{% macro numbers(listing) %}
{% if listing.entries | selectattr("note") | list or listing.joint != ", " %}
<ul>
{% for entry in listing.entries %}
<li>{% for number in entry.numbers %}{{ name(number) }}{% if not loop.last %}{{ listing.joint }}{% endif %}
{%- endfor %}{% if entry.note %} <span class="note">{{ entry.note | visible }}</span>{% endif %}</li>
{% endfor %}
</ul>
{% else %}
<p>{% for entry in listing.entries %}{% for number in entry.numbers %}{{ name(number) }}{% endfor %}
{%- if not loop.last %}, {% endif %}{% endfor %}</p>
{% endif %}
{% endmacro %}
<h2>Row numbers</h2>
<p class="note">Rows are counted from 1 over all that was read. Those of the eval split say so.</p>
{% for listing in listings %}
{% if listing.entries | length > long %}
<details class="list"><summary>{{ listing.title }} ({{ listing.entries | length }})</summary>
{{ numbers(listing) }}
</details>
{% else %}
<div class="list"><h3>{{ listing.title }} ({{ listing.entries | length }})</h3>
{{ numbers(listing) }}
</div>
{% endif %}
{% else %}
<p>Nothing found: no row is dropped, cut, repeated or leaked.</p>
{% endfor %}
<h2>Rows, worst first</h2>
<p class="note">{{ note }}</p>
<p class="keys"><mark>trained on</mark> · <span class="user">said by system or user</span> ·
<span class="note">the chat template's</span> · <del>cut away</del></p>
{% for row in rows %}
<article id="row-{{ row.number }}">
<h3>Row {{ row.number }}, {{ row.split }}</h3>
{% if row.problems %}
<ul class="problems">{% for problem in row.problems %}<li>{{ problem | visible }}</li>{% endfor %}</ul>
{% endif %}
<div class="text">{% for s in row.segments -%}
{% if not s.kept %}<del>{{ s.text | visible }}</del>
{%- elif s.trained %}<mark>{{ s.text | visible }}</mark>
{%- else %}<span class="{{ s.role }}">{{ s.text | visible }}</span>
{%- endif %}
{%- endfor %}</div>
</article>
{% endfor %}
</body>
</html>
"""
