"""The page of an audit: one HTML file that needs nothing but itself, on a screen, a phone or paper."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from finetune.report.html import write_page

LONG = 12  # a list of more entries is folded


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


def write_audit(path: Path, report: Report) -> None:
    """Write the page whole or not at all."""
    shown = {row.number for row in report.rows}
    write_page(path, _TEMPLATE, **report._asdict(), shown=shown, long=LONG)


_TEMPLATE = """\
{% extends "page" %}
{% block style %}
:root { --trained: #cdeed6; --under: #18793a; }
@media (prefers-color-scheme: dark) { :root { --trained: #17472a; --under: #6bd390; } }
details, .list { border-top: 1px solid var(--line); padding: .5rem 0; }
.list ul { margin: .3rem 0; padding-left: 1.2rem; }
article { scroll-margin-top: 3rem; }
.problems { margin: .2rem 0 .5rem; padding-left: 1.2rem; color: var(--bad); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .92rem; color: var(--dim); }
.system, .user, .other { color: var(--ink); }
mark { background: var(--trained); color: var(--ink); text-decoration: underline 2px var(--under);
  text-underline-offset: .2em; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
del { color: var(--dim); text-decoration: line-through; }
.keys { position: sticky; top: 0; background: var(--paper); padding: .4rem 0; }
@media (max-width: 40rem) { pre { font-size: .62rem; } }
@media print { .keys { position: static; } }
{% endblock %}
{% block content %}
<h1>{{ title }}</h1>
{% for table in tables %}
<h2>{{ table.title }}</h2>
<div class="scroll"><table{% if not table.columns %} class="facts"{% endif %}>
{% if table.columns %}
<tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% endif %}
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
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
{%- endfor %}{% if entry.note %} <span class="note">{{ entry.note }}</span>{% endif %}</li>
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
<ul class="problems">{% for problem in row.problems %}<li>{{ problem }}</li>{% endfor %}</ul>
{% endif %}
<div class="text">{% for s in row.segments -%}
{% if not s.kept %}<del>{{ s.text }}</del>
{%- elif s.trained %}<mark>{{ s.text }}</mark>
{%- else %}<span class="{{ s.role }}">{{ s.text }}</span>
{%- endif %}
{%- endfor %}</div>
</article>
{% endfor %}
{% endblock %}
"""
